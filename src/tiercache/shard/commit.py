"""Commit: makes shards a new version by one put-if-absent of the next number, which one of all writers wins."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, get_args

import pyarrow as pa

from tiercache.errors import CommitConflict, NotFound, StoreError
from tiercache.model import ShardInfo
from tiercache.shard.schema import Schema, check_same_schema
from tiercache.shard.versions import (
    HINT_KEY,
    SegmentRef,
    Version,
    VersionKind,
    check_writable,
    encode_version,
    fingerprint_of,
    latest,
    new_segment,
    newest_from,
    pack_segment,
    read_segments,
    read_version,
    version_log,
)
from tiercache.store.contract import Store

# Each lost race means that another append was committed; after a hundred losses in a row the writer gives up.
MAX_REBASES = 100
MAX_SEGMENTS = 64


def check_mode(mode: str) -> None:
    if mode not in get_args(VersionKind):
        raise ValueError(f"mode is 'create', 'append' or 'overwrite', got {mode!r}")


class Commit:
    """A commit of finished shards, from the first attempt until its result is known. For one thread at a time.

    Args:
        store: Store of the data set.
        infos: New shards, in data-set order.
        schema: Schema of the shards.
        mode: "create", "append" or "overwrite".
        parent: Version that an overwrite replaces, and from which an append starts to look for the newest version.
        writer_id: Identifier by which the commit, with a nonce of its own, recognises its version.
    """

    def __init__(
        self,
        store: Store,
        infos: Sequence[ShardInfo],
        *,
        schema: Schema,
        mode: VersionKind,
        parent: Version | None = None,
        writer_id: str | None = None,
    ) -> None:
        check_mode(mode)
        self._store, self._infos, self._schema, self._mode, self._parent = store, tuple(infos), schema, mode, parent
        self._writer_id, self._nonce = writer_id or secrets.token_hex(16), secrets.token_hex(16)
        self._own: tuple[SegmentRef, ...] | None = None
        self._unsettled: Version | None = None
        self._landed: Version | None = None

    def run(self) -> Version:
        """Commit, and return the version that contains the shards. A repeated call returns the same version.

        An append without shards commits nothing and returns the newest version.

        Raises:
            CommitConflict: Another writer committed first, or a data set exists already (create).
            NotFound: There is no data set to append to.
            SchemaError: The schema of an append differs from that of the data set.
            UnsupportedFormat: Only a later release may write to the data set.
            StoreError: The store failed. If .maybe_done is true, the commit may have happened (.number, .nonce): call
                run() again.
        """
        if self._landed is None:
            self._landed = self._land()
        return self._landed

    def _land(self) -> Version:
        base = None if self._unsettled else self._base()
        for _ in range(MAX_REBASES):
            if base is not None and self._mode == "append" and not self._infos:
                return base
            version = self._unsettled or self._next(base)
            standing = self._put(version)
            self._unsettled = None
            if (standing.writer, standing.nonce) == (version.writer, version.nonce):
                self._hint(version)
                return version
            base = self._rebase(standing)
        raise CommitConflict(f"lost {MAX_REBASES} races against other appends; try again later", url=self._store.url)

    def _base(self) -> Version | None:
        """Return the version on which the first attempt is based."""
        parent = self._parent
        if self._mode == "overwrite" and parent is not None:
            return parent
        newest = (newest_from(self._store, parent.number) if parent else None) or find_latest(self._store)
        if self._mode == "create" and newest is not None:
            raise data_set_exists_error(self._store, newest)
        if self._mode == "append":
            if newest is None:
                raise no_data_set_error(self._store)
            self._check_base(newest)
        return newest

    def _rebase(self, winner: Version) -> Version:
        """Return the base of the next attempt, after winner took the number of this attempt."""
        mode, number = self._mode, winner.number
        if mode == "create":
            raise data_set_exists_error(self._store, winner)
        if mode == "overwrite":
            raise CommitConflict(
                f"version {number} was committed by writer {winner.writer} ({winner.kind}) before this overwrite; "
                "nothing was changed: inspect that version, and overwrite again if it may be replaced",
                url=self._store.url,
                number=number,
            )
        newest = newest_from(self._store, number) or winner
        self._check_base(newest)
        return newest

    def _check_base(self, base: Version) -> None:
        parent = self._parent
        if parent is not None and parent.dataset_id != base.dataset_id:
            raise CommitConflict(
                "the data set was replaced by another one meanwhile", url=self._store.url, number=base.number
            )
        check_same_schema(base.schema, self._schema)

    def _next(self, base: Version | None) -> Version:
        if base is not None:
            check_writable(base, self._store.url)
        refs = self._segments(base)
        number = base.number + 1 if base else 1
        dataset_id = base.dataset_id if base else secrets.token_hex(16)
        appended = base if base is not None and self._mode == "append" else None
        schema_bytes = appended.schema_bytes if appended else self._schema.to_bytes()
        n_records = sum(info.n_records for info in self._infos) + (appended.n_records if appended else 0)
        return Version(
            dataset_id=dataset_id,
            number=number,
            parent=base.number if base else None,
            kind=self._mode if base else "create",
            schema_bytes=schema_bytes,
            writer=self._writer_id,
            nonce=self._nonce,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            fingerprint=fingerprint_of(dataset_id, number, schema_bytes, n_records, [ref.digest for ref in refs]),
            n_records=n_records,
            n_bytes=sum(info.n_bytes for info in self._infos) + (appended.n_bytes if appended else 0),
            segments=refs,
        )

    def _segments(self, base: Version | None) -> tuple[SegmentRef, ...]:
        """Return the segments of the next version, after the new ones are written to the store."""
        if self._own is None:
            self._own = (self._write(new_segment(self._infos)),) if self._infos else ()
        if base is None or self._mode != "append":
            return self._own
        refs = (*base.segments, *self._own)
        start = plan_merge([ref.n_shards for ref in refs])
        if start == len(refs):
            return refs
        # The new segment is read back with the others, which keeps one code path; merging is rare.
        tables = read_segments(self._store, base.dataset_id, refs[start:])
        return (*refs[:start], self._write(pack_segment(pa.concat_tables(tables))))

    def _write(self, segment: tuple[SegmentRef, bytes]) -> SegmentRef:
        ref, data = segment
        if len(data) <= self._store.min_part_bytes:
            self._store.put(ref.key, data)
            return ref
        view, part_bytes = memoryview(data), max(self._store.min_part_bytes, 16 << 20)
        with self._store.create(ref.key) as upload:
            for number, start in enumerate(range(0, len(data), part_bytes)):
                upload.put_part(number, view[start : start + part_bytes])
            upload.complete()
        return ref

    def _put(self, version: Version) -> Version:
        """Put a version if its number is free. Returns the version that has the number now: this one or another."""
        try:
            if version_log(self._store).put(version.number, encode_version(version)):
                return version
            return read_version(self._store, version.number)
        except StoreError as error:
            if error.maybe_done:
                raise self._lost(version) from error
            raise

    def _lost(self, version: Version) -> StoreError:
        self._unsettled = version
        return StoreError(
            f"the commit of version {version.number} may have happened: the store's response was lost, and the version "
            f"cannot be read back; call close() again to find out (writer {version.writer}, nonce {version.nonce})",
            url=self._store.url,
            retryable=True,
            maybe_done=True,
            number=version.number,
            nonce=version.nonce,
        )

    def _hint(self, version: Version) -> None:
        # Readers probe upward from the hint, so an outdated hint only costs a few requests.
        with suppress(StoreError):
            self._store.put(HINT_KEY, encode_version(version))


def find_latest(store: Store) -> Version | None:
    """Return the newest version; None if there is no data set."""
    try:
        return latest(store)
    except NotFound:
        return None


def data_set_exists_error(store: Store, found: Version) -> CommitConflict:
    return CommitConflict(
        f"a data set exists already (version {found.number}, {found.n_records} records); "
        'write with mode="append" to add to it, or mode="overwrite" to replace it',
        url=store.url,
        number=found.number,
    )


def no_data_set_error(store: Store) -> NotFound:
    return NotFound('no data set to append to; write with mode="create" first', url=store.url)


def plan_merge(n_rows: Sequence[int]) -> int:
    """Return the index from which the last segments are merged into one; len(n_rows) if there are few segments.

    Half of them are merged at once, and earlier ones while they are no larger than the sum of the later ones, so a row
    is copied only a few times in total, whatever the sizes of the appends.
    """
    if len(n_rows) <= MAX_SEGMENTS:
        return len(n_rows)
    start = MAX_SEGMENTS // 2
    total = sum(n_rows[start:])
    while start and n_rows[start - 1] <= total:
        start -= 1
        total += n_rows[start]
    return start


def commit(store: Store, infos: Sequence[ShardInfo], **options: Any) -> Version:
    """Commit finished shards as the next version of the store's data set, and return it. See Commit."""
    return Commit(store, infos, **options).run()
