"""Where objects lie that are not at home: a chain of numbered objects beside a data set, the newest of which holds.

::

    _tiercache/tiers.json                      the mark: tiers look after this; with a hint to the newest placement
    _tiercache/placement/<20 digits>.arrow     each whole: all that lies elsewhere, a row an object

Who has not the mark costs its readers one small GET. A placement is changed by one put of the next number, which
exactly one of racing writers wins; who loses merges its changes into the winner's and tries again. The hint is never
trusted: readers probe upward from it, and list where it leads nowhere.

Only the newest are kept, so that a number may be free again::

    1. a writer has read number 7, and sleeps
    2. others write 8 to 18, and remove 8
    3. the writer wakes, and puts its 8: the number is free, but nobody will ever read it

So whoever has put a number lists what there is: if there is a higher one, its own counts for nothing, and it begins
anew.
"""

from __future__ import annotations

import itertools
import json
import re
import secrets
import time
from bisect import bisect_left
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tiercache._native.checksum import crc32c
from tiercache.errors import CommitConflict, CorruptShard, NotFound, StoreError, UnsupportedFormat
from tiercache.points import reach
from tiercache.store import check_key

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from tiercache.store import Store

MARK_KEY = "_tiercache/tiers.json"
PLACEMENT_FOLDER = "_tiercache/placement/"
FORMAT_VERSION = 1
# Readers that opened an older one may still be probing from it.
N_KEPT = 10
# A loss means that another change landed: a hundred in a row is a crowd, not bad luck.
MAX_REBASES = 100
# How far is probed across a gap where the store cannot list: more than one writer can be late with its hint.
_MAX_GAP = 4 * N_KEPT
_FORBIDDEN = 403
_NEVER_S = 1e12  # no clock says so
_NAME = re.compile(rf"{re.escape(PLACEMENT_FOLDER)}([0-9]{{20}})\.arrow")
_META = b"tiercache"

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

    number: 0 where nothing was ever placed; rows: by key, each once, with the columns of `Row`.
    """

    def __init__(self, number: int, rows: pa.Table, nonce: str = "") -> None:
        self.number, self.rows, self.nonce = number, rows, nonce
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

    def with_changes(self, changes: Mapping[str, Row | None]) -> pa.Table:
        """The rows as they are after changes: a row to put in its place, None: it is at home."""
        gone = pa.array(list(changes), pa.large_string())
        kept = self.rows.filter(pc.invert(pc.is_in(self.rows["key"], value_set=gone)))
        added = [row for row in changes.values() if row is not None]
        columns = [pa.array([getattr(row, f.name) for row in added], f.type) for f in _SCHEMA]
        table = pa.concat_tables([kept, pa.Table.from_arrays(columns, schema=_SCHEMA)])
        return table.take(pc.sort_indices(table, [("key", "ascending")])).combine_chunks()


def nothing() -> Placement:
    """A placement of nothing, number 0."""
    return Placement(0, _SCHEMA.empty_table())


# -- reading --------------------------------------------------------------------------------------------------------


def is_adopted(store: Store) -> bool:
    """Whether tiers look after what lies in store: its mark is there. One small GET. Raises StoreError."""
    return _hint(store) is not None


def read(store: Store) -> Placement | None:
    """The newest placement; None: there is no mark, which is seen by one GET; number 0: nothing was placed yet.

    Raises:
        CorruptShard: the newest cannot be read.
        UnsupportedFormat: a newer release wrote it.
        StoreError: the store's.
    """
    hint = _hint(store)
    return None if hint is None else _newest(store, hint)


def search(store: Store, known: Placement | None = None) -> Placement:
    """As `read`, where something was missed: lists what there is, whatever mark and hint say. Raises as `read`."""
    listed = _listed(store)
    if listed is None:
        return _newest(store, max(_hint(store) or 0, 0 if known is None else known.number))
    if known is not None and known.number == listed:
        newer = _probe(store, listed + 1)
        return known if newer is None else newer
    return _newest(store, listed) if listed else nothing()


def encode_mark(number: int, since_s: float | None = None) -> bytes:
    """The mark's text. since_s: when tiers began to look after the data, seconds since the epoch."""
    facts = {"format": "tiercache-tiers", "version": FORMAT_VERSION, "placement": number}
    return json.dumps(facts | ({} if since_s is None else {"since": int(since_s)})).encode() + b"\n"


def placement_key(number: int) -> str:
    """Where placement `number` lies."""
    return f"{PLACEMENT_FOLDER}{number:020d}.arrow"


def adopted_s(store: Store) -> float | None:
    """When tiers began to look after what lies in store, and uses to be counted; None: nobody says. As is_adopted."""
    since = (_mark(store) or {}).get("since")
    if isinstance(since, bool) or not isinstance(since, int | float):
        return None
    return float(since) if 0 <= since < _NEVER_S else None


def _hint(store: Store) -> int | None:
    """The hinted number, 0 where the mark has none that can be; None: there is no mark."""
    mark = _mark(store)
    if mark is None:
        return None
    number = mark.get("placement")
    return number if type(number) is int and 0 < number < 10**18 else 0


def _mark(store: Store) -> dict[str, Any] | None:
    """What the mark says, nothing where it cannot be read; None: there is none."""
    try:
        data = store.get(MARK_KEY)
    except NotFound:
        return None
    except StoreError as error:
        if _is_forbidden(error):
            return None  # he reads what lies at home
        raise
    with suppress(ValueError, RecursionError):
        mark = json.loads(data)
        if isinstance(mark, dict):
            return mark
    return {}


def _newest(store: Store, hint: int) -> Placement:
    """The newest from a number that may be there; number 0 where there is none at all."""
    found = _probe(store, hint or 1)
    for _ in range(MAX_REBASES):
        if found is not None:
            return found
        listed = _listed(store)
        if listed is None:
            return _beyond(store, hint)
        if not listed:
            return nothing()
        found = _probe(store, listed, is_listed=True)  # unless it was removed since, for ten newer ones
    raise StoreError("placement changes faster than it can be read", url=store.url, retryable=True)


def _beyond(store: Store, hint: int) -> Placement:
    """The newest of a store that cannot list, where the hinted one is gone."""
    further = range(hint + 1, hint + 1 + _MAX_GAP) if hint else ()
    found = next((number for number in further if _get(store, number) is not None), 0)
    return _probe(store, found) or nothing()


def _probe(store: Store, number: int, *, is_listed: bool = False) -> Placement | None:
    """The newest of number, number + 1, ... without a gap; None if there is no `number`. is_listed: as _get's."""
    data, newer = None, _get(store, number, is_listed=is_listed)
    while newer is not None:
        data, number = newer, number + 1
        newer = _get(store, number)
    return None if data is None else decode(data, number - 1, url=f"{store.url}/{placement_key(number - 1)}")


def _get(store: Store, number: int, *, is_listed: bool = False) -> bytes | None:
    """A placement's file; None: there is none. is_listed: it was seen, so that "forbidden" means just that."""
    try:
        return store.get(placement_key(number)) if number > 0 else None
    except NotFound:
        return None
    except StoreError as error:
        if _is_forbidden(error) and not is_listed:
            return None
        raise


def _is_forbidden(error: StoreError) -> bool:
    """Whether a store forbids an object: to who may not list a bucket also one that is not there."""
    return error.status == _FORBIDDEN and not error.retryable


def _listed(store: Store) -> int | None:
    """The highest number there is, 0 for none; None: the store cannot list."""
    try:
        matches = (_NAME.fullmatch(info.key) for info in store.list(PLACEMENT_FOLDER))
        return max((int(match[1]) for match in matches if match), default=0)
    except StoreError as error:
        if error.retryable:
            raise
        return None


# -- changing -------------------------------------------------------------------------------------------------------


def adopt(store: Store) -> bool:
    """Set the mark: machines report from now on what they use. Whether it was not there. Raises StoreError."""
    if is_adopted(store):
        return False
    store.put_if_absent(MARK_KEY, encode_mark(0, time.time()))
    return True


def commit(store: Store, changes: Mapping[str, Row | None]) -> Placement:
    """Change where objects lie, in one step that all readers see; the placement that has the changes.

    Changes that are in it already make no new one, so that this may be repeated after a crash at any instant.

    Args:
        store: the home of these objects.
        changes: key -> where it lies from now on; None: at home.

    Raises:
        ValueError: a row under another key than its own.
        CommitConflict: others changed it again and again.
        CorruptShard, UnsupportedFormat: the placement that there is cannot be read.
        StoreError: the store's; with .maybe_done it may have happened: repeat it.
    """
    for key, row in changes.items():
        if row is not None and row.key != key:
            raise ValueError(f"the row for {key!r} is about {row.key!r}")
    adopt(store)  # first: a reader that sees no mark asks for no placement
    current = search(store)
    for _ in range(MAX_REBASES):
        rows = current.with_changes(changes)
        if rows.equals(current.rows):
            return current
        proposed = Placement(current.number + 1, rows, secrets.token_hex(16))
        if _put(store, proposed):
            reach("tier_placement.written")
            if (_listed(store) or 0) <= proposed.number:
                _tidy(store, proposed.number)
                return proposed
            store.delete([placement_key(proposed.number)])  # see above: it was put too late
        current = search(store)
    raise CommitConflict(f"{MAX_REBASES} others changed the placement first", url=store.url, number=current.number)


def _put(store: Store, proposed: Placement) -> bool:
    """Whether the number of `proposed` is its own after putting it there; False: another's, or gone by now."""
    number, failure = proposed.number, None
    try:
        if store.put_if_absent(placement_key(number), encode(proposed)):
            return True
    except StoreError as error:
        failure = error
    # Even a plain "no" may be about our own: a back end that tried again meets what its first try wrote.
    try:
        found = decode(store.get(placement_key(number)), number, url=f"{store.url}/{placement_key(number)}")
    except NotFound:
        if failure is not None:
            raise failure from None
        return False
    except StoreError as error:
        raise (failure or error) from error
    return found.nonce == proposed.nonce


def _tidy(store: Store, number: int) -> None:
    """Hint at the newest, and forget those that nobody can be reading any more. What fails is done by the next."""
    with suppress(StoreError):
        if (_hint(store) or 0) < number:
            store.put(MARK_KEY, encode_mark(number, adopted_s(store)))
        reach("tier_placement.hinted")
        if number > N_KEPT:
            store.delete([placement_key(old) for old in range(max(1, number - 2 * N_KEPT), number - N_KEPT + 1)])


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
        CorruptShard: it is not what was written.
        UnsupportedFormat: a newer release wrote it.
    """
    try:
        table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
        facts: dict[str, Any] = json.loads((table.schema.metadata or {})[_META])
        found, nonce, stated = int(facts["format"]), str(facts["nonce"]), (facts["number"], facts["crc32c"])
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise CorruptShard(f"cannot be read: {error}", url=url, part="placement") from error
    if found > FORMAT_VERSION:
        message = f"is a placement of format {found}, this release reads up to {FORMAT_VERSION}: install a newer one"
        raise UnsupportedFormat(message, url=url, found=found, supported=FORMAT_VERSION)
    problem = _problem(table, number, stated)
    if problem:
        raise CorruptShard(problem, url=url, part="placement")
    return Placement(number, table.replace_schema_metadata(None).combine_chunks(), nonce)


def _problem(table: pa.Table, number: int, stated: tuple[object, object]) -> str:
    """Why a file is not the placement of that number; "" if it is. stated: its number and CRC-32C, as it says."""
    if not table.schema.remove_metadata().equals(_SCHEMA):
        return "another schema"
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
