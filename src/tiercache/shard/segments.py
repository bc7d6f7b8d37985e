"""Segments: immutable lists of shards that versions share; and the table of all shards that a version's segments make.

A segment is an uncompressed Arrow IPC file, a row a shard, named by a random id. It is checked against the size and
CRC-32C that the version states before anything in it is believed, and then against what a reader relies on: names
that stay inside the data set, numbers that add up. A million rows are checked in a few vectorised passes, and mapped,
not copied, where the store has local files.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tiercache._native.checksum import crc32c
from tiercache._native.residence import Mapping
from tiercache.errors import CorruptShard, NotFound, StoreError
from tiercache.model import ByteRange, ShardIdentity, ShardInfo
from tiercache.store.contract import LocalStore, Store

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
        pa.field("statistics", pa.large_string(), nullable=False),
    ]
)
# check_key() as a regular expression, for a million names at once: these names are refused.
_BAD_NAME = r"(?s)\\|\x00|://|^$|^/|/$|//|(^|/)\.\.?(/|$)"
_MAX_SUM = 2**62
# Below it a private copy is cheaper than a mapping, and no later fault of the disk can reach it.
_MAP_BYTES = 1 << 20
_IPC_MAGIC = b"ARROW1\0\0"
# A version's claim of a segment's size is not believed beyond this, before memory of that size is taken.
_CLAIMED_BYTES = 1 << 20
# Round trips, not bytes, bound the opening of many small segments.
_FETCH_THREADS = 16


@dataclass(frozen=True, slots=True)
class SegmentRef:
    """A version's line about one segment. name: "<32 hex digits>.arrow"; digest: see digest_rows()."""

    name: str
    n_bytes: int
    crc32c: int
    n_shards: int
    digest: str

    @property
    def key(self) -> str:
        """Where it lies in the store."""
        return SEGMENTS_FOLDER + self.name

    def identity(self, dataset_id: str) -> ShardIdentity:
        """What the cache keeps its copy by."""
        return ShardIdentity(dataset_id, self.name.removesuffix(".arrow"), self.n_bytes, self.crc32c)


class ShardTable:
    """The shards of one version, column by column, in data-set order. Immutable; safe from any thread.

    names: large_string[n] and shard_ids: fixed_size_binary(16)[n], as Arrow; n_records, n_bytes, footer_offset,
    footer_bytes: int64[n]; crc32c: uint32[n]; first_record: int64[n + 1], the number of each shard's first record
    and, last, of all records. Numpy arrays are read-only.
    """

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
        """Shard i, 0 <= i < len(). Raises IndexError."""
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
            stats_json=self.arrow["statistics"][i].as_py(),
        )

    def objects(self, dataset_id: str, shards: NDArray[np.int64]) -> list[tuple[str, ShardIdentity]]:
        """Key and identity of each of these shards, int64[m], in their order: 2 us each, where info() takes 20."""
        rows = as_arrow(shards)
        keys, ids = self.names.take(rows).to_pylist(), self.shard_ids.take(rows).to_pylist()
        sizes, sums = self.n_bytes[shards].tolist(), self.crc32c[shards].tolist()
        return [
            (key, ShardIdentity(dataset_id, shard_id.hex(), n_bytes, crc))
            for key, shard_id, n_bytes, crc in zip(keys, ids, sizes, sums, strict=True)
        ]

    def identities(self, shards: NDArray[np.int64]) -> tuple[list[str], list[int], list[int]]:
        """Id, size and checksum of each of these shards, int64[m], in their order: 0.3 us each."""
        ids = self.shard_ids.take(as_arrow(shards)).to_pylist()
        return [i.hex() for i in ids], self.n_bytes[shards].tolist(), self.crc32c[shards].tolist()

    def infos(self) -> Iterator[ShardInfo]:
        """All of them, in order."""
        return map(self.info, range(len(self)))


def as_arrow(numbers: NDArray[np.int64]) -> pa.Int64Array:
    """Numbers, int64[n], for take(). Not pa.array(): it imports pandas, if there is one: 110 ms, and 30 MB to keep."""
    return pa.Array.from_buffers(pa.int64(), len(numbers), [None, pa.py_buffer(np.ascontiguousarray(numbers))])


def new_segment(infos: Iterable[ShardInfo]) -> tuple[SegmentRef, bytes]:
    """A new segment of these shards, in this order, and its file.

    Raises:
        ValueError: facts about a shard that cannot be.
    """
    rows = [
        (
            i.name,
            bytes.fromhex(i.shard_id),
            i.n_records,
            i.n_bytes,
            i.crc32c,
            i.footer_offset,
            i.footer_bytes,
            i.stats_json,
        )
        for i in infos
    ]
    columns = zip(*rows, strict=True) if rows else [()] * len(_SCHEMA)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
    return pack_segment(pa.Table.from_arrays(arrays, schema=_SCHEMA))


def pack_segment(table: pa.Table) -> tuple[SegmentRef, bytes]:
    """A new segment with the rows of a ShardTable's arrow table (or of several, joined), and its file.

    Raises:
        ValueError: rows that cannot be.
    """
    if problem := _problem(table):
        raise ValueError(f"cannot be listed in a segment: {problem}")
    sink = pa.BufferOutputStream()
    # One batch, so that each column is one run of memory in the mapped file.
    with pa.ipc.new_file(sink, _SCHEMA, options=pa.ipc.IpcWriteOptions(compression=None)) as writer:
        writer.write_table(table.combine_chunks())
    data = sink.getvalue().to_pybytes()
    ref = SegmentRef(f"{secrets.token_hex(16)}.arrow", len(data), crc32c(data), table.num_rows, digest_rows(table))
    return ref, data


def digest_rows(table: pa.Table) -> str:
    """What the fingerprint knows of a segment: SHA-256 (hex) of each row's 16 bytes of id and u64 (LE) of records."""
    rows = np.zeros(table.num_rows, np.dtype([("shard_id", "V16"), ("records", "<u8")]))
    if table.num_rows:
        ids = pa.concat_arrays(table["shard_id"].chunks)
        start = ids.offset * 16
        rows["shard_id"] = np.frombuffer(ids.buffers()[1], "V16", len(ids), start)
        rows["records"] = _numbers(table, "records")
    return hashlib.sha256(rows.tobytes()).hexdigest()


def read_segments(store: Store, dataset_id: str, refs: Sequence[SegmentRef]) -> list[pa.Table]:
    """The rows of each segment, checked; fetched in parallel.

    Raises:
        CorruptShard: not what the version says.
        NotFound, StoreError: the store's.
    """
    if len(refs) < 2:
        return [_read_segment(store, dataset_id, ref) for ref in refs]
    with ThreadPoolExecutor(min(_FETCH_THREADS, len(refs)), "tiercache-segments") as pool:
        return list(pool.map(lambda ref: _read_segment(store, dataset_id, ref), refs))


def _read_segment(store: Store, dataset_id: str, ref: SegmentRef) -> pa.Table:
    data = _local(store, dataset_id, ref)
    # A local copy that is not what the version says is passed by: in a cache it may be rotten, and the source whole.
    if data is None or not _is_whole(data, ref):
        if isinstance(store, LocalStore):
            store.distrust(ref.key, ref.identity(dataset_id))
        data = _fetched(store, ref)
        if not _is_whole(data, ref):  # it may have been damaged on the way
            data = _fetched(store, ref)
        if not _is_whole(data, ref):
            raise CorruptShard(
                f"the CRC-32C is not the {ref.crc32c:#010x} of the version", url=_url(store, ref), part="segment"
            )
    return parse_segment(data, ref, url=_url(store, ref))


def parse_segment(data: pa.Buffer, ref: SegmentRef, *, url: str) -> pa.Table:
    """The rows of a segment's file, whose CRC is right; zero-copy over data. Columns of later releases are left out.

    Raises:
        CorruptShard: what it says cannot be, or is not what ref says.
    """
    try:
        table = _read_table(data)
        table = table.select(range(min(len(_SCHEMA), table.num_columns)))
        problem = "another schema" if not table.schema.equals(_SCHEMA) else _problem(table)
    except (pa.ArrowException, OSError, ValueError, KeyError, struct.error) as error:
        raise CorruptShard(f"cannot be read: {error}", url=url, part="segment") from error
    if not problem and table.num_rows != ref.n_shards:
        problem = f"{table.num_rows} rows, where the version says {ref.n_shards}"
    if not problem and digest_rows(table) != ref.digest:
        problem = "other shards than the version's fingerprint was made of"
    if problem:
        raise CorruptShard(problem, url=url, part="segment")
    return table


def _read_table(data: pa.Buffer) -> pa.Table:
    """The table of an Arrow IPC file, read as the stream that the file contains; zero-copy over data.

    The messages of a stream are the same whoever walks it: what was looked at here is what Arrow reads. A file's footer
    could name others.

    Raises:
        ValueError: it is no Arrow IPC file, or is compressed. Arrow takes the memory that a compressed buffer claims to
            need before it decodes it.
        pa.ArrowException, OSError, struct.error: it cannot be read.
    """
    if data.slice(0, len(_IPC_MAGIC)).to_pybytes() != _IPC_MAGIC:
        raise ValueError("not an Arrow IPC file")
    stream = data.slice(len(_IPC_MAGIC))
    for message in pa.ipc.MessageReader.open_stream(pa.BufferReader(stream)):
        if message.type in ("record batch", "dictionary") and _is_compressed(message):
            raise ValueError("it is compressed, which a segment never is")
    with pa.ipc.open_stream(pa.BufferReader(stream)) as reader:
        return reader.read_all()


def _is_compressed(message: pa.Message) -> bool:
    """Whether a record batch says how its body is compressed, which pyarrow does not tell.

    Arrow has verified the message's offsets.
    """
    metadata = memoryview(message.metadata)

    def table_at(position: int) -> int:
        return position + int(struct.unpack_from("<I", metadata, position)[0])

    def field(table: int, number: int) -> int:
        """Where a flatbuffers table has its field of this number; 0: it has none."""
        vtable = table - int(struct.unpack_from("<i", metadata, table)[0])
        (vtable_bytes,) = struct.unpack_from("<H", metadata, vtable)
        at = 4 + 2 * number
        offset = int(struct.unpack_from("<H", metadata, vtable + at)[0]) if at < vtable_bytes else 0
        return table + offset if offset else 0

    header = table_at(field(table_at(0), 2))  # Message: version, type of the header, header, length of the body
    if message.type == "dictionary":  # DictionaryBatch: id, data
        header = table_at(field(header, 1))
    return field(header, 3) > 0  # RecordBatch: length, nodes, buffers, compression


def _problem(table: pa.Table) -> str:
    """Why a reader cannot rely on these rows; "" if it can."""
    table.validate(full=True)
    if any(column.null_count for column in table.columns):
        return "a null"
    bad = pc.match_substring_regex(table["name"], _BAD_NAME)
    if pc.any(bad).as_py():
        name = table["name"].filter(bad)[0].as_py()
        return f"a shard's name must be a relative path inside the data set, got {name!r}"
    counts = {name: _numbers(table, name) for name in ("records", "bytes", "footer_offset", "footer_bytes")}
    for name, count in counts.items():
        # Summed as floats first: as integers a hostile sum would wrap.
        if count.size and (int(count.min()) < 0 or float(count.sum(dtype=np.float64)) >= _MAX_SUM):
            return f"{name} that cannot be"
    if bool((counts["footer_offset"] + counts["footer_bytes"] > counts["bytes"]).any()):
        return "a footer beyond the end of its shard"
    return ""


def _numbers(table: pa.Table, name: str) -> NDArray[np.int64]:
    """A column without nulls. Not to_numpy(): Arrow then imports pandas, if there is one, which takes 110 ms."""
    kind = np.dtype(_SCHEMA.field(name).type.to_pandas_dtype())
    chunks = [
        np.frombuffer(chunk.buffers()[1], kind, len(chunk), chunk.offset * kind.itemsize)
        for chunk in table[name].chunks
        if len(chunk)
    ]
    numbers: NDArray[np.int64] = chunks[0] if len(chunks) == 1 else np.concatenate([np.empty(0, kind), *chunks])
    numbers.flags.writeable = False
    return numbers


def _url(store: Store, ref: SegmentRef) -> str:
    return f"{store.url}/{ref.key}"


def _is_whole(data: pa.Buffer, ref: SegmentRef) -> bool:
    try:
        return data.size == ref.n_bytes and crc32c(data) == ref.crc32c
    except OSError:  # the mapping could not be read
        return False


def _local(store: Store, dataset_id: str, ref: SegmentRef) -> pa.Buffer | None:
    """The segment's local copy, mapped (or copied, when small); None where there is none to be had.

    The mapping outlives the lease: what is published is never rewritten or truncated, only unlinked.
    """
    if not isinstance(store, LocalStore):
        return None
    lease = store.open_local(ref.key, ref.identity(dataset_id))
    if lease is None:
        return None
    whole = [ByteRange(0, ref.n_bytes)]
    try:
        if not lease.present(whole):
            _check_size(store, ref)
        lease.want(whole)
        return _open_copy(lease.fd, ref.n_bytes) if lease.wait(whole) else None
    finally:
        lease.close()


def _open_copy(fd: int, n_bytes: int) -> pa.Buffer | None:
    try:
        if os.fstat(fd).st_size < n_bytes:
            return None
        if n_bytes < _MAP_BYTES:
            return pa.py_buffer(os.pread(fd, n_bytes, 0))
        return pa.py_buffer(Mapping(fd, n_bytes))
    except OSError:  # a disk that fails makes it slower, not wrong
        return None


def _fetched(store: Store, ref: SegmentRef) -> pa.Buffer:
    _check_size(store, ref)
    data = bytearray(ref.n_bytes)
    try:
        store.read_into(ref.key, [(ByteRange(0, ref.n_bytes), memoryview(data))])
    except NotFound:
        raise
    except StoreError as error:
        _check_size(store, ref, beyond_bytes=0, cause=error)
        raise
    return pa.py_buffer(data)


def _check_size(
    store: Store, ref: SegmentRef, *, beyond_bytes: int = _CLAIMED_BYTES, cause: StoreError | None = None
) -> None:
    """See that a segment is as long as the version says; of those of beyond_bytes and less the store is not asked.

    Raises:
        CorruptShard: it is shorter.
    """
    if ref.n_bytes <= beyond_bytes:
        return
    n_bytes = store.head(ref.key).n_bytes
    if n_bytes < ref.n_bytes:
        found = f"it has {n_bytes} bytes, where the version says 'bytes' {ref.n_bytes}"
        raise CorruptShard(found, url=_url(store, ref), part="segment") from cause
