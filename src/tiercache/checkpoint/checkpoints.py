"""Checkpoints of a training run: the public class, and the order of the steps of a save.

save() copies the state to host memory in the caller's thread. Then one thread writes the files and commits the
checkpoint in the local folder; a second one uploads it from there and commits it at the store, so that the next state
is written while an earlier one is uploaded. Without a local folder, the first thread writes to the store from host
memory. The housekeeping thread looks at the run before the first save, lets what an earlier process did not upload be
uploaded first, deletes what the rules no longer keep, and aborts old uploads. A condition guards the states of the
saves; no step runs under it. A checkpoint that cannot be written to the local folder, for example to a full disk, is
uploaded from host memory.
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
from threading import Condition
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tiercache.checkpoint.inventory import check_run, take_run
from tiercache.checkpoint.layout import (
    Manifest,
    checkpoint_name,
    checkpoint_objects,
    manifest_key,
    written_order,
)
from tiercache.checkpoint.retention import GC_AGE_S, RetentionReport
from tiercache.checkpoint.staging import HostMemory, StagedState
from tiercache.checkpoint.state_tree import encode_state, state_text
from tiercache.checkpoint.stored import StoredCheckpoints, UnfinishedSave
from tiercache.checkpoint.writer import CheckpointWriter, TaskThread, may_be_committed
from tiercache.crash_points import crash_point
from tiercache.errors import NotFound, StoreError, TierCacheError
from tiercache.keep import PIN_NAME, Keep
from tiercache.store import LocalFolder, Store, open_store
from tiercache.store.access import ParsedUrl

if TYPE_CHECKING:
    from tiercache.checkpoint.dcp_reader import DistributedReader
    from tiercache.checkpoint.dcp_writer import DistributedWriter

Target: TypeAlias = Literal["local", "remote"]
"""Place where a save commits a checkpoint; each is a tier of checkpoints (CheckpointTier) of the same name."""
SaveState: TypeAlias = Literal["staged", "writing", "local", "done", "failed", "skipped"]

FIRST_LOOK_S = 10.0
"""Time that the first save of a process waits for the store."""
_ENDED = ("done", "failed", "skipped")

logger = logging.getLogger("tiercache")


class SaveHandle:
    """One save of a checkpoint. Any thread may use it.

    Attributes:
        name: Name of the checkpoint.
        step: Step of the training run.
        state: "staged" (in host memory), "writing" (to `local`, or to the store if there is no `local`), "local"
            (committed in `local`, not yet at the store), "done" (committed everywhere), "failed" or "skipped" (by a
            rank that does not write).
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
        """Wait until the checkpoint is committed at a target; return False if this rank does not write it.

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
    """

    handle: SaveHandle
    state: StagedState
    text: bytes
    aliases: Mapping[str, str]
    manifest: Manifest


class Checkpoints(StoredCheckpoints):
    """Checkpoints of one training run, below a URL. Any thread may call the methods, save() one at a time.

    A checkpoint exists once its manifest is put, which happens only after size and checksum of every file were checked
    at the store. A save that fails, or a process that is killed, leaves the earlier checkpoints as they are.

    Args:
        url: URL or path of the folder in which the checkpoints are kept, or an open store, which close() closes. One
            process writes to it at a time.
        local: Folder on a local disk to which each checkpoint is written first; None: none. Complete checkpoints in it
            that the store lacks, because their upload failed or was killed, are uploaded when the next process of the
            run saves first, if the rules keep them. If the disk is full, checkpoints are uploaded from memory, with a
            warning in the log.
        keep: Rules of retention (Keep); a checkpoint is kept if any rule keeps it. Without rules, all are kept.
        pending: Number of saves that may be unfinished at a time, uploads included; save() waits for one of them. Each
            needs host memory for its state until it is committed at the first target.
        writers: Number of files that are written, or uploaded, in parallel.
        rank: Number of this process among those that call save() with the same state, of which process 0 writes. None:
            the rank in torch.distributed's default group, or 0.
        storage_options: Options of the store of `url`.

    Attributes:
        remote_store: Store of `url`.
        local_store: Store of `local`; None if there is none.
        keep: Rules of retention.
        targets: Places at which a checkpoint is committed, in this order.
        n_streams: Number of files that are written, or uploaded, in parallel.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | Store,
        *,
        local: str | os.PathLike[str] | None = None,
        keep: Keep | Iterable[Keep] = (),
        pending: int = 1,
        writers: int = 8,
        rank: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        if pending < 1 or writers < 1:
            raise ValueError(f"pending and writers are at least 1, got {pending} and {writers}")
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
        self.targets: tuple[Target, ...] = ("remote",) if local is None else ("local", "remote")
        self._pending, self.n_streams, self._rank = pending, writers, rank
        self._memory = HostMemory()
        self._changed = Condition()
        self._saves: list[_Save] = []  # unfinished, oldest first
        self._failed: list[SaveHandle] = []
        self._unreported: list[SaveHandle] = []  # failed saves whose error nobody has seen
        self._newest_s = 0.0
        self._run_look: Future[None] | None = None  # the first look at the run's checkpoints
        # Weak: of a save that another rank has ended by an error, no rank but that one is told.
        self._dcp_writers: weakref.WeakSet[DistributedWriter] = weakref.WeakSet()
        self._repeated: dict[str, SaveHandle] = {}  # uploads that an earlier process has not ended
        self._has_run_id = False
        self._uploads_seen_s = -math.inf  # when unfinished uploads were looked for, by the monotonic clock
        self._pid, self._is_closed = os.getpid(), False
        self._remote = CheckpointWriter(remote_store, writers)
        self._local = None if local_store is None else CheckpointWriter(local_store, writers, keeps_metrics=False)
        self._writing, self._uploading = TaskThread("tiercache-checkpoint"), TaskThread("tiercache-checkpoint-upload")
        self._housekeeping = TaskThread("tiercache-checkpoint-housekeeping")
        if local_store is not None:
            with suppress(StoreError):  # the first save looks again
                check_run(local_store, remote_store)
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
    def saves(self) -> tuple[SaveHandle, ...]:
        """Saves of this process that are unfinished or have failed, oldest first."""
        with self._changed:
            handles = {*self._failed, *(save.handle for save in self._saves)}
            return tuple(sorted(handles, key=lambda one: written_order(one.name)))

    def unfinished_saves(self) -> Mapping[str, UnfinishedSave]:
        """See StoredCheckpoints.unfinished_saves()."""
        with self._changed:
            writing = {writer.name: writer for writer in [*self._dcp_writers] if writer.is_writing}
            repeated = dict(self._repeated)
        return {**writing, **repeated, **{handle.name: handle for handle in self.saves}}

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
            The save. Its state is "skipped" if this rank does not write.

        Raises:
            StoreError: An earlier save failed in the background, or the store refuses the first look at the run, for
                example because of wrong credentials; this save was not begun. The next call saves again.
            TypeError, ValueError: An argument cannot be stored.
        """
        self._check_usable()
        self._raise_failure()
        step, metrics, note = _integer(step), numbers(metrics or {}), json_copy(note)
        if self._find_rank() != 0:
            unused = checkpoint_name(step, time.time(), secrets.token_hex(3))
            skipped = SaveHandle(unused, step, self.targets, self._changed)
            skipped.state = "skipped"
            return skipped
        name, created_s = self.new_name(step)
        handle = SaveHandle(name, step, self.targets, self._changed)
        self._wait_for_turn()
        encoded = encode_state(state)
        staged = StagedState(encoded, self._memory, n_streams=self.n_streams)
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
        except RuntimeError as error:  # no thread can be started
            handle._is_reported = True  # noqa: SLF001 - our own class
            self._end(save, error)
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
        super().close()
        self._remote.close()
        self._raise_failure()

    def join(self) -> None:
        """Wait until the threads have nothing to do; errors stay for save(), wait() and close()."""
        for thread in (self._writing, self._housekeeping, self._uploading, self._housekeeping):
            thread.join()  # each gives tasks to later ones only

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
        """Note the time of the newest checkpoint of each store that can be reached, and upload what the store lacks."""
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
            if self.local_store is not None and self._take_local():
                self._upload_missing()
        except Exception as error:  # noqa: BLE001 -- top of a thread: new_name() raises it
            look.set_exception(error)
        else:
            look.set_result(None)

    def _take_local(self) -> bool:
        """Return whether the store and the local folder have the same id; give it to them."""
        if self.local_store is None:
            return False
        try:
            found = take_run(self.local_store, self.remote_store)
        except StoreError:  # a full disk: the save itself reports it
            return False
        self._has_run_id = True
        return found

    def _upload_missing(self) -> None:
        """Let the local checkpoints be uploaded that the rules keep at the store, and that it never had.

        The files that are at the store already are overwritten, so no collection may delete them meanwhile as
        leftovers: from now on the checkpoints are among the unfinished saves.
        """
        try:
            scan = self.stores.scan()
            missing = [name for name in self.retention.plan(scan).missing if name not in self.unfinished_saves()]
        except TierCacheError as error:
            logger.warning("%s: earlier checkpoints were not uploaded: %s", self.remote_store.url, error)
            return
        for name in missing:
            manifest = scan.manifest(name)
            if manifest is not None:
                with self._changed:
                    self._repeated[name] = SaveHandle(name, manifest.step, self.targets, self._changed)
                try:
                    self._uploading.submit(partial(self._upload_again, manifest))
                except RuntimeError:  # no thread can be started: the next process tries again
                    self._end_repeated(name)

    def _upload_again(self, manifest: Manifest) -> None:
        try:
            self._upload_local(manifest)
        except Exception as error:  # noqa: BLE001 -- top of a thread
            url = self.remote_store.url
            logger.warning("%s: the earlier checkpoint %s was not uploaded: %s", url, manifest.name, error)
            self._end_repeated(manifest.name)
        else:
            self._end_repeated(manifest.name)
            self.announce("remote")

    def _end_repeated(self, name: str) -> None:
        with self._changed:
            self._repeated.pop(name)

    def _wait_for_turn(self) -> None:
        """Wait until a new save may begin. Raises StoreError if one fails meanwhile."""
        while True:
            with self._changed:
                if len(self._saves) < self._pending:
                    return
                n_failed = len(self._unreported)
                self._changed.wait_for(
                    lambda: len(self._saves) < self._pending or len(self._unreported) > n_failed  # noqa: B023
                )
            self._raise_failure()

    def _raise_failure(self) -> None:
        """Raise the error of the oldest failed save that was not raised yet."""
        with self._changed:
            errors = [(one, one.error) for one in self._unreported if one.error and not one._is_reported]  # noqa: SLF001
            self._unreported = [one for one, _ in errors[1:]]
        if errors:
            raise errors[0][1]

    # -- the threads -------------------------------------------------------------------------------------------------

    def _run(self, save: _Save, step: Callable[[_Save], None]) -> None:
        """Execute a step of a save."""
        try:
            step(save)
        except Exception as error:  # noqa: BLE001 -- top of a thread: raised by the next save(), wait() or close()
            self._end(save, error)

    def _write(self, save: _Save) -> None:
        """Write a staged state to the first target and commit it; if the local folder fails, let it be uploaded."""
        self._advance(save, "writing")
        if self._local is None or self.local_store is None:
            self._write_to(save, self._remote, "remote")
            return
        try:
            if not self._has_run_id:  # a copy of which nobody knows whose it is would be uploaded to another run
                take_run(self.local_store, self.remote_store)
                self._has_run_id = True
            self._write_to(save, self._local, "local")
        except StoreError as error:
            if may_be_committed(error):
                raise
            logger.warning("%s: uploaded from memory, because it has no local copy: %s", save.handle.name, error)
            self._uploading.submit(partial(self._run, save, partial(self._upload_staged, error)))
        else:
            self._uploading.submit(partial(self._run, save, self._upload))

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

    def _upload(self, save: _Save) -> None:
        """Upload a checkpoint that is committed in the local folder, and commit it at the store."""
        self._upload_local(save.manifest)
        self._commit(save, "remote")

    def _upload_local(self, manifest: Manifest) -> None:
        """Upload and commit a local checkpoint. After an error, the files stay: a later upload writes them again."""
        if self.local_store is None:
            return
        self._remote.upload(manifest, self.local_store)
        pin_key = f"{manifest.name}/{PIN_NAME}"
        with suppress(NotFound):  # pinned since it was saved
            self.remote_store.put(pin_key, self.local_store.get(pin_key))
        # NotFound: it was deleted meanwhile, and must not come back
        self.local_store.head(manifest_key(manifest.name))
        self._remote.commit(manifest)

    def _advance(self, save: _Save, state: SaveState) -> None:
        with self._changed:
            save.handle.state = state
            self._changed.notify_all()

    def _commit(self, save: _Save, target: Target) -> None:
        """Note that a checkpoint is committed at a target."""
        with self._changed:
            save.handle._committed.add(target)  # noqa: SLF001 - our own class
            self._advance(save, "done" if target == "remote" else "local")
            if target == "remote":
                self._saves.remove(save)
        self.announce(target)

    def _submit_housekeeping(self, task: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # no thread can be started: the next commit, or gc(), deletes the same
            self._housekeeping.submit(task)

    def announce(self, target: Target) -> None:
        """Let the housekeeping thread apply the rules of retention after a commit.

        Args:
            target: Where the checkpoint was committed.
        """
        self._submit_housekeeping(partial(self._retain, target))

    def retain_local(self) -> None:
        """Let the housekeeping thread apply the rules of retention to the local folder only."""
        self._submit_housekeeping(partial(self.apply_retention, ("local",)))

    def _retain(self, target: Target) -> None:
        self.apply_retention()
        now_s = time.monotonic()
        if target == "remote" and now_s - self._uploads_seen_s >= GC_AGE_S:  # those of a kill are a day old by then
            self._uploads_seen_s = now_s
            with suppress(StoreError):  # the next process, and gc(), try again
                self._remote.abort_uploads(GC_AGE_S)

    def gc(self) -> RetentionReport:
        """Remove what killed saves and deletions have left, once it is a day old.

        Parts of uploads that were interrupted are removed too, where the store lists them (S3, with boto3). The first
        commit of a process does the same in the background.

        Raises:
            StoreError: A store failed.
        """
        report = super().gc()
        self._remote.abort_uploads(GC_AGE_S)
        return report

    def _end(self, save: _Save, error: Exception) -> None:
        """Note that a save has failed before it was committed everywhere."""
        save.state.release()
        handle = save.handle
        with self._changed:
            is_local = "local" in handle._committed  # noqa: SLF001 - our own class
            where = f"; it is committed in {self._local_url}: the next start of the run uploads it" if is_local else ""
            message = f"the checkpoint of step {handle.step} was not saved: {error}{where}"
            url = f"{self.remote_store.url}/{handle.name}"
            handle.error = StoreError(message, url=url, retryable=getattr(error, "retryable", False))
            handle.error.__cause__ = error
            self._failed.append(handle)
            self._unreported.append(handle)
            self._saves.remove(save)
            self._advance(save, "failed")

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
