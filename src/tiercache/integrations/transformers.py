"""Hugging Face's Trainer: callbacks that keep a loader's state in checkpoints, and that save with `tc.Checkpoints`."""

from __future__ import annotations

import json
import os
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import SAFE_WEIGHTS_NAME

from tiercache.checkpoint.checkpoints import Checkpoints
from tiercache.errors import NotFound
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


class CheckpointCallback(TrainerCallback):  # type: ignore[misc]  # not installed where types are checked
    """Callback that saves with `tc.Checkpoints` where the Trainer would write a folder, while training goes on.

    The Trainer's own arguments (`save_strategy`, `save_steps`) decide when. It then writes no folder of its own, and
    the rules `keep=` of the checkpoints take the place of `save_total_limit` and `load_best_model_at_end`. The metrics
    of the last log and of the evaluation are stored with a checkpoint.

    Args:
        checkpoints: Checkpoints. The end of the training waits until they are committed at the store.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._metrics: dict[str, float] = {}
        self._is_due = False

    def restore(self, folder: str | os.PathLike[str], which: str | int = "latest") -> str | None:
        """Load a checkpoint, and write it into a folder from which the Trainer resumes: `resume_from_checkpoint=`.

        Args:
            folder: Folder in which a folder "checkpoint-STEP" is created.
            which: "latest", "best:METRIC", a step or a name.

        Returns:
            Path of the new folder; None if there is no checkpoint yet and `which` is "latest".
        """
        try:
            saved = self._checkpoints.load(which)
        except NotFound:
            if which == "latest":
                return None
            raise
        path = Path(folder) / f"checkpoint-{saved['trainer']['global_step']}"
        path.mkdir(parents=True, exist_ok=True)
        save_file(dict(saved["model"]), path / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        for name in ("optimizer", "scheduler"):
            torch.save(saved[name], path / f"{name}.pt")
        if saved["random"] is not None:
            torch.save(saved["random"], path / "rng_state.pth")
        (path / "trainer_state.json").write_text(json.dumps(saved["trainer"], indent=2), encoding="utf-8")
        return str(path)

    def on_train_begin(self, args: Any, _state: Any, _control: Any, **_others: Any) -> None:
        """Check that the state is that of one process. Raises ValueError with FSDP and DeepSpeed."""
        if args.fsdp or args.deepspeed:
            raise ValueError(
                "CheckpointCallback saves models that each process has whole; save a sharded model with "
                "torch.distributed.checkpoint and Checkpoints.dcp_writer()"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Take over a save that is due after this step."""
        if not control.should_save:
            return
        control.should_save, self._is_due = False, True
        if not (control.should_log or control.should_evaluate):
            self._save(args, state, **objects)

    on_epoch_end = on_step_end

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **objects: Any) -> None:
        """Note the metrics, and save if no evaluation follows."""
        self._metrics |= {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        if self._is_due and not control.should_evaluate:
            self._save(args, state, **objects)

    def on_evaluate(self, args: Any, state: Any, _control: Any, metrics: Any = None, **objects: Any) -> None:
        """Note the metrics, and save."""
        self._metrics |= {name: value for name, value in (metrics or {}).items() if isinstance(value, int | float)}
        if self._is_due:
            self._save(args, state, **objects)

    def on_save(self, args: Any, state: Any, _control: Any, **objects: Any) -> None:
        """Save what the Trainer has saved itself: with save_strategy="best", it decides after the evaluation."""
        self._save(args, state, **objects)

    def on_train_end(self, _args: Any, _state: Any, _control: Any, **_others: Any) -> None:
        """Wait until all checkpoints are committed. Raises StoreError if a save failed."""
        self._checkpoints.wait()

    def _save(
        self,
        args: Any,
        state: Any,
        model: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        train_dataloader: Any = None,
        **_others: Any,
    ) -> None:
        self._is_due = False
        if not state.is_world_process_zero:
            return
        trainer = json.loads(json.dumps(asdict(state)))
        if isinstance(train_dataloader, DataLoader) and LoaderStateCallback.__name__ in trainer["stateful_callbacks"]:
            attributes = {_LOADER_STATE: train_dataloader.state_dict()}
            trainer["stateful_callbacks"][LoaderStateCallback.__name__] = {"args": {}, "attributes": attributes}
        self._checkpoints.save(
            state.global_step,
            {
                "model": model,
                "optimizer": optimizer,
                "scheduler": lr_scheduler,
                "trainer": trainer,
                "random": _random_state() if args.world_size == 1 else None,
            },
            metrics=self._metrics,
        )


def _random_state() -> dict[str, Any]:
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.random.get_rng_state()
    return states
