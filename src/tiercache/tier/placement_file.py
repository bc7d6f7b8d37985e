"""What a placement is, and the file that it stands in: an Arrow IPC file of one batch, read by hostile eyes.

Whoever may write beside a data set may write anything there. So a file is read only as far as MOST_BYTES, its facts
before its rows, and rows only where reading them takes no more memory than the file is long: one batch, uncompressed.
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
# A million shards that lie elsewhere, with URLs of 50 characters, are 207 bytes each: 197 MiB, and 1.1 GiB of memory
# while they are read. Two and a half times that is more than anybody places, and less than what kills a machine.
MOST_BYTES = 512 << 20
MOST_ROWS = 1 << 22  # rows need not have bytes of their own, and cost some 100 in memory
_META = b"tiercache"
_MAGIC = b"ARROW1"
_WRONG = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError, struct.error)
_HEADER, _COMPRESSION = 2, 3  # fields of Arrow's tables Message and RecordBatch

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
class Row:
    """Where an object lies.

    Attributes:
        key: in its home, which is the store that the placement lies in.
        url: of the folder that it lies in under the same key: `url + "/" + key` is the object. Without credentials.
        storage_class: that it has there; None: the store's own.
        state: "here" can be read; "archived" must be restored first, unless the store says that it was by now.
        n_bytes: its size.
        crc32c: of it whole; None: not known.
        promote: URL of the folder in the hot tier that it is copied to, under the same key, when it is read; None: not.
        hot_bytes: most bytes that the hot tier may hold; None: as its disk has room.
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
        """Raises ValueError for a row that cannot be."""
        check_key(self.key)
        if not self.url or self.n_bytes < 0 or self.state not in get_args(State):
            raise ValueError(f"a row needs a URL, a size of 0 or more and a state of {get_args(State)}, got {self!r}")


class Placement:
    """What lies elsewhere, as one numbered object says it. Immutable; safe from any thread.

    number: 0 where nothing was ever placed; rows: by key, each once, with the columns of `Row`; n_spoilt: how many
    later numbers there are that were spoilt while they were written, and count for nothing.
    """

    def __init__(self, number: int, rows: pa.Table, nonce: str = "", *, n_spoilt: int = 0) -> None:
        self.number, self.rows, self.nonce, self.n_spoilt = number, rows, nonce, n_spoilt
        self._keys: pa.Array = _one(rows["key"])

    def __repr__(self) -> str:
        return f"Placement({self.number}, {len(self)} rows)"

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    def find(self, key: str) -> Row | None:
        """Where key lies; None: at home, as far as this one knows. 10 us among a million."""
        at = bisect_left(range(len(self)), key, key=lambda i: self._keys[i].as_py())
        return self.row(at) if at < len(self) and self._keys[at].as_py() == key else None

    def row(self, at: int) -> Row:
        """Row `at` of the table."""
        return Row(**self.rows.slice(at, 1).to_pylist()[0])

    def among(self, keys: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
        """Of each key the number of its row, -1 for those at home; int64[len(keys)]."""
        found = pc.index_in(keys.cast(pa.large_string()), value_set=self._keys).fill_null(-1)
        return np.asarray(found.to_numpy(), np.int64) if len(keys) else np.empty(0, np.int64)

    def unlike(self, other: Placement) -> Placement:
        """The rows of objects that other has in another place."""
        at = other.among(self.rows["key"])
        there = pc.take(other.rows["url"], pa.array(np.maximum(at, 0))) if len(other) else self.rows["url"]
        is_other = pc.and_(pa.array(at >= 0), pc.not_equal(self.rows["url"], there))
        return Placement(self.number, self.rows.filter(is_other).combine_chunks(), self.nonce)

    def with_changes(self, changes: Mapping[str, Row | None]) -> pa.Table:
        """The rows as they are after changes: a row to put in its place, None: it is at home."""
        gone = pa.array(list(changes), pa.large_string())
        kept = self.rows.filter(pc.invert(pc.is_in(self.rows["key"], value_set=gone)))
        added = [row for row in changes.values() if row is not None]
        columns = [pa.array([getattr(row, f.name) for row in added], f.type) for f in _SCHEMA]
        table = pa.concat_tables([kept, pa.Table.from_arrays(columns, schema=_SCHEMA)])
        return table.take(pc.sort_indices(table, [("key", "ascending")])).combine_chunks()


def nothing(n_spoilt: int = 0) -> Placement:
    """A placement of nothing, number 0."""
    return Placement(0, _SCHEMA.empty_table(), n_spoilt=n_spoilt)


# -- the file -------------------------------------------------------------------------------------------------------


def encode(placement: Placement) -> bytes:
    """Its Arrow IPC file, with number, nonce and a CRC-32C of the rows in the schema's metadata."""
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


def decode(data: bytes, number: int, *, url: str) -> Placement:
    """The placement of a file that was read from placement_key(number). url: of it, for errors.

    Raises:
        CorruptShard: it is not what was written, or more than anybody writes.
        UnsupportedFormat: a newer release wrote it.
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
    """The error of a file that is larger than anybody writes."""
    message = f"expected at most {MOST_BYTES} bytes, found {n_bytes}: it was read no further; restore or remove it"
    return CorruptShard(message, url=url, part="placement")


def _begun(data: bytes) -> tuple[Iterator[pa.Message], pa.Schema]:
    """What follows the schema, and the schema."""
    if data[:8] != _MAGIC + b"\0\0" or data[-6:] != _MAGIC:
        raise ValueError("no whole Arrow file")
    messages = iter(pa.ipc.MessageReader.open_stream(pa.py_buffer(data).slice(8)))
    first = next(messages, None)
    if first is None:
        raise ValueError("no schema")
    return messages, pa.ipc.read_schema(first)


def _rows_of(messages: Iterator[pa.Message], schema: pa.Schema) -> pa.Table:
    """The rows, in the bytes that were read: nothing is decompressed."""
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
    """Whether a message says that its body is: how long it would be then, it says itself. Raises struct.error."""
    header = _field(metadata, struct.unpack_from("<I", metadata)[0], _HEADER)
    batch = header + struct.unpack_from("<I", metadata, header)[0]
    return header == 0 or _field(metadata, batch, _COMPRESSION) != 0


def _field(data: bytes, table: int, number: int) -> int:
    """Where a field of a flatbuffer's table lies; 0: it has none."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    at = 4 + 2 * number
    offset: int = (
        struct.unpack_from("<H", data, vtable + at)[0] if at < struct.unpack_from("<H", data, vtable)[0] else 0
    )
    return table + offset if offset else 0


def _problem(table: pa.Table, number: int, stated: tuple[object, object]) -> str:
    """Why a file is not the placement of that number; "" if it is. stated: its number and CRC-32C, as it says."""
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
        return "a row without a place, or with a size below 0"
    return ""


def _sum_of(table: pa.Table) -> int:
    """CRC-32C of all values and of where nulls are, whatever the layout of the file."""
    crc = 0
    for column in map(_one, table.columns):
        crc = crc32c(np.packbits(np.asarray(pc.is_valid(column).to_numpy(zero_copy_only=False), bool)).tobytes(), crc)
        is_text = pa.types.is_large_string(column.type)
        filled = pa.concat_arrays([column.fill_null("" if is_text else 0)])
        numbers = pc.binary_length(filled) if is_text else filled
        crc = crc32c(np.ascontiguousarray(numbers.to_numpy(zero_copy_only=False)).tobytes(), crc)
        if is_text:
            crc = crc32c("".join(filled.to_pylist()).encode(), crc)
    return crc


def _one(column: pa.ChunkedArray) -> pa.Array:
    """A column in one piece."""
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays([*column.chunks, pa.array([], column.type)])
