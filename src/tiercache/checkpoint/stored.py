"""The methods of `Checkpoints` that act on stored checkpoints: load, list, verify, delete, pin and collect."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

from tiercache.cache import Cache
from tiercache.checkpoint.inventory import (
    CheckpointCopy,
    CheckpointInfo,
    CheckpointState,
    CheckpointStores,
    CheckpointTier,
    Scan,
    resolve,
)
from tiercache.checkpoint.layout import SHARED_FOLDER, key_of, parse_name
from tiercache.checkpoint.loading import load_copy
from tiercache.checkpoint.moved import MovedCheckpoints
from tiercache.checkpoint.reading import CopyReader
from tiercache.checkpoint.retention import GC_AGE_S, Keep, Retention, RetentionReport
from tiercache.errors import CorruptCheckpoint, NotFound, StoreError, TierCacheError
from tiercache.store import LocalFolder, Span, Store
from tiercache.store.contract import WrapperStore
from tiercache.tier.placement.resolver import is_archived, is_remote

logger = logging.getLogger("tiercache")

_ROUNDS = 3  # restores of one load: the manifest, the files that it names, and one more attempt


class UnfinishedSave(Protocol):
    """A save of this process that is not committed everywhere, as list() describes it."""

    @property
    def error(self) -> BaseException | None:
        """Error that ended the save; None if it is still being written."""


@dataclass(frozen=True, slots=True)
class CheckpointVerification:
    """Result of `Checkpoints.verify()`.

    Attributes:
        name: Name of the checkpoint.
        problems: Defects of the copy in each tier as text; an empty tuple for a copy that is right.
        n_bytes: Number of bytes that were read.
    """

    name: str
    problems: Mapping[CheckpointTier, tuple[str, ...]]
    n_bytes: int

    @property
    def is_right(self) -> bool:
        """Whether every copy is what was written."""
        return not any(self.problems.values())


class StoredCheckpoints:
    """Stored checkpoints below a URL: what `Checkpoints` can do without a save.

    Args:
        remote_store: Store of the URL.
        local_store: Store of the local folder; None: there is none.
        keep: Rules of retention.
        storage_options: Options of the store of the URL.
        cache: Function that returns the cache through which a remote store is read.
        moved: Checkpoints that the tier engine has moved; None: those of the rule file that applies.
        gc_age_s: Age in seconds from which leftovers of killed saves are removed.
    """

    def __init__(
        self,
        remote_store: Store,
        local_store: LocalFolder | None = None,
        *,
        keep: Keep | Iterable[Keep] = (),
        storage_options: Mapping[str, Any] | None = None,
        cache: Callable[[], Cache] = Cache.default,
        moved: MovedCheckpoints | None = None,
        gc_age_s: float = GC_AGE_S,
    ) -> None:
        self.remote_store, self.local_store = remote_store, local_store
        tiers: dict[CheckpointTier, Store] = {} if local_store is None else {"local": local_store}
        self.stores = CheckpointStores({**tiers, "remote": remote_store})
        self.keep = (keep,) if isinstance(keep, Keep) else tuple(keep)
        self.retention = Retention(
            self.stores,
            self.keep,
            gc_age_s=gc_age_s,
            unfinished=lambda: {name for name, save in self.unfinished_saves().items() if save.error is None},
        )
        self._moved = MovedCheckpoints(remote_store.url, storage_options) if moved is None else moved
        self._open_cache = cache

    def unfinished_saves(self) -> Mapping[str, UnfinishedSave]:
        """Return the saves of this process that are unfinished or have failed, by the name of the checkpoint."""
        return {}

    @cached_property
    def _cached_remote(self) -> Store:
        """Store of the URL as it is read: a remote one through the cache of this machine."""
        is_cloud = not isinstance(self.remote_store, LocalFolder) and is_remote(self.remote_store.url)
        return self._open_cache().store(self.remote_store) if is_cloud else self.remote_store

    # -- load --------------------------------------------------------------------------------------------------------

    def load(
        self,
        which: str | int = "latest",
        into: Any = None,
        *,
        map_location: Any = None,
        strict: bool = True,
        wait: bool = False,
    ) -> Any:
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
            wait: Whether to restore an archived checkpoint, at a cost that is logged, and to wait until it can be read.

        Returns:
            The state, or `into`.

        Raises:
            NotFound: There is no such checkpoint.
            ValueError: The checkpoint does not fit `into`; the message lists all missing, unexpected and mis-shaped
                keys, and those that cannot be filled. Nothing was changed.
            TypeError: `into` has an object that is neither filled nor replaced; nothing was changed.
            ArchivedShards: The checkpoint must be restored first; the error has cost, duration and command.
            CorruptCheckpoint: No copy of the checkpoint is right.
            StoreError: A store failed.
        """
        scan = self.scan_to_load()
        with self._found(scan, which) as (found, stores):
            names = [resolve(found, which)]
            if which == "latest":
                names += [name for name in reversed(found.loadable_names) if name != names[0]]
                for problem in found.problems_after(names[0]):
                    _warn(f"{problem}; {names[0]}, which was written before it, is loaded")
            failure: CorruptCheckpoint | None = None
            for name in names:
                try:
                    return self._load(found, stores, name, into, map_location, strict=strict, wait=wait)
                except CorruptCheckpoint as error:
                    failure = failure or error
                    if name != names[-1]:
                        _warn(f"{name}: no copy can be read ({error}); the checkpoint written before it is next")
            if failure is None:
                raise NotFound("there are no checkpoints", url=self.remote_store.url)
            raise failure

    def require_restored(self, keys: Iterable[str]) -> None:
        """Raise ArchivedShards, with cost, duration and command, if an object must be restored before it can be read.

        Args:
            keys: Keys of objects below the URL.
        """
        self._moved.restore(sorted(keys), wait=False)

    def scan_to_load(self) -> Scan:
        """Return the checkpoints of all tiers; only the local ones, with a warning, if the store cannot be reached."""
        try:
            return self.stores.scan()
        except StoreError as error:
            if self.local_store is None:
                raise
            scan = CheckpointStores({"local": self.local_store}).scan()
            if not scan.complete_names:
                raise
            _warn(f"{self.remote_store.url}: cannot be listed ({error}); only local checkpoints are considered")
            return scan

    @contextmanager
    def _found(self, scan: Scan, which: str | int) -> Iterator[tuple[Scan, Mapping[str, Store]]]:
        """Yield a listing that has the checkpoint, and the stores of other tiers, which are listed only if needed."""
        try:
            resolve(scan, which)
        except NotFound:
            with self._moved.other_stores() as others:
                if not others:
                    raise
                others = {name: _WithSharedTensors(store, self.remote_store) for name, store in others.items()}
                elsewhere = self._scan_others(scan, others)
                copies = {name: [*scan.copies.get(name, ()), *found] for name, found in elsewhere.copies.items()}
                yield replace(scan, copies={**scan.copies, **copies}), others
        else:
            yield scan, {}

    @staticmethod
    def _scan_others(scan: Scan, others: Mapping[str, Store]) -> Scan:
        """Return the checkpoints in other tiers. The tier engine leaves their shared tensors at the URL."""
        return CheckpointStores(others).scan(scan.shared.get("remote", {}))

    def _load(
        self,
        scan: Scan,
        others: Mapping[str, Store],
        name: str,
        into: Any,
        map_location: Any,
        *,
        strict: bool,
        wait: bool,
    ) -> Any:
        """Load one checkpoint from its nearest copy that can be read; restore it if there is none."""
        restored: set[str] = set()
        for _ in range(_ROUNDS):
            failure: TierCacheError | None = None
            archived: set[str] = set()
            for copy in scan.copies[name]:
                if copy.is_archived:
                    archived.update(info.key for info in copy.objects.values())
                    continue
                if copy.manifest is None or copy.problem:
                    if copy.is_committed:
                        failure = CorruptCheckpoint(copy.problem, url=copy.url)
                        _warn(f"{failure}: this copy is skipped")
                    continue
                try:
                    return load_copy(
                        self._store_to_read(copy), copy.manifest, into=into, map_location=map_location, strict=strict
                    )
                except CorruptCheckpoint as error:
                    failure = error
                except StoreError as error:
                    if is_archived(error):
                        archived.update(key_of(name, file.path) for file in copy.manifest.files)
                        continue
                    failure = error
                _warn(f"{failure}: this copy is skipped")
            if not archived:
                raise failure or NotFound(f"no copy of {name} is complete", url=self.remote_store.url)
            if archived <= restored:
                raise StoreError(f"{name} was restored, and still cannot be read", url=self.remote_store.url)
            self._moved.restore(sorted(archived), wait=wait)
            restored |= archived
            scan = self.stores.scan()
            copies = self._scan_others(scan, others).copies.get(name, ()) if others else ()
            scan = replace(scan, copies={name: [*scan.copies.get(name, ()), *copies]})
        raise StoreError(f"{name} was restored, and still cannot be read", url=self.remote_store.url)

    def _store_to_read(self, copy: CheckpointCopy) -> Store:
        # By store, not by name: a tier of the rule file may be called "remote", too.
        return self._cached_remote if copy.store is self.remote_store else copy.store

    # -- list and verify ---------------------------------------------------------------------------------------------

    def list(self) -> Sequence[CheckpointInfo]:
        """Return all checkpoints, written first to last, with those that are being saved or that failed.

        Raises:
            StoreError: A store cannot be listed.
        """
        scan = self.stores.scan()
        kept_by = self.retention.plan(scan).kept_by
        unfinished = self.unfinished_saves()
        names = [*scan.copies, *(name for name in unfinished if name not in scan.copies)]
        found = [_info(scan, name, kept_by.get(name, {}), unfinished.get(name)) for name in names]
        found += [_moved_info(name) for name in scan.moved_names if name not in unfinished]
        return sorted(found, key=lambda one: (one.created_s, one.name))

    def verify(self, which: str | int = "latest") -> CheckpointVerification:
        """Read every byte of a checkpoint in each of its tiers, past the cache, and compare it with its checksums.

        Args:
            which: "latest", "best:METRIC", a step, or a name.

        Raises:
            NotFound: There is no such checkpoint.
            StoreError: A store failed.
        """
        scan = self.stores.scan()
        name = which if isinstance(which, str) and which in scan.copies else resolve(scan, which)
        problems: dict[CheckpointTier, tuple[str, ...]] = {}
        n_bytes = 0
        for copy in scan.copies[name]:
            if not copy.is_committed and scan.complete(name):
                continue  # no copy: the files of the ranks of this machine
            if copy.manifest is None or copy.problem:
                problems[copy.tier] = (f"{copy.url}: {copy.problem}",)
                continue
            with CopyReader(copy.store, copy.manifest) as reader:
                problems[copy.tier] = tuple(reader.verify())
            n_bytes += copy.manifest.n_bytes
        return CheckpointVerification(name, problems, n_bytes)

    # -- delete and pin -----------------------------------------------------------------------------------------

    def delete(self, which: str | int) -> RetentionReport:
        """Delete a checkpoint from all tiers. Tensors that other checkpoints share stay.

        Args:
            which: "latest", "best:METRIC", a step, or a name; of a step, the checkpoint written last.

        Raises:
            NotFound: There is no such checkpoint.
            ValueError: The checkpoint is pinned, or is being saved.
            StoreError: A store failed; the same call continues.
        """
        scan = self.stores.scan()
        is_moved = isinstance(which, str) and which in scan.moved_names
        return self.retention.delete([str(which) if is_moved else self._name(scan, which)])

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
        """Remove what killed saves and deletions have left, and shared tensors without users, once they are a day old.

        Raises:
            StoreError: A store failed.
        """
        return self.retention.collect()

    def apply_retention(self, tiers: Collection[CheckpointTier] | None = None) -> None:
        """Delete what no rule keeps, and collect leftovers. An error is logged: the next call continues.

        Args:
            tiers: Tiers from which is deleted; None: all.
        """
        try:
            self.retention.run(tiers)
        except TierCacheError as error:
            logger.warning("%s: old checkpoints were not deleted: %s", self.remote_store.url, error)

    def _set_pin(self, which: str | int, why: str | None) -> None:
        scan = self.stores.scan()
        self.stores.set_pin(scan, self._name(scan, which), why)

    @staticmethod
    def _name(scan: Scan, which: str | int) -> str:
        """Return the name of a checkpoint, also of one that is not complete."""
        return which if isinstance(which, str) and which in scan.copies else resolve(scan, which)


class _WithSharedTensors(WrapperStore):
    """The store of moved checkpoints, with the shared tensors of the store from which they were moved."""

    def __init__(self, inner: Store, shared: Store) -> None:
        super().__init__(inner)
        self._shared = shared

    def read_into(self, key: str, spans: Sequence[Span], **options: Any) -> None:
        """See Store.read_into."""
        store = self._shared if key.startswith(SHARED_FOLDER) else self.inner
        store.read_into(key, spans, **options)


def _moved_info(name: str) -> CheckpointInfo:
    step, created_s = parse_name(name) or (0, 0.0)
    why = "moved or deleted by another program, such as the tier engine; delete() gives up its shared tensors"
    return CheckpointInfo(name, step, created_s, "moved", error=why)


def _info(
    scan: Scan, name: str, kept_by: Mapping[CheckpointTier, tuple[str, ...]], save: UnfinishedSave | None
) -> CheckpointInfo:
    parsed = parse_name(name) or (0, 0.0)
    manifest, pin, complete = scan.manifest(name), scan.pin(name), scan.complete(name)
    state: CheckpointState = "complete" if complete else "incomplete"
    error = "" if complete else next((copy.problem for copy in scan.copies.get(name, ())), "")
    if save is not None and save.error is not None:
        state, error = ("complete" if complete else "failed"), str(save.error)
    elif save is not None and not complete:
        state, error = "saving", ""
    return CheckpointInfo(
        name=name,
        step=parsed[0],
        created_s=parsed[1],
        state=state,
        tiers=tuple(copy.tier for copy in complete),
        n_bytes=0 if manifest is None else manifest.n_bytes,
        metrics={} if manifest is None else manifest.metrics,
        is_pinned=pin is not None,
        why_pinned=pin or "",
        kept_by=kept_by,
        note=None if manifest is None else manifest.note,
        error=error,
    )


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
