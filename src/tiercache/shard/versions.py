"""Versions of a data set, and their segments.

A version is small and immutable. Store.get() is sufficient to read it; Store.list() is called only without a usable
hint. The hint is a copy of a recent version, normally of the newest one, so a data set opens in two round trips::

    1. the hint
    2. at once: the hinted version, the one after it (which is missing if the hint is right), and the hinted segments

No reader trusts the hint: the version itself decides, and other segments are read if it names others.

A deleted version is an empty object, so its number stays taken: a slow writer cannot commit under it, and a reader that
searches upward meets no gap. The newest version is never deleted.

A tag is a name for a version. The version that it names is not deleted.

A segment is an immutable list of shards, which versions share: an uncompressed Arrow IPC file with one row per shard
and a random name. Its size and CRC-32C are first compared with those that the version states; then the values are
checked: names stay inside the data set, and numbers are consistent. ShardTable has all shards of a version.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import shlex
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from difflib import get_close_matches
from functools import cached_property
from itertools import count, islice
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tiercache._native.checksum import crc32c
from tiercache.errors import CommitConflict, CorruptShard, NotFound, SchemaError, StoreError, UnsupportedFormat
from tiercache.model import ByteRange, ShardIdentity, ShardInfo
from tiercache.shard.footer import FORMAT_VERSION, RELEASE_TEXT, SOFTWARE, check_features, check_format
from tiercache.shard.schema import Schema, UnknownKindError, check_same_schema
from tiercache.shard.source import READS_AGAIN, ByteSource
from tiercache.store.access import redact, scheme_of
from tiercache.store.contract import LocalStore, Store, unwrapped
from tiercache.store.numbered_log import NumberedLog
from tiercache.store.remote import RemoteStore, call_threads

SHARDS_FOLDER = "shards/"
SEGMENTS_FOLDER = "_tiercache/segments/"
_SCHEMA = pa.schema(
    [
        pa.field("name", pa.large_string(), nullable=False),
        pa.field("shard_id", pa.binary(16), nullable=False),
        pa.field("records", pa.int64(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("crc32c", pa.uint32(), nullable=False),
        pa.field("footer_offset", pa.int64(), nullable=False),
        pa.field("footer_bytes", pa.int64(), nullable=False),
        pa.field("statistics", pa.large_string(), nullable=False),  # no release reads them; "{}" since the first one
    ]
)
# The names that check_key() refuses, as a regular expression that Arrow applies to a million names at once.
_BAD_NAME = r"(?s)\\|\x00|://|^$|^/|/$|//|(^|/)\.\.?(/|$)"
_MAX_SUM = 2**62
# Below this size, a copy in memory is cheaper than a mapping, and a later disk error cannot affect it.
_MAP_BYTES = 1 << 20
_IPC_MAGIC = b"ARROW1\0\0"
# Round trips, and not bytes, limit how fast many small segments open.
_FETCH_THREADS = 16


@dataclass(frozen=True, slots=True)
class SegmentRef:
    """The entry of a version for a segment: file name, size, CRC-32C, number of rows, and digest_rows() of them."""

    name: str
    n_bytes: int
    crc32c: int
    n_shards: int
    digest: str

    @property
    def key(self) -> str:
        return SEGMENTS_FOLDER + self.name

    def identity(self, dataset_id: str) -> ShardIdentity:
        """Return the identity under which the cache keeps its copy of the segment."""
        return ShardIdentity(dataset_id, self.name.removesuffix(".arrow"), self.n_bytes, self.crc32c)


class ShardTable:
    """The shards of a version in data-set order, stored by column. Immutable and thread-safe; arrays are read-only."""

    def __init__(self, tables: Sequence[pa.Table]) -> None:
        self.arrow = pa.concat_tables(tables) if tables else _SCHEMA.empty_table()
        self.names: pa.ChunkedArray = self.arrow["name"]
        self.shard_ids: pa.ChunkedArray = self.arrow["shard_id"]
        self.n_records = _numbers(self.arrow, "records")
        self.n_bytes = _numbers(self.arrow, "bytes")
        self.crc32c = _numbers(self.arrow, "crc32c")
        self.footer_offset = _numbers(self.arrow, "footer_offset")
        self.footer_bytes = _numbers(self.arrow, "footer_bytes")
        self.first_record: NDArray[np.int64] = np.zeros(len(self) + 1, np.int64)
        np.cumsum(self.n_records, out=self.first_record[1:])
        self.first_record.flags.writeable = False

    def __len__(self) -> int:
        return int(self.arrow.num_rows)

    def info(self, i: int) -> ShardInfo:
        """Return the description of shard i. Raises IndexError."""
        if not 0 <= i < len(self):
            raise IndexError(f"shard {i} of {len(self)}")
        return ShardInfo(
            name=self.names[i].as_py(),
            shard_id=self.shard_ids[i].as_py().hex(),
            n_records=int(self.n_records[i]),
            n_bytes=int(self.n_bytes[i]),
            crc32c=int(self.crc32c[i]),
            footer_offset=int(self.footer_offset[i]),
            footer_bytes=int(self.footer_bytes[i]),
        )

    def objects(self, dataset_id: str, shards: NDArray[np.int64]) -> Sequence[tuple[str, ShardIdentity]]:
        """Return keys and identities of these shards, int64[m], in their order: 2 us each, where info() takes 20 us."""
        rows = as_arrow(shards)
        keys, ids = self.names.take(rows).to_pylist(), self.shard_ids.take(rows).to_pylist()
        sizes, sums = self.n_bytes[shards].tolist(), self.crc32c[shards].tolist()
        return [
            (key, ShardIdentity(dataset_id, shard_id.hex(), n_bytes, crc))
            for key, shard_id, n_bytes, crc in zip(keys, ids, sizes, sums, strict=True)
        ]

    def identities(self, shards: NDArray[np.int64]) -> tuple[list[str], list[int], Sequence[int | None]]:
        """Return ids, sizes and checksums of the shards with these numbers, int64[m], in order: 0.3 us each."""
        ids = self.shard_ids.take(as_arrow(shards)).to_pylist()
        return [i.hex() for i in ids], self.n_bytes[shards].tolist(), self.crc32c[shards].tolist()

    def infos(self) -> Iterator[ShardInfo]:
        return map(self.info, range(len(self)))


def as_arrow(numbers: NDArray[np.int64]) -> pa.Int64Array:
    """Return int64[n] as an Arrow array. pa.array() would import pandas if it is installed: 110 ms and 30 MB."""
    return pa.Array.from_buffers(pa.int64(), len(numbers), [None, pa.py_buffer(np.ascontiguousarray(numbers))])


def new_segment(infos: Iterable[ShardInfo]) -> tuple[SegmentRef, bytes]:
    """Return entry and file of a new segment with these shards, in this order. Raises ValueError."""
    return pack_segment(table_of(infos))


def table_of(infos: Iterable[ShardInfo]) -> pa.Table:
    """Return shards in the form of ShardTable.arrow. Made from buffers, for the reason that as_arrow() states."""
    infos = list(infos)
    ids = pa.py_buffer(b"".join(bytes.fromhex(info.shard_id) for info in infos))
    rows = [(i.n_records, i.n_bytes, i.crc32c, i.footer_offset, i.footer_bytes) for i in infos]
    n_records, n_bytes, sums, offsets, footers = map(as_arrow, np.array(rows, np.int64).reshape(-1, 5).T)
    arrays = [
        _as_text([info.name for info in infos]),
        pa.Array.from_buffers(pa.binary(16), len(infos), [None, ids]),
        *(n_records, n_bytes, sums.cast(pa.uint32()), offsets, footers),
        _as_text(["{}"] * len(infos)),
    ]
    table = pa.Table.from_arrays(arrays, schema=_SCHEMA)
    table.validate()  # an id of another length would make Arrow read beyond the buffer
    return table


def _as_text(texts: Sequence[str]) -> pa.LargeStringArray:
    values = [text.encode() for text in texts]
    ends = np.cumsum([0, *map(len, values)], dtype=np.int64)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(pa.large_string(), len(values), buffers)


def pack_segment(table: pa.Table) -> tuple[SegmentRef, bytes]:
    """Return entry and file of a new segment with rows in the form of ShardTable.arrow. Raises ValueError."""
    if problem := _row_problem(table):
        raise ValueError(f"cannot write a segment of these shards: {problem}")
    sink = pa.BufferOutputStream()
    # One record batch, so that each column is contiguous in the mapped file.
    with pa.ipc.new_file(sink, _SCHEMA, options=pa.ipc.IpcWriteOptions(compression=None)) as writer:
        writer.write_table(table.combine_chunks())
    data = sink.getvalue().to_pybytes()
    ref = SegmentRef(f"{secrets.token_hex(16)}.arrow", len(data), crc32c(data), table.num_rows, digest_rows(table))
    return ref, data


def digest_rows(table: pa.Table) -> str:
    """Return the digest of a segment: SHA-256 (hex) over each row's shard id (16 bytes) and record count (u64, LE)."""
    rows = np.zeros(table.num_rows, np.dtype([("shard_id", "V16"), ("records", "<u8")]))
    if table.num_rows:
        ids = pa.concat_arrays(table["shard_id"].chunks)
        start = ids.offset * 16
        rows["shard_id"] = np.frombuffer(ids.buffers()[1], "V16", len(ids), start)
        rows["records"] = _numbers(table, "records")
    return hashlib.sha256(rows.tobytes()).hexdigest()


def read_segments(store: Store, dataset_id: str, refs: Sequence[SegmentRef]) -> list[pa.Table]:
    """Return the checked rows of each segment, fetched in parallel. Raises CorruptShard, NotFound and StoreError."""
    if len(refs) < 2:
        return [_read_segment(store, dataset_id, ref) for ref in refs]
    with call_threads(min(_FETCH_THREADS, len(refs)), "tiercache-segments") as pool:
        return list(pool.map(lambda ref: _read_segment(store, dataset_id, ref), refs))


def _read_segment(store: Store, dataset_id: str, ref: SegmentRef) -> pa.Table:
    source = ByteSource(store, ref.key, ref.identity(dataset_id), part="segment")
    n_fetches = 0
    while True:
        data = _read_whole(source, ref)
        if data is not None and _is_whole(data, ref):
            return parse_segment(data, ref, url=source.url)
        # If the local copy differs from what the version states, only the copy may be damaged: read the source instead,
        # and again, because the data may have been damaged in transit.
        if source.local_copy is not None and isinstance(store, LocalStore):
            store.remove_if_corrupt(ref.key, ref.identity(dataset_id))
            source.close()
            continue
        n_fetches += 1
        if n_fetches > READS_AGAIN:
            message = f"the CRC-32C is not {ref.crc32c:#010x}, which the version states"
            raise CorruptShard(message, url=source.url, part="segment")


def _read_whole(source: ByteSource, ref: SegmentRef) -> pa.Buffer | None:
    """Return the bytes of a segment: the local copy, mapped (or copied if it is small), else those of the store.

    None: the local copy cannot be read. The mapping may outlive the lease: a published file is only ever unlinked.
    """
    try:
        if ref.n_bytes >= _MAP_BYTES and source.local_copy is not None:
            source.check_claimed(ByteRange(0, ref.n_bytes))
            copy = source.ensure_cached([ByteRange(0, ref.n_bytes)])
            if copy is not None:
                return pa.py_buffer(copy.map_file()[: ref.n_bytes])
        return pa.py_buffer(source.range(0, ref.n_bytes))
    except (CorruptShard, StoreError):
        if source.local_copy is None:
            raise
        return None


def parse_segment(data: pa.Buffer, ref: SegmentRef, *, url: str) -> pa.Table:
    """Return the rows of a file whose CRC matches; no copy of data. Columns of later releases are left out."""
    try:
        table = _read_table(data)
        table = table.select(range(min(len(_SCHEMA), table.num_columns)))
        problem = "has another Arrow schema than a segment" if not table.schema.equals(_SCHEMA) else _row_problem(table)
    except (pa.ArrowException, OSError, ValueError, KeyError, struct.error) as error:
        raise CorruptShard(f"cannot be read: {error}", url=url, part="segment") from error
    if not problem and table.num_rows != ref.n_shards:
        problem = f"has {table.num_rows} rows, the version states {ref.n_shards}"
    if not problem and digest_rows(table) != ref.digest:
        problem = "lists other shards than the version's fingerprint"
    if problem:
        raise CorruptShard(problem, url=url, part="segment")
    return table


def _read_table(data: pa.Buffer) -> pa.Table:
    """Return the table of an Arrow IPC file, without a copy of data. Raises ValueError and Arrow's errors.

    The file is read as the stream that it contains, because Arrow then reads exactly the messages that are checked
    here. A compressed buffer is refused: Arrow would allocate the size that it claims.
    """
    if data.slice(0, len(_IPC_MAGIC)).to_pybytes() != _IPC_MAGIC:
        raise ValueError("not an Arrow IPC file")
    stream = data.slice(len(_IPC_MAGIC))
    for message in pa.ipc.MessageReader.open_stream(pa.BufferReader(stream)):
        if message.type in ("record batch", "dictionary") and _is_compressed(message):
            raise ValueError("it is compressed, but a segment must not be")
    with pa.ipc.open_stream(pa.BufferReader(stream)) as reader:
        return reader.read_all()


def _is_compressed(message: pa.Message) -> bool:
    """Return whether the body of a message, whose flatbuffers offsets Arrow has verified, is compressed."""
    metadata = memoryview(message.metadata)

    def table_at(position: int) -> int:
        return position + int(struct.unpack_from("<I", metadata, position)[0])

    def field(table: int, number: int) -> int:
        """Return the position of the field with this number in a flatbuffers table; 0 if the table does not have it."""
        vtable = table - int(struct.unpack_from("<i", metadata, table)[0])
        (vtable_bytes,) = struct.unpack_from("<H", metadata, vtable)
        at = 4 + 2 * number
        offset = int(struct.unpack_from("<H", metadata, vtable + at)[0]) if at < vtable_bytes else 0
        return table + offset if offset else 0

    header = table_at(field(table_at(0), 2))  # Message: version, type of the header, header, length of the body
    if message.type == "dictionary":  # DictionaryBatch: id, data
        header = table_at(field(header, 1))
    return field(header, 3) > 0  # RecordBatch: length, nodes, buffers, compression


def _row_problem(table: pa.Table) -> str:
    """Return what is invalid in these rows, or ""."""
    table.validate(full=True)
    if any(column.null_count for column in table.columns):
        return "a null"
    bad = pc.match_substring_regex(table["name"], _BAD_NAME)
    if pc.any(bad).as_py():
        name = table["name"].filter(bad)[0].as_py()
        return f"a shard's name must be a relative path inside the data set, got {name!r}"
    counts = {name: _numbers(table, name) for name in ("records", "bytes", "footer_offset", "footer_bytes")}
    for name, numbers in counts.items():
        # A float sum, because an integer sum of forged values could wrap around.
        if numbers.size and (int(numbers.min()) < 0 or float(numbers.sum(dtype=np.float64)) >= _MAX_SUM):
            return f"{name} has a value below 0, or a sum of 2**62 or more"
    if bool((counts["footer_offset"] + counts["footer_bytes"] > counts["bytes"]).any()):
        return "a footer beyond the end of its shard"
    return ""


def _numbers(table: pa.Table, name: str) -> NDArray[np.int64]:
    """Return a column without nulls as numpy. to_numpy() would import pandas if it is installed (110 ms)."""
    kind = np.dtype(_SCHEMA.field(name).type.to_pandas_dtype())
    chunks = [
        np.frombuffer(chunk.buffers()[1], kind, len(chunk), chunk.offset * kind.itemsize)
        for chunk in table[name].chunks
        if len(chunk)
    ]
    numbers: NDArray[np.int64] = chunks[0] if len(chunks) == 1 else np.concatenate([np.empty(0, kind), *chunks])
    numbers.flags.writeable = False
    return numbers


def _is_whole(data: pa.Buffer, ref: SegmentRef) -> bool:
    try:
        return data.size == ref.n_bytes and crc32c(data) == ref.crc32c
    except OSError:  # the mapping could not be read
        return False


VERSIONS_FOLDER = "_tiercache/versions/"
PACKINGS_FOLDER = "_tiercache/packing/"
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
    """A version of a data set. parse_version checks the features that reading it needs."""

    dataset_id: str  # random, 32 hex digits; all versions have the same
    number: int
    parent: int | None  # version from which this one was made; None for the first
    kind: str  # for information only; a later release may use values that are not in VersionKind
    schema_bytes: bytes = field(repr=False)  # an Arrow IPC schema message
    writer: str
    nonce: str  # random id of the commit that made the version
    created: str  # UTC in ISO 8601
    fingerprint: str  # see fingerprint_of()
    n_records: int
    n_bytes: int  # stored bytes of all shards
    segments: tuple[SegmentRef, ...]  # in data-set order
    software: str = SOFTWARE  # that wrote the version
    release: str = RELEASE_TEXT  # first release that reads the version
    needs_to_write: tuple[str, ...] = ()  # features that appending and overwriting need
    tags: tuple[str, ...] = field(default=(), compare=False)  # names of its tags, where they were read

    @cached_property
    def schema(self) -> Schema:
        return Schema.from_bytes(self.schema_bytes)

    @property
    def n_shards(self) -> int:
        return sum(segment.n_shards for segment in self.segments)


def version_key(number: int) -> str:
    return f"{VERSIONS_FOLDER}{number:020d}.json"


def fingerprint_of(dataset_id: str, number: int, schema_bytes: bytes, n_records: int, digests: Iterable[str]) -> str:
    """Return the 32 hex digits that a resumed run compares: a hash of data set, version, schema and shards in order."""
    facts = [dataset_id, number, hashlib.sha256(schema_bytes).hexdigest(), n_records, list(digests)]
    return hashlib.sha256(_canonical(facts)).hexdigest()[:32]


def encode_version(version: Version) -> bytes:
    """Return the canonical text of a version: JSON with sorted keys, whose "crc32c" is that of the other keys."""
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
    """Return the version that a text under this number describes. Raises CorruptShard and UnsupportedFormat."""
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


def _checked_body(data: bytes, url: str, part: str = "version") -> dict[str, Any]:
    """Return the JSON object without its CRC, if the CRC matches and the text is canonical."""
    try:
        body = json.loads(data)
        if not isinstance(body, dict):
            raise TypeError(f"a {part} is a JSON object, got {type(body).__name__}")
        canonical = _canonical(body) + b"\n"
        stated = body.pop("crc32c", None)
        whole = canonical == data and type(stated) is int and crc32c(_canonical(body)) == stated
    except (ValueError, TypeError, RecursionError) as error:
        raise CorruptShard(f"cannot be read: {error}", url=url, part=part) from error
    if not whole:
        raise CorruptShard("the text does not match its CRC-32C", url=url, part=part)
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


HINT_KEY = "_tiercache/latest"


def version_log(store: Store) -> NumberedLog:
    return NumberedLog(store, VERSIONS_FOLDER, ".json")


def latest(store: Store) -> Version:
    """Return the newest version. Raises NotFound, which says what is there if there is no data set."""
    found = find_latest(store)
    if found is None:
        raise no_version_error(store)
    return found


def find_version(store: Store, at: int | str | None) -> Version:
    """Return a version by its number or tag; None: the newest. Raises NotFound, and errors as read_version()."""
    if at is None:
        return latest(store)
    return read_version(store, int(at) if isinstance(at, int) or at.isdecimal() else read_tag(store, at).number)


def find_latest(store: Store) -> Version | None:
    """Return the newest version; None if there is no data set."""
    return _find_from(store, _read_hint(store)[0])


def open_latest(store: Store) -> tuple[Version, ShardTable]:
    """Return the newest version and its shards; from a remote store, the hinted segments are read meanwhile."""
    hinted, version = _read_hint(store)
    if version is None or not isinstance(unwrapped(store), RemoteStore):
        newest = _find_from(store, hinted)
    else:
        with call_threads(1, "tiercache-open") as pool:
            shards = pool.submit(read_shards, store, version)
            newest = _find_from(store, hinted)
            if newest == version:
                return version, shards.result()
    if newest is None:
        raise no_version_error(store)
    return newest, read_shards(store, newest)


def _read_hint(store: Store) -> tuple[int, Version | None]:
    """Return the number that the hint states, 0 if it is invalid, and the version that it has a copy of.

    Nothing of it is trusted, so nothing of it is an error. An old hint is a number only.
    """
    try:
        data = store.get(HINT_KEY)
        stated = json.loads(data)
        number = _int(stated if isinstance(stated, dict) else {"number": stated}, "number")
    except (NotFound, ValueError, KeyError, TypeError, RecursionError):
        return 0, None
    try:
        return number, parse_version(data, number=number, url=HINT_KEY)
    except (CorruptShard, UnsupportedFormat):
        return number, None


def _find_from(store: Store, hinted: int) -> Version | None:
    """Probe upward from the hint, else from the highest listed version, else from 1."""
    found = newest_from(store, hinted)
    if found is None:
        highest = version_log(store).highest()
        found = newest_from(store, 1 if highest is None else highest)  # None: the store cannot list
    return found


def newest_from(store: Store, number: int) -> Version | None:
    """Return the last of the versions number, number + 1, ... before the first gap; None without a version `number`."""
    found = version_log(store).probe(number)
    return None if found is None else _parsed(store, found[1], found[0])


def read_version(store: Store, number: int) -> Version:
    """Return the version with this number. Raises NotFound, CorruptShard, UnsupportedFormat and StoreError."""
    data = version_log(store).get(number) if number <= MAX_NUMBER else None
    if data is None:
        newest = find_latest(store)
        if newest is None:
            raise no_version_error(store)
        message = f"no version {number}; the newest is {newest.number} (`tiercache versions` lists all)"
        raise NotFound(message, url=store.url, number=number)
    if not data:
        message = f"version {number} was deleted (`tiercache versions` lists the others)"
        raise NotFound(message, url=store.url, number=number)
    return _parsed(store, data, number)


def list_versions(store: Store) -> list[int]:
    """Return the numbers of the versions that are not deleted, in rising order."""
    return [number for number, info in version_log(store).listed().items() if info.n_bytes]


def read_versions(store: Store) -> list[Version]:
    """Return all versions, oldest first, with their tags. Raises as read_version() and read_tag()."""
    numbers = list_versions(store)
    if not numbers:
        numbers = [latest(store).number]
    with call_threads(min(_FETCH_THREADS, len(numbers)), "tiercache-versions") as pool:
        versions = list(pool.map(lambda number: read_version(store, number), numbers))
    tags = read_tags(store)
    return [replace(v, tags=tuple(tag.name for tag in tags if tag.number == v.number)) for v in versions]


TAGS_FOLDER = "_tiercache/tags/"
_TAG = re.compile(r"(?!\d+$)[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class Tag:
    name: str
    number: int  # of the version
    dataset_id: str
    created: str  # UTC in ISO 8601

    def encode(self) -> bytes:
        body = {
            "created": self.created,
            "dataset_id": self.dataset_id,
            "format": FORMAT_VERSION,
            "version": self.number,
        }
        return _canonical(body | {"crc32c": crc32c(_canonical(body))}) + b"\n"


def tag_key(name: str) -> str:
    """Return the key of a tag. Raises ValueError if no tag can have this name."""
    if not _TAG.fullmatch(name):
        raise ValueError(
            f"a tag is named by up to 100 letters, digits, '.', '_' and '-', is not a number, and begins with a letter "
            f"or digit; got {name!r}"
        )
    return f"{TAGS_FOLDER}{name}.json"


def read_tag(store: Store, name: str) -> Tag:
    """Return a tag. Raises ValueError, NotFound, CorruptShard and UnsupportedFormat."""
    key = tag_key(name)
    try:
        data = store.get(key)
    except NotFound:
        near: list[str] = []
        with suppress(StoreError):
            near = get_close_matches(name, tag_names(store), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else " (`tiercache versions` lists all)"
        raise NotFound(f"no tag {name!r}{hint}", url=store.url) from None
    body = _checked_body(data, store.url_of(key), part="tag")
    try:
        check_format(_int(body, "format"), "", what="tag", url=store.url_of(key))
        dataset_id, created = _text(body, "dataset_id", _HEX32), _text(body, "created", _TEXT)
        return Tag(name, _int(body, "version"), dataset_id, created)
    except (ValueError, KeyError) as error:
        raise CorruptShard(f"cannot be read: {error}", url=store.url_of(key), part="tag") from error


def tag_names(store: Store) -> list[str]:
    matches = (re.fullmatch(rf"{TAGS_FOLDER}({_TAG.pattern})\.json", info.key) for info in store.list(TAGS_FOLDER))
    return sorted(match[1] for match in matches if match)


def read_tags(store: Store) -> list[Tag]:
    """Return all tags, by name. Raises as read_tag()."""

    def read(name: str) -> Tag | None:
        with suppress(NotFound):  # deleted since it was listed
            return read_tag(store, name)
        return None

    names = tag_names(store)
    with call_threads(min(_FETCH_THREADS, max(len(names), 1)), "tiercache-tags") as pool:
        return [tag for tag in pool.map(read, names) if tag is not None]


def put_tag(store: Store, name: str, at: int | str | None, *, replace: bool = False) -> Tag:
    """Give a version a tag. at: See find_version(). replace: A tag of this name is moved from its version.

    Raises CommitConflict if the tag names another version, ValueError, NotFound and StoreError.
    """
    version = find_version(store, at)
    tag = Tag(name, version.number, version.dataset_id, datetime.now(UTC).isoformat(timespec="seconds"))
    key = tag_key(name)
    if replace:
        store.put(key, tag.encode())
    else:
        store.require_conditional_put()
        try:
            is_new = store.put_if_absent(key, tag.encode())
        except StoreError as error:
            if not error.maybe_done:
                raise
            is_new = False
        if not is_new and (found := read_tag(store, name)).number != version.number:
            raise CommitConflict(
                f"the tag {name!r} names version {found.number} already; move it with replace=True",
                url=store.url,
                number=found.number,
            )
    # 1. here: the version exists; 2. gc deletes it, and has not seen the tag; 3. here: the tag is put. Then gc, which
    # reads the tags again after it has deleted, puts the version back, or this second look finds it missing.
    try:
        read_version(store, version.number)
    except NotFound:
        store.delete([key])
        raise
    return tag


def delete_tag(store: Store, name: str) -> Tag:
    """Delete a tag, and return it. Its version stays. Raises as read_tag()."""
    tag = read_tag(store, name)
    store.delete([tag_key(name)])
    return tag


def read_shards(store: Store, version: Version) -> ShardTable:
    """Return the shards of a version; local files are mapped. Raises CorruptShard if the totals differ."""
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


# Of the objects of a folder that has no version, a message looks at this many: at most five requests.
_MOST_LISTED = 5000
_MOST_NAMED = 5
_DEEPEST = 3  # folders between a data set and an object of it, and one more
_OF_A_DATA_SET = re.compile(r"(?:(.*)/)?_tiercache/(?:latest|versions/.+)")


def no_version_error(store: Store) -> NotFound:
    """Return the error of a URL without a data set, which says what was found there, and what to do."""
    return NotFound(f"no data set here: {_found_instead(store)}", url=store.url)


def say_pack(url: str) -> str:
    """Return how files that are no data set become one."""
    source, name = redact(url).rstrip("/"), redact(url).rstrip("/").rpartition("/")[2]
    folder = source.removesuffix(name) if scheme_of(url) not in ("hf", "http", "https") else ""  # not written to
    target = f"{folder}{name.partition('.')[0] or name}-packed"
    return (
        f"pack them: `tiercache pack {shlex.quote(source)} {shlex.quote(target)}`, or "
        f"tiercache.pack({source!r}, {target!r}); tiercache.Writer writes any other records"
    )


def _found_instead(store: Store) -> str:
    with suppress(StoreError):
        start = store.get(HINT_KEY)[:40].decode(errors="replace")
        return f"its {HINT_KEY} is not that of a data set, it begins with {start!r}"
    try:
        keys = _first_keys(store)
    except StoreError as error:
        if isinstance(error, NotFound) and "no such bucket" in error.message:
            return "the bucket does not exist; check its name, and the endpoint and region of its server"
        return f"it has no {HINT_KEY}, and cannot be listed ({error.details.get('text', error.message)})"
    if whole := _data_set_above(store):
        return f"it is a part of the data set {whole}"
    if inside := _data_sets(keys):
        return f"the data sets are in folders below it, {_listed(inside)}: open {store.url_of(inside[0])}"
    if any(key.startswith(PACKINGS_FOLDER) for key in keys):
        return "a packing into it has begun, and is not finished: the same `tiercache pack` continues"
    if any(key.startswith("_tiercache/") or key.endswith(".tcs") for key in keys):
        return "there are shards, but no version: the writer that wrote them has not committed them by close()"
    if keys:
        endings = Counter(f".{key.rpartition('.')[2]}" for key in keys if "." in key.rpartition("/")[2])
        kinds = ", ".join(f"{n} {ending}" for ending, n in endings.most_common(3))
        return f"it has other files, such as {keys[0]}{f' ({kinds})' if kinds else ''}; {say_pack(store.url)}"
    return _found_above(store)


def _data_set_above(store: Store) -> str:
    """Return the data set of a shard or of a folder of a data set; "" if it is none."""
    above = unwrapped(store).parent()
    for _ in range(_DEEPEST):
        if above is None:
            break
        with closing(above[0]), suppress(StoreError):
            above[0].head(HINT_KEY)
            return above[0].url
        above = above[0].parent()
    return ""


def _found_above(store: Store) -> str:
    """Return what the folder above an empty one has: the object itself, a data set of a similar name, others."""
    above = unwrapped(store).parent()
    if above is None:
        return "it is empty"
    folder, name = above
    with closing(folder), suppress(StoreError):
        with suppress(NotFound):
            folder.head(name)
            return f"it is a file, and a data set is a folder; {say_pack(store.url)}"
        names = _data_sets(_first_keys(folder))
        if near := get_close_matches(name, names, n=1):
            return f"it is empty, or does not exist; did you mean {folder.url_of(near[0])}?"
        if names:
            return f"it is empty, or does not exist; {folder.url} has the data sets {_listed(names)}"
    return f"it is empty, or does not exist, and {folder.url} has no data set"


def _first_keys(store: Store) -> list[str]:
    return [info.key for info in islice(store.list(), _MOST_LISTED)]


def _data_sets(keys: Iterable[str]) -> list[str]:
    """Return the folders, below the one that is listed, that have a version."""
    matches = filter(None, map(_OF_A_DATA_SET.fullmatch, keys))
    return sorted({match[1] for match in matches if match[1]})


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_MOST_NAMED]) + (
        f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    )


# Each lost race means that another append was committed; after a hundred losses in a row the writer gives up.
MAX_REBASES = 100
MAX_SEGMENTS = 64


def check_mode(mode: str) -> None:
    if mode not in get_args(VersionKind):
        raise ValueError(f"mode must be 'create', 'append' or 'overwrite', got {mode!r}")


class Commit:
    """A commit of finished shards, from the first attempt until its result is known. For one thread at a time.

    parent: Version that an overwrite replaces, and from which an append looks for the newest. The commit recognises its
    own version by writer_id and a nonce. kind: That of the version; None: the mode. nonce: 32 hex digits that several
    processes share that make one commit; None: random.
    """

    def __init__(
        self,
        store: Store,
        infos: Sequence[ShardInfo],
        *,
        schema: Schema,
        mode: VersionKind,
        kind: str | None = None,
        parent: Version | None = None,
        writer_id: str | None = None,
        nonce: str | None = None,
    ) -> None:
        check_mode(mode)
        self._store, self._infos, self._schema, self._mode, self._parent = store, tuple(infos), schema, mode, parent
        self._kind = kind or mode
        self._writer_id, self._nonce = writer_id or secrets.token_hex(16), nonce or secrets.token_hex(16)
        self._own: tuple[SegmentRef, ...] | None = None
        self._unsettled: Version | None = None
        self._landed: Version | None = None

    def run(self) -> Version:
        """Commit, and return the version that contains the shards. A repeated call returns the same version.

        An append without shards commits nothing and returns the newest version. Raises CommitConflict, NotFound,
        SchemaError, UnsupportedFormat; or StoreError: if its .maybe_done is true, the commit may have happened: call
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
            kind=self._kind if base else "create",
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
            try:
                return read_version(self._store, version.number)
            except NotFound:  # committed by another writer, and deleted since; there are newer ones
                return latest(self._store)
        except StoreError as error:
            if error.maybe_done:
                raise self._lost(version) from error
            raise

    def _lost(self, version: Version) -> StoreError:
        self._unsettled = version
        return StoreError(
            f"the commit of version {version.number} may have happened: the store's response was lost, and the version "
            f"cannot be read back; repeat the call to find out (writer {version.writer}, nonce {version.nonce})",
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


def data_set_exists_error(store: Store, found: Version) -> CommitConflict:
    return CommitConflict(
        f"a data set exists already (version {found.number}, {found.n_records} records); "
        'write with mode="append" to add to it, or mode="overwrite" to replace it',
        url=store.url,
        number=found.number,
    )


def no_data_set_error(store: Store) -> NotFound:
    return NotFound('no data set to append to; write with mode="create" first', url=store.url)


def find_parent(store: Store, mode: VersionKind) -> Version | None:
    """Return the newest version, on which a commit of a mode will be based; None if there is no data set.

    The commit may come hours later. Raises CommitConflict, NotFound, UnsupportedFormat or StoreError if it must fail.
    """
    store.require_conditional_put()
    parent = find_latest(store)
    if mode == "create" and parent is not None:
        raise data_set_exists_error(store, parent)
    if mode == "append" and parent is None:
        raise no_data_set_error(store)
    if parent is not None:
        check_writable(parent, store.url)
    return parent


def plan_merge(n_rows: Sequence[int]) -> int:
    """Return the index from which the last segments are merged into one; len(n_rows) if there are few segments.

    Half of them are merged at once, and earlier ones while they are no larger than the later ones together, so a row is
    copied only a few times in total.
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
