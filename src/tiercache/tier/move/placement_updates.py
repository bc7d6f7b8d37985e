"""Placement updates of moves, written before anything that readers use is deleted, and the start of use tracking."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tiercache.errors import StoreError, TierCacheError
from tiercache.tier.model import SHARD
from tiercache.tier.move.checks import is_readable
from tiercache.tier.placement import log
from tiercache.tier.placement.log import Placement, PlacementRow, prefix_store
from tiercache.tier.stores import RESTORED_FIRST
from tiercache.tier.text_columns import first_match

if TYPE_CHECKING:
    from tiercache.catalog.tiers import JournalRow
    from tiercache.model import ObjectInfo
    from tiercache.store import Store
    from tiercache.tier.inventory.groups import Inventory
    from tiercache.tier.model import Plan
    from tiercache.tier.move.checks import Infos, MoveContext
    from tiercache.tier.stores import Stores


RowChanges: TypeAlias = "dict[str, PlacementRow | None]"
Heads: TypeAlias = "Mapping[tuple[str, str], ObjectInfo | StoreError | None]"

_VERSIONS = "_tiercache/versions/"


class PlacementUpdates:
    """Updates the placements of one rule file's home tier.

    Each placement log is known by its data set's folder; "" is home's. Thread-safe. A placement that was read is cached
    until forget_placements().
    """

    def __init__(self, context: MoveContext) -> None:
        self._context = context
        self._file, self._stores = context.file, context.stores
        self.home = context.file.home.name
        self._folders: dict[str, str | None] = {}
        self._read: dict[str, Placement | None] = {}

    # -- which placement log ----------------------------------------------------------------------------------------

    def folder(self, row: JournalRow) -> str:
        """Return the folder whose placement log covers the objects of a move.

        Raises:
            TierCacheError: .no_data_set: a shard that belongs to no data set at home; or home cannot be queried.
        """
        if row.kind != "shard":
            return ""
        parent = row.path.rpartition("/")[0]
        if parent not in self._folders:
            self._folders[parent] = dataset_folder_above(self._stores.store(self.home), parent)
        found = self._folders[parent]
        if found is None:
            url = self._stores.store(self.home).url
            message = f"{url}: expected a data set above {row.path}, found none: no versions lie there"
            raise TierCacheError(message, no_data_set=True)
        return found

    def chain(self, folder: str) -> Store:
        """Return the store whose placement log covers the objects below a folder."""
        return prefix_store(self._stores.store(self.home), folder)

    def url(self, tier: str, folder: str) -> str:
        """Return the URL of a folder in a tier, as placement rows have it."""
        root = self._file.tier(tier).url.rstrip("/")
        return f"{root}/{folder}" if folder else root or "/"

    def is_home(self, tier: str) -> bool:
        """Return whether a tier has the same location as home."""
        return self._stores.same_url(tier, self.home)

    # -- writing placements -----------------------------------------------------------------------------------------

    def wanted(self, row: JournalRow, there: Infos, at_home: Infos) -> RowChanges:
        """Return the placement changes for a finished move, by key in its placement log: a row, or None for "at home".

        Args:
            row: Journal row of the move.
            there: Metadata of its objects in dst.
            at_home: Metadata of its objects at home; empty where home is src or dst.
        """
        folder = self.folder(row)
        start = f"{folder}/" if folder else ""
        if row.action == "delete" or self._home_has(row, at_home):
            return {one.key.removeprefix(start): None for one in row.objects}
        ends = ends_readability(self._context, row)
        if self.is_home(row.dst) and not ends:
            return {one.key.removeprefix(start): None for one in row.objects}
        books = self._context.catalog.entries(row.dst, [one.key for one in row.objects])
        changes: RowChanges = {}
        for one in row.objects:
            key, info, known = one.key.removeprefix(start), there.get(one.key), books.get(one.key)
            changes[key] = PlacementRow(
                key,
                self.url(row.dst, folder),
                storage_class=self._file.tier(row.dst).storage_class,
                state="archived" if ends or (info is not None and not is_readable(info)) else "here",
                n_bytes=one.n_bytes,
                crc32c=one.crc32c if known is None or known.crc32c is None else known.crc32c,
            )
        return changes

    def _home_has(self, row: JournalRow, at_home: Infos) -> bool:
        if not at_home:
            return False
        found = [at_home.get(one.key) for one in row.objects]
        pairs = zip(found, row.objects, strict=True)
        return all(info is not None and info.n_bytes == one.n_bytes for info, one in pairs)

    def commit(self, changes: Mapping[str, RowChanges]) -> dict[str, str]:
        """Commit the changes of each placement log, and return {folder: reason} of the logs for which that failed."""
        failed: dict[str, str] = {}
        for folder, some in changes.items():
            try:
                self._read[folder] = log.commit_placement(self.chain(folder), some)
            except TierCacheError as error:
                self._read.pop(folder, None)
                failed[folder] = f"the placement could not be written: {error}"
        return failed

    def forget_placements(self) -> None:
        """Drop the cached placements, so that they are read again."""
        self._read.clear()

    # -- checking placements ----------------------------------------------------------------------------------------

    def _said(self, folder: str, key: str) -> PlacementRow | None:
        if folder not in self._read:
            self._read[folder] = log.read_placement(self.chain(folder))
        found = self._read[folder]
        return None if found is None else found.find(key)

    def unredirected_reason(self, row: JournalRow, at_home: Infos) -> str:
        """Return why readers would still look where a move deletes; "" if all are redirected.

        Raises as log.read_placement().
        """
        folder = self.folder(row)
        start = f"{folder}/" if folder else ""
        there = self.url(row.dst, folder)
        for one in row.objects:
            said = self._said(folder, one.key.removeprefix(start))
            if said is not None and equal_urls(said.url, there):
                if row.action == "reclass" and said.state != "archived":
                    return f"{row.path}: expected placement to say that it is archived, found {said.state!r}"
                continue
            where = self.url(self.home, folder) if said is None else said.url
            is_at_home = said is None and row.action != "reclass"
            if is_at_home and self.is_home(row.dst):
                continue
            if is_at_home and not self.is_home(row.src) and self._home_has(row, at_home):
                continue
            if row.action == "reclass" and said is None and not self.is_home(row.dst) and self._home_has(row, at_home):
                continue
            return f"{row.path}: expected placement to lead to {there}, found {where}"
        return ""

    def take_back(self, rows: Iterable[JournalRow]) -> dict[tuple[str, int], str]:
        """Revert the placement for moves that will not be finished, so that readers return to the source.

        Returns:
            {(plan, number): reason} of the moves for which that failed. A failure of one move does not affect the
            others.
        """
        changes: dict[str, RowChanges] = defaultdict(dict)
        chains: dict[str, list[JournalRow]] = defaultdict(list)
        failed: dict[tuple[str, int], str] = {}
        for row in rows:
            try:
                folder = self.folder(row)
                changes[folder].update(self._way_back(row, folder))
                chains[folder].append(row)
            except TierCacheError as error:
                if not error.details.get("no_data_set"):  # without a data set, no placement redirects anybody
                    failed[row.plan, row.number] = str(error)
        for folder, why in self.commit(changes).items():
            failed.update({(row.plan, row.number): why for row in chains[folder]})
        return failed

    def _way_back(self, row: JournalRow, folder: str) -> RowChanges:
        """Return the changes that undo the redirect of a move, or its removal of rows. Raises as read_placement()."""
        if row.action == "delete":
            return self._still_there(row, folder)
        start, there = f"{folder}/" if folder else "", self.url(row.dst, folder)
        keys = [one.key.removeprefix(start) for one in row.objects]
        said = {key: self._said(folder, key) for key in keys}
        led = [key for key, one in said.items() if one is not None and equal_urls(one.url, there)]
        back = self._back(row, keys) if led else {}
        return {key: back[key] for key in led if key in back}

    def _still_there(self, row: JournalRow, folder: str) -> RowChanges:
        """Return rows for the objects of a cancelled delete, if the placement has none of them and home has no copy."""
        start, keys = f"{folder}/" if folder else "", {one.key for one in row.objects}
        if any(self.is_home(one.where) or self._said(folder, one.key.removeprefix(start)) for one in row.objects):
            return {}
        for tier in reversed(self._file.tiers):
            objects = tuple(one for one in row.objects if one.where == tier.name)
            if {one.key for one in objects} == keys:
                infos = self._context.infos(tier.name, keys)
                if all(infos.values()):
                    moved = replace(row, action="move", dst=tier.name, dst_place=tier.url, objects=objects)
                    return self.wanted(moved, infos, {})
        return {}

    def _back(self, row: JournalRow, keys: Iterable[str]) -> RowChanges:
        """Return rows that lead to a move's objects in src; nothing if they are not there unchanged."""
        if self.is_home(row.src):
            return dict.fromkeys(keys)
        infos = self._context.infos(row.src, [one.key for one in row.objects])
        for one in row.objects:
            info = infos[one.key]
            if info is None or self._context.change_reason(row.src, info, one):
                return {}
        return self.wanted(replace(row, dst=row.src, dst_place=row.src_place), infos, {})


def dataset_folder_above(home: Store, folder: str) -> str | None:
    """Return the nearest folder, from `folder` upwards, that holds versions of a data set. Raises StoreError."""
    while True:
        prefix = f"{folder}/{_VERSIONS}" if folder else _VERSIONS
        if next(iter(home.list(prefix)), None) is not None:
            return folder
        if not folder:
            return None
        folder = folder.rpartition("/")[0]


def ends_readability(context: MoveContext, row: JournalRow) -> bool:
    """Return whether a move gives objects, in place, a class from which they must be restored before a read."""
    return row.action == "reclass" and context.stores.class_of(row.dst) in RESTORED_FIRST


def equal_urls(first: str, second: str) -> bool:
    """Return whether two folder URLs are equal, apart from a "/" at the end."""
    return first.rstrip("/") == second.rstrip("/")


def found_infos(heads: Heads, tier: str, row: JournalRow) -> dict[str, ObjectInfo | None]:
    """Return the metadata of a move's objects in a tier, by key. Raises the StoreError recorded for an object."""
    found: dict[str, ObjectInfo | None] = {}
    for one in row.objects:
        found[one.key] = found_in(heads, tier, one.key)
    return found


def found_in(heads: Heads, tier: str, key: str) -> ObjectInfo | None:
    """Return the metadata of an object in a tier; None if it is absent. Raises the StoreError recorded for it."""
    info = heads[tier, key]
    if isinstance(info, StoreError):
        raise info
    return info


def track_ruled(inventory: Inventory, stores: Stores) -> tuple[str, ...]:
    """Start tracking the data sets at home that a rule covers. Return the folders of the newly tracked ones."""
    file, snapshot = stores.file, inventory.snapshot
    shards = snapshot.paths.filter(pa.array(snapshot.kind == SHARD))
    ruled = shards.filter(pa.array(first_match(shards, [(rule.match, rule.exclude) for rule in file.rules]) >= 0))
    return _adopted(
        stores,
        (
            found.folder.rstrip("/")
            for found in inventory.facts.get("datasets", ())
            if not (found.problem or found.is_adopted)
            and stores.same_url(found.tier, file.home.name)
            and np.any(pc.starts_with(ruled, found.folder).to_numpy(zero_copy_only=False))
        ),
    )


def track_planned(plan: Plan, stores: Stores) -> tuple[str, ...]:
    """Start tracking the data sets at home whose shards a plan moves or refuses. Return the newly tracked folders."""
    home = stores.store(stores.file.home.name)
    shards = [one.path for one in plan.moves if one.kind == "shard"]
    shards += [one.path for one in plan.refusals if one.kind == "shard"]
    folders = {path.rpartition("/")[0] for path in shards}
    found = {dataset_folder_above(home, folder) for folder in folders}
    return _adopted(stores, sorted(folder for folder in found if folder is not None))


def _adopted(stores: Stores, folders: Iterable[str]) -> tuple[str, ...]:
    home, adopted = stores.store(stores.file.home.name), []
    for folder in folders:
        # A store that cannot be written: the moves report that.
        with suppress(StoreError):
            if log.start_tracking(prefix_store(home, folder)):
                adopted.append(folder)
    return tuple(adopted)
