"""The catalog may vanish at any moment: what comes meanwhile stays within the limit all the same."""

import pytest
from tests.support.stores import GateStore

from tiercache.cache.names import name_of_identity
from tiercache.model import ByteRange

UNIT = 4096


def lose_the_catalog(world):
    for path in (world.root / "cache").glob("catalog.sqlite*"):
        path.unlink()


def sums(cache):
    return cache._open().writing.accounts.sums()


@pytest.fixture
def fetching(world):
    """A holder of the folder whose fetch of 80 of 100 units stands still, and another holder."""
    identity = world.put("a", 80 * UNIT)
    gated = GateStore(world.inner)
    busy, other = (world.cache(size=100 * UNIT, policy="lru") for _ in range(2))
    with gated.stop_at("before_read_into") as gate:
        lease = busy.store(gated).open_local("a", identity)
        lease.prefetch([ByteRange(0, 80 * UNIT)])
        gate.wait_reached()
        yield busy, other
        gate.open()
    lease.close()


def test_new_books_know_what_the_fetches_of_others_have_reserved(world, fetching):
    busy, other = fetching
    reserved = sums(busy)[1]
    assert reserved > 80 * UNIT
    lose_the_catalog(world)
    assert sums(other)[1] == reserved


def test_what_is_coming_leaves_no_room_in_new_books_for_more_than_the_limit(world, fetching):
    _, other = fetching
    lose_the_catalog(world)
    identity = world.put("b", 30 * UNIT)
    assert world.read(world.store(other), "b", identity) is None
    assert sum(sums(other)[:2]) <= 100 * UNIT


def test_a_fetch_that_ended_leaves_nothing_reserved_in_new_books(world):
    identity = world.put("a", 80 * UNIT)
    busy, other = (world.cache(size=100 * UNIT) for _ in range(2))
    lock = world.root / "cache" / "locks" / name_of_identity(identity)
    noted = []

    def booked(*_):
        noted.append(lock.read_text())
        return True

    accounts = busy._open().writing.accounts
    book = accounts.book
    accounts.book = lambda *args: (booked(), book(*args))
    world.fetch(world.store(busy), "a")
    assert noted
    assert all('"reserved_bytes": 0' in text for text in noted)
    lose_the_catalog(world)
    assert sums(other)[:2] == (81 * UNIT, 0)


def test_what_is_being_fetched_is_not_counted_twice_when_the_books_are_compared_with_the_files(world, fetching):
    _, other = fetching
    before = sums(other)
    other._open().writing.accounts.reconcile()
    assert sums(other) == before
