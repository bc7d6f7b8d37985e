"""Hugging Face's Trainer: a callback that keeps a loader's state in the Trainer's checkpoints."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from tiercache.load.loader import DataLoader

_LOADER_STATE = "loader_state"


class LoaderStateCallback(TrainerCallback, ExportableState):  # type: ignore[misc]  # not installed where types are checked
    """Callback that saves the training loader's state in every checkpoint, so that a run resumes at the next batch.

    The state is in the checkpoint's `trainer_state.json`. The Trainer must not skip batches itself, so the callback
    sets `ignore_data_skip` in the Trainer's arguments. `get_train_dataloader()` of the Trainer must return a
    `tiercache.DataLoader`, or the result of `tiercache.integrations.accelerate.prepare`.

    Attributes:
        loader_state: State of the loader in the checkpoint from which the Trainer resumed; None if there was none.
    """

    def __init__(self) -> None:
        self.loader_state: dict[str, Any] | None = None
        self._loader: DataLoader[Any] | None = None

    def state(self) -> dict[str, Any]:
        """Return the state that the Trainer writes to a checkpoint, and from which it restores a callback."""
        loader_state = self.loader_state if self._loader is None else self._loader.state_dict()
        return {"args": {}, "attributes": {_LOADER_STATE: loader_state}}

    def on_init_end(self, args: Any, _state: Any, _control: Any, **_others: Any) -> None:
        """Set ignore_data_skip: the loader continues within an epoch, and the Trainer must not skip batches."""
        args.ignore_data_skip = True

    def on_train_begin(
        self, args: Any, state: Any, _control: Any, train_dataloader: Any = None, **_others: Any
    ) -> None:
        """Load the loader's state from the checkpoint. Raises TypeError, ValueError."""
        if not isinstance(train_dataloader, DataLoader):
            raise TypeError(
                "LoaderStateCallback keeps the state of a tiercache.DataLoader, and the Trainer's loader is a "
                f"{type(train_dataloader).__name__}: return the result of "
                "tiercache.integrations.accelerate.prepare(loader, self.accelerator) from get_train_dataloader(), or "
                "remove the callback"
            )
        self._loader = train_dataloader
        if not state.global_step:
            return
        if not args.ignore_data_skip:
            raise ValueError(
                "the Trainer would skip the batches that the loader's state skips already: pass the callback to the "
                "Trainer's constructor, in callbacks=, or set ignore_data_skip=True in its arguments"
            )
        found = state.stateful_callbacks.get(type(self).__name__) or {}
        if isinstance(found, list):
            found = found[-1]
        loader_state = found.get("attributes", {}).get(_LOADER_STATE)
        if loader_state is None:
            raise ValueError(
                f"the checkpoint of step {state.global_step} contains no loader state, because it was saved without "
                "LoaderStateCallback. Resume without the callback, or start from its weights (from_pretrained)"
            )
        self.loader_state = loader_state
        train_dataloader.load_state_dict(loader_state)

    def on_train_end(self, _args: Any, _state: Any, _control: Any, **_others: Any) -> None:
        """Release the loader."""
        self._loader = None
