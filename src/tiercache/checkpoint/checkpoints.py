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
import logging
import operator
import os
import secrets
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from threading import Condition
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tiercache.cache import Cache
from tiercache.checkpoint.format import Manifest, checkpoint_name, json_copy, metric_numbers, parse_name, written_order
from tiercache.checkpoint.housekeeping import Housekeeper, RetentionReport
from tiercache.checkpoint.loading import CopyReader, LoadedState, load_nearest
from tiercache.checkpoint.run_stores import CheckpointTier, RunStores, Scan, check_run, resolve
from tiercache.checkpoint.staging import HostMemory, StagedState
from tiercache.checkpoint.state_tree import encode_state, state_text
from tiercache.checkpoint.writer import CheckpointWriter, TaskThread, may_be_committed
from tiercache.crash_points import crash_point
from tiercache.errors import CorruptCheckpoint, NotFound, StoreError
from tiercache.keep import PIN_NAME, Keep, encode_pin
from tiercache.store import LocalFolder, Store, open_store, redact
from tiercache.store.access import ParsedUrl
from tiercache.store.placement import is_remote

if TYPE_CHECKING:
    from tiercache.checkpoint.dcp import DistributedReader, DistributedWriter

Target: TypeAlias = Literal["local", "remote"]
"""Place where a save commits a checkpoint; each is a tier of checkpoints (CheckpointTier) of the same name."""
SaveState: TypeAlias = Literal["staged", "writing", "local", "done", "failed", "skipped"]

CheckpointState: TypeAlias = Literal["complete", "saving", "failed", "incomplete", "archived", "moved"]

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


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A checkpoint as `Checkpoints.list()` describes it.

    Attributes:
        name: Name of the checkpoint.
        step: Step of the training run.
        created_s: Time at which the save began, in seconds since the Unix epoch.
        state: "complete" (committed in one tier or more), "saving", "failed" (its save ended with an error),
            "incomplete" (an unfinished save of another process, or a corrupt checkpoint), "archived" (it must be
            restored before it can be read) or "moved" (to a tier that cannot be asked now).
        tiers: Tiers that have a complete copy: "local", "remote", and those to which the tier engine has moved it.
        n_bytes: Size of all files; 0 if unknown.
        metrics: Metrics by name.
        is_pinned: Whether the checkpoint is pinned.
        why_pinned: Reason of the pin.
        kept_by: Rules that keep it in each tier, as text.
        note: JSON value of the user.
        error: Reason of the state "failed", "incomplete", "archived" or "moved"; "" otherwise.
    """

    name: str
    step: int
    created_s: float
    state: CheckpointState
    tiers: tuple[CheckpointTier, ...] = ()
    n_bytes: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    is_pinned: bool = False
    why_pinned: str = ""
    kept_by: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    note: Any = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class CheckpointVerification:
    """Result of `Checkpoints.verify()`.

    Attributes:
        name: Name of the checkpoint.
        problems: Defects of the copy in each tier as text; an empty tuple for a copy that is right.
    """

    name: str
    problems: Mapping[CheckpointTier, tuple[str, ...]]

    @property
    def is_right(self) -> bool:
        """Whether every copy is what was written."""
        return not any(self.problems.values())


@dataclass(slots=True, eq=False)
class _Save:
    """What the threads know of an unfinished save."""

    handle: SaveHandle
    state: StagedState
    text: bytes  # of the state without its tensors
    aliases: Mapping[str, str]  # further names of tensors
    manifest: Manifest  # without files and tensors until they are written


class Checkpoints:
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
        self.remote_store = url if isinstance(url, Store) else open_store(url, **(storage_options or {}))
        self.local_store = None if local is None else LocalFolder(_local_path(local))
        roots = [
            os.path.realpath(store.root)
            for store in (self.local_store, self.remote_store)
            if isinstance(store, LocalFolder)
        ]
        if len(roots) > len({*roots}):
            raise ValueError(f"local= is the folder of the checkpoints itself, {roots[0]}: leave it out")
        self.keep = (keep,) if isinstance(keep, Keep) else tuple(keep)
        self._pending, self._n_streams, self._rank = pending, writers, rank
        self._memory = HostMemory()
        self._changed = Condition()
        self._saves: list[_Save] = []  # unfinished, oldest first
        self._failed: list[SaveHandle] = []
        self._unreported: list[SaveHandle] = []  # failed saves whose error nobody has seen
        self._pid, self._is_closed = os.getpid(), False
        self._remote = CheckpointWriter(self.remote_store, writers)
        self._local: CheckpointWriter | None = None
        tiers: dict[CheckpointTier, Store] = {}
        if self.local_store is not None:
            self._local = CheckpointWriter(self.local_store, writers, keeps_metrics=False)
            tiers["local"] = self.local_store
        self.targets: tuple[Target, ...] = ("remote",) if local is None else ("local", "remote")
        # The options of an open store are not known, so that no other store is opened with them.
        options = None if isinstance(url, Store) else storage_options or {}
        self._stores = RunStores({**tiers, "remote": self.remote_store}, options)
        self._writing, self._uploading = TaskThread("tiercache-checkpoint"), TaskThread("tiercache-checkpoint-upload")
        file_writers = [self._remote] if self._local is None else [self._local, self._remote]
        self._house = Housekeeper(self._stores, self.keep, file_writers, self._uploading, self._errors)
        if self.local_store is not None:
            with suppress(StoreError):  # the first save looks again
                check_run(self.local_store, self.remote_store)
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

    # -- save

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
        step, metrics, note = _integer(step), metric_numbers(metrics or {}), json_copy(note)
        if self._find_rank() != 0:
            unused = checkpoint_name(step, time.time(), secrets.token_hex(3))
            skipped = SaveHandle(unused, step, self.targets, self._changed)
            skipped.state = "skipped"
            return skipped
        name, created_s = self._house.new_name(step)
        handle = SaveHandle(name, step, self.targets, self._changed)
        self._wait_for_turn()
        encoded = encode_state(state)
        staged = StagedState(encoded, self._memory, n_streams=self._n_streams)
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

    @property
    def saves(self) -> tuple[SaveHandle, ...]:
        """Saves of this process that are unfinished or have failed, oldest first."""
        with self._changed:
            handles = {*self._failed, *(save.handle for save in self._saves)}
            return tuple(sorted(handles, key=lambda one: written_order(one.name)))

    def _errors(self) -> dict[str, Exception | None]:
        return {handle.name: handle.error for handle in self.saves}

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
        self._stores.close()
        self._remote.close()
        self._raise_failure()

    def join(self) -> None:
        """Wait until the threads have nothing to do; errors stay for save(), wait() and close()."""
        for thread in (self._writing, self._house, self._uploading, self._house):
            thread.join()  # each gives tasks to later ones only

    # -- torch.distributed.checkpoint

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
        from tiercache.checkpoint.dcp import DistributedWriter

        return DistributedWriter(self._house, self._n_streams, _integer(step), metrics or {}, note)

    def dcp_reader(self, which: str | int = "latest") -> DistributedReader:
        """Return a reader of one checkpoint for torch.distributed.checkpoint: `dcp.load(state, storage_reader=...)`.

        Every rank calls this with the same arguments. The number of ranks may differ from that of the save.

        Args:
            which: "latest", "best:METRIC", a step or a name, as for load().
        """
        from tiercache.checkpoint.dcp import DistributedReader

        return DistributedReader(self._stores, self._n_streams, which)

    # -- stored checkpoints

    def load(
        self, which: str | int = "latest", into: Any = None, *, map_location: Any = None, strict: bool = True
    ) -> LoadedState:
        """Load a checkpoint from the nearest complete copy, and check all bytes that are read.

        A corrupt copy is skipped with a warning; "latest" then goes on to the checkpoint written before. An interrupted
        load of a remote checkpoint continues where it ended: what has arrived is in the cache of the machine.

        Args:
            which: "latest" (the checkpoint written last), "best:METRIC", "best:METRIC:max", a step, or a name.
            into: Dict of objects to fill, with the keys of the saved state: modules, optimizers, other objects with
                load_state_dict(), tensors, arrays, dicts of these, and JSON values such as a step, which are replaced.
                Saved objects that it does not name are not loaded. If a StoreError or CorruptCheckpoint ends the load,
                their contents are undefined. None: the state is returned as data, with the state dicts of objects.
            map_location: Device of tensors that are returned as data, such as "cuda:0"; None: the host's memory.
            strict: Whether a difference between `into` and the checkpoint is an error. With False, everything that fits
                is loaded, with a warning.

        Returns:
            The state, or the filled contents of `into`, as a dict with the attributes name, step, url (of the copy that
            was read), metrics and note of the loaded checkpoint.

        Raises:
            NotFound: There is no such checkpoint.
            ValueError: The checkpoint does not fit `into`; the message lists all missing, unexpected and mis-shaped
                keys, and those that cannot be filled. Nothing was changed.
            TypeError: `into` has an object that is neither filled nor replaced; nothing was changed.
            ArchivedShards: The checkpoint is archived; the error names the command that restores it.
            CorruptCheckpoint: No copy of the checkpoint is right.
            StoreError: A store failed, or it cannot be known which checkpoint is meant: the message names the tier that
                could not be asked.
        """
        scan = self._stores.scan_to_load(which)
        names = [resolve(scan, which)]
        if which == "latest":
            names += [name for name in reversed(scan.loadable_names) if name != names[0]]
            for problem in scan.problems_after(names[0]):
                _warn(f"{problem}; {names[0]}, which was written before it, is loaded")
        failure: CorruptCheckpoint | None = None
        for name in names:
            try:
                return load_nearest(
                    scan.copies[name], self._cached, into=into, map_location=map_location, strict=strict
                )
            except CorruptCheckpoint as error:
                failure = failure or error
                if name != names[-1]:
                    _warn(f"{name}: no copy can be read ({error}); the checkpoint written before it is next")
        if failure is None:
            raise NotFound("there are no checkpoints", url=self.remote_store.url)
        raise failure

    def list(self) -> Sequence[CheckpointInfo]:
        """Return all checkpoints of all tiers, written first to last, with those that are being saved or that failed.

        Raises:
            StoreError: A store cannot be listed, and it is not known which checkpoints it has.
        """
        own = self._stores.scan()
        kept_by = self._house.retention.plan(own).kept_by
        unfinished = self._house.unfinished()
        scan = self._stores.with_other_tiers(own)
        if scan.unasked:
            raise StoreError(f"there may be further checkpoints: {scan.unasked}", url=self.remote_store.url)
        names = [*scan.copies, *(name for name in unfinished if name not in scan.copies)]
        found = [_info(scan, name, kept_by.get(name, {}), unfinished) for name in names]
        return sorted(found, key=lambda one: (one.created_s, one.name))

    def verify(self, which: str | int = "latest") -> CheckpointVerification:
        """Read every byte of a checkpoint in each of its tiers, past the cache, and compare it with its checksums.

        Args:
            which: "latest", "best:METRIC", a step, or a name.

        Raises:
            NotFound: There is no such checkpoint.
            StoreError: A store failed.
        """
        scan, name = self._find(which)
        problems: dict[CheckpointTier, tuple[str, ...]] = {}
        for copy in scan.copies[name]:
            if not copy.is_committed and scan.complete(name):
                continue  # no copy: the files of the ranks of this machine
            if copy.manifest is None or copy.problem:
                problems[copy.tier] = (f"{copy.url}: {copy.problem}",)
                continue
            with CopyReader(copy.store, copy.manifest) as reader:
                problems[copy.tier] = tuple(reader.verify())
        return CheckpointVerification(name, problems)

    def delete(self, which: str | int) -> RetentionReport:
        """Delete a checkpoint from all tiers.

        Args:
            which: "latest", "best:METRIC", a step, or a name; of a step, the checkpoint written last.

        Raises:
            NotFound: There is no such checkpoint.
            ValueError: The checkpoint is pinned, is being saved, or is in another tier, where `ckpt rm` deletes it.
            StoreError: A store failed; the same call continues.
        """
        scan, name = self._find(which)
        if others := [copy.tier for copy in scan.copies[name] if copy.tier not in self._stores.tiers]:
            raise ValueError(
                f"{name} is in {', '.join(others)}, where the tier engine has put it, and was not deleted;"
                f" `tiercache ckpt rm {redact(self.remote_store.url)}/{name}` in a folder with the rule file deletes it"
                " from all tiers"
            )
        return self._house.retention.delete([name])

    def pin(self, which: str | int, why: str = "") -> None:
        """Pin a checkpoint: no rule moves or deletes any of its copies, and neither delete() nor `ckpt rm` does.

        Args:
            which: "latest", "best:METRIC", a step, or a name.
            why: Reason, for people, such as "the release of May".

        Raises:
            NotFound: There is no such checkpoint.
            TypeError: The reason is not a text.
            StoreError: A store failed.
        """
        if not isinstance(why, str):
            raise TypeError(f"why is a text, such as 'the release of May', got the {type(why).__name__} {why!r:.60}")
        self._set_pin(which, why)

    def unpin(self, which: str | int) -> None:
        """Remove the pin of a checkpoint. Errors as for pin().

        Args:
            which: "latest", "best:METRIC", a step, or a name.
        """
        self._set_pin(which, None)

    def gc(self) -> RetentionReport:
        """Remove what killed saves and deletions have left, once it is a day old.

        Parts of uploads that were interrupted are removed too, where the store lists them (S3, with boto3). The first
        commit of a process does the same in the background.

        Raises:
            StoreError: A store failed.
        """
        return self._house.collect()

    def _set_pin(self, which: str | int, why: str | None) -> None:
        """Pin a checkpoint in every tier that has it, or unpin it (None)."""
        scan, name = self._find(which)
        for copy in scan.copies[name]:
            if copy.is_unseen:
                raise StoreError(f"its pin cannot be changed: {copy.problem}", url=copy.url)
        for copy in scan.copies[name]:
            if copy.is_committed and (why is not None or copy.pin is not None):
                copy.store.put(f"{name}/{PIN_NAME}", encode_pin(why))

    def _find(self, which: str | int) -> tuple[Scan, str]:
        """Return the listing of all tiers and the name of a checkpoint, also of one that is not complete."""
        scan = self._stores.with_other_tiers(self._stores.scan(), which)
        return scan, which if isinstance(which, str) and which in scan.copies else resolve(scan, which)

    @cached_property
    def _cached_remote(self) -> Store:
        """Store of the URL as it is read: a remote one through the cache of this machine."""
        is_cloud = not isinstance(self.remote_store, LocalFolder) and is_remote(self.remote_store.url)
        return Cache.default().store(self.remote_store) if is_cloud else self.remote_store

    def _cached(self, store: Store) -> Store:
        # By store, not by name: a tier of the rule file may be called "remote", too.
        return self._cached_remote if store is self.remote_store else store

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
        if self._local is None:
            self._write_to(save, self._remote, "remote")
            return
        try:
            if not self._house.has_run_id:  # a copy of which nobody knows whose it is would be uploaded to another run
                self._house.claim_local_folder()
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

    def _upload(self, save: _Save) -> None:
        """Upload a checkpoint that is committed in the local folder, and commit it at the store."""
        if self.local_store is not None:
            self._remote.upload_checkpoint(save.manifest, self.local_store)
            self._commit(save, "remote")

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
                self._house.discard(name)
            raise
        save.state.release()
        self._commit(save, target)

    def _commit(self, save: _Save, target: Target) -> None:
        """Note that a checkpoint is committed at a target."""
        with self._changed:
            save.handle._committed.add(target)  # noqa: SLF001 - our own class
            self._advance(save, "done" if target == "remote" else "local")
            if target == "remote":
                self._saves.remove(save)
        self._house.follow_commit(target)

    def _advance(self, save: _Save, state: SaveState) -> None:
        with self._changed:
            save.handle.state = state
            self._changed.notify_all()

    def _end(self, save: _Save, error: Exception) -> None:
        """Note that a save has failed before it was committed everywhere."""
        save.state.release()
        handle, where = save.handle, ""
        with self._changed:
            if self.local_store is not None and "local" in handle._committed:  # noqa: SLF001 - our own class
                where = f"; it is committed in {self.local_store.url}: the next start of the run uploads it"
            message = f"the checkpoint of step {handle.step} was not saved: {error}{where}"
            url = f"{self.remote_store.url}/{handle.name}"
            handle.error = StoreError(message, url=url, retryable=getattr(error, "retryable", False))
            handle.error.__cause__ = error
            self._failed.append(handle)
            self._unreported.append(handle)
            self._saves.remove(save)
            self._advance(save, "failed")


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


def _info(
    scan: Scan, name: str, kept_by: Mapping[CheckpointTier, tuple[str, ...]], unfinished: Mapping[str, Exception | None]
) -> CheckpointInfo:
    parsed = parse_name(name) or (0, 0.0)
    manifest, pin, complete = scan.manifest(name), scan.pin(name), scan.complete(name)
    copies = scan.copies.get(name, ())
    archived = [copy.objects.values() for copy in copies if copy.is_archived]
    listed_bytes = max((sum(info.n_bytes for info in objects) for objects in archived), default=0)
    state: CheckpointState = "complete" if complete else "incomplete"
    error = "" if complete else next((copy.problem for copy in copies), "")
    if not complete and (away := [copy for copy in copies if copy.is_archived or copy.is_unseen]):
        state, error = ("archived" if away[0].is_archived else "moved"), away[0].problem
        if away[0].is_archived:
            error += f": tiercache tier get {redact(away[0].url)} --wait"
    if (failure := unfinished.get(name)) is not None:
        state, error = ("complete" if complete else "failed"), str(failure)
    elif name in unfinished and not complete:
        state, error = "saving", ""
    return CheckpointInfo(
        name=name,
        step=parsed[0],
        created_s=parsed[1],
        state=state,
        tiers=tuple(copy.tier for copy in complete),
        n_bytes=listed_bytes if manifest is None else manifest.n_bytes,
        metrics=scan.metrics(name) or {},
        is_pinned=pin is not None,
        why_pinned=pin or "",
        kept_by=kept_by,
        note=None if manifest is None else manifest.note,
        error=error,
    )


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


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
