"""Properties of the policies."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.cache import policy as policy_module
from tiercache.cache.policy import (
    POLICIES,
    UNPLANNED,
    CopyTable,
    SpaceRequest,
    lru,
    plan,
    replaces,
    resident,
    s3fifo,
)
from tiercache.model import NEVER

next_uses = st.one_of(st.integers(0, 50), st.sampled_from([NEVER, UNPLANNED]))
thens = st.one_of(st.integers(1, 50), st.sampled_from([NEVER, UNPLANNED]))


@st.composite
def snapshots(draw, max_size=12):
    n = draw(st.integers(0, max_size))

    def column(values):
        return draw(st.lists(values, min_size=n, max_size=n))

    return CopyTable(
        charge_bytes=np.array(column(st.integers(1, 20)), np.int64),
        last_use=np.array(draw(st.permutations(range(n))), np.int64),
        main=np.array(column(st.booleans()), np.bool_),
        freq=np.array(column(st.integers(0, 3)), np.int64),
        turn=np.array(draw(st.permutations(range(n))), np.int64),
        keep=np.array(column(st.booleans()), np.bool_),
        next_use=np.array(column(next_uses), np.int64),
        limit_bytes=draw(st.integers(1, 200)),
        has_evicted=draw(st.booleans()),
    )


asks = st.builds(SpaceRequest, st.integers(-5, 60), st.integers(0, 60), thens)
replacing = pytest.mark.parametrize("policy", [lru, s3fifo, plan], ids=lambda p: p.__name__)


def shuffled(copies, order):
    columns = {name: getattr(copies, name)[order] for name in CopyTable.__slots__ if name not in FACTS}
    return CopyTable(**columns, **{name: getattr(copies, name) for name in FACTS})


FACTS = ("limit_bytes", "has_evicted")


@given(snapshots(), asks)
def test_resident_evicts_nothing_and_admits_what_fits(copies, ask):
    decision = resident(copies, ask)
    assert decision.victims == ()
    assert decision.admit == (ask.need_bytes <= 0)


@replacing
@given(copies=snapshots(), ask=asks)
def test_victims_suffice_and_are_distinct_and_not_protected(policy, copies, ask):
    decision = policy(copies, ask)
    victims = list(decision.victims)
    assert len(set(victims)) == len(victims)
    assert not copies.keep[victims].any()
    if not decision.admit:
        assert victims == []
    else:
        assert copies.charge_bytes[victims].sum() >= ask.need_bytes
    if policy is plan:
        assert (copies.next_use[victims] > 0).all()


@replacing
@given(copies=snapshots(), ask=asks)
def test_no_more_victims_than_needed_are_chosen(policy, copies, ask):
    sizes = copies.charge_bytes[list(policy(copies, ask).victims)]
    assert sizes[:-1].sum() < max(ask.need_bytes, ask.want_bytes, 1)


@given(snapshots(), asks)
def test_lru_and_s3fifo_refuse_only_if_all_copies_are_too_small(copies, ask):
    enough = copies.charge_bytes[~copies.keep].sum() >= ask.need_bytes
    assert lru(copies, ask).admit == enough
    assert s3fifo(copies, ask).admit == enough


@given(snapshots(), asks)
def test_lru_evicts_the_least_recently_used_first(copies, ask):
    victims = list(lru(copies, ask).victims)
    by_use = sorted(np.flatnonzero(~copies.keep).tolist(), key=lambda row: copies.last_use[row])
    assert victims == by_use[: len(victims)]


@given(snapshots(), asks)
def test_plan_evicts_unplanned_copies_and_then_those_needed_last(copies, ask):
    uses = copies.next_use[list(plan(copies, ask).victims)].tolist()
    assert uses == sorted(uses, reverse=True)
    left = np.delete(copies.next_use[~copies.keep], [])
    if uses:
        n_later = int((left > uses[-1]).sum())
        assert n_later <= len(uses), "nothing that is needed later stays"


@given(snapshots(), asks)
def test_plan_evicts_only_copies_that_are_needed_later(copies, ask):
    for use in copies.next_use[list(plan(copies, ask).victims)]:
        assert use == UNPLANNED or use > ask.use_after_next


@given(snapshots(), asks)
def test_plan_refuses_only_if_the_evictable_copies_are_too_small(copies, ask):
    use = copies.next_use
    may_go = ~copies.keep & ((use == UNPLANNED) | ((use > ask.use_after_next) & (use > 0)))
    assert plan(copies, ask).admit == (copies.charge_bytes[may_go].sum() >= ask.need_bytes)


def test_a_copy_without_a_planned_use_does_not_displace_its_like():
    """One job reads every shard once: then plan is resident, not a queue that gives up what it has just fetched."""
    copies = example(next_use=[NEVER, NEVER])
    assert not plan(copies, SpaceRequest(10, use_after_next=NEVER)).admit
    assert plan(copies, SpaceRequest(10, use_after_next=100)).admit


def test_a_planned_copy_displaces_an_unplanned_one():
    copies = example(next_use=[UNPLANNED, 5])
    assert plan(copies, SpaceRequest(10, use_after_next=NEVER)).victims == (0,)
    assert not plan(copies, SpaceRequest(20, use_after_next=NEVER)).admit


def example(next_use, **columns):
    n = len(next_use)
    given_ = {
        "charge_bytes": np.full(n, 10),
        "last_use": np.arange(n),
        "main": np.zeros(n, np.bool_),
        "freq": np.zeros(n, np.int64),
        "turn": np.arange(n),
        "keep": np.zeros(n, np.bool_),
        "limit_bytes": 10 * n,
        "has_evicted": True,
    }
    return CopyTable(next_use=np.array(next_use, np.int64), **given_ | columns)


@replacing
@given(copies=snapshots(), ask=asks, random=st.randoms(use_true_random=False))
def test_the_decision_does_not_depend_on_the_order_of_the_rows(policy, copies, ask, random):
    order = np.array(random.sample(range(len(copies.turn)), len(copies.turn)), np.int64)
    decision, other = policy(copies, ask), policy(shuffled(copies, order), ask)
    assert list(decision.victims) == [int(order[row]) for row in other.victims]
    assert {m.row for m in decision.moves} == {int(order[m.row]) for m in other.moves}


@replacing
@given(copies=snapshots(), ask=asks)
def test_a_larger_request_starts_with_the_same_victims(policy, copies, ask):
    short, long = policy(copies, ask), policy(copies, replace(ask, want_bytes=ask.want_bytes + 40))
    assert long.admit == short.admit
    assert long.victims[: len(short.victims)] == short.victims


@given(snapshots(max_size=20), asks)
def test_large_tables_are_decided_like_small_ones(copies, ask):
    """Of many copies the furthest needed are found before the rest is sorted."""
    expected = plan(copies, ask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_module, "_FEW_ROWS", 2)
        patch.setattr(policy_module, "_ROWS_AT_A_TIME", 2)
        assert plan(copies, ask) == expected


def test_s3fifo_moves_a_copy_that_was_used_twice_to_the_main_queue():
    copies = example([UNPLANNED] * 4, freq=np.array([2, 1, 0, 0]))
    decision = s3fifo(copies, SpaceRequest(10))
    assert decision.victims == (1,)
    assert [(m.row, m.main, m.freq, m.n_before) for m in decision.moves] == [(0, True, 0, 0)]


def test_s3fifo_requeues_a_used_copy_of_the_main_queue():
    copies = example([UNPLANNED] * 3, freq=np.array([3, 0, 0]), main=np.ones(3, np.bool_))
    decision = s3fifo(copies, SpaceRequest(10))
    assert decision.victims == (1,)
    assert [(m.row, m.freq) for m in decision.moves] == [(0, 2)]


def test_s3fifo_evicts_from_the_main_queue_only_above_its_share():
    main = np.array([False] * 2 + [True] * 8)
    assert s3fifo(example([UNPLANNED] * 10, main=main), SpaceRequest(30)).victims == (0, 1, 2)
    main = np.ones(10, np.bool_)
    assert s3fifo(example([UNPLANNED] * 10, main=main), SpaceRequest(30)).victims == (0, 1, 2)


def test_the_small_queue_keeps_its_share_at_the_first_eviction():
    copies = example([UNPLANNED] * 20, has_evicted=False)
    decision = s3fifo(copies, SpaceRequest(10))
    assert decision.victims == (0,)
    assert [m.row for m in decision.moves] == list(range(2, 20))


def test_all_policies_except_resident_evict():
    assert {name for name in POLICIES if replaces(name)} == {"plan", "s3fifo", "lru"}
