"""Placements that are spoilt while they are written, that rot later, and that are read wrongly: which of them count."""

from __future__ import annotations

import pytest
from tests.tier.placements import numbers, row, rows_of

from tiercache.errors import CorruptShard
from tiercache.testing.faults import WrapperStore
from tiercache.tier.placement import log
from tiercache.tier.placement.log import TRACKING_MARKER_KEY, placement_key


def spoil(store, number: int) -> None:
    data = store.get(placement_key(number))
    store.put(placement_key(number), data.replace(b"s3://", b"s3:/0"))


@pytest.mark.parametrize("mark", [log.encode_mark(2), log.encode_mark(7), b"{}", b"", None])
def test_a_placement_that_rots_is_corrupt_for_readers_and_writers(store, mark):
    for n in range(2):
        log.commit_placement(store, {"a": row("a", n_bytes=n)})
    spoil(store, 2)
    store.delete([TRACKING_MARKER_KEY])
    if mark is not None:
        store.put(TRACKING_MARKER_KEY, mark)
    with pytest.raises(CorruptShard, match=placement_key(2)):
        log.find_newest_placement(store)
    with pytest.raises(CorruptShard, match=placement_key(2)):
        log.commit_placement(store, {"b": row("b")})
    with pytest.raises(CorruptShard, match=placement_key(2)):
        log.read_placement(store)  # if there was no mark, there is one by now
    assert numbers(store) == [1, 2]


class Misread(WrapperStore):
    """A placement that is read wrongly n times, from the first or a later time on."""

    def __init__(self, inner, key, n, nth=1):
        super().__init__(inner)
        self._wrong, self._key, self._n = range(nth, nth + n), key, 0

    def read_tail(self, key, n_bytes):
        data, info = super().read_tail(key, n_bytes)
        self._n += key == self._key
        wrong = key == self._key and self._n in self._wrong
        return (data.replace(b"s3://", b"s3:/0") if wrong else data), info


def test_what_is_read_wrongly_once_is_read_again(store):
    log.commit_placement(store, {"a": row("a")})
    assert rows_of(log.read_placement(Misread(store, placement_key(1), 1))) == {"a": row("a")}
    with pytest.raises(CorruptShard):
        log.read_placement(Misread(store, placement_key(1), 2))
