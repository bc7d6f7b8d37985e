"""Lightning: a CheckpointIO that saves the Trainer's checkpoints with `tc.Checkpoints`, while training goes on."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO

from tiercache.checkpoint.checkpoints import Checkpoints, SaveHandle
from tiercache.checkpoint.format import parse_name
from tiercache.checkpoint.writer import TaskThread
from tiercache.errors import NotFound, TierCacheError


class TierCacheCheckpointIO(CheckpointIO):  # type: ignore[misc]  # not installed where types are checked
    """Saves and loads a Trainer's checkpoints: `Trainer(plugins=[TierCacheCheckpointIO(checkpoints)])`.

    The Trainer's path of a checkpoint is kept as its note, so that `ckpt_path=` finds it by this path. `ckpt_path=` may
    also be "latest", "best:METRIC" or the name of a checkpoint. ModelCheckpoint decides when a checkpoint is saved; the
    metric that it monitors is stored with it. The checkpoints that ModelCheckpoint removes are deleted in a thread;
    with `save_top_k=-1`, the rules `keep=` of the checkpoints decide alone.

    Args:
        checkpoints: Checkpoints. The Trainer's teardown waits until they are committed at the store.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._saved: dict[str, SaveHandle] = {}
        self._deleting = TaskThread("tiercache-lightning-delete")

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Copy a checkpoint to host memory and return; it is written in the background."""
        if storage_options is not None:
            raise TypeError("storage_options belong to tc.Checkpoints(url, storage_options=...)")
        step, name = int(checkpoint.get("global_step", 0)), os.fspath(path)
        self._saved[name] = self._checkpoints.save(
            step, checkpoint, metrics=_monitored(checkpoint), note={"path": name}
        )

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = None,
        weights_only: bool | None = None,  # noqa: ARG002 - nothing but weights and JSON is stored
    ) -> dict[str, Any]:
        """Return a checkpoint. Raises NotFound, CorruptCheckpoint, StoreError."""
        self._checkpoints.wait()
        return self._checkpoints.load(
            self._find(os.fspath(path)), map_location=map_location if not callable(map_location) else None
        )

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete the checkpoint of a path in a thread, once it is written."""
        name = os.fspath(path)
        self._deleting.submit(partial(self._delete, name, self._saved.pop(name, None)))

    def teardown(self) -> None:
        """Wait until all checkpoints are committed and deletions are done. Raises StoreError if a save failed."""
        self._checkpoints.wait()
        self._deleting.join()

    def _find(self, path: str) -> str:
        """Return what Checkpoints.load() takes for a path of the Trainer."""
        if path == "latest" or path.startswith("best:") or parse_name(path) is not None:
            return path
        saved = [info for info in self._checkpoints.list() if info.state == "complete"]
        names = [info.name for info in saved if isinstance(info.note, dict) and info.note.get("path") == path]
        if not names:
            known = [info.note["path"] for info in saved if isinstance(info.note, dict) and "path" in info.note]
            raise NotFound(f"no checkpoint was saved as {path}; the last ones are {known[-5:]}", url=path)
        return names[-1]

    def _delete(self, path: str, handle: SaveHandle | None) -> None:
        try:
            if handle is None:
                name = self._find(path)
            else:
                name = handle.name
                handle.wait()
            self._checkpoints.delete(name)
        except (TierCacheError, ValueError) as error:
            warnings.warn(f"{path} was not deleted: {error}", RuntimeWarning, stacklevel=2)


def _monitored(checkpoint: Mapping[str, Any]) -> dict[str, float]:
    states = [state for state in (checkpoint.get("callbacks") or {}).values() if isinstance(state, Mapping)]
    scores = [(state.get("monitor"), state.get("current_score")) for state in states]
    return {name: float(score) for name, score in scores if name is not None and score is not None}
