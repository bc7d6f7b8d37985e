"""Reading a data set: the newest version, a version by number, and a version's shards.

get() alone is enough; list() is asked only where there is no usable hint, so that stores that cannot list (plain
HTTP) work.
"""

from __future__ import annotations

import re

from tiercache.errors import CorruptShard, NotFound, SchemaError, StoreError
from tiercache.shard.needs import check_features
from tiercache.shard.segments import SegmentRef, ShardTable, read_segments
from tiercache.shard.types import UnknownKindError
from tiercache.shard.versions import MAX_NUMBER, VERSIONS_FOLDER, Version, parse_version, version_key
from tiercache.store.contract import Store

__all__ = [
    "HINT_KEY",
    "SegmentRef",
    "ShardTable",
    "Version",
    "encode_hint",
    "latest",
    "list_versions",
    "newest_from",
    "parse_hint",
    "read_shards",
    "read_version",
]

HINT_KEY = "_tiercache/latest"
_VERSION_NAME = re.compile(rf"{re.escape(VERSIONS_FOLDER)}([0-9]{{20}})\.json")
_HINT_DIGITS = 18  # no data set has that many versions, and any such number is one


def encode_hint(number: int) -> bytes:
    """The hint's text."""
    return b"%d\n" % number


def parse_hint(data: bytes) -> int | None:
    """The number in a hint, None where it is not one: a hint is never trusted, so a bad one is no error."""
    text = data.strip()
    return int(text) if 0 < len(text) <= _HINT_DIGITS and text.isdigit() and int(text) > 0 else None


def latest(store: Store) -> Version:
    """The newest version: from the hint upward; by listing, or else from 1 upward, where there is no usable hint.

    Raises:
        NotFound: no data set here.
        CorruptShard, UnsupportedFormat: the newest version cannot be read.
        StoreError: the store's.
    """
    found = newest_from(store, _hinted(store) or 0) or newest_from(store, _listed(store))
    if found is None:
        raise NotFound("no data set here: it has no version", url=store.url)
    return found


def newest_from(store: Store, number: int) -> Version | None:
    """The newest of the versions number, number + 1, ... without a gap; None if there is no version `number`."""
    if number < 1:
        return None
    data, newer = None, _get(store, number)
    while newer is not None:
        data, number = newer, number + 1
        newer = _get(store, number)
    return None if data is None else _parsed(store, data, number - 1)


def read_version(store: Store, number: int) -> Version:
    """One version, by number.

    Raises:
        NotFound: no such version.
        CorruptShard, UnsupportedFormat: it cannot be read.
        StoreError: the store's.
    """
    data = _get(store, number) if 0 < number <= MAX_NUMBER else None
    if data is None:
        raise NotFound(f"no version {number}", url=store.url, number=number)
    return _parsed(store, data, number)


def list_versions(store: Store) -> list[int]:
    """Numbers of all versions, ascending. Raises StoreError where the store cannot list."""
    matches = (_VERSION_NAME.fullmatch(info.key) for info in store.list(VERSIONS_FOLDER))
    return sorted(int(match[1]) for match in matches if match and int(match[1]))


def read_shards(store: Store, version: Version) -> ShardTable:
    """The version's shards. Of a store with local files (a cache is one) the local copies of segments are mapped.

    Raises:
        CorruptShard: a segment is not what the version says, or does not add up to it.
        NotFound, StoreError: the store's.
    """
    table = ShardTable(read_segments(store, version.dataset_id, version.segments))
    for name, found, stated in (
        ("records", int(table.n_records.sum()), version.n_records),
        ("bytes", int(table.n_bytes.sum()), version.n_bytes),
    ):
        if found != stated:
            url = f"{store.url}/{version_key(version.number)}"
            raise CorruptShard(f"the segments have {found} {name}, the version says {stated}", url=url, part="version")
    return table


def _get(store: Store, number: int) -> bytes | None:
    try:
        return store.get(version_key(number))
    except NotFound:
        return None


def _parsed(store: Store, data: bytes, number: int) -> Version:
    url = f"{store.url}/{version_key(number)}"
    try:
        version = parse_version(data, number=number, url=url)
    except CorruptShard:  # it may have been damaged on the way: fetched once more
        again = _get(store, number)
        if again is None or again == data:
            raise
        version = parse_version(again, number=number, url=url)
    try:
        len(version.schema)
    except UnknownKindError as error:
        check_features([error.needed], version.release, what="data set", url=url)
        raise
    except SchemaError as error:
        raise CorruptShard(f"the schema cannot be read: {error}", url=url, part="version") from error
    return version


def _hinted(store: Store) -> int | None:
    try:
        return parse_hint(store.get(HINT_KEY))
    except NotFound:
        return None


def _listed(store: Store) -> int:
    """The number to probe from where there is no hint: the highest listed, or 1 where the store cannot list."""
    try:
        return max(list_versions(store), default=0)
    except StoreError as error:
        if error.retryable:
            raise
        return 1
