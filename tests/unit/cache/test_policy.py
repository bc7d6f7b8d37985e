"""Properties of the policies."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tiercache.cache.eviction import UNPLANNED, CopyTable, choose_victims, lru, plan
from tiercache.model import NEVER

next_uses = st.one_of(st.integers(0, 50), st.sampled_from([NEVER, UNPLANNED]))
thens = st.one_of(st.integers(1, 50), st.sampled_from([NEVER, UNPLANNED]))
policies = st.sampled_from([lru, plan])
needs, wants = st.integers(-5, 60), st.integers(0, 60)


@st.composite
def tables(draw, max_size=12):
    n = draw(st.integers(0, max_size))

    def column(values):
        return draw(st.lists(values, min_size=n, max_size=n))

    return CopyTable(
        charge_bytes=np.array(column(st.integers(1, 20)), np.int64),
        last_use=np.array(draw(st.permutations(range(n))), np.int64),
        keep=np.array(column(st.booleans()), np.bool_),
        next_use=np.array(column(next_uses), np.int64),
    )


def victims_of(policy, copies, need, want, then):
    """The rule in plain Python: what may go, in its order, until enough is freed."""
    rows = [row for row in range(len(copies.keep)) if not copies.keep[row]]
    use = copies.next_use.tolist()
    if policy is plan:
        rows = [row for row in rows if use[row] == UNPLANNED or (use[row] > then and use[row] > 0)]
        rows.sort(key=lambda row: (-use[row], copies.last_use[row]))
    else:
        rows.sort(key=lambda row: copies.last_use[row])
    if sum(copies.charge_bytes[rows]) < need:
        return None
    chosen = []
    while rows and sum(copies.charge_bytes[chosen]) < max(need, want):
        chosen.append(rows.pop(0))
    return chosen


@given(policy=policies, copies=tables(), need=needs, want=wants, then=thens)
def test_a_policy_chooses_the_first_in_its_order_until_enough_is_free(policy, copies, need, want, then):
    chosen = choose_victims(policy, copies, need, want_bytes=want, use_after_next=then)
    assert (None if chosen is None else chosen.tolist()) == victims_of(policy, copies, need, want, then)
