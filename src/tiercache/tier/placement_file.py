"""The codec of placements: one Arrow IPC file of one batch, parsed as untrusted input.

Anybody who may write beside a data set can put any bytes there. So at most MOST_BYTES of a file are read, its metadata
is checked before its rows, and rows are read only where that takes no more memory than the file: one batch,
uncompressed.
"""

from __future__ import annotations

import itertools
import json
import struct
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tiercache._native.checksum import crc32c
from tiercache.errors import CorruptShard, UnsupportedFormat
from tiercache.store import check_key

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

FORMAT_VERSION = 1
# A million moved shards with URLs of 50 characters take 207 bytes each: 197 MiB, and 1.1 GiB of memory while they are
# read. The limit is 2.5 times that: more than real data sets need, less than what exhausts a machine.
MOST_BYTES = 512 << 20
MOST_ROWS = 1 << 22  # a row may take no bytes in a crafted file, and costs about 100 bytes in memory
_META = b"tiercache"
_MAGIC = b"ARROW1"
_WRONG = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError, struct.error)
_HEADER, _COMPRESSION = 2, 3  # field numbers in Arrow's flatbuffer tables Message and RecordBatch

State: TypeAlias = Literal["here", "archived"]

_SCHEMA = pa.schema(
    [
        pa.field("key", pa.large_string(), nullable=False),
        pa.field("url", pa.large_string(), nullable=False),
        pa.field("storage_class", pa.large_string()),
        pa.field("state", pa.large_string(), nullable=False),
        pa.field("n_bytes", pa.int64(), nullable=False),
        pa.field("crc32c", pa.uint32()),
        pa.field("promote", pa.large_string()),
        pa.field("hot_bytes", pa.int64()),
    ]
)


@dataclass(frozen=True, slots=True)
class PlacementRow:
    """Location of an object that is away from home.

    Attributes:
        key: Key in its home, which is the store of the placement.
        url: URL of the folder that holds the object under the same key: `url + "/" + key`. Without credentials.
        storage_class: Storage class there. None: the default class of the store.
        state: "here": readable. "archived": to be restored first, unless the store says that it was restored since.
        n_bytes: Size, in bytes.
        crc32c: CRC-32C of the whole object. None: unknown.
        promote: URL of the folder in the hot tier to which a read copies the object, under the same key. None: no
            promotion.
        hot_bytes: Capacity of the hot tier, in bytes. None: limited only by its disk.
    """

    key: str
    url: str
    storage_class: str | None = None
    state: State = "here"
    n_bytes: int = 0
    crc32c: int | None = None
    promote: str | None = None
    hot_bytes: int | None = None

    def __post_init__(self) -> None:
        """Check the values. Raises ValueError."""
        check_key(self.key)
        if not self.url or self.n_bytes < 0 or self.state not in get_args(State):
            raise ValueError(f"a row needs a URL, a size of 0 or more and a state of {get_args(State)}, got {self!r}")


class Placement:
    """The objects that are away from home, as one numbered object lists them. Immutable and thread-safe.

    Attributes:
        number: Number of the placement; 0 if nothing was ever placed.
        rows: Table with the columns of `PlacementRow`, sorted by key; each key once.
        nonce: Random text that identifies the writer's attempt.
        n_spoilt: Number of later placements that were damaged while they were written, and do not count.
    """

    def __init__(self, number: int, rows: pa.Table, nonce: str = "", *, n_spoilt: int = 0) -> None:
        self.number, self.rows, self.nonce, self.n_damaged = number, rows, nonce, n_spoilt
        self._keys: pa.Array = _as_one_array(rows["key"])

    def __repr__(self) -> str:
        return f"Placement({self.number}, {len(self)} rows)"

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    def find(self, key: str) -> PlacementRow | None:
        """Return the row of key; None if it is at home, as far as this placement knows. 10 us among a million rows."""
        at = bisect_left(range(len(self)), key, key=lambda i: self._keys[i].as_py())
        return self.row(at) if at < len(self) and self._keys[at].as_py() == key else None

    def row(self, at: int) -> PlacementRow:
        """Return row `at` of the table."""
        return PlacementRow(**self.rows.slice(at, 1).to_pylist()[0])

    def row_numbers(self, keys: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
        """Return the row number of each key, -1 for those at home; int64[len(keys)]."""
        found = pc.index_in(keys.cast(pa.large_string()), value_set=self._keys).fill_null(-1)
        return np.asarray(found.to_numpy(), np.int64) if len(keys) else np.empty(0, np.int64)

    def rows_elsewhere(self, other: Placement) -> Placement:
        """Return the rows of objects for which `other` has another location."""
        at = other.row_numbers(self.rows["key"])
        there = pc.take(other.rows["url"], pa.array(np.maximum(at, 0))) if len(other) else self.rows["url"]
        is_other = pc.and_(pa.array(at >= 0), pc.not_equal(self.rows["url"], there))
        return Placement(self.number, self.rows.filter(is_other).combine_chunks(), self.nonce)

    def with_changes(self, changes: Mapping[str, PlacementRow | None]) -> pa.Table:
        """Return the rows after changes: key -> new row, or None to remove the row."""
        gone = pa.array(list(changes), pa.large_string())
        kept = self.rows.filter(pc.invert(pc.is_in(self.rows["key"], value_set=gone)))
        added = [row for row in changes.values() if row is not None]
        columns = [pa.array([getattr(row, f.name) for row in added], f.type) for f in _SCHEMA]
        table = pa.concat_tables([kept, pa.Table.from_arrays(columns, schema=_SCHEMA)])
        return table.take(pc.sort_indices(table, [("key", "ascending")])).combine_chunks()


def empty_placement(n_spoilt: int = 0) -> Placement:
    """Return an empty placement, number 0."""
    return Placement(0, _SCHEMA.empty_table(), n_spoilt=n_spoilt)


# -- the file -------------------------------------------------------------------------------------------------------


def encode_placement(placement: Placement) -> bytes:
    """Return the Arrow IPC file, with number, nonce and a CRC-32C of the rows in the schema's metadata."""
    facts = {
        "format": FORMAT_VERSION,
        "number": placement.number,
        "nonce": placement.nonce,
        "crc32c": _sum_of(placement.rows),
    }
    schema = _SCHEMA.with_metadata({_META: json.dumps(facts).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(placement.rows.replace_schema_metadata(schema.metadata).combine_chunks())
    data: bytes = sink.getvalue().to_pybytes()
    return data


def decode_placement(data: bytes, number: int, *, url: str) -> Placement:
    """Return the placement in a file that was read from placement_key(number). url: URL of the file, for errors.

    Raises:
        CorruptShard: The file is not what was written, or exceeds the limits.
        UnsupportedFormat: A newer release wrote it.
    """
    try:
        messages, schema = _begun(data)
        facts: dict[str, Any] = json.loads((schema.metadata or {})[_META])
        found, nonce, stated = int(facts["format"]), str(facts["nonce"]), (facts["number"], facts["crc32c"])
        is_later = found > FORMAT_VERSION
        table = _SCHEMA.empty_table() if is_later else _rows_of(messages, schema)
    except _WRONG as error:
        raise CorruptShard(f"cannot be read: {error}", url=url, part="placement") from error
    if is_later:
        message = f"is a placement of format {found}, this release reads up to {FORMAT_VERSION}: install a newer one"
        raise UnsupportedFormat(message, url=url, found=found, supported=FORMAT_VERSION)
    problem = _problem(table, number, stated)
    if problem:
        raise CorruptShard(problem, url=url, part="placement")
    return Placement(number, table.replace_schema_metadata(None).combine_chunks(), nonce)


def too_large(n_bytes: int, *, url: str) -> CorruptShard:
    """Return the error for a file above the size limit."""
    message = f"expected at most {MOST_BYTES} bytes, found {n_bytes}: it was read no further; restore or remove it"
    return CorruptShard(message, url=url, part="placement")


def _begun(data: bytes) -> tuple[Iterator[pa.Message], pa.Schema]:
    """Return the messages after the schema, and the schema."""
    if data[:8] != _MAGIC + b"\0\0" or data[-6:] != _MAGIC:
        raise ValueError("no whole Arrow file")
    messages = iter(pa.ipc.MessageReader.open_stream(pa.py_buffer(data).slice(8)))
    first = next(messages, None)
    if first is None:
        raise ValueError("no schema")
    return messages, pa.ipc.read_schema(first)


def _rows_of(messages: Iterator[pa.Message], schema: pa.Schema) -> pa.Table:
    """Return the rows as views of the file's bytes: nothing is decompressed."""
    if not schema.remove_metadata().equals(_SCHEMA):
        raise ValueError("another schema")
    batches = list(itertools.islice(messages, 2))
    if len(batches) > 1 or any(one.type != "record batch" for one in batches):
        raise ValueError("more than one batch of rows")
    if any(_is_compressed(one.metadata.to_pybytes()) for one in batches):
        raise ValueError("compressed rows")
    table = pa.Table.from_batches([pa.ipc.read_record_batch(one, schema) for one in batches], schema)
    if table.num_rows > MOST_ROWS:
        raise ValueError(f"expected at most {MOST_ROWS} rows, found {table.num_rows}")
    return table


def _is_compressed(metadata: bytes) -> bool:
    """Return whether a message has a compressed body, whose decompressed size is untrusted. Raises struct.error."""
    header = _field(metadata, struct.unpack_from("<I", metadata)[0], _HEADER)
    batch = header + struct.unpack_from("<I", metadata, header)[0]
    return header == 0 or _field(metadata, batch, _COMPRESSION) != 0


def _field(data: bytes, table: int, number: int) -> int:
    """Return the offset of a field of a flatbuffer table; 0 if the table lacks it."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    at = 4 + 2 * number
    offset: int = (
        struct.unpack_from("<H", data, vtable + at)[0] if at < struct.unpack_from("<H", data, vtable)[0] else 0
    )
    return table + offset if offset else 0


def _problem(table: pa.Table, number: int, stated: tuple[object, object]) -> str:
    """Return why a file is not the placement of that number; "" if it is. stated: Number and checksum in the file."""
    try:
        table.validate(full=True)
    except pa.ArrowInvalid as error:
        return f"cannot be read: {error}"
    if stated != (number, _sum_of(table)):
        return f"the rows or the number are not those that it was written with: {stated}, where it should be {number}"
    keys = table["key"].to_pylist()
    try:
        bad = [key for key in keys if not check_key(key)]
    except ValueError as error:
        return str(error)
    if bad or any(a >= b for a, b in itertools.pairwise(keys)):
        return "keys out of order"
    states = pc.unique(table["state"]).to_pylist()
    if set(states) - set(get_args(State)):
        return f"a state of {states}"
    if pc.any(pc.less(table["n_bytes"], 0)).as_py() or pc.any(pc.equal(table["url"], "")).as_py():
        return "a row without a URL, or with a negative size"
    return ""


def _sum_of(table: pa.Table) -> int:
    """Return a CRC-32C over all values and null positions, independent of the layout of the file."""
    crc = 0
    for column in map(_as_one_array, table.columns):
        crc = crc32c(np.packbits(np.asarray(pc.is_valid(column).to_numpy(zero_copy_only=False), bool)).tobytes(), crc)
        is_text = pa.types.is_large_string(column.type)
        filled = pa.concat_arrays([column.fill_null("" if is_text else 0)])
        numbers = pc.binary_length(filled) if is_text else filled
        crc = crc32c(np.ascontiguousarray(numbers.to_numpy(zero_copy_only=False)).tobytes(), crc)
        if is_text:
            crc = crc32c("".join(filled.to_pylist()).encode(), crc)
    return crc


def _as_one_array(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as one array."""
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays([*column.chunks, pa.array([], column.type)])
