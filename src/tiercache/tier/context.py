"""The tiers that moves work on: checks of objects and copies, results, and the placements that lead readers.

A check tells whether an object is still the planned one, or a copy still the verified one. No check writes the journal,
or changes objects of users. Three of them write: ensure_tier_marker() creates a mount marker, probe_shared_location()
puts an object and deletes it again, and unconfirmed_reason() records a new ETag in the catalog. A function whose name
ends in `_reason`, and each of the first two of these three, returns "" if everything is as expected, otherwise a text
for people that says what was expected and what was found.

Placements are written before anything that readers use is deleted.
"""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tiercache.errors import NotFound, StoreError, TierCacheError
from tiercache.model import ObjectInfo
from tiercache.shard.versions import VERSIONS_FOLDER
from tiercache.store import Store, placement_log
from tiercache.store.placement_log import Placement, PlacementRow, prefix_store
from tiercache.tier.inventory import Inventory
from tiercache.tier.journal import CatalogEntry, JournalRow, PlannedObject, TierCatalog
from tiercache.tier.lock import TierLock
from tiercache.tier.plans import Plan
from tiercache.tier.rules import RuleFile, load_rule_file
from tiercache.tier.snapshot import READABLE, SHARD, STANDARD
from tiercache.tier.stores import CLASSES_TO_RESTORE, Stores, ensure_mount_marker, needs_restore, read_holds, state_of
from tiercache.tier.text_columns import first_match
from tiercache.tier.transfer import Transfer, find_difference


@dataclass(frozen=True, slots=True)
class StoppedMove:
    number: int
    reason: str
    path: str = ""
    plan: str = ""


@dataclass(frozen=True, slots=True)
class ApplyResult:
    """Result of apply_plan() or run_due_deletions()."""

    n_made: int = 0  # with moves whose deletions wait for the grace period, unlike the journal's state "done"
    stopped: tuple[StoppedMove, ...] = ()
    waiting_drops: int = 0
    n_bytes: int = 0  # that were copied; of run_due_deletions(): that were deleted

    def followed_by(self, later: ApplyResult) -> ApplyResult:
        """Return the results of two calls as one. The second one has checked again what the first one left."""
        again = {(move.plan, move.number) for move in later.stopped}
        stopped = tuple(move for move in self.stopped if (move.plan, move.number) not in again)
        n_bytes = self.n_bytes + later.n_bytes
        return ApplyResult(self.n_made + later.n_made, stopped + later.stopped, later.waiting_drops, n_bytes)


class HasRow(Protocol):
    row: JournalRow


R = TypeVar("R", bound=HasRow)
Infos: TypeAlias = Mapping[str, "ObjectInfo | None"]

_PROBE_FOLDER = "_tiercache/probe/"


class Heads:
    """Answers of stores about many objects. A look-up raises the StoreError that a store gave as its answer."""

    def __init__(self, answers: Mapping[tuple[str, str], ObjectInfo | StoreError | None]) -> None:
        self._answers = answers

    def info(self, tier: str, key: str) -> ObjectInfo | None:
        info = self._answers[tier, key]
        if isinstance(info, StoreError):
            raise info
        return info

    def is_absent(self, tier: str, key: str) -> bool:
        return self._answers[tier, key] is None

    def infos(self, tier: str, row: JournalRow) -> Infos:
        return {obj.key: self.info(tier, obj.key) for obj in row.objects}


@dataclass(slots=True)
class MoveContext:
    """The tiers that moves work on, with the lock that admits them, threads, and checks. Thread-safe."""

    file: RuleFile
    stores: Stores
    catalog: TierCatalog
    transfer: Transfer
    pool: Executor
    lock: TierLock
    clock: Callable[[], float]
    _shared_reasons: dict[tuple[str, str], str] = field(default_factory=dict)  # results of probe_shared_location()

    # -- objects ----------------------------------------------------------------------------------------------------

    def head(self, tier: str, key: str) -> ObjectInfo | None:
        try:
            return self.stores.head(tier, key)
        except NotFound:
            return None

    def heads(self, pairs: Iterable[tuple[str, str]]) -> Heads:
        def ask(pair: tuple[str, str]) -> ObjectInfo | StoreError | None:
            try:
                return self.head(*pair)
            except StoreError as error:
                return error

        unique = list(dict.fromkeys(pairs))
        return Heads(dict(zip(unique, self.pool.map(ask, unique), strict=True)))

    def has_class(self, tier: str, info: ObjectInfo) -> bool:
        return (info.storage_class or STANDARD) == self.stores.class_of(tier)

    def ends_readability(self, row: JournalRow) -> bool:
        """Return whether a move gives objects, in place, a class from which they must be restored before a read."""
        return row.action == "reclass" and self.stores.class_of(row.dst) in CLASSES_TO_RESTORE

    # -- the copy that is moved -------------------------------------------------------------------------------------

    def change_reason(self, tier: str, info: ObjectInfo, obj: PlannedObject) -> str:
        at = f"{self.stores.store(tier).url}/{obj.key}"
        if (difference := find_difference(obj, info)) is not None:
            what, expected, found = difference
            return f"{at}: expected {f'{expected} bytes' if what == 'size' else f'{what} {expected}'}, found {found}"
        if None not in (info.etag, obj.etag) or None not in (info.modified_s, obj.modified_s):
            return ""
        if obj.crc32c is None:
            return f"{at}: the store says neither ETag nor date, and its checksum is not known: it cannot be compared"
        crc = self.transfer.checksum_of(tier, info)
        return "" if crc == obj.crc32c else f"{at}: expected CRC-32C {obj.crc32c:08x}, found {crc:08x}"

    def extra_object_reason(self, tier: str, path: str, keys: Iterable[str]) -> str:
        planned = set(keys)
        if planned == {path}:
            return ""
        new = [info.key for info in self.stores.listing(tier, f"{path}/") if info.key not in planned]
        if not new:
            return ""
        return f"{self.stores.store(tier).url}/{path}: expected {len(planned)} objects, found {min(new)!r} beside them"

    def unconfirmed_reason(self, tier: str, key: str, info: ObjectInfo | None, entry: CatalogEntry | None) -> str:
        """Return why a copy cannot be relied on; "" if it is the verified one. Raises StoreError.

        If the ETag differs but the bytes are equal (a server may assign a new ETag with a new class), the catalog is
        updated.
        """
        at = f"{self.stores.store(tier).url}/{key}"
        if info is None:
            return f"{at}: expected a verified copy, found none"
        if entry is None or not entry.verified:
            return f"{at}: expected a verified copy, found one that nobody has verified"
        if info.n_bytes != entry.n_bytes:
            return f"{at}: expected the {entry.n_bytes} bytes that were verified, found {info.n_bytes}"
        same_etag = None not in (info.etag, entry.etag) and info.etag == entry.etag
        other_checksum = None not in (info.crc32c, entry.crc32c) and info.crc32c != entry.crc32c
        # With an equal ETag, another checksum proves nothing (moto computes it of something else): the bytes decide.
        # Where they cannot be read, the ETag decides, which real stores derive from the bytes.
        if same_etag and not other_checksum:
            return ""
        if needs_restore(info):
            reason = f"{at}: expected ETag {entry.etag}, found {info.etag}; it must be restored first"
            return "" if same_etag else reason
        if entry.crc32c is None:
            return f"{at}: expected ETag {entry.etag}, found {info.etag}, and its checksum is not known"
        found = self.transfer.checksum_of(tier, info)
        if found != entry.crc32c:
            return f"{at}: expected CRC-32C {entry.crc32c:08x}, found {found:08x}"
        self.catalog.record([(tier, key, entry._replace(etag=info.etag, crc32c=found))])
        return ""

    def unconfirmed_move_reason(self, row: JournalRow, copies: Infos) -> str:
        entries = self.catalog.entries(row.dst, [obj.key for obj in row.objects])
        reasons = (self.unconfirmed_reason(row.dst, key, copies[key], entries.get(key)) for key, *_ in row.objects)
        return next(filter(None, reasons), "")

    def disbelieve(self, tier: str, key: str, entry: CatalogEntry) -> None:
        """Record that a verified copy is damaged: while nobody writes it again, a later move replaces it."""
        self.catalog.record([(tier, key, entry._replace(verified=False))])

    def checksum_of(self, tier: str, info: ObjectInfo, entry: CatalogEntry | None) -> int | None:
        """Return an object's CRC-32C, from the catalog if it was verified, else by reading; None if it is archived."""
        if entry is not None and entry.verified and entry.crc32c is not None and matches_entry(info, entry):
            return entry.crc32c
        if needs_restore(info):
            return None
        return self.transfer.checksum_of(tier, info)

    def remember_dates(self, tier: str, objects: Sequence[PlannedObject]) -> None:
        """Record in the catalog when these objects were first written: a change of class gives them a new date."""
        entries = self.catalog.entries(tier, [obj.key for obj in objects])
        dated = []
        for obj in objects:
            entry = entries.get(obj.key)
            if obj.etag is None or (first_s := first_written_s(obj, entry)) is None:
                continue
            if entry is None or (entry.n_bytes, entry.etag) != (obj.n_bytes, obj.etag):
                entry = CatalogEntry(obj.n_bytes, obj.etag, None, verified=False)
            dated.append((tier, obj.key, entry._replace(written_s=first_s)))
        self.catalog.record(dated)

    # -- checks of a whole move -------------------------------------------------------------------------------------

    def pin_reasons(self, rows: Sequence[JournalRow], now_s: float) -> dict[tuple[str, int], str]:
        """Return the moves that a pin or a hold forbids now, as {(plan, number): reason}.

        The rule file is read again: a run may take days, and a pin that is added during it must count. The pins at the
        start of the run count too, because a file that is read while somebody writes it can be valid TOML and lack
        pins. A hold does not forbid a move into a faster tier, which is how held groups get there. Raises
        TierCacheError where the file or the holds cannot be read now, because the pins are not known then.
        """
        if not rows:
            return {}
        try:
            file = load_rule_file(self.file.path) if self.file.is_from_file else self.file
        except ValueError as error:
            raise TierCacheError(f"expected to read the pins anew, found no rule file: {error}") from error
        both = (*file.pins, *(pin for pin in self.file.pins if pin not in file.pins))
        pins = [pin for pin in both if pin.until_s is None or pin.until_s > now_s]
        reasons = self._hold_reasons(rows, now_s)
        if not pins:
            return reasons
        texts, owners = [], []
        for row in rows:
            for text in {row.path, *(obj.key for obj in row.objects)}:
                texts.append(text)
                owners.append((row.plan, row.number))
        found = first_match(pa.array(texts, pa.large_string()), [(pin.match, ()) for pin in pins])
        for owner, number in zip(owners, found.tolist(), strict=True):
            if number >= 0:
                pin = pins[number]
                reasons[owner] = f"expected no pin, found {', '.join(pin.match)}" + (f" ({pin.why})" if pin.why else "")
        return reasons

    def _hold_reasons(self, rows: Sequence[JournalRow], now_s: float) -> dict[tuple[str, int], str]:
        holds = read_holds(self.stores.store(self.file.home_tier.name), now_s)
        names = [tier.name for tier in self.file.tiers]
        reasons = {}
        for row in rows if holds else ():
            goes_up = {row.src, row.dst} <= {*names} and names.index(row.dst) < names.index(row.src)
            found = None if goes_up else holds.of(row.path)
            if found is not None:
                reasons[row.plan, row.number] = f"expected no hold, found it {found.reason}"
        return reasons

    def changed_tiers_reason(self, row: JournalRow) -> str:
        urls = {tier.name: tier.url for tier in self.file.tiers}
        for name, url in ((row.src, row.src_url), (row.dst, row.dst_url)):
            if name and urls.get(name) != url:
                return f"expected tier {name!r} at {url}, found {urls.get(name, 'no such tier')} in the rule file"
        gone = {obj.tier for obj in row.objects if obj.tier} - urls.keys()
        return f"expected tiers {', '.join(sorted(gone))}, found none of that name in the rule file" if gone else ""

    def ensure_tier_marker(self, tier: str, *, gets: bool = True) -> str:
        try:
            return ensure_mount_marker(self.file.tier(tier), self.stores.store(tier), self.catalog, gets=gets)
        except StoreError as error:
            return str(error)

    def probe_shared_location(self, src: str, dst: str) -> str:
        """Return why two tiers may be one location, whose copies are one copy; "" if they are not. Raises StoreError.

        URLs do not show this: 1. /data/a and /mnt/b are one folder by a link, a mount or NFS. 2. The copy "in both" is
        verified. 3. It is dropped from one tier, and is gone from the other. So a probe object is written to one tier
        and looked up in the other.
        """
        if self.stores.same_url(src, dst):
            return f"tiers {src} and {dst} have one URL"
        if (src, dst) not in self._shared_reasons:
            key, source = f"{_PROBE_FOLDER}{secrets.token_hex(16)}", self.stores.store(src)
            try:
                source.put(key, b"a probe, gone at once\n")
                is_one = self.head(dst, key) is not None
            finally:
                with suppress(StoreError):
                    source.delete([key])
            urls = f"{source.url} and {self.stores.store(dst).url}"
            reason = f"expected two locations, found that {urls} (tiers {src}, {dst}) are one: a drop would delete both"
            self._shared_reasons[src, dst] = reason if is_one else ""
        return self._shared_reasons[src, dst]


@dataclass(frozen=True, slots=True)
class BatchLimits:
    n_moves: int
    n_objects: int
    n_bytes: int


def in_batches(items: Sequence[R], limits: BatchLimits) -> Iterator[list[R]]:
    batch: list[R] = []
    n_objects = n_bytes = 0
    for item in items:
        objects = item.row.objects
        n_objects, n_bytes = n_objects + len(objects), n_bytes + sum(obj.n_bytes for obj in objects)
        if batch and (len(batch) >= limits.n_moves or n_objects > limits.n_objects or n_bytes > limits.n_bytes):
            yield batch
            batch, n_objects, n_bytes = [], len(objects), sum(obj.n_bytes for obj in objects)
        batch.append(item)
    if batch:
        yield batch


def matches_entry(info: ObjectInfo, entry: CatalogEntry) -> bool:
    return info.n_bytes == entry.n_bytes and None not in (info.etag, entry.etag) and info.etag == entry.etag


def first_written_s(obj: PlannedObject, entry: CatalogEntry | None) -> float | None:
    is_it = entry is not None and obj.etag is not None and (entry.n_bytes, entry.etag) == (obj.n_bytes, obj.etag)
    return earliest(obj.modified_s, entry.written_s if entry is not None and is_it else None)


def earliest(*dates_s: float | None) -> float | None:
    return min((date_s for date_s in dates_s if date_s is not None), default=None)


def entry_after_class_change(
    obj: PlannedObject, entry: CatalogEntry | None, changed: CatalogEntry
) -> CatalogEntry | None:
    """Return the new catalog entry of an object whose class was changed; None: nothing changes. entry: The old one."""
    crc = changed.crc32c if changed.crc32c is not None else obj.crc32c
    first_s = obj.modified_s if entry is None else first_written_s(obj, entry)
    if crc is not None:
        return CatalogEntry(changed.n_bytes, changed.etag, crc, first_s)
    if changed.etag in (None, obj.etag):
        return None
    return CatalogEntry(changed.n_bytes, changed.etag, None, written_s=first_s, verified=False)


def is_readable(info: ObjectInfo) -> bool:
    return state_of(info) == READABLE


T = TypeVar("T")
RowChanges: TypeAlias = "dict[str, PlacementRow | None]"


class PlacementUpdates:
    """Updates the placements of one rule file's home tier.

    Each placement log is known by its data set's folder; "" is home's. Keys in a log are relative to that folder.
    Thread-safe. A placement that was read is cached until forget_placements().
    """

    def __init__(self, context: MoveContext) -> None:
        self._context, self._stores = context, context.stores
        self.home_name = context.file.home_tier.name
        self._folders: dict[str, str | None] = {}
        self._placements: dict[str, Placement | None] = {}

    def _folder(self, row: JournalRow) -> str:
        """Return the folder whose placement log covers the objects of a move.

        Raises TierCacheError: .no_data_set: a shard that belongs to no data set at home; or home cannot be queried.
        """
        if row.kind != "shard":
            return ""
        parent = row.path.rpartition("/")[0]
        if parent not in self._folders:
            self._folders[parent] = dataset_folder_above(self._stores.store(self.home_name), parent)
        found = self._folders[parent]
        if found is None:
            url = self._stores.store(self.home_name).url
            message = f"{url}: expected a data set above {row.path}, found none: no versions lie there"
            raise TierCacheError(message, no_data_set=True)
        return found

    def _url(self, tier: str, folder: str) -> str:
        root = self._context.file.tier(tier).url.rstrip("/")
        return f"{root}/{folder}" if folder else root or "/"

    def is_home(self, tier: str) -> bool:
        return self._stores.same_url(tier, self.home_name)

    def deciding_tiers(self, row: JournalRow) -> list[str]:
        return [row.dst] if self.is_home(row.src) or self.is_home(row.dst) else [row.dst, self.home_name]

    def copies_at_home(self, row: JournalRow, heads: Heads) -> Infos:
        return heads.infos(self.home_name, row) if len(self.deciding_tiers(row)) > 1 else {}

    # -- writing placements -----------------------------------------------------------------------------------------

    def changes(self, row: JournalRow, copies: Infos, at_home: Infos) -> tuple[str, RowChanges]:
        """Return the folder and the placement changes of a finished move: a row for each key, or None for "at home".

        copies: Metadata of its objects in dst. at_home: As copies_at_home(). Raises as _folder().
        """
        folder = self._folder(row)
        ends = self._context.ends_readability(row)
        if row.action == "delete" or _is_complete(row, at_home) or (self.is_home(row.dst) and not ends):
            return folder, {_relative(folder, obj.key): None for obj in row.objects}
        entries = self._context.catalog.entries(row.dst, [obj.key for obj in row.objects])
        changes: RowChanges = {}
        for obj in row.objects:
            key, info, entry = _relative(folder, obj.key), copies.get(obj.key), entries.get(obj.key)
            changes[key] = PlacementRow(
                key,
                self._url(row.dst, folder),
                storage_class=self._context.file.tier(row.dst).storage_class,
                state="archived" if ends or (info is not None and not is_readable(info)) else "here",
                n_bytes=obj.n_bytes,
                crc32c=obj.crc32c if entry is None or entry.crc32c is None else entry.crc32c,
            )
        return folder, changes

    def commit(self, changes: Iterable[tuple[T, str, RowChanges]]) -> list[tuple[T, str]]:
        merged: dict[str, RowChanges] = defaultdict(dict)
        owners: dict[str, list[T]] = defaultdict(list)
        for owner, folder, some in changes:
            merged[folder].update(some)
            owners[folder].append(owner)
        failed: list[tuple[T, str]] = []
        for folder, some in merged.items():
            try:
                self._placements[folder] = placement_log.commit_placement(self._log(folder), some)
            except TierCacheError as error:
                self._placements.pop(folder, None)
                failed += [(owner, f"the placement could not be written: {error}") for owner in owners[folder]]
        return failed

    def _log(self, folder: str) -> Store:
        return prefix_store(self._stores.store(self.home_name), folder)

    # -- reading placements -----------------------------------------------------------------------------------------

    def forget_placements(self) -> None:
        self._placements.clear()

    def _row(self, folder: str, key: str) -> PlacementRow | None:
        if folder not in self._placements:
            self._placements[folder] = placement_log.read_placement(self._log(folder))
        found = self._placements[folder]
        return None if found is None else found.find(_relative(folder, key))

    def stale_placement_reason(self, row: JournalRow, at_home: Infos) -> str:
        folder = self._folder(row)
        target = self._url(row.dst, folder)
        for obj in row.objects:
            placed = self._row(folder, obj.key)
            if placed is not None and _equal_urls(placed.url, target):
                if row.action == "reclass" and placed.state != "archived":
                    return f"{row.path}: expected placement to say that it is archived, found {placed.state!r}"
                continue
            is_at_home = placed is None and row.action != "reclass"
            if is_at_home and self.is_home(row.dst):
                continue
            if is_at_home and not self.is_home(row.src) and _is_complete(row, at_home):
                continue
            if placed is None and row.action == "reclass" and not self.is_home(row.dst) and _is_complete(row, at_home):
                continue
            found = self._url(self.home_name, folder) if placed is None else placed.url
            return f"{row.path}: expected placement to lead to {target}, found {found}"
        return ""

    # -- reverting placements ---------------------------------------------------------------------------------------

    def revert(self, rows: Iterable[JournalRow]) -> dict[tuple[str, int], str]:
        """Revert the placement for moves that will not be finished, so that readers return to the source.

        Return {(plan, number): reason} of the moves for which that failed, which does not affect the others.
        """
        changes: list[tuple[JournalRow, str, RowChanges]] = []
        failed: list[tuple[JournalRow, str]] = []
        for row in rows:
            try:
                changes.append((row, *self._reverse_changes(row)))
            except TierCacheError as error:
                if not error.details.get("no_data_set"):  # without a data set, no placement redirects anybody
                    failed.append((row, str(error)))
        return {(row.plan, row.number): reason for row, reason in failed + self.commit(changes)}

    def _reverse_changes(self, row: JournalRow) -> tuple[str, RowChanges]:
        folder = self._folder(row)
        if row.action == "delete":
            return folder, self._rows_of_last_copies(row, folder)
        target = self._url(row.dst, folder)
        placed = [(obj.key, self._row(folder, obj.key)) for obj in row.objects]
        led = [_relative(folder, key) for key, found in placed if found is not None and _equal_urls(found.url, target)]
        if not led or self.is_home(row.src):
            return folder, dict.fromkeys(led)
        infos = self._context.heads((row.src, obj.key) for obj in row.objects).infos(row.src, row)
        for obj in row.objects:
            info = infos[obj.key]
            if info is None or self._context.change_reason(row.src, info, obj):
                return folder, {}
        back = self.changes(replace(row, dst=row.src, dst_url=row.src_url), infos, {})[1]
        return folder, {key: back[key] for key in led}

    def _rows_of_last_copies(self, row: JournalRow, folder: str) -> RowChanges:
        if any(self.is_home(obj.tier) or self._row(folder, obj.key) for obj in row.objects):
            return {}
        keys = {obj.key for obj in row.objects}
        for tier in reversed(self._context.file.tiers):
            objects = tuple(obj for obj in row.objects if obj.tier == tier.name)
            if {obj.key for obj in objects} == keys:
                infos = self._context.heads((tier.name, key) for key in keys).infos(tier.name, row)
                if all(infos.values()):
                    moved = replace(row, action="move", dst=tier.name, dst_url=tier.url, objects=objects)
                    return self.changes(moved, infos, {})[1]
        return {}


def _relative(folder: str, key: str) -> str:
    return key.removeprefix(f"{folder}/") if folder else key


def _is_complete(row: JournalRow, copies: Infos) -> bool:
    found = [(copies.get(obj.key), obj.n_bytes) for obj in row.objects]
    return bool(copies) and all(info is not None and info.n_bytes == n_bytes for info, n_bytes in found)


def _equal_urls(first: str, second: str) -> bool:
    return first.rstrip("/") == second.rstrip("/")


def dataset_folder_above(home_store: Store, folder: str) -> str | None:
    while True:
        prefix = f"{folder}/{VERSIONS_FOLDER}" if folder else VERSIONS_FOLDER
        if next(iter(home_store.list(prefix)), None) is not None:
            return folder
        if not folder:
            return None
        folder = folder.rpartition("/")[0]


def track_ruled(inventory: Inventory, stores: Stores) -> tuple[str, ...]:
    file, snapshot = stores.file, inventory.snapshot
    shards = snapshot.paths.filter(pa.array(snapshot.kind == SHARD))
    ruled = shards.filter(pa.array(first_match(shards, [(rule.match, rule.exclude) for rule in file.rules]) >= 0))
    return _start_tracking(
        stores,
        (
            found.folder.rstrip("/")
            for found in inventory.facts.get("datasets", ())
            if not (found.problem or found.is_tracked)
            and stores.same_url(found.tier, file.home_tier.name)
            and np.any(pc.starts_with(ruled, found.folder).to_numpy(zero_copy_only=False))
        ),
    )


def track_planned(plan: Plan, stores: Stores) -> tuple[str, ...]:
    home_store = stores.store(stores.file.home_tier.name)
    shards = [move.path for move in plan.moves if move.kind == "shard"]
    shards += [refusal.path for refusal in plan.refusals if refusal.kind == "shard"]
    folders = {path.rpartition("/")[0] for path in shards}
    found = {dataset_folder_above(home_store, folder) for folder in folders}
    return _start_tracking(stores, sorted(folder for folder in found if folder is not None))


def _start_tracking(stores: Stores, folders: Iterable[str]) -> tuple[str, ...]:
    home_store, newly_tracked = stores.store(stores.file.home_tier.name), []
    for folder in folders:
        # A store that cannot be written: the moves report that.
        with suppress(StoreError):
            if placement_log.start_tracking(prefix_store(home_store, folder)):
                newly_tracked.append(folder)
    return tuple(newly_tracked)
