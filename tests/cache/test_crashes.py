"""Endings that are no deaths: a source that fails in mid-fetch leaves nothing. Deaths are test_kill_points.py's."""

import pytest
from tests.support.folder_check import Expected, FolderCheck

from tiercache.model import ByteRange
from tiercache.testing import Fault, FaultStore

WHOLE = [ByteRange(0, 10_000)]


@pytest.mark.parametrize("retryable", [True, False])
def test_errors_of_the_source_leave_nothing(world, retryable):
    identity = world.put("a")
    cache = world.cache()
    store = cache.store(FaultStore(world.inner, [Fault("read_into", times=2, retryable=retryable)]))
    with store.open_local("a", identity) as lease, pytest.raises(Exception, match="scripted"):
        lease.wait(WHOLE, deadline_s=60)
    assert cache.status()["reserved_bytes"] == 0
    cache.close()
    cache.stats()
    cache.close()
    assert FolderCheck(world.root / "cache", Expected({})).problems() == []
    world.fetch(world.store(cache), "a")
