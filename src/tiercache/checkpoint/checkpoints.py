"""Checkpoints of a training run: the public class."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from tiercache.store import LocalFolder, Store, open_store

Target: TypeAlias = Literal["local", "remote"]
WhenBusy: TypeAlias = Literal["wait", "skip", "drop"]
SaveState: TypeAlias = Literal["staged", "writing", "local", "done", "failed", "skipped", "dropped"]


class SaveHandle:
    """One save of a checkpoint.

    Attributes:
        name: Name of the checkpoint.
        step: Step of the training run.
        state: "staged" (in host memory), "writing" (to `local`, or to the store if there is no `local`), "local"
            (committed in `local`, not yet at the store), "done" (committed everywhere), "failed", "skipped"
            (when_busy="skip", or a rank that does not write) or "dropped" (when_busy="drop").
        error: Error that ended the save; None if there is none.
    """

    name: str
    step: int
    state: SaveState
    error: Exception | None

    def done(self, target: Target = "remote") -> bool:
        """Return whether the checkpoint is committed at a target.

        Args:
            target: "local" or "remote".
        """
        raise NotImplementedError

    def wait(self, target: Target = "remote", timeout_s: float | None = None) -> bool:
        """Wait until the checkpoint is committed at a target; return False if the save was skipped or dropped.

        Args:
            target: "local" or "remote".
            timeout_s: Seconds after which TimeoutError is raised; None for no limit.

        Raises:
            StoreError: The save failed.
            TimeoutError: The time is over.
        """
        raise NotImplementedError


class Checkpoints:
    """Checkpoints of one training run, below a URL.

    Args:
        url: URL or path of the folder in which the checkpoints are kept.
        local: Folder on a local disk to which each checkpoint is written first; None: none.
        keep: Rules of retention (Keep); a checkpoint is kept if any rule keeps it. Without rules, all are kept.
        dedup: Whether checkpoints share tensors of 1 MiB or more whose values are equal.
        pending: Number of saves that may be unfinished at a time.
        when_busy: What save() does if `pending` saves are unfinished: "wait" for one of them, "skip" the new save, or
            "drop" an unfinished one.
        writers: Number of files that are written, or uploaded, in parallel.
        storage_options: Options of the store of `url`.

    Attributes:
        remote_store: Store of `url`.
        local_store: Store of `local`; None if there is none.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        local: str | os.PathLike[str] | None = None,
        keep: Any = (),
        dedup: bool = False,
        pending: int = 1,
        when_busy: WhenBusy = "wait",
        writers: int = 8,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.remote_store: Store = open_store(url, **(storage_options or {}))
        self.local_store = None if local is None else LocalFolder(local)
        self.keep, self.dedup = keep, dedup
        self._pending, self._when_busy, self._writers = pending, when_busy, writers

    def save(
        self, step: int, state: Mapping[str, Any], *, metrics: Mapping[str, float] | None = None, note: Any = None
    ) -> SaveHandle:
        """Copy a state to host memory and return; threads write it, upload it and commit it.

        Args:
            step: Step of the training run.
            state: Dict of modules, optimizers, other objects with state_dict(), tensors, arrays and JSON values, nested
                at will.
            metrics: Metrics by name, for the rules of retention.
            note: JSON value that load() and list() return.

        Raises:
            StoreError: An earlier save failed in the background; this save was not begun.
        """
        raise NotImplementedError

    def wait(self, target: Target = "remote", timeout_s: float | None = None) -> None:
        """Wait until all saves are committed at a target.

        Args:
            target: "local" or "remote".
            timeout_s: Seconds after which TimeoutError is raised; None for no limit.

        Raises:
            StoreError: A save failed.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Finish all saves and end the threads."""
        raise NotImplementedError
