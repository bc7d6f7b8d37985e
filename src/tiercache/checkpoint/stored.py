"""The methods of `Checkpoints` that act on stored checkpoints: load, list, verify, delete, pin and collect."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
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
from tiercache.checkpoint.layout import (
    SHARED_FOLDER,
    Manifest,
    key_of,
    metrics_key,
    parse_metrics,
    parse_name,
    written_order,
)
from tiercache.checkpoint.loading import load_copy
from tiercache.checkpoint.moved import MovedCheckpoints
from tiercache.checkpoint.reading import CopyReader
from tiercache.checkpoint.retention import GC_AGE_S, Retention, RetentionReport
from tiercache.errors import CorruptCheckpoint, NotFound, StoreError, TierCacheError
from tiercache.keep import Keep
from tiercache.model import ObjectInfo
from tiercache.store import LocalFolder, Span, Store, redact
from tiercache.store.contract import WrapperStore
from tiercache.store.placement.resolver import is_archived, is_remote

logger = logging.getLogger("tiercache")

_THREADS = 16
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
        self._moved_manifests: dict[tuple[str, str], Manifest] = {}
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
            StoreError: A store failed, or it cannot be known which checkpoint is meant: the message names the tier that
                could not be asked.
        """
        scan = self.scan_to_load(which)
        names = [resolve(scan, which)]
        if which == "latest":
            names += [name for name in reversed(scan.loadable_names) if name != names[0]]
            for problem in scan.problems_after(names[0]):
                _warn(f"{problem}; {names[0]}, which was written before it, is loaded")
        failure: CorruptCheckpoint | None = None
        for name in names:
            try:
                return self._load(scan, name, into, map_location, strict=strict, wait=wait)
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

    def scan_to_load(self, which: str | int) -> Scan:
        """Return the checkpoints of all tiers; only the local ones, with a warning, if the store cannot be reached.

        Args:
            which: Checkpoint, as for load(); a name that is at the URL spares the other tiers.
        """
        try:
            scan = self.stores.scan()
        except StoreError as error:
            if self.local_store is None:
                raise
            scan = CheckpointStores({"local": self.local_store}).scan()
            if not scan.complete_names:
                raise
            _warn(f"{self.remote_store.url}: cannot be listed ({error}); only local checkpoints are considered")
            return scan
        if isinstance(which, str) and scan.complete(which):  # by its name
            return scan
        return self._everywhere(scan, which)

    def _everywhere(self, scan: Scan, which: str | int | None = None) -> Scan:
        """Return a listing with the checkpoints that are in other tiers too.

        Args:
            scan: Listing of the own tiers.
            which: Choice for which the listing is made; None: all checkpoints are described.
        """
        others = self._moved.tiers()
        copies = {name: [*found] for name, found in scan.copies.items()}
        unasked = others.problem
        for tier, url in others.urls.items():
            try:
                store = _WithSharedTensors(self._moved.store(url), self.remote_store)
                listed = CheckpointStores({tier: store}, self._moved_manifests).scan(scan.shared.get("remote", {}))
                found = [copy for some in listed.copies.values() for copy in some]
            except StoreError as error:
                problem = f"the tier {tier} could not be asked: {error}"
                names = [name for name in others.placed.get(url, ()) if parse_name(name) is not None]
                unseen = partial(CheckpointCopy, tier, self.remote_store, objects={}, manifest=None, problem=problem)
                found = [unseen(name=name, is_unseen=True) for name in names]
                if others.home in (None, url):  # no placement states what is there
                    unasked = unasked or problem
            for copy in found:
                copies.setdefault(copy.name, []).append(copy)
        copies = {name: copies[name] for name in sorted(copies, key=written_order)}
        merged = replace(scan, copies=copies, unasked=unasked, hint="" if copies else scan.hint)
        if which is None or (isinstance(which, str) and which.startswith("best:")):
            unread = [name for name in merged.loadable_names if merged.manifest(name) is None]
            with ThreadPoolExecutor(_THREADS, thread_name_prefix="tiercache-checkpoints") as pool:
                kept = dict(zip(unread, pool.map(self._kept_metrics, unread), strict=True))
            merged = replace(merged, kept_metrics={name: some for name, some in kept.items() if some is not None})
        return merged

    def _kept_metrics(self, name: str) -> Mapping[str, float] | None:
        """Return the metrics of a checkpoint whose manifest cannot be read; None if they are not known."""
        try:
            return parse_metrics(self.remote_store.get(metrics_key(name)))
        except StoreError as error:
            if isinstance(error, NotFound) or is_archived(error):
                return None
            raise

    def _load(
        self,
        scan: Scan,
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
                if copy.is_unseen:
                    failure = StoreError(f"cannot be loaded: {copy.problem}", url=copy.url)
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
            scan = self._everywhere(self.stores.scan(), name)
        raise StoreError(f"{name} was restored, and still cannot be read", url=self.remote_store.url)

    def open_copy(self, scan: Scan, name: str) -> tuple[Manifest, Store]:
        """Return the manifest of a checkpoint, and the store of its nearest complete copy.

        The store is the one of the URL, or one that the caller closes.

        Args:
            scan: Copies of the checkpoints of all tiers.
            name: Name of the checkpoint.

        Raises:
            ArchivedShards: The checkpoint must be restored first.
            StoreError: It is in a tier that cannot be asked.
        """
        for copy in scan.complete(name):
            if copy.manifest is None or copy.store is self.remote_store:
                return copy.manifest or self.stores.manifest(copy.tier, name), self.remote_store
            opened = self._moved.open(self._moved.tiers().urls[copy.tier])
            has_shared = any(entry.digest for entry in copy.manifest.tensors.values())
            return copy.manifest, _WithSharedTensors(opened, self.remote_store) if has_shared else opened
        if archived := [copy for copy in scan.copies[name] if copy.is_archived]:
            self.require_restored(info.key for copy in archived for info in copy.objects.values())
        problem = next((copy.problem for copy in scan.copies[name]), "it was restored just now: open it again")
        raise StoreError(problem, url=f"{self.remote_store.url}/{name}")

    def close_other_tiers(self) -> None:
        """Close the stores of the tiers to which checkpoints were moved; later calls open them again."""
        self._moved.close()

    def _store_to_read(self, copy: CheckpointCopy) -> Store:
        # By store, not by name: a tier of the rule file may be called "remote", too.
        return self._cached_remote if copy.store is self.remote_store else copy.store

    # -- list and verify ---------------------------------------------------------------------------------------------

    def list(self) -> Sequence[CheckpointInfo]:
        """Return all checkpoints of all tiers, written first to last, with those that are being saved or that failed.

        Raises:
            StoreError: A store cannot be listed, and it is not known which checkpoints it has.
        """
        own = self.stores.scan()
        kept_by = self.retention.plan(own).kept_by
        unfinished = self.unfinished_saves()
        scan = self._everywhere(own)
        if scan.unasked:
            raise StoreError(f"there may be further checkpoints: {scan.unasked}", url=self.remote_store.url)
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
        scan = self._everywhere(self.stores.scan(), which)
        name = self._name(scan, which)
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
            ValueError: The checkpoint is pinned, is being saved, or is in another tier, where `ckpt rm` deletes it.
            StoreError: A store failed; the same call continues.
        """
        own = self.stores.scan()
        if isinstance(which, str) and which in own.moved_names:
            return self.retention.delete([which])
        scan = self._everywhere(own, which)
        name = self._name(scan, which)
        if others := [copy.tier for copy in scan.copies[name] if copy.tier not in self.stores.tiers]:
            raise ValueError(
                f"{name} is in {', '.join(others)}, where the tier engine has put it, and was not deleted;"
                f" `tiercache ckpt rm {redact(self.remote_store.url)}/{name}` in a folder with the rule file deletes it"
                " from all tiers"
            )
        return self.retention.delete([name])

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
        scan = self._everywhere(self.stores.scan(), which)
        name = self._name(scan, which)
        for copy in scan.copies[name]:
            if copy.is_unseen:
                raise StoreError(f"its pin cannot be changed: {copy.problem}", url=copy.url)
        self.stores.set_pin(scan, name, why)

    @staticmethod
    def _name(scan: Scan, which: str | int) -> str:
        """Return the name of a checkpoint, also of one that is not complete."""
        return which if isinstance(which, str) and which in scan.copies else resolve(scan, which)


class _WithSharedTensors(WrapperStore):
    """The store of moved checkpoints, with the shared tensors of the store from which they were moved."""

    def __init__(self, inner: Store, shared: Store) -> None:
        super().__init__(inner)
        self._shared = shared

    def _store_of(self, key: str) -> Store:
        return self._shared if key.startswith(SHARED_FOLDER) else self.inner

    def head(self, key: str) -> ObjectInfo:
        """See Store.head."""
        return self._store_of(key).head(key)

    def read_into(self, key: str, spans: Sequence[Span], **options: Any) -> None:
        """See Store.read_into."""
        self._store_of(key).read_into(key, spans, **options)

    def close(self) -> None:
        """Close the connections of both stores."""
        self.inner.close()
        self._shared.close()


def _moved_info(name: str) -> CheckpointInfo:
    step, created_s = parse_name(name) or (0, 0.0)
    why = "moved or deleted by another program, such as the tier engine; delete() gives up its shared tensors"
    return CheckpointInfo(name, step, created_s, "moved", error=why)


def _info(
    scan: Scan, name: str, kept_by: Mapping[CheckpointTier, tuple[str, ...]], save: UnfinishedSave | None
) -> CheckpointInfo:
    parsed = parse_name(name) or (0, 0.0)
    manifest, pin, complete = scan.manifest(name), scan.pin(name), scan.complete(name)
    copies = scan.copies.get(name, ())
    state: CheckpointState = "complete" if complete else "incomplete"
    error = "" if complete else next((copy.problem for copy in copies), "")
    if not complete and (away := [copy for copy in copies if copy.is_archived or copy.is_unseen]):
        state, error = ("archived" if away[0].is_archived else "moved"), away[0].problem
        if away[0].is_archived:
            error += f", by load(wait=True) or `tiercache tier get {redact(away[0].url)} --wait`"
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
        n_bytes=max((_listed_bytes(copy) for copy in copies), default=0) if manifest is None else manifest.n_bytes,
        metrics=scan.metrics(name) or {},
        is_pinned=pin is not None,
        why_pinned=pin or "",
        kept_by=kept_by,
        note=None if manifest is None else manifest.note,
        error=error,
    )


def _listed_bytes(copy: CheckpointCopy) -> int:
    """Return the size of the objects in the folder of an archived copy; 0 for any other."""
    return sum(info.n_bytes for info in copy.objects.values()) if copy.is_archived else 0


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
