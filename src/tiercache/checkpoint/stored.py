"""The methods of `Checkpoints` that act on stored checkpoints: load, list, verify, delete, pin and collect."""

from __future__ import annotations

import logging
import os
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
    Manifest,
    metrics_key,
    parse_metrics,
    parse_name,
    written_order,
)
from tiercache.checkpoint.loading import load_copy
from tiercache.checkpoint.reading import CopyReader
from tiercache.checkpoint.retention import Retention, RetentionReport
from tiercache.errors import (
    ArchivedShards,
    CorruptCheckpoint,
    CorruptShard,
    NotFound,
    StoreError,
    TierCacheError,
    UnsupportedFormat,
)
from tiercache.keep import Keep
from tiercache.store import LocalFolder, Store, open_store, redact
from tiercache.store.placement import (
    FileLocator,
    archived_file_error,
    is_archived,
    is_remote,
    is_same_service,
    options_of,
)

logger = logging.getLogger("tiercache")

_THREADS = 16
_OWN_TIERS = ("local", "remote")


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
    """

    def __init__(
        self,
        remote_store: Store,
        local_store: LocalFolder | None = None,
        *,
        keep: Keep | Iterable[Keep] = (),
        storage_options: Mapping[str, Any] | None = None,
        cache: Callable[[], Cache] = Cache.default,
    ) -> None:
        self.remote_store, self.local_store = remote_store, local_store
        tiers: dict[CheckpointTier, Store] = {} if local_store is None else {"local": local_store}
        self.stores = CheckpointStores({**tiers, "remote": remote_store})
        self.keep = (keep,) if isinstance(keep, Keep) else tuple(keep)
        self.retention = Retention(
            self.stores,
            self.keep,
            unfinished=lambda: {name for name, save in self.unfinished_saves().items() if save.error is None},
        )
        self._moved = _OtherTiers(remote_store.url, storage_options)
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

        Returns:
            The state, or `into`.

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
        scan = self.scan_to_load(which)
        names = [resolve(scan, which)]
        if which == "latest":
            names += [name for name in reversed(scan.loadable_names) if name != names[0]]
            for problem in scan.problems_after(names[0]):
                _warn(f"{problem}; {names[0]}, which was written before it, is loaded")
        failure: CorruptCheckpoint | None = None
        for name in names:
            try:
                return self._load(scan, name, into, map_location, strict=strict)
            except CorruptCheckpoint as error:
                failure = failure or error
                if name != names[-1]:
                    _warn(f"{name}: no copy can be read ({error}); the checkpoint written before it is next")
        if failure is None:
            raise NotFound("there are no checkpoints", url=self.remote_store.url)
        raise failure

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
        others = self._moved.find()
        copies = {name: [*found] for name, found in scan.copies.items()}
        unasked = others.problem
        for tier, url in others.urls.items():
            try:
                listed = CheckpointStores({tier: self._moved.store(url)}, self._moved_manifests).scan()
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

    def _load(self, scan: Scan, name: str, into: Any, map_location: Any, *, strict: bool) -> Any:
        """Load one checkpoint from its nearest copy that can be read."""
        failure: TierCacheError | None = None
        archived: CheckpointCopy | None = None
        for copy in scan.copies[name]:
            if copy.is_archived:
                archived = archived or copy
                continue
            if copy.is_unseen:
                failure = StoreError(f"cannot be loaded: {copy.problem}", url=copy.url)
                continue
            if copy.manifest is None or copy.problem:
                if copy.is_committed:
                    failure = CorruptCheckpoint(copy.problem, url=copy.url)
                    _warn(f"{failure}: this copy is skipped")
                continue
            # By store, not by name: a tier of the rule file may be called "remote", too.
            store = self._cached_remote if copy.store is self.remote_store else copy.store
            try:
                return load_copy(store, copy.manifest, into=into, map_location=map_location, strict=strict)
            except CorruptCheckpoint as error:
                failure = error
            except StoreError as error:
                if is_archived(error):
                    archived = archived or copy
                    continue
                failure = error
            _warn(f"{failure}: this copy is skipped")
        if archived is not None:
            raise archived_error(archived)
        raise failure or NotFound(f"no copy of {name} is complete", url=self.remote_store.url)

    def open_copy(self, scan: Scan, name: str) -> tuple[Manifest, Store]:
        """Return the manifest of a checkpoint, and the store of its nearest complete copy.

        The store is the one of the URL, or one that the caller closes.

        Args:
            scan: Copies of the checkpoints of all tiers.
            name: Name of the checkpoint.

        Raises:
            ArchivedShards: The checkpoint is archived.
            StoreError: It is in a tier that cannot be asked.
        """
        for copy in scan.complete(name):
            if copy.manifest is None or copy.store is self.remote_store:
                return copy.manifest or self.stores.manifest(copy.tier, name), self.remote_store
            return copy.manifest, self._moved.open(self._moved.find().urls[copy.tier])
        for copy in scan.copies[name]:
            if copy.is_archived:
                raise archived_error(copy)
        raise StoreError(scan.copies[name][0].problem, url=f"{self.remote_store.url}/{name}")

    def close(self) -> None:
        """Close the stores of the tiers to which checkpoints were moved; later calls open them again."""
        self._moved.close()

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
        """Delete a checkpoint from all tiers.

        Args:
            which: "latest", "best:METRIC", a step, or a name; of a step, the checkpoint written last.

        Raises:
            NotFound: There is no such checkpoint.
            ValueError: The checkpoint is pinned, is being saved, or is in another tier, where `ckpt rm` deletes it.
            StoreError: A store failed; the same call continues.
        """
        scan = self._everywhere(self.stores.scan(), which)
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
        """Remove what killed saves and deletions have left, once it is a day old.

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


@dataclass(frozen=True, slots=True)
class _Others:
    """The tiers other than the URL in which its checkpoints may be.

    Attributes:
        urls: URL of the folder of the checkpoints in each tier, by its name in the rule file, or by the URL.
        placed: Names of the checkpoints that the placement states to be in each tier, by the URL.
        home: URL of the folder of the checkpoints in the home; None if none was found.
        problem: Reason why the placement could not be read; "" if it was.
    """

    urls: Mapping[str, str]
    placed: Mapping[str, Sequence[str]]
    home: str | None = None
    problem: str = ""


class _OtherTiers:
    """The tiers to which the tier engine has moved checkpoints of a URL.

    They are those of the rule file that applies to the working folder, and those that the placement names: that of the
    home above the URL, or of the home to which a marker of the URL's tier leads.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None) -> None:
        """Open nothing yet. options: Of the URL's store; None: not known, so no other store is opened with them."""
        self.url = url if "://" in url else os.path.abspath(url)  # noqa: PTH100 - resolve() would follow links
        self._options = None if options is None else dict(options)
        self._locator = FileLocator(self.open)

    def open(self, url: str) -> Store:
        """Return a new store of a folder in another tier. Raises ValueError."""
        own = self._options if self._options and is_same_service(url, self.url) else {}
        return open_store(url, **(own | options_of(url)))

    def close(self) -> None:
        """Close the stores of other tiers."""
        self._locator.close()

    def store(self, url: str) -> Store:
        """Return the store of a folder in another tier, opened once. Raises StoreError if it cannot be opened."""
        try:
            return self._locator.store(url)
        except ValueError as error:
            raise StoreError(f"its store cannot be opened: {error}", url=redact(url)) from error

    def find(self) -> _Others:
        """Return the tiers other than the URL in which its checkpoints may be."""
        follows, problem = self._options is not None or not is_remote(self.url), ""
        try:
            found = self._locator.find_tiers(self.url, follows_placement=follows)
        except (StoreError, CorruptShard, UnsupportedFormat, ValueError) as error:
            problem = f"the placement of moved checkpoints cannot be read: {error}"
            found = self._locator.find_tiers(self.url, follows_placement=False)
        urls = {redact(url) if name in _OWN_TIERS else name: url for name, url in found.urls.items()}
        placed: dict[str, dict[str, None]] = {}
        for key, url in found.placed.items():
            placed.setdefault(url, {})[key.partition("/")[0]] = None
        return _Others(urls, {url: [*names] for url, names in placed.items()}, found.home, problem)


def archived_error(copy: CheckpointCopy) -> ArchivedShards:
    """Return the error for a checkpoint that must be restored; it names the command that does that."""
    return archived_file_error(copy.url, sum(info.n_bytes for info in copy.objects.values()))


def _info(
    scan: Scan, name: str, kept_by: Mapping[CheckpointTier, tuple[str, ...]], save: UnfinishedSave | None
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
        n_bytes=listed_bytes if manifest is None else manifest.n_bytes,
        metrics=scan.metrics(name) or {},
        is_pinned=pin is not None,
        why_pinned=pin or "",
        kept_by=kept_by,
        note=None if manifest is None else manifest.note,
        error=error,
    )


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
