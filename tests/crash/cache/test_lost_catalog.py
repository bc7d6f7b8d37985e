"""The catalog is deleted at any moment: fetches still stay within the limit."""

import pytest
from tests.support.stores import GateStore

from tiercache.cache.names import name_of_identity
from tiercache.model import ByteRange

UNIT = 4096


def lose_the_catalog(world):
    for path in (world.root / "cache").glob("catalog.sqlite*"):
        path.unlink()


def sums(cache):
    return cache._open().accounts.sums()


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


def test_rebuilt_accounts_contain_the_reservations_of_running_fetches(world, fetching):
    busy, other = fetching
    reserved = sums(busy)[1]
    assert reserved > 80 * UNIT
    lose_the_catalog(world)
    assert sums(other)[1] == reserved


def test_an_ended_fetch_leaves_no_reservation_in_rebuilt_accounts(world):
    identity = world.put("a", 80 * UNIT)
    busy, other = (world.cache(size=100 * UNIT) for _ in range(2))
    lock = world.root / "cache" / "locks" / name_of_identity(identity)
    noted = []

    def booked(*_):
        noted.append(lock.read_text())
        return True

    accounts = busy._open().accounts
    book = accounts.set_charge
    accounts.set_charge = lambda *args: (booked(), book(*args))
    world.fetch(world.store(busy), "a")
    assert noted
    assert all('"reserved_bytes": 0' in text for text in noted)
    lose_the_catalog(world)
    assert sums(other)[:2] == (81 * UNIT, 0)
