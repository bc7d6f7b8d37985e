"""Hugging Face's Trainer: a callback that keeps a loader's state in the Trainer's checkpoints."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from tiercache.load.loader import DataLoader

_LOADER_STATE = "loader_state"


class LoaderStateCallback(TrainerCallback, ExportableState):  # type: ignore[misc]  # not installed where types are checked
    """Keeps the training loader's state in every checkpoint, so that a resumed run continues at the next batch.

    The state is in the checkpoint's `trainer_state.json`. The Trainer must not skip batches itself, so the callback
    sets `ignore_data_skip` of its arguments. `get_train_dataloader()` of the Trainer must return a
    `tiercache.DataLoader`, or what `tiercache.integrations.accelerate.prepare` makes of one.

    Attributes:
        loader_state: State that the loader had in the checkpoint from which the Trainer resumed; None: it has none.
    """

    def __init__(self) -> None:
        self.loader_state: dict[str, Any] | None = None
        self._loader: DataLoader[Any] | None = None

    def state(self) -> dict[str, Any]:
        """What the Trainer writes to a checkpoint, and hands to a new callback if it restores callbacks."""
        loader_state = self.loader_state if self._loader is None else self._loader.state_dict()
        return {"args": {}, "attributes": {_LOADER_STATE: loader_state}}

    def on_init_end(self, args: Any, _state: Any, _control: Any, **_others: Any) -> None:
        """Leave it to the loader to continue within an epoch."""
        args.ignore_data_skip = True

    def on_train_begin(
        self, args: Any, state: Any, _control: Any, train_dataloader: Any = None, **_others: Any
    ) -> None:
        """Load the state that the checkpoint has.

        Raises:
            TypeError: The Trainer's loader is none of tiercache's.
            ValueError: The Trainer would skip batches too, or the checkpoint was saved without this callback.
        """
        if not isinstance(train_dataloader, DataLoader):
            raise TypeError(
                "LoaderStateCallback keeps the state of a tiercache.DataLoader, and the Trainer's loader is a "
                f"{type(train_dataloader).__name__}: let get_train_dataloader() return "
                "tiercache.integrations.accelerate.prepare(loader, self.accelerator), or leave the callback out"
            )
        self._loader = train_dataloader
        if not state.global_step:
            return
        if not args.ignore_data_skip:
            raise ValueError(
                "the Trainer would skip the batches that the loader skips by its state: give the callback to the "
                "Trainer's constructor, in callbacks=, or set ignore_data_skip=True in its arguments"
            )
        found = state.stateful_callbacks.get(type(self).__name__) or {}
        if isinstance(found, list):
            found = found[-1]
        loader_state = found.get("attributes", {}).get(_LOADER_STATE)
        if loader_state is None:
            raise ValueError(
                f"the checkpoint of step {state.global_step} has no state of a loader: it was saved without "
                "LoaderStateCallback. Resume it as it was saved, or start from its weights (from_pretrained)"
            )
        self.loader_state = loader_state
        train_dataloader.load_state_dict(loader_state)

    def on_train_end(self, _args: Any, _state: Any, _control: Any, **_others: Any) -> None:
        """Let go of the loader."""
        self._loader = None
