"""What a run does with its stored checkpoints beside saving: names, late uploads, retention, removal of leftovers.

The rules of retention are keep lists (`keep.py`), which the tier engine evaluates too. plan_retention() decides,
Retention acts, Housekeeper has the thread. A deletion removes the manifest first, so that no reader sees a checkpoint
that lacks files.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from tiercache.checkpoint.format import (
    KEEP_KEY,
    MANIFEST_NAME,
    Manifest,
    checkpoint_name,
    checkpoint_objects,
    manifest_key,
    metrics_key,
    parse_name,
    written_order,
)
from tiercache.checkpoint.run_stores import CheckpointCopy, CheckpointTier, RunStores, Scan, take_run
from tiercache.checkpoint.writer import CheckpointWriter, TaskThread
from tiercache.crash_points import crash_point
from tiercache.errors import NotFound, StoreError, TierCacheError
from tiercache.keep import CheckpointColumns, Keep, encode_keeps, evaluate_keep_list
from tiercache.model import ObjectInfo
from tiercache.store import LocalFolder

FIRST_LOOK_S = 10.0
"""Time that the first save of a process waits for the store."""
GC_AGE_S = 86400.0
"""Age from which leftovers of killed saves are removed."""

logger = logging.getLogger("tiercache")


@dataclass(frozen=True, slots=True)
class RetentionPlan:
    """What stays and what is deleted.

    Attributes:
        kept_by: Reasons for which each checkpoint stays, by name and tier.
        deletes: Checkpoints to delete from each tier, written first to last.
        missing: Checkpoints that the remote tier would keep and never had, written first to last.
    """

    kept_by: Mapping[str, Mapping[CheckpointTier, tuple[str, ...]]]
    deletes: Mapping[CheckpointTier, tuple[str, ...]]
    missing: tuple[str, ...] = ()


def plan_retention(
    scan: Scan, keeps: Sequence[Keep], tiers: Sequence[CheckpointTier], now_s: float, unfinished: Collection[str] = ()
) -> RetentionPlan:
    """Return what the rules keep and what they delete. Pure.

    Rules of the local tier count local and remote checkpoints together; those of the remote tier count remote ones. A
    tier without rules keeps everything. Whatever the rules say, these are kept:

    - the checkpoint of the tier, or of a tier behind it, that was written last;
    - pinned checkpoints;
    - a checkpoint that is being uploaded;
    - a local copy of a checkpoint that the remote tier would keep and does not have yet.

    Only complete checkpoints are deleted. Files in the local tier without a manifest, such as those of the ranks of one
    machine, count as a copy if the remote tier has the checkpoint; if no tier has it, they are deleted once the remote
    tier has a later one.

    Args:
        scan: Listing of the checkpoints.
        keeps: Rules.
        tiers: Tiers, the nearest first.
        now_s: Time, in seconds since the Unix epoch.
        unfinished: Checkpoints that this process saves now: their local copy is the source of their upload.
    """
    remote = tiers[-1]
    complete = {tier: [n for n in scan.copies if tier in {c.tier for c in scan.complete(n)}] for tier in tiers}
    everywhere = scan.complete_names
    of_remote = _kept(scan, everywhere, keeps, remote, now_s)
    absent = [name for name in everywhere if name not in complete[remote] and name not in scan.departed]
    kept_by: dict[str, dict[CheckpointTier, tuple[str, ...]]] = {}
    deletes: dict[CheckpointTier, tuple[str, ...]] = {}
    for number, tier in enumerate(tiers):
        behind = [name for name in everywhere if any(name in complete[one] for one in tiers[number:])]
        by_rules = _kept(scan, behind, keeps, tier, now_s)
        copies = [copy for found in scan.copies.values() for copy in found if copy.tier == tier]
        parts = [] if tier == remote else [copy.name for copy in copies if not copy.is_committed]
        here = [name for name in behind if name in complete[tier] or (name in complete[remote] and name in parts)]
        for name in here:
            reasons = [*by_rules[name]]
            reasons += ["latest"] if name == behind[-1] else []  # of the store too: it outlives this machine
            reasons += ["being uploaded"] if name in unfinished and tier != remote else []
            reasons += [] if (why := scan.pin(name)) is None else [f"pinned: {why}" if why else "pinned"]
            reasons += ["not uploaded yet"] if tier != remote and name in absent and of_remote[name] else []
            kept_by.setdefault(name, {})[tier] = tuple(reasons)
        gone = [
            name
            for name in parts
            if any(written_order(name) < written_order(later) for later in complete[remote][-1:])
            and name not in unfinished
            and not any(copy.is_committed for copy in scan.copies[name])
        ]
        deletes[tier] = (*gone, *(name for name in here if not kept_by[name][tier]))
    missing = [name for name in absent if of_remote[name] or name == everywhere[-1] or scan.pin(name) is not None]
    return RetentionPlan(kept_by, deletes, tuple(missing))


def _kept(
    scan: Scan, names: Sequence[str], keeps: Sequence[Keep], tier: CheckpointTier, now_s: float
) -> dict[str, list[str]]:
    keeps = [keep for keep in keeps if keep.tier in (None, tier)]
    if not keeps:
        return {name: ["no rule for this tier"] for name in names}
    columns, rows = _columns(scan, names, now_s), np.arange(len(names))
    found: dict[str, list[str]] = {name: [] for name in names}
    for keep in keeps:
        result = evaluate_keep_list(columns, rows, keep.keep_list)
        for row, name in enumerate(names):
            if result.named[row]:
                found[name].append(str(keep))
            elif result.unscored[row]:
                found[name].append(f"{keep} (no checkpoint has the metric)")
    return found


def _columns(scan: Scan, names: Sequence[str], now_s: float) -> CheckpointColumns:
    n = len(names)
    parsed = [parse_name(name) or (0, 0.0) for name in names]
    metrics: dict[str, NDArray[np.float64]] = {}
    for row, name in enumerate(names):
        manifest = scan.manifest(name)
        for metric, value in ({} if manifest is None else manifest.metrics).items():
            metrics.setdefault(metric, np.full(n, np.nan))[row] = value
    return CheckpointColumns(
        now_s=now_s,
        run=np.zeros(n, np.int32),
        step=np.array([step for step, _ in parsed], np.int64),
        created_s=np.array([created_s for _, created_s in parsed], np.float64),
        complete=np.ones(n, np.bool_),
        metrics=metrics,
        unread=np.zeros(n, np.bool_),
    )


@dataclass(frozen=True, slots=True)
class RetentionReport:
    """What was removed: checkpoints by tier, a number of leftover objects, and the bytes of all."""

    deleted: Mapping[CheckpointTier, tuple[str, ...]] = field(default_factory=dict)
    n_leftovers: int = 0
    n_bytes: int = 0


class Retention:
    """Deletes checkpoints and leftovers. All methods may be called from any thread and any process.

    unfinished: Function that returns the checkpoints that this process saves now.
    """

    def __init__(
        self,
        stores: RunStores,
        keeps: Iterable[Keep] = (),
        *,
        unfinished: Callable[[], Collection[str]] = tuple,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.stores, self.keeps = stores, tuple(keeps)
        self._unfinished, self._now = unfinished, now
        for keep in self.keeps:
            if not isinstance(keep, Keep):
                raise TypeError(f"keep is a list of tc.Keep(...), got {keep!r}")
            if keep.tier not in (None, *stores.tiers):
                raise ValueError(f"Keep({keep}, tier={keep.tier!r}): these checkpoints have no local folder")

    def plan(self, scan: Scan, before: Collection[str] = ()) -> RetentionPlan:
        """Return what the rules keep and delete now. before: Saves that were unfinished before the scan."""
        unfinished = frozenset((*before, *self._unfinished()))
        return plan_retention(scan, self.keeps, tuple(self.stores.tiers), self._now(), unfinished)

    def run(self, tiers: Collection[CheckpointTier] | None = None) -> RetentionReport:
        """Delete what no rule keeps, and collect(). The background thread calls it after each commit."""
        deleted: dict[CheckpointTier, tuple[str, ...]] = {}
        n_bytes = 0
        before = tuple(self._unfinished())
        scan = self.stores.scan()
        tiers = self.stores.tiers.keys() if tiers is None else tiers
        if self.keeps:
            deletes = self.plan(scan, before).deletes
            for tier in tiers:
                names = deletes[tier]
                copies = [copy for name in names for copy in scan.copies[name] if copy.tier == tier]
                n_bytes += delete_copies(copies)
                deleted[tier] = names
        collected = self._collect(self.stores.scan() if any(deleted.values()) else scan, tiers, before)
        return RetentionReport(deleted, collected.n_leftovers, n_bytes + collected.n_bytes)

    def delete(self, names: Iterable[str]) -> RetentionReport:
        """Delete checkpoints from all tiers, the nearest first, so that a deletion that ends early can be repeated."""
        before = tuple(self._unfinished())  # a save that ends during the listing is in it without its manifest
        scan, wanted, n_bytes = self.stores.scan(), list(names), 0
        for name in wanted:
            if name in before or name in self._unfinished():
                raise ValueError(f"{name} is being saved: wait for its save before it is deleted")
            if name not in scan.copies:
                raise NotFound("no such checkpoint", url=name)
            if (why := scan.pin(name)) is not None:
                raise ValueError(
                    f"{name} is pinned{f' ({why})' if why else ''} and was not deleted; unpin({name!r}) or `tiercache"
                    f" ckpt unpin` removes the pin"
                )
        deleted: dict[CheckpointTier, tuple[str, ...]] = {}
        for tier in self.stores.tiers:
            copies = [copy for name in wanted for copy in scan.copies.get(name, ()) if copy.tier == tier]
            n_bytes += delete_copies(copies)
            deleted[tier] = tuple(copy.name for copy in copies)
        return RetentionReport(deleted, n_bytes=n_bytes)

    def collect(self) -> RetentionReport:
        """Delete leftovers of unfinished saves and of ended deletions, if they are old enough."""
        before = tuple(self._unfinished())
        return self._collect(self.stores.scan(), self.stores.tiers, before)

    def _collect(self, scan: Scan, tiers: Iterable[CheckpointTier], before: Collection[str]) -> RetentionReport:
        leftovers: list[ObjectInfo] = []
        old_s = self._now() - GC_AGE_S
        unfinished = frozenset((*before, *self._unfinished()))
        for tier in tiers:
            store = self.stores.tiers[tier]
            copies = [copy for found in scan.copies.values() for copy in found if copy.tier == tier]
            old = [copy for copy in copies if not copy.is_committed and copy.name not in unfinished]
            old = [copy for copy in old if _newest_s(copy) <= old_s]
            if not old:
                continue
            objects = [info for copy in old for info in copy.objects.values()]
            metrics = [metrics_key(copy.name) for copy in old] if tier == "remote" else []
            store.delete([*(info.key for info in objects), *metrics])
            _remove_folders(old)
            leftovers += objects
        return RetentionReport(n_leftovers=len(leftovers), n_bytes=sum(info.n_bytes for info in leftovers))


def delete_copies(copies: Sequence[CheckpointCopy]) -> int:
    """Delete copies of checkpoints of one tier by a few requests, whatever their number. Return the number of bytes.

    Raises:
        StoreError: The store failed. Checkpoints whose manifests were deleted are gone; collect() removes their files.
    """
    if not copies:
        return 0
    store = copies[0].store
    store.delete([manifest_key(copy.name) for copy in copies if copy.is_committed])
    crash_point("retention.manifests")
    store.delete(
        [
            *(metrics_key(copy.name) for copy in copies if copy.tier == "remote"),  # a collection knows only folders
            *(info.key for copy in copies for path, info in copy.objects.items() if path != MANIFEST_NAME),
        ]
    )
    crash_point("retention.files")
    _remove_folders(copies)
    return sum(info.n_bytes for copy in copies for info in copy.objects.values())


def _remove_folders(copies: Iterable[CheckpointCopy]) -> None:
    for copy in copies:
        if isinstance(copy.store, LocalFolder):
            copy.store.remove_empty(copy.name)


def _newest_s(copy: CheckpointCopy) -> float:
    """Return when the newest object was written; for a store that does not tell, when its save began."""
    began_s = (parse_name(copy.name) or (0, 0.0))[1]
    return max((began_s if one.modified_s is None else one.modified_s for one in copy.objects.values()), default=0.0)


class _RankSave:
    """The part of a save that this rank does. It is forgotten with its writer: another rank may have ended the save."""

    name = ""  # while the save is unfinished, as far as this rank knows


class Housekeeper:
    """Names new checkpoints, and cares for the stored ones in a thread. Any thread may call the methods.

    Args:
        stores: Stores of the run.
        keeps: Rules of retention.
        writers: Writer of the local folder, if there is one, and writer of the store.
        uploading: Thread that uploads.
        saves: Function that returns the saves that are unfinished or have failed, with their errors, by name.
    """

    def __init__(
        self,
        stores: RunStores,
        keeps: Iterable[Keep],
        writers: Sequence[CheckpointWriter],
        uploading: TaskThread,
        saves: Callable[[], Mapping[str, Exception | None]],
    ) -> None:
        self.stores, self.writers, self._uploading, self._saves = stores, tuple(writers), uploading, saves
        self.remote = self.writers[-1]
        nearest = self.writers[0].store
        self.local = nearest if len(self.writers) > 1 and isinstance(nearest, LocalFolder) else None
        self.retention = Retention(
            stores, keeps, unfinished=lambda: {name for name, error in self.unfinished().items() if error is None}
        )
        self._thread = TaskThread("tiercache-checkpoint-housekeeping")
        self._lock = Lock()
        self._newest_s = 0.0
        self._look: Future[None] | None = None  # the first look at the run's checkpoints
        self.has_run_id = False  # of the local folder; without one, nobody knows whose its copies are
        self._late: dict[str, None] = {}  # checkpoints of an earlier process that are being uploaded
        self._rank_saves: weakref.WeakSet[_RankSave] = weakref.WeakSet()
        self._uploads_seen_s = -math.inf  # when unfinished uploads were looked for, by the monotonic clock

    def unfinished(self) -> Mapping[str, Exception | None]:
        """Return the saves of this process that are unfinished or have failed, with their errors, by name."""
        saves = self._saves()
        with self._lock:
            others = [*(save.name for save in self._rank_saves if save.name), *self._late]
        return {**dict.fromkeys(others), **saves}

    def begin_rank_save(self) -> _RankSave:
        """Return the entry of a save of many ranks; its name is set while this rank takes part."""
        save = _RankSave()
        with self._lock:
            self._rank_saves.add(save)
        return save

    def join(self) -> None:
        self._thread.join()

    # -- names, and what an earlier process has left

    def new_name(self, step: int) -> tuple[str, float]:
        """Return a name and its time: the present, but later than that of every checkpoint of the run.

        The clock of a machine on which the run restarts may be behind. The first call looks at the run for that, and
        waits at most FIRST_LOOK_S for a store that does not answer.

        Raises:
            ValueError: The local folder has copies of other checkpoints.
            StoreError: The store refuses to list the run, for example because of wrong credentials.
        """
        if self._look is None:
            self._look = Future()
            try:
                self._thread.submit(partial(self._look_at_run, self._look))
            except RuntimeError:
                self._look = None
                raise
            if not wait([self._look], FIRST_LOOK_S).done:
                logger.warning("%s does not answer: save() does not wait for it", self.stores.remote.url)
        if self._look.done() and (error := self._look.exception()) is not None:
            self._look = None
            raise error
        with self._lock:
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
                with self._lock:
                    self._newest_s = max([self._newest_s, *times_s])
            is_ours = False
            with suppress(StoreError):  # a full disk: the save itself reports it
                is_ours = self.claim_local_folder()
            if is_ours:
                self._upload_missing()
        except Exception as error:  # noqa: BLE001 -- top of a thread: new_name() raises it
            look.set_exception(error)
        else:
            look.set_result(None)
            self._publish_rules()

    def _publish_rules(self) -> None:
        """Put the rules of each tier beside its checkpoints, for `tiercache ckpt ls`."""
        for tier, store in self.stores.tiers.items():
            keeps = [keep for keep in self.retention.keeps if keep.tier in (None, tier)]
            with suppress(StoreError):
                if keeps:
                    store.put(KEEP_KEY, encode_keeps(keeps))
                else:
                    store.delete([KEEP_KEY])

    def claim_local_folder(self) -> bool:
        """Give the store and the local folder the same id; return whether both have it. Raises as take_run()."""
        if self.local is None:
            return False
        has_both = take_run(self.local, self.stores.remote)
        self.has_run_id = True
        return has_both

    def _upload_missing(self) -> None:
        """Let the local checkpoints be uploaded that the rules keep at the store, and that it never had.

        The files that are at the store already are overwritten, so no collection may delete them meanwhile as
        leftovers: from now on the checkpoints are among the unfinished saves.
        """
        try:
            scan = self.stores.scan()
            missing = [name for name in self.retention.plan(scan).missing if name not in self.unfinished()]
        except TierCacheError as error:
            logger.warning("%s: earlier checkpoints were not uploaded: %s", self.stores.remote.url, error)
            return
        for name in missing:
            manifest = scan.manifest(name)
            if manifest is not None:
                with self._lock:
                    self._late[name] = None
                try:
                    self._uploading.submit(partial(self._upload_late, manifest))
                except RuntimeError:  # no thread can be started: the next process tries again
                    with self._lock:
                        del self._late[name]

    def _upload_late(self, manifest: Manifest) -> None:
        try:
            if self.local is not None:
                self.remote.upload_checkpoint(manifest, self.local)
        except Exception as error:  # noqa: BLE001 -- top of a thread
            url = self.stores.remote.url
            logger.warning("%s: the earlier checkpoint %s was not uploaded: %s", url, manifest.name, error)
            return
        finally:
            with self._lock:
                del self._late[manifest.name]
        self.follow_commit("remote")

    # -- deletions

    def follow_commit(self, tier: CheckpointTier) -> None:
        """Let the thread delete what the rules no longer keep after a commit in a tier."""

        def keep_house() -> None:
            self._retain(None)
            now_s = time.monotonic()
            if tier == "remote" and now_s - self._uploads_seen_s >= GC_AGE_S:  # those of a kill are a day old by then
                self._uploads_seen_s = now_s
                with suppress(StoreError):  # the next process, and gc(), try again
                    self.remote.abort_uploads(GC_AGE_S)

        self._submit(keep_house)

    def collect(self) -> RetentionReport:
        """Delete leftovers and parts of interrupted uploads, if they are old enough. Raises StoreError."""
        report = self.retention.collect()
        self.remote.abort_uploads(GC_AGE_S)
        return report

    def retain_local(self) -> None:
        self._submit(partial(self._retain, ("local",)))

    def discard(self, name: str) -> None:
        """Let the thread delete the files at the store of a save that was not committed."""
        self._submit(partial(self.remote.discard, name))

    def _retain(self, tiers: Collection[CheckpointTier] | None) -> None:
        try:
            self.retention.run(tiers)
        except TierCacheError as error:  # the next call continues
            logger.warning("%s: old checkpoints were not deleted: %s", self.stores.remote.url, error)

    def _submit(self, task: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # no thread can be started: the next commit, or gc(), deletes the same
            self._thread.submit(task)
