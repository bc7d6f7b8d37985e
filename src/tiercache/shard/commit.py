"""Commits: shards become a version by one put of the next number, which exactly one of many racing writers wins.

::

    append:     newest version -> put the next number -> lost? the winner's version is the new base, try again
    overwrite:  parent         -> put the next number -> lost? CommitConflict
    create:     nothing there  -> put number 1        -> lost? CommitConflict

An answer that was lost is settled by reading the number back: the version there is ours if writer and nonce match. If
reading fails too, StoreError says that the commit may have happened, and land() again settles it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import get_args

import pyarrow as pa

from tiercache.errors import CommitConflict, NotFound, StoreError
from tiercache.model import ShardInfo
from tiercache.shard import manifest, segments
from tiercache.shard.difference import check_same_schema
from tiercache.shard.segments import SegmentRef
from tiercache.shard.types import Schema
from tiercache.shard.versions import (
    Version,
    VersionKind,
    check_writable,
    encode_version,
    fingerprint_of,
    version_key,
)
from tiercache.store.contract import Store

# A loss means that another append landed: a hundred in a row is a crowd, not bad luck.
MAX_REBASES = 100
MAX_SEGMENTS = 64
# How often a version is put again when its answer was lost and it is not there.
_MAX_PUTS = 3


@dataclass(frozen=True, slots=True)
class CommitRequest:
    """What is to be committed.

    infos: in data-set order; parent: what an overwrite replaces, and where an append starts to look for the newest
    version; writer_id: for people, and, with nonce, which is new for each commit, to recognise our own version.
    """

    infos: tuple[ShardInfo, ...]
    schema: Schema
    mode: VersionKind
    parent: Version | None = None
    writer_id: str = field(default_factory=lambda: secrets.token_hex(16))
    nonce: str = field(default_factory=lambda: secrets.token_hex(16))

    def __post_init__(self) -> None:
        check_mode(self.mode)


def check_mode(mode: str) -> None:
    """Refuse what is no mode of writing. Raises ValueError."""
    if mode not in get_args(VersionKind):
        raise ValueError(f"mode is 'create', 'append' or 'overwrite', got {mode!r}")


def commit(
    store: Store,
    infos: Sequence[ShardInfo],
    *,
    schema: Schema,
    mode: VersionKind,
    parent: Version | None = None,
    writer_id: str | None = None,
) -> Version:
    """Commit finished shards as the next version of the store's data set; see Commit.land() for what it raises."""
    who = {} if writer_id is None else {"writer_id": writer_id}
    return Commit(store, CommitRequest(tuple(infos), schema, mode, parent, **who)).land()


class Commit:
    """One commit, from the first try until it is settled. For one thread at a time."""

    def __init__(self, store: Store, request: CommitRequest) -> None:
        self._store = store
        self._request = request
        self._own: tuple[SegmentRef, ...] | None = None
        self._unsettled: Version | None = None
        self._landed: Version | None = None

    def land(self) -> Version:
        """Commit, and return the version that holds the shards; harmless when repeated. Appending none commits nothing.

        Raises:
            CommitConflict: somebody else committed first, or a data set is there already (create).
            NotFound: there is no data set to append to.
            SchemaError: an append's schema is not that of the data set.
            UnsupportedFormat: only a later release may write to the data set.
            StoreError: the store's; with .maybe_done, .number, .nonce: the commit may have happened, call land() again.
        """
        if self._landed is None:
            self._landed = self._land()
        return self._landed

    def _land(self) -> Version:
        base = None if self._unsettled else self._base()
        for _ in range(MAX_REBASES):
            if base is not None and self._request.mode == "append" and not self._request.infos:
                return base
            version = self._unsettled or self._next(base)
            standing = self._put(version)
            self._unsettled = None
            if (standing.writer, standing.nonce) == (version.writer, version.nonce):
                self._hint(version.number)
                return version
            base = self._rebase(standing)
        raise CommitConflict(f"lost {MAX_REBASES} races against other appends; try again later", url=self._store.url)

    def _base(self) -> Version | None:
        """The version that the first try comes after."""
        parent = self._request.parent
        if self._request.mode == "overwrite" and parent is not None:
            return parent
        newest = (manifest.newest_from(self._store, parent.number) if parent else None) or find_latest(self._store)
        if self._request.mode == "create" and newest is not None:
            raise data_set_exists(self._store, newest)
        if self._request.mode == "append":
            if newest is None:
                raise nothing_to_append_to(self._store)
            self._check_base(newest)
        return newest

    def _rebase(self, winner: Version) -> Version:
        """The base of the next try, after winner took the number of this one."""
        mode, number = self._request.mode, winner.number
        if mode == "create":
            raise data_set_exists(self._store, winner)
        if mode == "overwrite":
            raise CommitConflict(
                f"version {number} was committed by writer {winner.writer} ({winner.kind}) before this overwrite; "
                "nothing was changed: look at that version, then overwrite it if it is to go",
                url=self._store.url,
                number=number,
            )
        newest = manifest.newest_from(self._store, number) or winner
        self._check_base(newest)
        return newest

    def _check_base(self, base: Version) -> None:
        parent = self._request.parent
        if parent is not None and parent.dataset_id != base.dataset_id:
            raise CommitConflict(
                "another data set has been put in the place of this one", url=self._store.url, number=base.number
            )
        check_same_schema(base.schema, self._request.schema)

    def _next(self, base: Version | None) -> Version:
        request = self._request
        if base is not None:
            check_writable(base, self._store.url)
        refs = self._segments(base)
        number = base.number + 1 if base else 1
        dataset_id = base.dataset_id if base else secrets.token_hex(16)
        appended = base if base is not None and request.mode == "append" else None
        schema_bytes = appended.schema_bytes if appended else request.schema.to_bytes()
        n_records = sum(info.n_records for info in request.infos) + (appended.n_records if appended else 0)
        return Version(
            dataset_id=dataset_id,
            number=number,
            parent=base.number if base else None,
            kind=request.mode if base else "create",
            schema_bytes=schema_bytes,
            writer=request.writer_id,
            nonce=request.nonce,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            fingerprint=fingerprint_of(dataset_id, number, schema_bytes, n_records, [ref.digest for ref in refs]),
            n_records=n_records,
            n_bytes=sum(info.n_bytes for info in request.infos) + (appended.n_bytes if appended else 0),
            segments=refs,
        )

    def _segments(self, base: Version | None) -> tuple[SegmentRef, ...]:
        """The segments of the next version; the new ones are in the store when this returns."""
        if self._own is None:
            self._own = (self._write(segments.new_segment(self._request.infos)),) if self._request.infos else ()
        if base is None or self._request.mode != "append":
            return self._own
        refs = (*base.segments, *self._own)
        start = plan_merge([ref.n_shards for ref in refs])
        if start == len(refs):
            return refs
        # Our own segment is read back with the others: merging is rare, and this way there is one path.
        tables = segments.read_segments(self._store, base.dataset_id, refs[start:])
        return (*refs[:start], self._write(segments.pack_segment(pa.concat_tables(tables))))

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
        """The version that has the number of `version` after putting that one there: itself, or another's."""
        key, data, maybe_done = version_key(version.number), encode_version(version), False
        for _ in range(_MAX_PUTS):
            failure: StoreError | None = None
            try:
                if self._store.put_if_absent(key, data):
                    return version
            except StoreError as error:
                failure = error
                maybe_done = maybe_done or getattr(error, "maybe_done", False)
            # Even a plain "no" may be about our own: a back end that tried again meets what its first try wrote.
            try:
                return manifest.read_version(self._store, version.number)
            except NotFound:
                if failure is not None and not maybe_done:
                    raise failure from None
            except StoreError as error:
                if failure is not None and not maybe_done:
                    raise failure from error
                raise self._lost(version) from error
        raise self._lost(version)

    def _lost(self, version: Version) -> StoreError:
        self._unsettled = version
        return StoreError(
            f"the commit of version {version.number} may have happened: its answer was lost and not to be read back; "
            f"close() again settles it (writer {version.writer}, nonce {version.nonce})",
            url=self._store.url,
            retryable=True,
            maybe_done=True,
            number=version.number,
            nonce=version.nonce,
        )

    def _hint(self, number: int) -> None:
        # Readers probe upward from any hint, so an old one costs them a few requests and nothing else.
        with suppress(StoreError):
            self._store.put(manifest.HINT_KEY, manifest.encode_hint(number))


def find_latest(store: Store) -> Version | None:
    """The newest version, None where there is no data set."""
    try:
        return manifest.latest(store)
    except NotFound:
        return None


def data_set_exists(store: Store, found: Version) -> CommitConflict:
    """The error of creating where a data set is."""
    return CommitConflict(
        f"a data set is here already (version {found.number}, {found.n_records} records); "
        'write with mode="append" to add to it, or mode="overwrite" to replace it',
        url=store.url,
        number=found.number,
    )


def nothing_to_append_to(store: Store) -> NotFound:
    """The error of appending where no data set is."""
    return NotFound('no data set to append to; write with mode="create" first', url=store.url)


def plan_merge(n_rows: Sequence[int]) -> int:
    """Where the run of last segments that become one starts; len(n_rows) where there are few enough.

    Half of the segments go at once, so that merging is rare; and earlier ones while they are no larger than what is
    merged already, so that a row is copied a few times in all, whatever the sizes of the appends were.
    """
    if len(n_rows) <= MAX_SEGMENTS:
        return len(n_rows)
    start = MAX_SEGMENTS // 2
    total = sum(n_rows[start:])
    while start and n_rows[start - 1] <= total:
        start -= 1
        total += n_rows[start]
    return start
