"""What went from one place to another is read where it lay before, while that is kept and the other has lost it."""

import pytest
from tests.support.stores import CountingStore

from tiercache.errors import NotFound, ObjectChanged, StoreError
from tiercache.store import MemoryStore
from tiercache.testing import WrapperStore
from tiercache.tier.placement import log
from tiercache.tier.placement.log import PlacementRow
from tiercache.tier.placement.redirecting_store import follow_placement


class Frozen(WrapperStore):
    """All reads of objects say that they must be restored first."""

    def around(self, verb, key, call):
        if verb in ("get", "read_into", "read_tail"):
            raise StoreError("InvalidObjectState", url=f"{self.url}/{key}", status=403)
        return call()


@pytest.fixture
def stores(tmp_path):
    made = []

    def make(name: str) -> MemoryStore:
        made.append(MemoryStore(f"{tmp_path.name}-{name}", "data"))
        return made[-1]

    yield make
    for store in made:
        store.delete([info.key for info in store.list()])


def between(stores, **row):
    """An object that went from one place to another, neither of which is home, and is kept in the first by grace."""
    home, hot, cold = (stores(name) for name in ("home", "hot", "cold"))
    hot.put("a", b"bytes")
    log.commit_placement(home, {"a": PlacementRow("a", hot.url, n_bytes=5), "b": PlacementRow("b", hot.url, n_bytes=5)})
    log.commit_placement(home, {"a": PlacementRow("a", cold.url, n_bytes=5, **row)})
    return home, hot, cold


def test_while_the_copy_between_places_is_kept_it_serves_what_the_other_place_lost(stores):
    home, _, _ = between(stores)
    store = follow_placement(home, {})
    store.places.placement_once()
    assert store.get("a") == b"bytes"


def test_the_copy_that_is_kept_serves_what_is_archived_in_the_other_place(stores):
    home, _, cold = between(stores, state="archived", storage_class="GLACIER")
    cold.put("a", b"other")
    store = follow_placement(home, {})
    opened = store.places.store_at(store.places.placement_once().find("a"))
    store.places._here.stores[cold.url] = Frozen(opened)
    assert store.places.can_be_read(store.places.row("a"))
    assert store.get("a") == b"bytes"


def test_another_object_where_it_lay_before_is_not_served(stores):
    home, hot, _ = between(stores)
    hot.put("a", b"other bytes")
    store = follow_placement(home, {})
    store.places.placement_once()
    with pytest.raises(ObjectChanged, match="hot/data/a"):
        store.get("a")


def test_where_things_lay_before_is_asked_once_for_all_of_them(stores):
    home, hot, cold = between(stores)
    hot.put("b", b"bytes")
    log.commit_placement(home, {"b": PlacementRow("b", cold.url, n_bytes=5)})
    counting = CountingStore(home)
    store = follow_placement(counting, {})
    store.places.placement_once()
    assert (store.get("a"), store.get("b")) == (b"bytes", b"bytes")
    old = [key for verb, key in counting.calls if verb == "read_tail" and key < log.placement_key(3)]
    assert old == [log.placement_key(n) for n in (2, 1)]


def test_what_earlier_placements_say_is_no_error_where_they_cannot_be_read(stores):
    home, _, _ = between(stores)
    home.put(log.placement_key(1), b"garbage")
    store = follow_placement(home, {})
    store.places.placement_once()
    with pytest.raises(NotFound, match="cold/data/a"):
        store.get("a")
