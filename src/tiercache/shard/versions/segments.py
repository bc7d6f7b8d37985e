"""Segments (immutable lists of shards, which versions share) and ShardTable (all shards of a version).

A segment is an uncompressed Arrow IPC file with one row per shard and a random name. Its size and CRC-32C are first
compared with those that the version states; then the values are checked: names stay inside the data set, and numbers
are consistent.
"""

from __future__ import annotations

import hashlib
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
from tiercache.errors import CorruptShard, StoreError
from tiercache.model import ByteRange, ShardIdentity, ShardInfo
from tiercache.shard.read.source import READS_AGAIN, ByteSource
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
    """The entry of a version for a segment.

    Attributes:
        name: File name, "<32 hex digits>.arrow".
        n_bytes: Size of the file in bytes.
        crc32c: CRC-32C of the file.
        n_shards: Number of rows.
        digest: Digest of the rows. See digest_rows().
    """

    name: str
    n_bytes: int
    crc32c: int
    n_shards: int
    digest: str

    @property
    def key(self) -> str:
        """Key of the segment in the store."""
        return SEGMENTS_FOLDER + self.name

    def identity(self, dataset_id: str) -> ShardIdentity:
        """Return the identity under which the cache keeps its copy of the segment."""
        return ShardIdentity(dataset_id, self.name.removesuffix(".arrow"), self.n_bytes, self.crc32c)


class ShardTable:
    """The shards of a version in data-set order, stored by column. Immutable and thread-safe.

    Attributes:
        names, shard_ids: Arrow large_string[n] and fixed_size_binary(16)[n].
        n_records, n_bytes, footer_offset, footer_bytes: int64[n], read-only.
        crc32c: uint32[n], read-only.
        first_record: int64[n + 1], read-only: number of the first record of each shard; the last entry is the total.
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
        """Return the description of shard i, 0 <= i < len(). Raises IndexError otherwise."""
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
        """Return keys and identities of these shards, int64[m], in their order: 2 us each, where info() takes 20 us."""
        rows = as_arrow(shards)
        keys, ids = self.names.take(rows).to_pylist(), self.shard_ids.take(rows).to_pylist()
        sizes, sums = self.n_bytes[shards].tolist(), self.crc32c[shards].tolist()
        return [
            (key, ShardIdentity(dataset_id, shard_id.hex(), n_bytes, crc))
            for key, shard_id, n_bytes, crc in zip(keys, ids, sizes, sums, strict=True)
        ]

    def identities(self, shards: NDArray[np.int64]) -> tuple[list[str], list[int], list[int]]:
        """Return ids, sizes and checksums of the shards with these numbers, int64[m], in order: 0.3 us each."""
        ids = self.shard_ids.take(as_arrow(shards)).to_pylist()
        return [i.hex() for i in ids], self.n_bytes[shards].tolist(), self.crc32c[shards].tolist()

    def infos(self) -> Iterator[ShardInfo]:
        """Yield the descriptions of all shards, in order."""
        return map(self.info, range(len(self)))


def as_arrow(numbers: NDArray[np.int64]) -> pa.Int64Array:
    """Return int64[n] as an Arrow array. pa.array() would import pandas if it is installed: 110 ms and 30 MB."""
    return pa.Array.from_buffers(pa.int64(), len(numbers), [None, pa.py_buffer(np.ascontiguousarray(numbers))])


def new_segment(infos: Iterable[ShardInfo]) -> tuple[SegmentRef, bytes]:
    """Return entry and file of a new segment with these shards, in this order. Raises ValueError."""
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
    """Return entry and file of a new segment with rows in the form of ShardTable.arrow. Raises ValueError."""
    if problem := _problem(table):
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
    """Return the checked rows of each segment, fetched in parallel.

    Raises CorruptShard for one that differs from what the version states, NotFound and StoreError.
    """
    if len(refs) < 2:
        return [_read_segment(store, dataset_id, ref) for ref in refs]
    with ThreadPoolExecutor(min(_FETCH_THREADS, len(refs)), "tiercache-segments") as pool:
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

    None: the local copy cannot be read. The mapping may outlive the lease, because a published file is only ever
    unlinked, not rewritten or truncated.
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
    """Return the rows of a file whose CRC matches; no copy of data. Columns of later releases are left out.

    Raises CorruptShard for an invalid value, or rows that differ from what ref states.
    """
    try:
        table = _read_table(data)
        table = table.select(range(min(len(_SCHEMA), table.num_columns)))
        problem = "has another Arrow schema than a segment" if not table.schema.equals(_SCHEMA) else _problem(table)
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
    """Return the table of an Arrow IPC file, without a copy of data.

    The file is read as the stream that it contains, because Arrow then reads exactly the messages that are checked
    here. A compressed buffer is refused: Arrow would allocate the size that it claims. Raises ValueError and Arrow's
    errors.
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


def _problem(table: pa.Table) -> str:
    """Return what is invalid in these rows, or ""."""
    table.validate(full=True)
    if any(column.null_count for column in table.columns):
        return "a null"
    bad = pc.match_substring_regex(table["name"], _BAD_NAME)
    if pc.any(bad).as_py():
        name = table["name"].filter(bad)[0].as_py()
        return f"a shard's name must be a relative path inside the data set, got {name!r}"
    counts = {name: _numbers(table, name) for name in ("records", "bytes", "footer_offset", "footer_bytes")}
    for name, count in counts.items():
        # A float sum, because an integer sum of forged values could wrap around.
        if count.size and (int(count.min()) < 0 or float(count.sum(dtype=np.float64)) >= _MAX_SUM):
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
