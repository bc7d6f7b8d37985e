"""The placement log: numbered objects beside a data set, the newest of which says which objects are away from home.

::

    _tiercache/tiers.json                      tracking marker: it is tracked; the number of a recent placement. In the
                                               other tiers of a rule file: the URL of the home, which has the placement
    _tiercache/placement/<20 digits>.arrow     a complete placement each: one row for each object that is away from home

A writer changes the placement by putting the next number (numbered_log.py), which one of several racing writers wins;
the others merge their changes into the new placement and try again. Only the newest placements are kept. Readers begin
at the marker's number, which may be behind. PrefixStore views a folder of a tier as a store.
"""

from __future__ import annotations

import itertools
import json
import secrets
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tiercache._native.checksum import crc32c
from tiercache.crash_points import crash_point
from tiercache.errors import CommitConflict, CorruptShard, NotFound, StoreError, UnsupportedFormat
from tiercache.model import ObjectInfo
from tiercache.store import LocalFolder, Store, check_key
from tiercache.store.contract import WrapperStore
from tiercache.store.numbered_log import NumberedLog, is_forbidden

TRACKING_MARKER_KEY = "_tiercache/tiers.json"
PLACEMENT_FOLDER = "_tiercache/placement/"
# Readers that opened an older placement may still probe from it.
N_KEPT = 10
# A lost race means that another writer succeeded: a hundred losses in a row is overload, not bad luck.
MAX_REBASES = 100
_MARKER_BYTES = 64 << 10  # our markers have 100 bytes: of a longer file only the end is read, which does not parse
_NEVER_S = 1e12  # later than any clock
FORMAT_VERSION = 1
# A million moved shards with URLs of 50 characters take 207 bytes each: 197 MiB, and 1.1 GiB of memory while they are
# read. The limit is 2.5 times that: more than real data sets need, less than what exhausts a machine.
MOST_BYTES = 512 << 20
MOST_ROWS = 1 << 22  # a row may take no bytes in a crafted file, and costs about 100 bytes in memory
_META = b"tiercache"
_WRONG = (
    pa.ArrowException,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    RecursionError,
    OverflowError,
)

PlacementState: TypeAlias = Literal["here", "archived"]

_SCHEMA = pa.schema(
    [
        pa.field("key", pa.large_string(), nullable=False),
        pa.field("url", pa.large_string(), nullable=False),
        pa.field("storage_class", pa.large_string()),
        pa.field("state", pa.large_string(), nullable=False),
        pa.field("n_bytes", pa.int64(), nullable=False),
        pa.field("crc32c", pa.uint32()),
    ]
)


@dataclass(frozen=True, slots=True)
class PlacementRow:
    """Location of an object that is away from home: `url + "/" + key`, without credentials.

    storage_class: None: the store's default. state: "archived": to be restored first, unless it was restored since.
    crc32c: Of the whole object; None: unknown.
    """

    key: str
    url: str
    storage_class: str | None = None
    state: PlacementState = "here"
    n_bytes: int = 0
    crc32c: int | None = None


class Placement:
    """The objects that are away from home. Immutable and thread-safe.

    number: 0 if nothing was ever placed. rows: Table with the columns of `PlacementRow`, sorted by key; each key once.
    nonce: Random text that identifies the writer's attempt.
    """

    def __init__(self, number: int, rows: pa.Table, nonce: str = "") -> None:
        self.number, self.rows, self.nonce = number, rows, nonce
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
        return PlacementRow(**self.rows.select(_SCHEMA.names).slice(at, 1).to_pylist()[0])

    def urls_below(self, folder: str) -> tuple[str, ...]:
        return tuple(self.rows_below(folder)["url"].unique().to_pylist())

    def rows_below(self, folder: str) -> pa.Table:
        if not folder:
            return self.rows
        start, end = (
            bisect_left(range(len(self)), f"{folder}{sign}", key=lambda i: self._keys[i].as_py()) for sign in "/0"
        )
        return self.rows.slice(start, end - start)

    def row_numbers(self, keys: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
        found = pc.index_in(keys.cast(pa.large_string()), value_set=self._keys).fill_null(-1)
        return np.asarray(found.to_numpy(), np.int64) if len(keys) else np.empty(0, np.int64)

    def with_changes(self, changes: Mapping[str, PlacementRow | None]) -> pa.Table:
        gone = pa.array(list(changes), pa.large_string())
        kept = self.rows.filter(pc.invert(pc.is_in(self.rows["key"], value_set=gone)))
        added = [row for row in changes.values() if row is not None]
        columns = [pa.array([getattr(row, f.name, None) for row in added], f.type) for f in _SCHEMA]
        table = pa.concat_tables([kept, pa.Table.from_arrays(columns, schema=_SCHEMA)])
        return table.take(pc.sort_indices(table, [("key", "ascending")])).combine_chunks()


def empty_placement() -> Placement:
    return Placement(0, _SCHEMA.empty_table())


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
    """Return the placement in the file of this number. Raises CorruptShard, or UnsupportedFormat if it is newer."""
    try:
        reader = pa.ipc.open_file(pa.py_buffer(data))
        facts: dict[str, Any] = json.loads((reader.schema.metadata or {})[_META])
        version, nonce, stated = int(facts["format"]), str(facts["nonce"]), (facts["number"], facts["crc32c"])
        table = _SCHEMA.empty_table() if version > FORMAT_VERSION else _rows_of(reader)
    except _WRONG as error:
        raise CorruptShard(f"cannot be read: {error}", url=url, part="placement") from error
    if version > FORMAT_VERSION:
        message = f"is a placement of format {version}, this release reads up to {FORMAT_VERSION}: install a newer one"
        raise UnsupportedFormat(message, url=url, found=version, supported=FORMAT_VERSION)
    if stated != (number, _sum_of(table)):
        problem = f"the rows or the number are not those that it was written with: {stated}, it should be {number}"
        raise CorruptShard(problem, url=url, part="placement")
    if any(a >= b for a, b in itertools.pairwise(table["key"].to_pylist())):
        raise CorruptShard("keys out of order", url=url, part="placement")
    is_wrong = pc.or_(pc.less(table["n_bytes"], 0), pc.equal(table["url"], ""))
    is_wrong = pc.or_(is_wrong, pc.invert(pc.is_in(table["state"], value_set=pa.array(get_args(PlacementState)))))
    if pc.any(is_wrong).as_py():
        raise CorruptShard("a row without a URL, with a negative size or an unknown state", url=url, part="placement")
    return Placement(number, table.replace_schema_metadata(None).combine_chunks(), nonce)


def _rows_of(reader: pa.ipc.RecordBatchFileReader) -> pa.Table:
    if not reader.schema.remove_metadata().equals(_SCHEMA):
        raise ValueError("another schema")
    if reader.num_record_batches > 1:  # one batch named many times takes many times the memory of the file
        raise ValueError("more than one batch of rows")
    table = reader.read_all()
    if table.num_rows > MOST_ROWS or table.nbytes > MOST_BYTES:
        raise ValueError(
            f"expected at most {MOST_ROWS} rows and {MOST_BYTES} bytes, found {table.num_rows} and {table.nbytes}"
        )
    table.validate(full=True)
    return table


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
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays([*column.chunks, pa.array([], column.type)])


def _log_of(store: Store) -> NumberedLog:
    # One byte more than is allowed, so that a longer file is noticed and not read.
    return NumberedLog(store, PLACEMENT_FOLDER, ".arrow", hides_missing=True, most_bytes=MOST_BYTES + 1)


# -- reading --------------------------------------------------------------------------------------------------------


def is_tracked(store: Store) -> bool:
    """Return whether what is in store is tracked: its marker exists. One small GET. Raises StoreError."""
    return _marked(store) is not None


def read_placement(store: Store) -> Placement | None:
    """Return the newest placement; None if there is no marker, known from one GET; number 0 if nothing was placed yet.

    Raises CorruptShard, UnsupportedFormat if it cannot be read, StoreError if the store failed.
    """
    found = follow_marker(store)
    return None if isinstance(found, str) else found


def follow_marker(store: Store) -> Placement | str | None:
    """Return what the marker leads to: the newest placement, or, in a tier that is not the home, the URL of the home.

    None: there is no marker. Raises as read_placement().
    """
    mark = _mark(store)
    if mark is not None and isinstance(mark.get("home"), str):
        return str(mark["home"])
    marked = _number_in(mark)
    return None if marked is None else _found(store, _log_of(store).newest(marked))


def find_newest_placement(store: Store, known: Placement | None = None) -> Placement:
    """Return the newest placement as read_placement() does, but from a listing. For use when an object is missing."""
    placements = _log_of(store)
    start = placements.highest()
    if start is None:
        start = max(_marked(store) or 0, 0 if known is None else known.number)
    elif not start:
        return empty_placement()
    elif known is not None and known.number == start:
        newer = placements.probe(start + 1)
        return known if newer is None else _found(store, newer)
    return _found(store, placements.newest(start))


def encode_tracking_marker(number: int | None, since_s: float | None = None) -> bytes:
    facts: dict[str, Any] = {"format": "tiercache-tiers", "version": FORMAT_VERSION}
    facts |= {} if number is None else {"placement": number}
    return json.dumps(facts | ({} if since_s is None else {"since": int(since_s)})).encode() + b"\n"


def placement_key(number: int) -> str:
    return f"{PLACEMENT_FOLDER}{number:020d}.arrow"


def tracked_since_s(store: Store) -> float | None:
    """Return when tracking started, in seconds since the epoch; None if unknown. Raises StoreError."""
    since = (_mark(store) or {}).get("since")
    if isinstance(since, bool) or not isinstance(since, int | float):
        return None
    return float(since) if 0 <= since < _NEVER_S else None


def _marked(store: Store) -> int | None:
    return _number_in(_mark(store))


def _number_in(mark: Mapping[str, Any] | None) -> int | None:
    if mark is None or "home" in mark:
        return None
    number = mark.get("placement")
    return number if type(number) is int and 0 <= number < 10**18 else 0


def _mark(store: Store) -> dict[str, Any] | None:
    try:
        data, _ = store.read_tail(TRACKING_MARKER_KEY, _MARKER_BYTES)
    except NotFound:
        return None
    except StoreError as error:
        if is_forbidden(error):
            return None  # the reader reads from the home
        raise
    with suppress(ValueError, RecursionError):
        mark = json.loads(data)
        if isinstance(mark, dict):
            return mark
    return {}


def _found(store: Store, found: tuple[int, bytes] | None) -> Placement:
    """Return the placement in an object of the log; the empty one for None. Raises CorruptShard, UnsupportedFormat."""
    if found is None:
        return empty_placement()
    number, data = found
    url = store.url_of(placement_key(number))
    if len(data) > MOST_BYTES:
        message = f"expected at most {MOST_BYTES} bytes, found more: it was not read; restore or remove it"
        raise CorruptShard(message, url=url, part="placement")
    return decode_placement(data, number, url=url)


# -- changing -------------------------------------------------------------------------------------------------------


def start_tracking(store: Store) -> bool:
    """Put the marker: machines report their use from now on. Return whether it was missing. Raises StoreError."""
    mark = _mark(store)
    if _number_in(mark) is not None:
        return False
    marker = encode_tracking_marker(_log_of(store).highest(), time.time())
    if mark is None:
        store.put_if_absent(TRACKING_MARKER_KEY, marker)
    else:  # it was a tier of another home
        store.put(TRACKING_MARKER_KEY, marker)
    return True


def lead_to_home(store: Store, home_url: str) -> None:
    """Let the marker of a tier lead to the home, so that readers of what has left the tier find it. Raises StoreError.

    An empty folder gets no marker, because its disk may not be mounted. A tier that is tracked itself stays so.
    """
    mark = _mark(store)
    if _number_in(mark) is not None or (mark is not None and mark["home"] == home_url):
        return
    if mark is not None or not isinstance(store, LocalFolder) or next(iter(store.list()), None) is not None:
        text = json.dumps({"format": "tiercache-tiers", "version": FORMAT_VERSION, "home": home_url})
        store.put(TRACKING_MARKER_KEY, text.encode() + b"\n")


def commit_placement(store: Store, changes: Mapping[str, PlacementRow | None]) -> Placement:
    """Change the location of objects (None: at home), in one atomic step, and return the new placement.

    Changes that the placement has already make no new one, so a commit may be repeated after a crash at any instant.
    Raises CommitConflict if others won the race too often, CorruptShard, UnsupportedFormat, or StoreError; with
    .maybe_done the commit may have happened: repeat it.
    """
    start_tracking(store)  # first: a reader that sees no marker reads no placement
    placements, current = _log_of(store), find_newest_placement(store)
    for _ in range(MAX_REBASES):
        rows = current.with_changes(changes)
        if rows.equals(current.rows):
            return current
        proposed = Placement(current.number + 1, rows, secrets.token_hex(16))
        if placements.put_newest(proposed.number, _encoded(store, proposed)):
            crash_point("tier_placement.written")
            with suppress(StoreError):  # readers begin to look there: a failure only costs them some requests
                store.put(TRACKING_MARKER_KEY, encode_tracking_marker(proposed.number, tracked_since_s(store)))
            crash_point("tier_placement.hinted")
            with suppress(StoreError):  # the next commit deletes them
                placements.delete(range(max(1, proposed.number - 2 * N_KEPT), proposed.number - N_KEPT + 1))
            return proposed
        current = find_newest_placement(store)
    raise CommitConflict(f"{MAX_REBASES} others changed the placement first", url=store.url, number=current.number)


def _encoded(store: Store, proposed: Placement) -> bytes:
    data = encode_placement(proposed)
    if len(data) > MOST_BYTES or len(proposed) > MOST_ROWS:
        raise StoreError(
            f"expected a placement of at most {MOST_BYTES} bytes and {MOST_ROWS} rows, found {len(data)} bytes and "
            f"{len(proposed)} rows, which readers reject: move fewer objects away from home, or write larger shards",
            url=store.url_of(placement_key(proposed.number)),
        )
    return data


# -- a data set's folder ----------------------------------------------------------------------------------------------


def prefix_store(store: Store, folder: str) -> Store:
    return PrefixStore(store, folder) if folder else store


class PrefixStore(WrapperStore):
    """Store of the keys below a folder of another store. It uses that store's connections, and never closes them."""

    def __init__(self, store: Store, folder: str) -> None:
        super().__init__(store)
        self._prefix = f"{check_key(folder.strip('/'))}/"
        self.url = f"{store.url.rstrip('/')}/{self._prefix.rstrip('/')}"

    def key_inside(self, key: str) -> str:
        return self._prefix + check_key(key)

    def info_outside(self, info: ObjectInfo) -> ObjectInfo:
        return replace(info, key=info.key.removeprefix(self._prefix))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return map(self.info_outside, self.inner.list(self._prefix + prefix))

    def close(self) -> None:
        """Leave the connections open: they belong to the other store."""
