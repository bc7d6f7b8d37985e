"""Reads the versions of a data set: the newest one, one by number, and the shards of a version.

Store.get() is sufficient, so stores that cannot list (plain HTTP) work; Store.list() is called only without a usable
hint.
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
_HINT_DIGITS = 18  # every number of at most 18 digits is below MAX_NUMBER


def encode_hint(number: int) -> bytes:
    """Return the text of the hint object, which names a recent version."""
    return b"%d\n" % number


def parse_hint(data: bytes) -> int | None:
    """Return the version number in a hint; None if the hint is invalid, which is no error: no reader trusts a hint."""
    text = data.strip()
    return int(text) if 0 < len(text) <= _HINT_DIGITS and text.isdigit() and int(text) > 0 else None


def latest(store: Store) -> Version:
    """Return the newest version: probe upward from the hint, else from the highest listed version, else from version 1.

    Raises:
        NotFound: There is no data set.
        CorruptShard, UnsupportedFormat: The newest version cannot be read.
        StoreError: The store failed.
    """
    found = newest_from(store, _hinted(store) or 0) or newest_from(store, _listed(store))
    if found is None:
        raise NotFound("no data set here: it has no version", url=store.url)
    return found


def newest_from(store: Store, number: int) -> Version | None:
    """Return the last of the versions number, number + 1, ... before the first gap; None without a version `number`."""
    if number < 1:
        return None
    data, newer = None, _get(store, number)
    while newer is not None:
        data, number = newer, number + 1
        newer = _get(store, number)
    return None if data is None else _parsed(store, data, number - 1)


def read_version(store: Store, number: int) -> Version:
    """Return the version with this number.

    Raises:
        NotFound: There is no such version.
        CorruptShard, UnsupportedFormat: The version cannot be read.
        StoreError: The store failed.
    """
    data = _get(store, number) if 0 < number <= MAX_NUMBER else None
    if data is None:
        raise NotFound(f"no version {number}", url=store.url, number=number)
    return _parsed(store, data, number)


def list_versions(store: Store) -> list[int]:
    """Return the numbers of all versions, ascending. Raises StoreError if the store cannot list."""
    matches = (_VERSION_NAME.fullmatch(info.key) for info in store.list(VERSIONS_FOLDER))
    return sorted(int(match[1]) for match in matches if match and int(match[1]))


def read_shards(store: Store, version: Version) -> ShardTable:
    """Return the shards of a version. On a store with local files (such as a cache), the segments are memory-mapped.

    Raises:
        CorruptShard: A segment, or the totals of all segments, differ from what the version states.
        NotFound, StoreError: The store failed.
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
    except CorruptShard:  # the data may have been damaged in transit: fetch once more
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
    """Return the version number to probe from without a hint: the highest listed one, or 1 if the store cannot list."""
    try:
        return max(list_versions(store), default=0)
    except StoreError as error:
        if error.retryable:
            raise
        return 1
