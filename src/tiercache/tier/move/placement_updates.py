"""Placement updates of moves, written before anything that readers use is deleted, and the start of use tracking."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tiercache.errors import StoreError, TierCacheError
from tiercache.shard.versions import VERSIONS_FOLDER
from tiercache.store import placement_log
from tiercache.store.placement_log import Placement, PlacementRow, prefix_store
from tiercache.tier.model import SHARD
from tiercache.tier.move.checks import is_readable
from tiercache.tier.text_columns import first_match

if TYPE_CHECKING:
    from tiercache.store import Store
    from tiercache.tier.inventory.groups import Inventory
    from tiercache.tier.journal import JournalRow
    from tiercache.tier.model import Plan
    from tiercache.tier.move.checks import Heads, Infos, MoveContext
    from tiercache.tier.stores import Stores


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
        """Return the URL of a folder in a tier, as placement rows have it."""
        root = self._context.file.tier(tier).url.rstrip("/")
        return f"{root}/{folder}" if folder else root or "/"

    def is_home(self, tier: str) -> bool:
        """Return whether a tier has the same location as home."""
        return self._stores.same_url(tier, self.home_name)

    def deciding_tiers(self, row: JournalRow) -> list[str]:
        """Return the tiers whose copies decide about the placement: dst, and home where it is neither src nor dst."""
        return [row.dst] if self.is_home(row.src) or self.is_home(row.dst) else [row.dst, self.home_name]

    def copies_at_home(self, row: JournalRow, heads: Heads) -> Infos:
        """Return the metadata of a move's objects at home; nothing where home is src or dst."""
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
        """Commit the changes of moves, each with its folder. Return the moves for which that failed, with reasons."""
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
        """Drop the cached placements, so that they are read again."""
        self._placements.clear()

    def _row(self, folder: str, key: str) -> PlacementRow | None:
        """Return the placement row of an object; None if it is at home. key: Relative to home."""
        if folder not in self._placements:
            self._placements[folder] = placement_log.read_placement(self._log(folder))
        found = self._placements[folder]
        return None if found is None else found.find(_relative(folder, key))

    def keys_led_to(self, tier: str, keys: Iterable[str]) -> list[str]:
        """Return those of the keys of files and checkpoints for which the home's placement leads readers to a tier.

        Raises as read_placement().
        """
        url = self._url(tier, "")
        placed = [(key, self._row("", key)) for key in keys]
        return [key for key, found in placed if found is not None and _equal_urls(found.url, url)]

    def stale_placement_reason(self, row: JournalRow, at_home: Infos) -> str:
        """Return why readers would still look where a move deletes; "" if all are redirected.

        Raises as read_placement().
        """
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
        """Return the folder, and the changes that undo the redirect of a move. Raises as read_placement()."""
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
        """Return rows for the objects of a cancelled delete, if the placement has none of them and home has no copy."""
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
    """Return whether these copies are all objects of a move, by their sizes."""
    found = [(copies.get(obj.key), obj.n_bytes) for obj in row.objects]
    return bool(copies) and all(info is not None and info.n_bytes == n_bytes for info, n_bytes in found)


def _equal_urls(first: str, second: str) -> bool:
    return first.rstrip("/") == second.rstrip("/")


def dataset_folder_above(home_store: Store, folder: str) -> str | None:
    """Return the nearest folder, from `folder` upwards, that holds versions of a data set. Raises StoreError."""
    while True:
        prefix = f"{folder}/{VERSIONS_FOLDER}" if folder else VERSIONS_FOLDER
        if next(iter(home_store.list(prefix)), None) is not None:
            return folder
        if not folder:
            return None
        folder = folder.rpartition("/")[0]


def track_ruled(inventory: Inventory, stores: Stores) -> tuple[str, ...]:
    """Start tracking the data sets at home that a rule covers. Return the folders of the newly tracked ones."""
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
    """Start tracking the data sets at home whose shards a plan moves or refuses. Return the newly tracked folders."""
    home_store = stores.store(stores.file.home_tier.name)
    shards = [move.path for move in plan.moves if move.kind == "shard"]
    shards += [refusal.path for refusal in plan.refusals if refusal.kind == "shard"]
    folders = {path.rpartition("/")[0] for path in shards}
    found = {dataset_folder_above(home_store, folder) for folder in folders}
    return _start_tracking(stores, sorted(folder for folder in found if folder is not None))


def _start_tracking(stores: Stores, folders: Iterable[str]) -> tuple[str, ...]:
    """Start tracking data sets at home. Return the folders of the newly tracked ones."""
    home_store, newly_tracked = stores.store(stores.file.home_tier.name), []
    for folder in folders:
        # A store that cannot be written: the moves report that.
        with suppress(StoreError):
            if placement_log.start_tracking(prefix_store(home_store, folder)):
                newly_tracked.append(folder)
    return tuple(newly_tracked)
