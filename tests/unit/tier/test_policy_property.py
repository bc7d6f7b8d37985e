"""The policy by property: it decides what an oracle decides for each group, and never loses data."""

import math
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.planner_oracle import PlannerOracle
from tests.support.tier_snapshots import (
    COLD,
    DAY_S,
    FROZEN,
    PRICES,
    STANDARD,
    TIERS,
    Copy,
    Group,
    Outcome,
    decided,
    snapshot_of,
    tier_file,
)

from tiercache.keep import BestMetric, KeepList
from tiercache.prices import FREE
from tiercache.tier.rules import Pin, Rule
from tiercache.tier.snapshot import ARCHIVED, READABLE, RESTORED, RESTORING

# Worlds take long to draw, and half a dozen properties share them.
FEWER = settings(max_examples=max(settings.default.max_examples // 2, 1))
days = st.integers(0, 12).map(float)
copies = st.builds(
    Copy,
    n_bytes=st.sampled_from([50, 90, 1000, 5000, 20_000_000, 4_000_000_000]),
    n_objects=st.sampled_from([1, 1, 3]),
    days=st.none() | days,
    state=st.sampled_from([READABLE, READABLE, READABLE, ARCHIVED, RESTORING, RESTORED]),
    whole=st.booleans() | st.just(True),
    verified=st.booleans(),
)
lying = st.dictionaries(st.sampled_from(TIERS), copies, min_size=1)
facts = {
    "days": st.integers(0, 30).map(float),
    "unused_days": st.none() | days,
    "counted_days": st.sampled_from([math.inf, math.inf, 6.0, None]),
    "unreported": st.sampled_from([False, False, True]),
    "in_use": st.sampled_from([False, False, False, True]),
}


def group(kind: str, folder: str, number: int, at: dict[str, Copy], named: dict) -> Group:
    """Many share a folder, and none a path. Objects of one bucket have one class."""
    if kind == "checkpoint":
        return Group(f"{folder}/r{number % 2}/step-{number}", at, kind, number * 5, number % 2, **named)
    return Group(f"{folder}/{kind}-{number}", at, kind, **{k: v for k, v in named.items() if k not in OF_RUNS})


OF_RUNS = ("complete", "metrics")
of_runs = {
    "complete": st.sampled_from([True, True, True, False]),
    "metrics": st.fixed_dictionaries({}, optional={"loss": st.sampled_from([1.0, 2.0, 3.0])}),
}
KINDS = ("checkpoint", "checkpoint", "shard", "file")


@st.composite
def worlds(draw, max_size: int = 10) -> list[Group]:
    n = draw(st.integers(0, max_size))
    named = st.fixed_dictionaries(facts | of_runs)
    kinds, folders = st.sampled_from(KINDS), st.sampled_from(["a", "b", "c"])
    return [group(draw(kinds), draw(folders), i, draw(lying), draw(named)) for i in range(n)]


in_days = st.none() | st.integers(1, 10).map(lambda n: n * DAY_S)
to_rules = st.builds(
    Rule,
    name=st.just("to"),
    match=st.sampled_from([("a/**",), ("b/**",), ("**",)]),
    to=st.sampled_from(["standard", "archive", "archive"]),
    idle_s=in_days,
    after_s=in_days,
    delete_after_s=st.none() | st.integers(11, 40).map(lambda n: n * DAY_S),
)
keeps = st.builds(
    KeepList,
    last=st.none() | st.integers(1, 3),
    every_steps=st.none() | st.just(15),
    best=st.sampled_from([(), (BestMetric("loss", n=1),)]),
    younger_s=in_days,
)


@st.composite
def keep_rules(draw) -> Rule:
    then = draw(st.sampled_from([None, "archive", "archive"]))
    return Rule(
        name="keep",
        match=draw(st.sampled_from([("a/**",), ("**",)])),
        keep=draw(st.dictionaries(st.sampled_from(TIERS[:2]), keeps, min_size=1)),
        then=then,
        after_s=draw(in_days) if then else None,
        delete_after_s=draw(st.none() | st.integers(11, 40).map(lambda n: n * DAY_S)),
    )


pins = st.sampled_from([(), (), (Pin(match=("c/**",)),), (Pin(match=("a/**",), until_s=5.0),)])


@st.composite
def files(draw, *, one_bucket: bool | None = None):
    rules = draw(st.lists(st.one_of(to_rules, keep_rules()), max_size=3))
    bucket = draw(st.booleans()) if one_bucket is None else one_bucket
    return tier_file(rules, one_bucket=bucket, pins=draw(pins))


prices = st.sampled_from([PRICES, (FREE, STANDARD, FROZEN), (FREE, COLD, FROZEN)])
UNLIMITED = (None, None, None)
unseen = st.sampled_from(
    [{}, {}, {"hot": "why"}, {"standard": "why"}, {"archive": "why"}, {"hot": "a", "archive": "b"}]
)


def fitting(file, groups: Sequence[Group]) -> list[Group]:
    """Objects of one bucket lie in one of its tiers."""
    one_bucket = file.tiers[1].url == file.tiers[2].url
    out = []
    for one in groups:
        at = dict(one.copies)
        if one_bucket and "standard" in at:
            at.pop("archive", None)
        out.append(replace(one, copies=at))
    return out


@given(worlds(), files(), prices, unseen)
def test_without_capacities_the_moves_are_those_of_the_oracle(groups, file, priced, missing):
    groups = fitting(file, groups)
    oracle = PlannerOracle(file, priced, groups, missing)
    expected = {row: wish for row in range(len(groups)) if (wish := oracle.decide(row)) is not None}
    found = decided(snapshot_of(groups), file, priced, capacity_bytes=UNLIMITED, unavailable=missing)
    moves = {
        one.group: (one.action, TIERS[one.src], None if one.dst is None else TIERS[one.dst]) for one in found.moves
    }
    assert moves == {row: (one.action, one.src, one.dst) for row, one in expected.items() if not one.refused}
    assert {one.group for one in found.refusals} == {row for row, one in expected.items() if one.refused}


# -- with capacities: what must be true of any plan ------------------------------------------------------------------

limits_of_one = st.sampled_from([0, 1000, 8000, 30_000_000, 5_000_000_000, None])
capacities = st.tuples(limits_of_one, limits_of_one, st.none() | limits_of_one)


@given(worlds(), files(), prices, capacities, unseen)
def test_any_plan_protects_what_must_stay(groups, file, priced, limits, missing):
    groups = fitting(file, groups)
    snapshot = snapshot_of(groups)
    found = decided(snapshot, file, priced, capacity_bytes=limits, unavailable=missing)
    assert decided(snapshot, file, priced, capacity_bytes=limits, unavailable=missing) == found, "not deterministic"
    names = [one.group for one in (*found.moves, *found.refusals)]
    assert len(names) == len(set(names)), "more than one move or refusal of a group"
    oracle = PlannerOracle(file, priced, groups, missing)
    for one in found.moves:
        moved = groups[one.group]
        assert moved.complete
        assert not moved.in_use
        assert not oracle.is_pinned(moved)
        if one.group in oracle.newest:
            others = [c for name, c in moved.copies.items() if TIERS.index(name) != one.src]
            readable = any(c.state == READABLE and c.whole and c.verified for c in others)
            assert one.action == "copy" or (one.action == "drop" and readable)
        if one.action == "delete":
            assert not missing, "a last copy is deleted while a tier is unavailable"
            rule = oracle.rule_of(moved)
            assert rule.delete_after_s is not None
            assert moved.days * DAY_S >= rule.delete_after_s
            assert not any(one.group in oracle.kept(rule, keep) for keep in rule.keep.values())
            continue
        check_copies(one, moved, file, missing)
    for tier, limit in enumerate(limits):
        comes, _ = balance(groups, found, tier)
        assert limit is None or comes == 0 or bytes_in(groups, tier) + comes <= limit, "no room before grace is over"


def check_copies(one, moved: Group, file, missing) -> None:
    """A copy is removed only for a verified one, or for one that is made from it."""
    src, dst = moved.copies[TIERS[one.src]], moved.copies.get(TIERS[one.dst])
    assert TIERS[one.dst] not in missing
    assert src.whole
    if one.action == "drop":
        assert dst is not None
        assert dst.whole
        assert dst.verified
        return
    assert src.state in (READABLE, RESTORED)
    assert (one.action == "reclass") == (file.tiers[one.src].url == file.tiers[one.dst].url)


def bytes_in(groups: Sequence[Group], tier: int) -> int:
    return sum(group.copies[TIERS[tier]].n_bytes for group in groups if TIERS[tier] in group.copies)


def balance(groups: Sequence[Group], found: Outcome, tier: int) -> tuple[int, int]:
    """Bytes that come, and that go when all is done."""
    comes = goes = 0
    for one in found.moves:
        at = groups[one.group].copies
        if one.dst == tier and one.action != "drop":
            comes += at[TIERS[one.src]].n_bytes
        if one.action == "delete":
            goes += at[TIERS[tier]].n_bytes if TIERS[tier] in at else 0
        elif one.src == tier and one.action != "copy":
            goes += at[TIERS[tier]].n_bytes
    return comes, goes


@FEWER
@given(worlds(), files(), prices, capacities)
def test_a_tier_above_high_moves_the_least_recently_used_groups_until_low_and_no_more(groups, file, priced, limits):
    groups = fitting(file, groups)
    found = decided(snapshot_of(groups), file, priced, capacity_bytes=limits)
    refused = {one.group for one in found.refusals}
    for tier, limit in enumerate(limits[:-1]):
        sent = [one.group for one in found.moves if one.rule == f"tiers.{TIERS[tier]}.capacity"]
        if limit is None:
            assert not sent
            continue
        comes, goes = balance(groups, found, tier)
        left = bytes_in(groups, tier) + comes - goes
        freed = sum(groups[row].copies[TIERS[tier]].n_bytes for row in sent)
        if sent:
            assert left + freed > limit * 0.9
            least = min(sent, key=lambda row: unused(groups[row]))
            assert left + groups[least].copies[TIERS[tier]].n_bytes > int(limit * 0.75)
        moved = {one.group for one in found.moves}
        stay = [row for row in range(len(groups)) if TIERS[tier] in groups[row].copies and row not in moved]
        free = [row for row in stay if row not in refused and not holds(groups, row, tier, file, priced)]
        if left > limit * 0.9:
            assert free == []
        assert all(unused(groups[row]) <= unused(groups[gone]) for row in free for gone in sent)


def unused(one: Group) -> float:
    return one.days if one.unused_days is None else min(one.days, one.unused_days)


def holds(groups: list[Group], row: int, tier: int, file, priced) -> bool:
    """Whether anything holds a group where it is, whatever the watermark."""
    one, oracle = groups[row], PlannerOracle(file, priced, groups)
    if one.in_use or not one.complete or row in oracle.newest or oracle.is_pinned(one):
        return True
    rule = oracle.rule_of(one)
    if rule is None or TIERS[tier] not in rule.keep or one.kind != "checkpoint":
        return False
    return row in oracle.kept(rule, rule.keep[TIERS[tier]])


# -- plan after plan -------------------------------------------------------------------------------------------------


def applied(groups: Sequence[Group], found: Outcome, priced) -> list[Group | None]:
    """What there is when a plan has been carried out; None: deleted."""
    out: list[Group | None] = list(groups)
    for one in found.moves:
        at = dict(groups[one.group].copies)
        if one.action == "delete":
            out[one.group] = None
            continue
        src = at[TIERS[one.src]]
        if one.action != "drop":
            state = ARCHIVED if priced[one.dst].restore else READABLE
            at[TIERS[one.dst]] = replace(src, days=0.0, state=state, whole=True, verified=True)
        if one.action != "copy":
            del at[TIERS[one.src]]
        out[one.group] = replace(groups[one.group], copies=at)
    return out


@given(worlds(8), files(), prices, capacities)
def test_repeated_plans_converge_and_whole_groups_stay_whole(groups, file, priced, limits):
    """Nothing goes up and down again for ever; no group loses its last whole copy, nor the newest its last readable."""
    groups = fitting(file, groups)
    for _ in range(12):
        found = decided(snapshot_of(groups), file, priced, capacity_bytes=limits)
        after = applied(groups, found, priced)
        newest = PlannerOracle(file, priced, groups).newest
        for row, (old, new) in enumerate(zip(groups, after, strict=True)):
            assert new is not None or row not in newest
            if new is not None:
                assert any(c.whole for c in new.copies.values()) or not any(c.whole for c in old.copies.values())
                if row in newest and any(c.whole and c.state == READABLE for c in old.copies.values()):
                    assert any(c.whole and c.state == READABLE for c in new.copies.values())
        if not found.moves:
            return
        groups = [one for one in after if one is not None]
    raise AssertionError(f"moves without end: {found.moves}")
