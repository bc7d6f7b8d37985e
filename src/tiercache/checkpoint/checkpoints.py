"""Checkpoints of a training run: the public class, and the order of the steps of a save.

save() copies the state to host memory in the caller's thread. Then one thread writes the files and commits the
checkpoint in the local folder; a second one uploads it from there and commits it at the store, so that the next state
is written while an earlier one is uploaded. Without a local folder, the first thread writes to the store from host
memory. The housekeeping thread looks at the run before the first save, deletes what the rules no longer keep, aborts
old uploads, and chooses late uploads; a fourth thread makes these: uploads that failed or that a kill interrupted. A
condition guards the states of the saves; no step runs under it. A checkpoint that cannot be written to the local
folder, for example to a full disk, is uploaded from host memory.
"""

from __future__ import annotations

import atexit
import json
import logging
import math
import operator
import os
import secrets
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from threading import Condition, Lock
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tiercache.checkpoint.layout import (
    Manifest,
    checkpoint_name,
    checkpoint_objects,
    written_order,
)
from tiercache.checkpoint.local_copies import LateUploads, LocalCopies
from tiercache.checkpoint.retention import GC_AGE_S, RetentionReport, referenced_tensors
from tiercache.checkpoint.staging import HostMemory, StagedState
from tiercache.checkpoint.state_tree import encode_state, state_text
from tiercache.checkpoint.stored import StoredCheckpoints, UnfinishedSave
from tiercache.checkpoint.writer import CheckpointWriter, TaskThread, may_be_committed
from tiercache.crash_points import crash_point
from tiercache.errors import StoreError, TierCacheError
from tiercache.keep import Keep
from tiercache.store import LocalFolder, Store, open_store
from tiercache.store.options import ParsedUrl

if TYPE_CHECKING:
    from tiercache.checkpoint.dcp_reader import DistributedReader
    from tiercache.checkpoint.dcp_writer import DistributedWriter

Target: TypeAlias = Literal["local", "remote"]
"""Place where a save commits a checkpoint; each is a tier of checkpoints (CheckpointTier) of the same name."""
WhenBusy: TypeAlias = Literal["wait", "skip", "drop"]
SaveState: TypeAlias = Literal["staged", "writing", "local", "done", "failed", "skipped", "dropped"]

FIRST_LOOK_S = 10.0
"""Time that the first save of a process waits for the store."""
_ENDED = ("done", "failed", "skipped", "dropped")

logger = logging.getLogger("tiercache")


class SaveHandle:
    """One save of a checkpoint. Any thread may use it.

    Attributes:
        name: Name of the checkpoint.
        step: Step of the training run.
        state: "staged" (in host memory), "writing" (to `local`, or to the store if there is no `local`), "local"
            (committed in `local`, not yet at the store), "done" (committed everywhere), "failed", "skipped"
            (when_busy="skip", or a rank that does not write) or "dropped" (when_busy="drop").
        error: Error that ended the save; None if there is none.
    """

    def __init__(self, name: str, step: int, targets: Sequence[Target], changed: Condition) -> None:
        self.name, self.step = name, step
        self.state: SaveState = "staged"
        self.error: Exception | None = None
        self._targets, self._changed = targets, changed
        self._committed: set[Target] = set()
        self._is_reported = False  # whether wait() has raised the error

    def __repr__(self) -> str:
        return f"SaveHandle({self.name!r}, {self.state})"

    def done(self, target: Target = "remote") -> bool:
        """Return whether the checkpoint is committed at a target.

        Args:
            target: "local" or "remote".
        """
        return self._check_target(target) in self._committed

    def wait(self, target: Target = "remote", timeout_s: float | None = None) -> bool:
        """Wait until the checkpoint is committed at a target; return False if the save was skipped or dropped before.

        A checkpoint that could not be written to the local folder is uploaded from memory; wait("local") then waits for
        the store.

        Args:
            target: "local" or "remote".
            timeout_s: Seconds after which TimeoutError is raised; None for no limit.

        Raises:
            StoreError: The save failed.
            TimeoutError: The time is over.
        """
        self._check_target(target)
        with self._changed:
            if not self._changed.wait_for(lambda: target in self._committed or self.state in _ENDED, timeout_s):
                raise TimeoutError(f"{self.name} is not committed at {target!r} after {timeout_s:g} s: {self.state}")
            if target in self._committed or "remote" in self._committed:
                return True
            error = self.error
        if error is not None:
            self._is_reported = True
            raise error
        return False

    def _check_target(self, target: Target) -> Target:
        if target not in self._targets:
            hint = "; there is no local= folder" if target == "local" else ""
            raise ValueError(f"target is {' or '.join(map(repr, self._targets))}, got {target!r}{hint}")
        return target


@dataclass(slots=True, eq=False)
class _Save:
    """What the threads know of an unfinished save.

    Attributes:
        handle: Its public side.
        state: State in host memory.
        text: Text of the state without its tensors.
        aliases: Further names of tensors.
        manifest: Manifest without files and tensors, which are known once they are written.
        is_running: Whether a thread writes or uploads it now.
    """

    handle: SaveHandle
    state: StagedState
    text: bytes
    aliases: Mapping[str, str]
    manifest: Manifest
    is_running: bool = False


class Checkpoints(StoredCheckpoints):
    """Checkpoints of one training run, below a URL. Any thread may call the methods, save() one at a time.

    A checkpoint exists once its manifest is put, which happens only after size and checksum of every file were checked
    at the store. A save that fails, or a process that is killed, leaves the earlier checkpoints as they are.

    Args:
        url: URL or path of the folder in which the checkpoints are kept, or an open store, which close() closes. One
            process writes to it at a time.
        local: Folder on a local disk to which each checkpoint is written first; None: none. Checkpoints in it whose
            upload failed or was interrupted by a kill are uploaded after the next save, if the rules keep them. If the
            disk is full, checkpoints are uploaded from memory, with a warning in the log.
        keep: Rules of retention (Keep); a checkpoint is kept if any rule keeps it. Without rules, all are kept.
        dedup: Whether checkpoints share tensors of 1 MiB or more whose values are equal.
        pending: Number of saves that may be unfinished at a time, uploads included. Each needs host memory for its
            state until it is committed at the first target.
        when_busy: What save() does if `pending` saves are unfinished: "wait" for one of them, "skip" the new save, or
            "drop" the oldest one that waits to be written or uploaded. The save that began first is always finished, so
            "drop" needs `pending` of 2 or more.
        writers: Number of files that are written, or uploaded, in parallel.
        rank: Number of this process among those that call save() with the same state, of which process 0 writes. None:
            the rank in torch.distributed's default group, or 0.
        storage_options: Options of the store of `url`.

    Attributes:
        remote_store: Store of `url`.
        local_store: Store of `local`; None if there is none.
        keep: Rules of retention.
        dedup: As given.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | Store,
        *,
        local: str | os.PathLike[str] | None = None,
        keep: Keep | Iterable[Keep] = (),
        dedup: bool = False,
        pending: int = 1,
        when_busy: WhenBusy = "wait",
        writers: int = 8,
        rank: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        if pending < 1 or writers < 1:
            raise ValueError(f"pending and writers are at least 1, got {pending} and {writers}")
        if when_busy not in ("wait", "skip", "drop"):
            raise ValueError(f"when_busy is 'wait', 'skip' or 'drop', got {when_busy!r}")
        if when_busy == "drop" and pending == 1:
            raise ValueError(
                "when_busy='drop' needs pending=2 or more: the save that is being written is never dropped, because "
                "none would be complete if saves come faster than they are written"
            )
        remote_store = url if isinstance(url, Store) else open_store(url, **(storage_options or {}))
        local_store = None if local is None else LocalFolder(_local_path(local))
        roots = [
            os.path.realpath(store.root) for store in (local_store, remote_store) if isinstance(store, LocalFolder)
        ]
        if len(roots) > len({*roots}):
            raise ValueError(f"local= is the folder of the checkpoints itself, {roots[0]}: leave it out")
        # The options of an open store are not known, so that no other store is opened with them.
        options = None if isinstance(url, Store) else storage_options or {}
        super().__init__(remote_store, local_store, keep=keep, storage_options=options)
        self.dedup = dedup
        self._pending, self._when_busy, self._n_streams, self._rank = pending, when_busy, writers, rank
        self._memory = HostMemory()
        self._changed = Condition()
        self._saves: list[_Save] = []  # unfinished, oldest first
        self._failed: list[SaveHandle] = []
        self._unreported: list[SaveHandle] = []  # failed saves whose error nobody has seen
        self._newest_s = 0.0
        self._run_look: Future[None] | None = None  # the first look at the run's checkpoints
        # Weak: of a save that another rank has ended by an error, no rank but that one is told.
        self._dcp_writers: weakref.WeakSet[DistributedWriter] = weakref.WeakSet()
        self._committed_last = (0.0, "")  # written_order() of the newest checkpoint that this process has committed
        self._collecting = Lock()  # held by gc(), delete(), and while the next late upload is selected
        self._uploads_seen_s = -math.inf  # when unfinished uploads were looked for, by the monotonic clock
        self._pid, self._is_closed = os.getpid(), False
        self._remote = self._writer_to(remote_store, "remote")
        self._local = None if local_store is None else self._writer_to(local_store, "local")
        self._writing, self._uploading = TaskThread("tiercache-checkpoint"), TaskThread("tiercache-checkpoint-upload")
        self._housekeeping = TaskThread("tiercache-checkpoint-housekeeping")
        self._copies: LocalCopies | None = None
        self._late_uploads: LateUploads | None = None
        if local_store is not None:
            self._copies = LocalCopies(local_store, remote_store)
            with suppress(StoreError):  # the first save looks again
                self._copies.check()
            self._late_uploads = LateUploads(
                self._copies, self._remote, self.stores, self.retention, self._housekeeping, self._note_late_upload
            )
        _register_finish()
        _open.add(self)

    def __repr__(self) -> str:
        local = "" if self.local_store is None else f", local={self.local_store.url!r}"
        return f"Checkpoints({self.remote_store.url!r}{local})"

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            self.close()
        except StoreError:
            if kind is None:  # the error that ends the block counts
                raise

    def _writer_to(self, store: Store, target: Target) -> CheckpointWriter:
        referenced = partial(referenced_tensors, self.stores, target)
        return CheckpointWriter(
            store, self._n_streams, self.retention.claims[target], referenced, keeps_metrics=target == "remote"
        )

    @property
    def n_streams(self) -> int:
        """Number of files that are written, or uploaded, in parallel."""
        return self._n_streams

    @property
    def file_writers(self) -> tuple[CheckpointWriter, ...]:
        """Writers of files, in the order in which a checkpoint is written: to the local folder, to the store."""
        return (self._remote,) if self._local is None else (self._local, self._remote)

    def dcp_writer(
        self, step: int, *, metrics: Mapping[str, float] | None = None, note: Any = None
    ) -> DistributedWriter:
        """Return a writer of one checkpoint for torch.distributed.checkpoint: `dcp.save(state, storage_writer=...)`.

        Every rank calls this with the same arguments. `dcp.save` returns when the checkpoint is committed at the store.

        Args:
            step: Step of the training run.
            metrics: Metrics by name, for the rules of retention.
            note: JSON value that list() returns.
        """
        from tiercache.checkpoint.dcp_writer import DistributedWriter

        writer = DistributedWriter(self, _integer(step), metrics=metrics, note=note)
        with self._changed:
            self._dcp_writers.add(writer)
        return writer

    def dcp_reader(self, which: str | int = "latest") -> DistributedReader:
        """Return a reader of one checkpoint for torch.distributed.checkpoint: `dcp.load(state, storage_reader=...)`.

        Every rank calls this with the same arguments. The number of ranks may differ from that of the save.

        Args:
            which: "latest", "best:METRIC", a step or a name, as for load().
        """
        from tiercache.checkpoint.dcp_reader import DistributedReader

        return DistributedReader(self, which)

    @property
    def targets(self) -> tuple[Target, ...]:
        """Places at which a checkpoint is committed, in this order."""
        return ("remote",) if self._local is None else ("local", "remote")

    @property
    def saves(self) -> tuple[SaveHandle, ...]:
        """Saves of this process that are unfinished or have failed, oldest first."""
        with self._changed:
            handles = {*self._failed, *(save.handle for save in self._saves)}
            return tuple(sorted(handles, key=lambda one: written_order(one.name)))

    def unfinished_saves(self) -> Mapping[str, UnfinishedSave]:
        """See StoredCheckpoints.unfinished_saves()."""
        late = None if self._late_uploads is None else self._late_uploads.current
        with self._changed:
            writing = {writer.name: writer for writer in [*self._dcp_writers] if writer.is_writing}
        saving = {handle.name: handle for handle in self.saves}
        return {**writing, **saving, **({} if late is None else {late.name: late})}

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

        Returns:
            The save. Its state is "skipped" if nothing is written: see `when_busy` and `rank`.

        Raises:
            StoreError: An earlier save failed in the background, or the store refuses the first look at the run, for
                example because of wrong credentials; this save was not begun. The next call saves again.
            TypeError, ValueError: An argument cannot be stored.
        """
        self._check_usable()
        self._raise_failure()
        step, metrics, note = _integer(step), numbers(metrics or {}), json_copy(note)
        name, created_s = self.new_name(step)
        handle = SaveHandle(name, step, self.targets, self._changed)
        if self._find_rank() != 0 or not self._wait_for_turn():
            handle.state = "skipped"
            return handle
        encoded = encode_state(state)
        staged = StagedState(encoded, self._memory, n_streams=self._n_streams, shares=self.dedup)
        manifest = Manifest(name, step, created_s, (), {}, metrics, note)
        save = _Save(handle, staged, state_text(encoded.tree), encoded.aliases, manifest)
        try:
            # Writing while the rest is copied would save a part of the copy's time in the background, but take it from
            # the training: with two cores, save() then blocked for 1.5 times a plain copy instead of 1.2.
            staged.copy()
        except BaseException:
            staged.release()
            raise
        crash_point("checkpoint_stage.copied")
        with self._changed:
            self._saves.append(save)
        try:
            self._writing.submit(partial(self._run, save, self._write))
        except RuntimeError:  # no thread can be started
            self._end(save, "dropped")
            raise
        return handle

    def wait(self, target: Target = "remote", timeout_s: float | None = None) -> None:
        """Wait until no save is on its way to a target.

        Args:
            target: "local" or "remote".
            timeout_s: Seconds after which TimeoutError is raised; None for no limit.

        Raises:
            StoreError: A save failed.
            TimeoutError: The time is over.
        """
        if target not in self.targets:
            raise ValueError(f"target is {' or '.join(map(repr, self.targets))}, got {target!r}")
        with self._changed:
            handles = [save.handle for save in self._saves]
            if not self._changed.wait_for(
                lambda: all(target in one._committed or one.state in _ENDED for one in handles),  # noqa: SLF001
                timeout_s,
            ):
                raise TimeoutError(f"saves are not committed at {target!r} after {timeout_s:g} s: {handles}")
        self._raise_failure()

    def close(self) -> None:
        """Finish all saves, late uploads and deletions, end the threads and close the connections.

        Repeated calls have no effect.

        Raises:
            StoreError: A save failed.
        """
        if self._pid != os.getpid():
            return
        self._is_closed = True
        self.join()
        self._memory.clear()
        self.close_other_tiers()
        self._remote.close()
        self._raise_failure()

    def join(self) -> None:
        """Wait until the threads have nothing to do; errors stay for save(), wait() and close()."""
        self._writing.join()
        self._uploading.join()
        self._housekeeping.join()
        if self._late_uploads is not None:
            self._late_uploads.join()

    # -- the caller's thread -----------------------------------------------------------------------------------------

    def _check_usable(self) -> None:
        if self._is_closed:
            raise ValueError("these checkpoints are closed")
        if self._pid != os.getpid():
            raise RuntimeError("these checkpoints belong to the process that opened them, not to a fork of it")

    def _find_rank(self) -> int:
        if self._rank is not None:
            return self._rank
        torch = sys.modules.get("torch")
        if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return 0
        return int(torch.distributed.get_rank())

    def new_name(self, step: int) -> tuple[str, float]:
        """Return a name and its time: the present, but later than that of every checkpoint of the run.

        The clock of a machine on which the run restarts may be behind. The first call looks at the run for that, and
        waits at most FIRST_LOOK_S for a store that does not answer.

        Args:
            step: Step of the training run.

        Raises:
            ValueError: The local folder has copies of other checkpoints.
            StoreError: The store refuses to list the run, for example because of wrong credentials.
        """
        if self._run_look is None:
            self._run_look = Future()
            try:
                self._housekeeping.submit(partial(self._look_at_run, self._run_look))
            except RuntimeError:
                self._run_look = None
                raise
            if not wait([self._run_look], FIRST_LOOK_S).done:
                logger.warning("%s does not answer: save() does not wait for it", self.remote_store.url)
        if self._run_look.done() and (error := self._run_look.exception()) is not None:
            self._run_look = None
            raise error
        with self._changed:
            self._newest_s = max(round(time.time(), 3), round(self._newest_s + 0.001, 3))
            return checkpoint_name(step, self._newest_s, secrets.token_hex(3)), self._newest_s

    def _look_at_run(self, look: Future[None]) -> None:
        """Note the time of the newest checkpoint of each store that can be reached, and take the local folder."""
        try:
            for tier, store in self.stores.tiers.items():  # the local folder first: it always answers
                try:
                    times_s = [written_order(name)[0] for name in checkpoint_objects(store.list())]
                except StoreError as error:
                    is_refused = error.status is not None or error.details.get("before_request")
                    if tier == "remote" and is_refused and not error.retryable:
                        raise  # for example wrong credentials: no save can succeed
                    continue  # the save itself reports it, or waits until the store is back
                with self._changed:
                    self._newest_s = max([self._newest_s, *times_s])
            if self._copies is not None:
                self._copies.take()
        except Exception as error:  # noqa: BLE001 -- top of a thread: new_name() raises it
            look.set_exception(error)
        else:
            look.set_result(None)

    def _wait_for_turn(self) -> bool:
        """Return whether a new save may begin, after waiting for an unfinished one where necessary."""
        while True:
            with self._changed:
                if len(self._saves) < self._pending:
                    return True
                if self._when_busy == "skip":
                    return False
                n_failed = len(self._unreported)
                self._changed.wait_for(
                    lambda: (
                        len(self._saves) < self._pending
                        or len(self._unreported) > n_failed  # noqa: B023
                        or self._droppable
                    )
                )
                dropped = self._droppable[:1] if len(self._saves) >= self._pending else []
                for save in dropped:
                    save.handle.state = "dropped"  # no thread begins it any more
            for save in dropped:
                if self._copies is not None:
                    self._copies.unmark(save.handle.name)  # before it ends: it must not be uploaded later
                self._end(save, "dropped")
            if not dropped:
                self._raise_failure()

    @property
    def _droppable(self) -> list[_Save]:
        """Saves that may be dropped, oldest first. The oldest of all never is, so some are finished in any case."""
        if self._when_busy != "drop":
            return []
        return [save for save in self._saves[1:] if not save.is_running and save.handle.state not in _ENDED]

    def _raise_failure(self) -> None:
        """Raise the error of the oldest failed save that was not raised yet."""
        with self._changed:
            errors = [(one, one.error) for one in self._unreported if one.error and not one._is_reported]  # noqa: SLF001
            self._unreported = [one for one, _ in errors[1:]]
        if errors:
            raise errors[0][1]

    # -- the threads -------------------------------------------------------------------------------------------------

    def _run(self, save: _Save, step: Callable[[_Save], None]) -> None:
        """Execute a step of a save, unless it was dropped before."""
        with self._changed:
            if save.handle.state in _ENDED:
                return
            save.is_running = True
        try:
            step(save)
        except Exception as error:  # noqa: BLE001 -- top of a thread: raised by the next save(), wait() or close()
            self._end(save, "failed", error)

    def _write(self, save: _Save) -> None:
        """Write a staged state to the first target and commit it; if the local folder fails, let it be uploaded."""
        self._advance(save, "writing")
        if self._local is None or self._copies is None:
            self._write_to(save, self._remote, "remote")
            return
        try:
            self._write_to(save, self._local, "local")
        except StoreError as error:
            if may_be_committed(error):
                raise
            logger.warning("%s: uploaded from memory, because it has no local copy: %s", save.handle.name, error)
            with self._changed:
                save.is_running = False
            self._uploading.submit(partial(self._run, save, partial(self._upload_staged, error)))
        else:
            self._uploading.submit(partial(self._run, save, partial(self._upload, self._copies)))

    def _upload_staged(self, local_error: StoreError, save: _Save) -> None:
        """Upload a checkpoint from host memory, because it could not be written to the local folder."""
        try:
            self._write_to(save, self._remote, "remote")
        except StoreError as error:
            text = f"{error}; it was uploaded from memory, because the local folder failed: {local_error}"
            url = f"{self.remote_store.url}/{save.handle.name}"
            raise StoreError(text, url=url, retryable=error.retryable, maybe_done=error.maybe_done) from error

    def _write_to(self, save: _Save, writer: CheckpointWriter, target: Target) -> None:
        """Write a staged state to a target and commit it."""
        name = save.handle.name
        try:
            files, tensors = writer.write_staged(name, save.state.files, save.text, save.manifest.metrics)
            tensors |= {alias: tensors[first] for alias, first in save.aliases.items()}
            save.manifest = replace(save.manifest, files=tuple(files), tensors=tensors)
            if target == "local" and self._copies is not None:
                self._copies.mark(name)
            writer.commit(save.manifest)
        except BaseException as error:
            if may_be_committed(error):
                raise
            if target == "local":
                writer.discard(name)  # a full disk must not stay full
            else:
                self._submit_housekeeping(partial(writer.discard, name))
            raise
        save.state.release()
        self._commit(save, target)

    def _upload(self, copies: LocalCopies, save: _Save) -> None:
        """Upload a checkpoint that is committed in the local folder, and commit it at the store."""
        copies.upload(save.manifest, self._remote, self._remote.commit)
        self._commit(save, "remote")

    def _advance(self, save: _Save, state: SaveState) -> None:
        with self._changed:
            save.handle.state = state
            self._changed.notify_all()

    def _commit(self, save: _Save, target: Target) -> None:
        """Note that a checkpoint is committed at a target."""
        with self._changed:
            save.is_running = False
            save.handle._committed.add(target)  # noqa: SLF001 - our own class
            self._advance(save, "done" if target == "remote" else "local")
            if target == "remote":
                self._saves.remove(save)
        self.announce(save.handle.name, target)

    def _submit_housekeeping(self, task: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # no thread can be started: the next commit, or gc(), deletes the same
            self._housekeeping.submit(task)

    def announce(self, name: str, target: Target) -> None:
        """Let the housekeeping thread apply the rules of retention after a commit.

        Args:
            name: Name of the checkpoint that was committed.
            target: Where it was committed.
        """
        self._submit_housekeeping(partial(self._retain, name, target))

    def retain_local(self) -> None:
        """Let the housekeeping thread apply the rules of retention to the local folder only."""
        self._submit_housekeeping(partial(self.apply_retention, ("local",)))

    def _retain(self, name: str, target: Target) -> None:
        self.apply_retention()
        self._committed_last = max(self._committed_last, written_order(name))
        now_s = time.monotonic()
        if target == "remote" and now_s - self._uploads_seen_s >= GC_AGE_S:  # those of a kill are a day old by then
            self._uploads_seen_s = now_s
            with suppress(StoreError):  # the next process, and gc(), try again
                self._remote.abort_uploads(GC_AGE_S)
        if self._late_uploads is not None:
            saving = {name for name, save in self.unfinished_saves().items() if save.error is None}
            try:
                with self._collecting:
                    self._late_uploads.begin(saving, self._committed_last)
            except (TierCacheError, ValueError) as error:
                logger.warning("%s: earlier checkpoints were not uploaded: %s", self.remote_store.url, error)

    def _note_late_upload(self, name: str) -> None:
        """Note that a late upload has succeeded; apply the rules, and begin the next one."""
        with self._changed:
            for handle in [one for one in self._failed if one.name == name]:
                self._failed.remove(handle)
                handle._committed.add("remote")  # noqa: SLF001 - our own class
                handle.state, handle.error = "done", None
            self._changed.notify_all()
        self._retain(name, "remote")

    def delete(self, which: str | int) -> RetentionReport:
        """Delete a checkpoint from all tiers; shared tensors of others stay. No late upload begins meanwhile.

        Args:
            which: "latest", "best:METRIC", a step, or a name; of a step, the checkpoint written last.

        Raises:
            NotFound, ValueError, StoreError: See StoredCheckpoints.delete().
        """
        with self._collecting:
            return super().delete(which)

    def gc(self) -> RetentionReport:
        """Remove what killed saves and deletions have left, and shared tensors without users, once they are a day old.

        Parts of uploads that were interrupted are removed too, where the store lists them (S3, with boto3). The first
        commit of a process does the same in the background.

        Raises:
            StoreError: A store failed.
        """
        with self._collecting:
            report = super().gc()
        self._remote.abort_uploads(GC_AGE_S)
        return report

    def _end(self, save: _Save, state: SaveState, error: Exception | None = None) -> None:
        """Note that a save has ended before it was committed everywhere."""
        save.state.release()
        handle = save.handle
        with self._changed:
            if error is not None:
                is_local = "local" in handle._committed  # noqa: SLF001 - our own class
                where = f"; it is committed in {self._local_url}, and a later save uploads it" if is_local else ""
                message = f"the checkpoint of step {handle.step} was not saved: {error}{where}"
                url = f"{self.remote_store.url}/{handle.name}"
                handle.error = StoreError(message, url=url, retryable=getattr(error, "retryable", False))
                handle.error.__cause__ = error
                self._failed.append(handle)
                self._unreported.append(handle)
            self._saves.remove(save)
            self._advance(save, state)

    @property
    def _local_url(self) -> str:
        return "" if self.local_store is None else self.local_store.url


def _local_path(local: str | os.PathLike[str]) -> str:
    """Return the path of the local folder. Raises ValueError for the URL of a store."""
    parsed = ParsedUrl.parse(local)
    if parsed.scheme:
        raise ValueError(
            f"local= is a folder of this machine, such as '/nvme/run7', got the URL {parsed.shown}: the first argument"
            " is the URL of the store"
        )
    return parsed.path


def _integer(step: Any) -> int:
    """Return a step as an integer of Python. Raises TypeError."""
    try:
        return operator.index(step)
    except TypeError:
        raise TypeError(f"step is an integer, got the {type(step).__name__} {step!r}") from None


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return metrics as numbers. Raises TypeError or ValueError, with the name, if a value is none."""
    if not isinstance(metrics, Mapping):
        raise TypeError(f"metrics is a dict such as {{'loss': 0.5}}, got {type(metrics).__name__}")
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise TypeError(f"the name of a metric is a text, got {name!r}")
        try:
            if isinstance(value, str | bytes):
                raise TypeError("a text is no number")
            number = float(value.detach() if hasattr(value, "detach") else value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            # RuntimeError: a tensor of several values
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"the metric {name!r} is a number, got {type(value).__name__} {value!r:.60}: {error}") from None
        found[name] = value if type(value) is int else number
    return found


def json_copy(note: Any) -> Any:
    """Return a JSON value that later changes do not reach. Raises TypeError or ValueError if it is none."""

    def plain(value: Any) -> Any:
        if callable(getattr(value, "tolist", None)):  # a number, an array or a tensor
            return value.tolist()
        raise TypeError(f"it contains a {type(value).__name__}")

    try:
        return json.loads(json.dumps(note, allow_nan=False, default=plain))
    except (TypeError, ValueError, RecursionError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"note is a JSON value, such as a dict of texts and numbers: {error}") from None


# -- the end of the interpreter --------------------------------------------------------------------------------------

_open: weakref.WeakSet[Checkpoints] = weakref.WeakSet()


@cache
def _register_finish() -> None:
    """Let the interpreter finish the saves before it ends the pools of threads, which uploads need.

    atexit's functions are called after that; threading has no public hook.
    """
    getattr(threading, "_register_atexit", atexit.register)(_finish_all)


def _finish_all() -> None:
    for checkpoints in [*_open]:
        if checkpoints._pid != os.getpid():  # noqa: SLF001 - our own class
            continue
        checkpoints.join()
        for handle in checkpoints._unreported:  # noqa: SLF001
            if not handle._is_reported:  # noqa: SLF001
                warnings.warn(f"{handle.error}", RuntimeWarning, stacklevel=2)
