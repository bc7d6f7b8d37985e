"""Policies by property: the orders are right whatever the snapshot."""

from hypothesis import given
from hypothesis import strategies as st

from tiercache.cache.policy import POLICIES, Resident, lru, replaces, resident

copies = st.lists(
    st.builds(Resident, st.text("abcdef", min_size=1), st.integers(0, 1 << 40), st.integers(0, 50), st.booleans()),
    unique_by=lambda c: c.name,
    max_size=20,
)


@given(copies)
def test_resident_gives_up_nothing(snapshot):
    assert resident(snapshot) == ()


@given(copies)
def test_lru_gives_up_everything_unpinned_longest_unused_first(snapshot):
    order = lru(snapshot)
    last_use = {c.name: c.last_use for c in snapshot}
    assert set(order) == {c.name for c in snapshot if not c.pinned}
    assert [last_use[name] for name in order] == sorted(last_use[name] for name in order)


@given(copies, st.randoms())
def test_the_order_does_not_depend_on_the_order_of_the_snapshot(snapshot, random):
    shuffled = random.sample(snapshot, len(snapshot))
    assert lru(shuffled) == lru(snapshot)


def test_only_lru_replaces_for_now():
    assert {name for name in POLICIES if replaces(name)} == {"lru"}
