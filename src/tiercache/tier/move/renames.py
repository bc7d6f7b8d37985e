"""Renames of older copies: a name that was written again is freed for the newer objects.

An older copy, which lies in one tier, gets the date of its writing in its name. Steps, each of which may be repeated:

1. The objects are those of the plan, and no pin protects them. If their bytes equal those of the newer copy after all
   (somebody has copied them back by hand, or only touched the files), the catalog records that, and nothing is renamed;
   a copy in a faster tier is held (hand_copies.py).
2. The journal records the rename.
3. Each object is copied under its new key in the same tier, the completing object last. In a local
   folder, the file gets a second name (a hard link), and no byte is copied.
4. The placement leads readers of the new name to the tier, and no reader of the old name to the older copy.
5. The objects are checked once more, and deleted under their old keys: the completing object first.
   The delete request to S3 names the ETag, and a local file is checked directly before it is unlinked. Other stores
   have no such request: what is written there between the check and the deletion is lost.
6. The journal and the catalog record the new names.

A killed rename is finished by the next run, before it takes the inventory: finish_renames(). There is no grace period:
the writer of the newer objects has replaced what readers of the old name want.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tiercache.catalog.tiers import CatalogEntry, JournalRow, MoveState, PlannedObject
from tiercache.crash_points import crash_point
from tiercache.errors import CommitConflict, StoreError, TierCacheError
from tiercache.store import LocalFolder
from tiercache.tier.inventory.layouts import undated_path
from tiercache.tier.inventory.rewritten import renamed_key
from tiercache.tier.move.checks import Heads, StoppedMove, first_written_s
from tiercache.tier.move.hand_copies import HandCopy, hold_hand_copies
from tiercache.tier.move.placement_updates import PlacementUpdates
from tiercache.tier.stores import needs_restore

if TYPE_CHECKING:
    from tiercache.model import ObjectInfo
    from tiercache.tier.move.checks import MoveContext


def finish_renames(context: MoveContext) -> list[StoppedMove]:
    """Finish the renames that were interrupted. Return those that cannot be finished now.

    Raises CommitConflict if the tier lock was lost.
    """
    stopped = []
    placements = PlacementUpdates(context)
    for row in context.catalog.open_moves(context.file.home_tier.url, "begun"):
        if row.action == "rename" and row.src_url == context.catalog.url(row.src):
            reason = _Rename(context, placements, row).run(is_begun=True)
            if reason:
                stopped.append(StoppedMove(row.number, reason, row.path, row.plan))
    return stopped


def rename_older_copy(
    context: MoveContext, placements: PlacementUpdates, row: JournalRow
) -> tuple[str, HandCopy | None]:
    """Rename the objects of an older copy. Return the reason why that was not done; "" if it was, or need not be.

    The second result is the newer copy, if it is a copy that somebody made by hand, and that is held now. Raises
    CommitConflict if the tier lock was lost.
    """
    rename = _Rename(context, placements, row)
    return rename.run(is_begun=False), rename.hand_copy


@dataclass(slots=True)
class _Rename:
    """One rename. row: Its objects have their old keys; its path is the new one."""

    context: MoveContext
    placements: PlacementUpdates
    row: JournalRow
    hand_copy: HandCopy | None = None

    def run(self, *, is_begun: bool) -> str:
        """Make the steps. is_begun: Whether the journal has the rename: some objects may have their new keys only."""
        context = self.context
        try:
            context.lock.check()
            left = self._objects_left(is_begun=is_begun)
            if left and (reason := self._pin_reason()):
                return self._end("cancelled", reason)
            if not is_begun and self._equals_newer():
                return ""
            self._write("begun")
            crash_point("tier_rename.begun")
            for obj in left:
                self._copy(obj)
                crash_point("tier_rename.object")
            self._commit_placement()
            crash_point("tier_rename.placed")
            self._delete(left)
            self._record()
        except _Changed as error:
            return self._end("cancelled", str(error))
        except CommitConflict:
            raise
        except TierCacheError as error:
            return self._end("begun", str(error))
        self._write("done")
        return ""

    def _end(self, state: MoveState, reason: str) -> str:
        self._write(state, reason)
        return reason

    def _write(self, state: MoveState, note: str = "") -> None:
        self.context.catalog.write([replace(self.row, state=state, note=note, changed_s=self.context.clock())])

    def _new_key(self, obj: PlannedObject) -> str:
        return renamed_key(obj.key, self.row.path)

    def _objects_left(self, *, is_begun: bool) -> list[PlannedObject]:
        """Return the objects that still have their old keys. Raises _Changed if one is not the planned one."""
        context, row, left = self.context, self.row, []
        heads = context.heads((row.src, obj.key) for obj in row.objects)
        for obj in row.objects:
            info = heads.info(row.src, obj.key)
            if info is None:
                made = context.head(row.src, self._new_key(obj)) if is_begun else None
                if made is None or made.n_bytes != obj.n_bytes:
                    raise _Changed(f"{row.src_url}/{obj.key}: expected {obj.n_bytes} bytes, found nothing")
                continue
            if reason := context.change_reason(row.src, info, obj):
                # The second name of a file has changed its ETag: it is this file under both names.
                made = context.head(row.src, self._new_key(obj)) if is_begun else None
                if made is None or self._is_changed(obj, info, made):
                    raise _Changed(reason)
            left.append(obj._replace(etag=info.etag, modified_s=info.modified_s))
        old = undated_path(row.path)
        if not is_begun and (reason := context.extra_object_reason(row.src, old, [obj.key for obj in row.objects])):
            raise _Changed(reason)
        return left

    def _pin_reason(self) -> str:
        return self.context.pin_reasons([self.row], self.context.clock()).get((self.row.plan, self.row.number), "")

    def _equals_newer(self) -> bool:
        """Return whether another tier has the same bytes under the old keys; the catalog then has them as verified."""
        context, row = self.context, self.row
        entries = context.catalog.entries(row.src, [obj.key for obj in row.objects])
        for tier in context.file.tiers:
            if context.stores.same_url(tier.name, row.src):
                continue
            infos = {obj.key: context.head(tier.name, obj.key) for obj in row.objects}
            if any(info is None or info.n_bytes != obj.n_bytes for obj in row.objects for info in [infos[obj.key]]):
                continue
            equal: dict[str, CatalogEntry] = {}
            for obj in row.objects:
                info, entry = infos[obj.key], entries.get(obj.key)
                crc = obj.crc32c if obj.crc32c is not None or entry is None else entry.crc32c
                if info is None or crc is None or self._checksum(tier.name, info) != crc:
                    break
                written_s = first_written_s(obj, entry)
                known = entry is not None and entry.is_verified
                equal[info.key] = CatalogEntry(info.n_bytes, info.etag, crc, "", written_s, known)
            if len(equal) == len(row.objects):
                newer = HandCopy(tier.name, equal)
                if context.file.tiering.hold_s > 0 and context.file.index(tier.name) < context.file.index(row.src):
                    hold_hand_copies(context, {undated_path(row.path): newer})
                    self.hand_copy = newer
                else:
                    context.catalog.record([(tier.name, key, entry) for key, entry in equal.items()])
                return True
        return False

    def _checksum(self, tier: str, info: ObjectInfo) -> int | None:
        entry = self.context.catalog.entries(tier, [info.key]).get(info.key)
        return self.context.checksum_of(tier, info, entry)

    def _copy(self, obj: PlannedObject) -> None:
        """Give an object its new key too. Raises StoreError if another object has that key."""
        context, row, key = self.context, self.row, self._new_key(obj)
        made = context.head(row.src, key)
        if made is not None:
            same_file = made.etag is not None and made.etag == obj.etag
            if not same_file and (
                made.n_bytes != obj.n_bytes or self._sum_of(key, made) != self._sum_of(obj.key, None)
            ):
                where = f"{row.src_url}/{key}"
                raise _Changed(f"{where}: expected nothing there, or a copy of {obj.key}; found another object")
            return
        context.transfer.copy_within(row.src, obj, key)

    def _sum_of(self, key: str, info: ObjectInfo | None) -> int | None:
        info = info or self.context.head(self.row.src, key)
        if info is None:
            return None
        return info.crc32c if needs_restore(info) else self._checksum(self.row.src, info)

    def _commit_placement(self) -> None:
        """Lead readers of the new keys to the tier, and readers of the old keys to no older copy."""
        context, row, placements = self.context, self.row, self.placements
        placements.forget_placements()
        moved = tuple(obj._replace(key=self._new_key(obj)) for obj in row.objects)
        infos = {obj.key: context.head(row.src, obj.key) for obj in moved}
        as_move = replace(row, action="move", dst=row.src, dst_url=row.src_url, objects=moved)
        _, changes = placements.changes(as_move, infos, {})
        changes |= dict.fromkeys(placements.keys_led_to(row.src, [obj.key for obj in row.objects]))
        for _, reason in placements.commit([(row, "", changes)]):
            raise TierCacheError(reason)

    def _delete(self, left: Sequence[PlannedObject]) -> None:
        """Delete the objects under their old keys; the last one is the completing object, and is deleted first."""
        context, row = self.context, self.row
        if pinned := self._pin_reason():
            raise _Changed(pinned)
        context.lock.announce([(row.src_url, undated_path(row.path))])
        crash_point("tier_rename.decided")  # a pin that is added from here on is too late
        heads = context.heads([(row.src, obj.key) for obj in left] + [(row.src, self._new_key(obj)) for obj in left])
        now: list[PlannedObject] = []
        for obj in left:
            info, made = heads.info(row.src, obj.key), heads.info(row.src, self._new_key(obj))
            if made is None or made.n_bytes != obj.n_bytes:
                raise TierCacheError(f"{row.src_url}/{self._new_key(obj)}: expected a copy of {obj.key}, found none")
            if info is None:
                continue
            if self._is_changed(obj, info, made):
                # Both names of a local file that was written in place lead to the new bytes.
                linked = [self._new_key(one) for one in left if self._is_linked(heads, one)]
                context.stores.store(row.src).delete(linked)
                raise _Changed(f"{row.src_url}/{obj.key}: it was written again during its rename, and stays")
            now.append(obj._replace(etag=info.etag, modified_s=info.modified_s))
        crash_point("tier_rename.checked")
        last = [obj for obj in now if obj.key == row.objects[-1].key]
        context.transfer.delete_objects(row.src, last)
        crash_point("tier_rename.unmade")
        context.transfer.delete_objects(row.src, [obj for obj in now if obj not in last])
        crash_point("tier_rename.deleted")
        store, old = context.stores.store(row.src), undated_path(row.path)
        if isinstance(store, LocalFolder) and all(obj.key != old for obj in row.objects):
            with suppress(StoreError):  # an empty folder is only cosmetic
                store.remove_empty(old)

    def _is_changed(self, obj: PlannedObject, info: ObjectInfo, made: ObjectInfo) -> bool:
        """Return whether an object is no longer the one that was copied.

        A second name changes the ETag of a file in a local folder, and neither its size nor its date.
        """
        if not self.context.change_reason(self.row.src, info, obj):
            return False
        return made.etag != info.etag or (info.n_bytes, info.modified_s) != (obj.n_bytes, obj.modified_s)

    def _is_linked(self, heads: Heads, obj: PlannedObject) -> bool:
        """Return whether the two keys of an object are two names of one file."""
        info, made = heads.info(self.row.src, obj.key), heads.info(self.row.src, self._new_key(obj))
        is_local = isinstance(self.context.stores.store(self.row.src), LocalFolder)
        return is_local and info is not None and made is not None and info.etag == made.etag

    def _record(self) -> None:
        """Record the objects under their new keys in the catalog, with their checksums and dates."""
        context, row, made = self.context, self.row, []
        entries = context.catalog.entries(row.src, [obj.key for obj in row.objects])
        for obj in row.objects:
            key, entry = self._new_key(obj), entries.get(obj.key)
            info = context.head(row.src, key)
            if info is None or info.etag is None:
                continue
            crc = obj.crc32c if obj.crc32c is not None or entry is None else entry.crc32c
            is_verified = crc is not None and entry is not None and entry.is_verified
            made.append(
                (row.src, key, CatalogEntry(info.n_bytes, info.etag, crc, "", first_written_s(obj, entry), is_verified))
            )
        context.catalog.record(made)
        context.catalog.forget([(row.src, obj.key) for obj in row.objects])


class _Changed(Exception):
    """An object is not the one that the rename planned: the rename is cancelled."""
