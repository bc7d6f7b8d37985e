"""Where objects lie that are not at home: a chain of numbered objects beside a data set, the newest of which holds.

::

    _tiercache/tiers.json                      the mark: tiers look after this; and up to which number it is whole
    _tiercache/placement/<20 digits>.arrow     each whole: all that lies elsewhere, a row an object

Who has not the mark costs its readers one small GET. A placement is changed by one put of the next number, which
exactly one of racing writers wins; who loses merges its changes into the winner's and tries again. The mark's number
is where readers begin: they probe upward from it, and list where it leads nowhere.

Only the newest are kept, so that a number may be free again::

    1. a writer has read number 7, and sleeps
    2. others write 8 to 18, and remove 8
    3. the writer wakes, and puts its 8: the number is free, but nobody will ever read it

So whoever has put a number lists what there is: if there is a higher one, its own counts for nothing, and it begins
anew.

A put may be spoilt on its way. So what was put is read back, and only then does the mark say its number, and does a
commit return: nobody acts on one that the mark does not reach. If such a one cannot be read, it counts for nothing,
to readers and to the next writer, who steps over it. One that the mark reaches was whole once: what it said cannot be
known from those before, and whoever reads it gets CorruptShard::

    1. A puts 8, and reads it back
    2. B reads 8 wrongly, more than once, where the mark says 7; it steps over it and puts 9, which lacks A's changes
    3. A has the mark say 8

Of the two, one sees the other: A lists after the mark says 8, and B looks at the mark again after 9 is there.

Two that raise the mark in one instant may leave the lower number in it. Who wrote that finds the higher one in his
list, and raises the mark again; if he is killed in between, the next commit does.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tiercache.errors import CommitConflict, CorruptShard, NotFound, StoreError, UnsupportedFormat
from tiercache.points import reach
from tiercache.tier.placement_file import (
    FORMAT_VERSION,
    MOST_BYTES,
    MOST_ROWS,
    Placement,
    Row,
    State,
    decode,
    encode,
    nothing,
    too_large,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tiercache.store import Store

__all__ = ["Placement", "Row", "State", "adopt", "commit", "decode", "encode", "nothing", "read", "search"]

MARK_KEY = "_tiercache/tiers.json"
PLACEMENT_FOLDER = "_tiercache/placement/"
# Readers that opened an older one may still be probing from it.
N_KEPT = 10
# A loss means that another change landed: a hundred in a row is a crowd, not bad luck.
MAX_REBASES = 100
# How far is probed across a gap where the store cannot list: more than one writer can be late with its hint.
_MAX_GAP = 4 * N_KEPT
_MARK_BYTES = 64 << 10  # ours are a hundred: of a longer one the end is read, which says nothing
_TRIES = 3  # of writing a mark that another writer, or a fault, writes otherwise
_FORBIDDEN = 403
_NEVER_S = 1e12  # no clock says so
_NAME = re.compile(rf"{re.escape(PLACEMENT_FOLDER)}([0-9]{{20}})\.arrow")

# -- reading --------------------------------------------------------------------------------------------------------


def is_adopted(store: Store) -> bool:
    """Whether tiers look after what lies in store: its mark is there. One small GET. Raises StoreError."""
    return _marked(store) is not None


def read(store: Store) -> Placement | None:
    """The newest placement; None: there is no mark, which is seen by one GET; number 0: nothing was placed yet.

    Raises:
        CorruptShard: the newest cannot be read.
        UnsupportedFormat: a newer release wrote it.
        StoreError: the store's.
    """
    marked = _marked(store)
    return None if marked is None else _newest(store, marked)


def search(store: Store, known: Placement | None = None) -> Placement:
    """As `read`, where something was missed: lists what there is, whatever the mark says. Raises as `read`."""
    listed = _listed(store)
    if listed is None:
        return _newest(store, max(_marked(store) or 0, 0 if known is None else known.number))
    if known is not None and known.number + known.n_spoilt == listed:
        newer = _probe(store, listed + 1)
        return known if newer is None else newer
    return _newest(store, listed) if listed else nothing()


def moved_since(store: Store, newest: Placement) -> tuple[Placement, ...]:
    """Of the placements before the newest that are still there, the latest first, the rows that say another place.

    Ends at the first that is gone, and steps over what is damaged: nothing hangs on them.
    """
    found = []
    with suppress(StoreError, UnsupportedFormat):
        for number in range(newest.number - 1, max(newest.number - N_KEPT, 0), -1):
            with suppress(CorruptShard):
                data = _get(store, number)
                if data is None:
                    break
                before = _decoded(store, number, data).unlike(newest)
                if len(before):
                    found.append(before)
    return tuple(found)


def encode_mark(number: int | None, since_s: float | None = None) -> bytes:
    """The mark's text.

    Args:
        number: up to which placements were read back; None: it is not known.
        since_s: when tiers began to look after the data, seconds since the epoch.
    """
    facts: dict[str, Any] = {"format": "tiercache-tiers", "version": FORMAT_VERSION}
    facts |= {} if number is None else {"placement": number}
    return json.dumps(facts | ({} if since_s is None else {"since": int(since_s)})).encode() + b"\n"


def placement_key(number: int) -> str:
    """Where placement `number` lies."""
    return f"{PLACEMENT_FOLDER}{number:020d}.arrow"


def adopted_s(store: Store) -> float | None:
    """When tiers began to look after what lies in store, and uses to be counted; None: nobody says. As is_adopted."""
    return _since_s(_mark(store) or {})


def _since_s(mark: dict[str, Any]) -> float | None:
    since = mark.get("since")
    if isinstance(since, bool) or not isinstance(since, int | float):
        return None
    return float(since) if 0 <= since < _NEVER_S else None


def _marked(store: Store) -> int | None:
    """The number in the mark, 0 where it has none that can be; None: there is no mark."""
    mark = _mark(store)
    return None if mark is None else _number(mark) or 0


def _number(mark: dict[str, Any]) -> int | None:
    """The number up to which placements were read back; None: it says none that can be."""
    number = mark.get("placement")
    return number if type(number) is int and 0 <= number < 10**18 else None


def _mark(store: Store) -> dict[str, Any] | None:
    """What the mark says, nothing where it cannot be read; None: there is none."""
    try:
        data, _ = store.read_tail(MARK_KEY, _MARK_BYTES)
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


def _newest(store: Store, start: int) -> Placement:
    """The newest from a number that may be there; number 0 where there is none at all."""
    found = _probe(store, start or 1)
    for _ in range(MAX_REBASES):
        if found is not None:
            return found
        listed = _listed(store)
        if listed is None:
            return _beyond(store, start)
        if not listed:
            return nothing()
        found = _probe(store, listed, is_listed=True)  # unless it was removed since, for ten newer ones
    raise StoreError("placement changes faster than it can be read", url=store.url, retryable=True)


def _beyond(store: Store, start: int) -> Placement:
    """The newest of a store that cannot list, where `start` is gone."""
    further = range(start + 1, start + 1 + _MAX_GAP) if start else ()
    found = next((number for number in further if _get(store, number) is not None), 0)
    return _probe(store, found) or nothing()


def _probe(store: Store, number: int, *, is_listed: bool = False) -> Placement | None:
    """The newest of number, number + 1, ... without a gap; None if there is no `number`. is_listed: as _get's."""
    data, newer = None, _get(store, number, is_listed=is_listed)
    while newer is not None:
        data, number = newer, number + 1
        newer = _get(store, number)
    return None if data is None else _sound(store, number - 1, data)


def _sound(store: Store, top: int, data: bytes) -> Placement:
    """The newest that counts, where `top` is the newest there is: see above of those that were spoilt. data: of top."""
    try:
        return _decoded(store, top, data)
    except CorruptShard:
        read_back = _number(_mark(store) or {})
        if read_back is None or top <= read_back:  # more were written and read back since, or it was whole once
            newer = _probe(store, read_back) if read_back is not None and top < read_back else None
            if newer is None:
                raise
            return newer
        for number in range(top - 1, 0, -1):
            found = _get(store, number, is_listed=True)
            if found is None:
                raise  # none is left that could tell what lay where before
            try:
                sound = _decoded(store, number, found)
            except CorruptShard:
                if number <= read_back:
                    raise
            else:
                return Placement(number, sound.rows, sound.nonce, n_spoilt=top - number)
        return nothing(n_spoilt=top)


def _decoded(store: Store, number: int, data: bytes) -> Placement:
    """What was read, or what is read now where that cannot be decoded: a bit may have turned on the way."""
    url = f"{store.url}/{placement_key(number)}"
    try:
        return decode(data, number, url=url)
    except CorruptShard:
        again = _get(store, number)
        if again is None or again == data:
            raise
        return decode(again, number, url=url)


def _get(store: Store, number: int, *, is_listed: bool = False) -> bytes | None:
    """A placement's file; None: there is none. is_listed: it was seen, so that "forbidden" means just that."""
    if number <= 0:
        return None
    try:
        return _whole(store, placement_key(number))
    except NotFound:
        return None
    except StoreError as error:
        if _is_forbidden(error) and not is_listed:
            return None
        raise


def _whole(store: Store, key: str) -> bytes:
    """A placement's file, in one request that reads MOST_BYTES at most. Raises CorruptShard where it is longer."""
    data, info = store.read_tail(key, MOST_BYTES)
    if info.n_bytes > MOST_BYTES:
        raise too_large(info.n_bytes, url=f"{store.url}/{key}")
    return data


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
    # What is there may have been acted upon, if a mark was there and is gone: it counts as read back.
    store.put_if_absent(MARK_KEY, encode_mark(_listed(store), time.time()))
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
            _say_read_back(store, current.number)
            return current
        proposed = Placement(current.number + current.n_spoilt + 1, rows, secrets.token_hex(16))
        if _put(store, proposed):
            try:
                if _holds(store, proposed.number, current):
                    reach("tier_placement.hinted")
                    _tidy(store, proposed.number)
                    return proposed
            except StoreError as error:
                error.facts["maybe_done"] = True
                raise
            store.delete([placement_key(proposed.number)])  # see above: it was put too late
        current = search(store)
    raise CommitConflict(f"{MAX_REBASES} others changed the placement first", url=store.url, number=current.number)


def _put(store: Store, proposed: Placement) -> bool:
    """Whether `proposed` was put and read back whole; False: its number is another's or gone, or it is spoilt."""
    number, failure, data = proposed.number, None, encode(proposed)
    if len(data) > MOST_BYTES or len(proposed) > MOST_ROWS:
        raise StoreError(
            f"expected a placement of at most {MOST_BYTES} bytes and {MOST_ROWS} rows, found {len(data)} bytes and "
            f"{len(proposed)} rows, which no reader reads: fewer objects can lie elsewhere, in larger shards",
            url=f"{store.url}/{placement_key(number)}",
        )
    try:
        if store.put_if_absent(placement_key(number), data):
            reach("tier_placement.written")
    except StoreError as error:
        failure = error
    # Even a plain "no" may be about our own: a back end that tried again meets what its first try wrote.
    try:
        return _whole(store, placement_key(number)) == data
    except NotFound:
        if failure is not None:
            raise failure from None
        return False
    except StoreError as error:
        unsettled = failure or error
        unsettled.facts["maybe_done"] = True
        raise unsettled from error


def _holds(store: Store, number: int, before: Placement) -> bool:
    """Whether a placement that was read back may be acted on; the mark says its number then. before: its base."""
    if before.n_spoilt and (_marked(store) or 0) > before.number:
        return False  # what was stepped over was whole
    _say_read_back(store, number)
    return (_listed(store) or 0) <= number


def _say_read_back(store: Store, number: int) -> None:
    """Have the mark say that placements up to number were whole when they were read back. Raises StoreError."""
    for _ in range(_TRIES):
        mark = _mark(store) or _mark(store) or {}  # twice: of one that was read wrongly `since` would be lost
        if (_number(mark) or 0) >= number:
            return
        store.put(MARK_KEY, encode_mark(number, _since_s(mark)))
    raise StoreError(
        f"expected the mark to say {number} after writing that, found another thing {_TRIES} times",
        url=f"{store.url}/{MARK_KEY}",
        retryable=True,
    )


def _tidy(store: Store, number: int) -> None:
    """Forget those that nobody can be reading any more. What fails is done by the next."""
    if number > N_KEPT:
        with suppress(StoreError):
            store.delete([placement_key(old) for old in range(max(1, number - 2 * N_KEPT), number - N_KEPT + 1)])
