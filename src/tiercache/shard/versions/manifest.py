"""Versions of a data set: their JSON form, and how a reader finds a version and its shards.

A version is small and immutable. Store.get() is sufficient to read it; Store.list() is called only without a usable
hint. The hint is a copy of a recent version, normally of the newest one, so a data set opens in two round trips::

    1. the hint
    2. at once: the hinted version, the one after it (which is missing if the hint is right), and the hinted segments

No reader trusts the hint: the version itself decides, and other segments are read if it names others.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any, Literal, TypeAlias

from tiercache._native.checksum import crc32c
from tiercache.errors import CorruptShard, NotFound, SchemaError, UnsupportedFormat
from tiercache.shard.format.layout import FORMAT_VERSION, RELEASE_TEXT, SOFTWARE, check_features, check_format
from tiercache.shard.read.source import READS_AGAIN
from tiercache.shard.schema import Schema, UnknownKindError
from tiercache.shard.versions.segments import SegmentRef, ShardTable, read_segments
from tiercache.store.contract import Store, unwrapped
from tiercache.store.numbered_log import NumberedLog
from tiercache.store.remote import RemoteStore

VERSIONS_FOLDER = "_tiercache/versions/"
VersionKind: TypeAlias = Literal["create", "append", "overwrite"]
_KIND = re.compile("[a-z][a-z-]{0,31}")
MAX_NUMBER = 2**63 - 1
_HEX32, _HEX64 = re.compile("[0-9a-f]{32}"), re.compile("[0-9a-f]{64}")
_TEXT = re.compile(r"[^\0]{1,200}")
_SEGMENT_NAME = re.compile(r"[0-9a-f]{32}\.arrow")
_RELEASE = re.compile(r"[0-9]{1,5}\.[0-9]{1,5}")
_FEATURE = re.compile("[a-z][a-z0-9-]{0,63}")
_BASE64 = re.compile(r"[A-Za-z0-9+/]+=*")
# Key in the JSON text: attribute, and the pattern of its text; None for an integer from 0.
_Fields: TypeAlias = Mapping[str, tuple[str, re.Pattern[str] | None]]
_VERSION_FIELDS: _Fields = {
    "release": ("release", _RELEASE),
    "software": ("software", _TEXT),
    "dataset_id": ("dataset_id", _HEX32),
    "number": ("number", None),
    "kind": ("kind", _KIND),
    "writer": ("writer", _TEXT),
    "nonce": ("nonce", _HEX32),
    "created": ("created", _TEXT),
    "fingerprint": ("fingerprint", _HEX32),
    "records": ("n_records", None),
    "bytes": ("n_bytes", None),
}
_SEGMENT_FIELDS: _Fields = {
    "name": ("name", _SEGMENT_NAME),
    "bytes": ("n_bytes", None),
    "crc32c": ("crc32c", None),
    "rows": ("n_shards", None),
    "digest": ("digest", _HEX64),
}


@dataclass(frozen=True)
class Version:
    """A version of a data set.

    Attributes:
        dataset_id: Random id of the data set, 32 hex digits; all versions have the same.
        number: Number of the version, from 1.
        parent: Number of the version from which this one was made; None for the first.
        kind: How the version was made, for information only. A later release may use values that are not in
            VersionKind.
        schema_bytes: Schema as an Arrow IPC schema message.
        writer: Identifier of the writer.
        nonce: Random identifier of the commit that made the version.
        created: Time of the commit, UTC in ISO 8601.
        fingerprint: See fingerprint_of().
        n_records: Number of records.
        n_bytes: Number of stored bytes of all shards.
        segments: Entries of the segments, in data-set order.
        software: Name and release of the software that wrote the version.
        release: First release that reads the version, such as "0.1".
        needs_to_write: Features that a release must have to append to the data set or to overwrite it. parse_version
            checks the features that reading needs.
    """

    dataset_id: str
    number: int
    parent: int | None
    kind: str
    schema_bytes: bytes
    writer: str
    nonce: str
    created: str
    fingerprint: str
    n_records: int
    n_bytes: int
    segments: tuple[SegmentRef, ...]
    software: str = SOFTWARE
    release: str = RELEASE_TEXT
    needs_to_write: tuple[str, ...] = ()

    @cached_property
    def schema(self) -> Schema:
        """Schema of the data set. Raises SchemaError if this release cannot read it."""
        return Schema.from_bytes(self.schema_bytes)

    @property
    def n_shards(self) -> int:
        """Number of shards in all segments."""
        return sum(segment.n_shards for segment in self.segments)


def version_key(number: int) -> str:
    """Return the key of the version with this number."""
    return f"{VERSIONS_FOLDER}{number:020d}.json"


def fingerprint_of(dataset_id: str, number: int, schema_bytes: bytes, n_records: int, digests: Iterable[str]) -> str:
    """Return the 32 hex digits that a resumed run compares: a hash of data set, version, schema and shards in order."""
    facts = [dataset_id, number, hashlib.sha256(schema_bytes).hexdigest(), n_records, list(digests)]
    return hashlib.sha256(_canonical(facts)).hexdigest()[:32]


def encode_version(version: Version) -> bytes:
    """Return the canonical text of a version: JSON in ASCII with sorted keys and without spaces, then a newline.

    Its key "crc32c" is the checksum of the text without that key and without the newline.
    """
    body = _as_json(version, _VERSION_FIELDS) | {
        "format": FORMAT_VERSION,
        "needs_to_read": [],
        "needs_to_write": list(version.needs_to_write),
        "parent": version.parent,
        "schema": base64.b64encode(version.schema_bytes).decode("ascii"),
        "segments": [_as_json(segment, _SEGMENT_FIELDS) for segment in version.segments],
    }
    return _canonical(body | {"crc32c": crc32c(_canonical(body))}) + b"\n"


def parse_version(data: bytes, *, number: int, url: str) -> Version:
    """Return the version that a text, read from version_key(number), describes.

    Raises CorruptShard if a byte differs from what was written, and UnsupportedFormat.
    """
    body = _checked_body(data, url)
    _check_readable(body, url)
    try:
        version = _version_of(body)
        problem = _problem(version, number)
    except (ValueError, KeyError, TypeError) as error:
        problem = str(error)
    if problem:
        raise CorruptShard(problem, url=url, part="version")
    return version


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def _checked_body(data: bytes, url: str) -> dict[str, Any]:
    """Return the JSON object without its CRC, if the CRC matches and the text is canonical."""
    try:
        body = json.loads(data)
        if not isinstance(body, dict):
            raise TypeError(f"a version is a JSON object, got {type(body).__name__}")
        canonical = _canonical(body) + b"\n"
        stated = body.pop("crc32c", None)
        whole = canonical == data and type(stated) is int and crc32c(_canonical(body)) == stated
    except (ValueError, TypeError, RecursionError) as error:
        raise CorruptShard(f"cannot be read: {error}", url=url, part="version") from error
    if not whole:
        raise CorruptShard("the text does not match its CRC-32C", url=url, part="version")
    return body


def _check_readable(body: Mapping[str, Any], url: str) -> None:
    """Check that this release can read the version. The three keys keep their meaning in every later format."""
    try:
        found, release = _int(body, "format"), body.get("release")
        known = release if isinstance(release, str) and _RELEASE.fullmatch(release) else ""
        check_format(found, known, what="data set", url=url)
        check_features(_features(body, "needs_to_read"), known, what="data set", url=url)
    except (ValueError, KeyError) as error:
        raise CorruptShard(f"format, release or needs_to_read: {error}", url=url, part="version") from error


def check_writable(version: Version, url: str) -> None:
    """Raise UnsupportedFormat unless this release may append to, or overwrite, the data set of a newest version."""
    check_features(version.needs_to_write, version.release, what="data set", url=url, doing="writing to")


def _version_of(body: Mapping[str, Any]) -> Version:
    """Return the version that a JSON object describes; unknown keys, which a later release wrote, are ignored."""
    return Version(
        parent=None if body["parent"] is None else _int(body, "parent"),
        schema_bytes=base64.b64decode(_text(body, "schema", _BASE64), validate=True),
        segments=tuple(SegmentRef(**_checked(line, _SEGMENT_FIELDS)) for line in body["segments"]),
        needs_to_write=_features(body, "needs_to_write"),
        **_checked(body, _VERSION_FIELDS),
    )


def _as_json(found: Version | SegmentRef, fields: _Fields) -> dict[str, Any]:
    return {key: getattr(found, attribute) for key, (attribute, _) in fields.items()}


def _checked(body: Mapping[str, Any], fields: _Fields) -> dict[str, Any]:
    """Return the attributes that a JSON object states. Raises ValueError for an invalid value, KeyError, TypeError."""
    return {
        attribute: _int(body, key) if pattern is None else _text(body, key, pattern)
        for key, (attribute, pattern) in fields.items()
    }


def _int(body: Mapping[str, Any], name: str) -> int:
    value = body[name]
    if type(value) is not int or not 0 <= value <= MAX_NUMBER:
        raise ValueError(f"{name} is an integer from 0 to 2^63 - 1, got {value!r}")
    return value


def _text(body: Mapping[str, Any], name: str, pattern: re.Pattern[str]) -> str:
    value = body[name]
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"{name} has the invalid value {value!r}")
    return value


def _features(body: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = body[name]
    if not isinstance(value, list) or not all(isinstance(one, str) and _FEATURE.fullmatch(one) for one in value):
        raise ValueError(f"{name} is a list of feature names, got {value!r}")
    return tuple(value)


def _problem(version: Version, number: int) -> str:
    if version.number != number:
        return f"the text says that it is version {version.number}, expected {number}"
    if version.parent is not None and not 0 < version.parent < number:
        return f"version {number} cannot have version {version.parent} as its parent"
    digests = [segment.digest for segment in version.segments]
    facts = version.dataset_id, number, version.schema_bytes, version.n_records
    if fingerprint_of(*facts, digests) != version.fingerprint:
        return "the fingerprint does not match the contents"
    return ""


__all__ = [
    "HINT_KEY",
    "Hint",
    "SegmentRef",
    "ShardTable",
    "Version",
    "encode_hint",
    "latest",
    "list_versions",
    "newest_from",
    "open_latest",
    "parse_hint",
    "read_shards",
    "read_version",
    "version_log",
]

HINT_KEY = "_tiercache/latest"
_HINT_DIGITS = 18  # every number of at most 18 digits is below MAX_NUMBER


def version_log(store: Store) -> NumberedLog:
    """Return the log of the versions of a store's data set."""
    return NumberedLog(store, VERSIONS_FOLDER, ".json")


@dataclass(frozen=True, slots=True)
class Hint:
    """What the hint object states; nothing of it is trusted.

    Attributes:
        number: Number of a version that may exist.
        version: The version with this number, if the hint has a copy of it that this release can read.
    """

    number: int
    version: Version | None = None


def encode_hint(version: Version) -> bytes:
    """Return the text of the hint object: that of the version."""
    return encode_version(version)


def parse_hint(data: bytes) -> Hint | None:
    """Return what a hint states; None if it is invalid, which is no error. Old hints are a number only."""
    text = data.strip()
    if 0 < len(text) <= _HINT_DIGITS and text.isdigit():
        return Hint(int(text)) if int(text) else None
    try:
        number = _int(json.loads(data), "number")
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    try:
        return Hint(number, parse_version(data, number=number, url=HINT_KEY))
    except (CorruptShard, UnsupportedFormat):
        return Hint(number)


def latest(store: Store) -> Version:
    """Return the newest version: probe upward from the hint, else from the highest listed version, else from 1.

    Raises NotFound without a data set, CorruptShard, UnsupportedFormat and StoreError.
    """
    return _latest(store, _read_hint(store))


def open_latest(store: Store) -> tuple[Version, ShardTable]:
    """Return the newest version and its shards. Raises as latest() and read_shards().

    From a remote store, the segments that the hint names are read while the versions are probed.
    """
    hint = _read_hint(store)
    if hint is None or hint.version is None or not isinstance(unwrapped(store), RemoteStore):
        version = _latest(store, hint)
        return version, read_shards(store, version)
    with ThreadPoolExecutor(1, "tiercache-open") as pool:
        shards = pool.submit(read_shards, store, hint.version)
        version = _latest(store, hint)
        if version == hint.version:
            return version, shards.result()
    return version, read_shards(store, version)


def _read_hint(store: Store) -> Hint | None:
    try:
        return parse_hint(store.get(HINT_KEY))
    except NotFound:
        return None


def _latest(store: Store, hint: Hint | None) -> Version:
    found = newest_from(store, 0 if hint is None else hint.number)
    if found is None:
        highest = version_log(store).highest()
        found = newest_from(store, 1 if highest is None else highest)  # None: the store cannot list
    if found is None:
        raise NotFound("no data set here: it has no version", url=store.url)
    return found


def newest_from(store: Store, number: int) -> Version | None:
    """Return the last of the versions number, number + 1, ... before the first gap; None without a version `number`."""
    found = version_log(store).probe(number)
    return None if found is None else _parsed(store, found[1], found[0])


def read_version(store: Store, number: int) -> Version:
    """Return the version with this number. Raises NotFound, CorruptShard, UnsupportedFormat and StoreError."""
    data = version_log(store).get(number) if number <= MAX_NUMBER else None
    if data is None:
        raise NotFound(f"no version {number}", url=store.url, number=number)
    return _parsed(store, data, number)


def list_versions(store: Store) -> list[int]:
    """Return the numbers of all versions, ascending. Raises StoreError if the store cannot list."""
    return version_log(store).numbers()


def read_shards(store: Store, version: Version) -> ShardTable:
    """Return the shards of a version. On a store with local files (such as a cache), the segments are mapped.

    Raises CorruptShard if a segment, or their totals, differ from what the version states.
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


def _parsed(store: Store, data: bytes, number: int) -> Version:
    url = f"{store.url}/{version_key(number)}"
    for n_reads in count(1):
        try:
            version = parse_version(data, number=number, url=url)
            break
        except CorruptShard:  # the data may have been damaged in transit
            again = version_log(store).get(number)
            if again is None or again == data or n_reads > READS_AGAIN:
                raise
            data = again
    try:
        len(version.schema)
    except UnknownKindError as error:
        check_features([error.needed], version.release, what="data set", url=url)
        raise
    except SchemaError as error:
        raise CorruptShard(f"the schema cannot be read: {error}", url=url, part="version") from error
    return version
