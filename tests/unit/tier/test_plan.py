"""Plans: moves and refusals with names, objects and figures, and what each tier holds before and after."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from tests.support.tier_snapshots import DAY_S, NOW_S, PRICES, TIERS, Copy, Group, in_rows, snapshot_of, tier_file
from tests.unit.tier.test_policy_property import FEWER, applied, bytes_in, capacities, files, fitting, worlds

from tiercache.model import ObjectInfo
from tiercache.tier.journal import PlannedObject
from tiercache.tier.listing import ObjectTable
from tiercache.tier.plans import Plan, PlannedTier, holdings, make_plan
from tiercache.tier.policy import decide
from tiercache.tier.rules import Rule
from tiercache.tier.snapshot import Snapshot


@dataclass
class Stock:
    """An inventory of made-up objects: each group's copy is so many of equal size, the last one a little larger."""

    groups: Sequence[Group]
    snapshot: Snapshot

    def objects_of(self, groups, tiers) -> ObjectTable:
        copies = [self.objects(group, tier) for group, tier in zip(groups.tolist(), tiers.tolist(), strict=True)]
        flat = [one for copy in copies for one in copy]
        return ObjectTable(
            start=np.cumsum([0, *map(len, copies)]),
            row=np.arange(len(flat)),
            crc32c=np.array([one.crc32c for one in flat], np.int64),
            keys=pa.array([one.key for one in flat], pa.large_string()),
            etags=pa.array([one.etag for one in flat], pa.large_string()),
            n_bytes=np.array([one.n_bytes for one in flat], np.int64),
            modified_s=np.array([one.modified_s for one in flat], np.float64),
        )

    def objects(self, group: int, tier: int) -> tuple[ObjectInfo, ...]:
        one = self.groups[group]
        copy = one.copies[TIERS[tier]]
        each = copy.n_bytes // copy.n_objects
        sizes = [each] * (copy.n_objects - 1) + [copy.n_bytes - each * (copy.n_objects - 1)]
        return tuple(
            ObjectInfo(f"{one.path}/{i}", size, etag=f'"{i}"', crc32c=i, modified_s=NOW_S - DAY_S)
            for i, size in enumerate(sizes)
        )


def made(groups: Sequence[Group], *rules: Rule, **keys) -> Plan:
    file, snapshot = tier_file(rules, **keys), snapshot_of(groups)
    decisions = decide(snapshot, file, PRICES, capacity_bytes=(None, None, None))
    return make_plan(decisions, Stock(groups, snapshot), file, PRICES)


TO_ARCHIVE = Rule(name="cold", match=("**",), to="archive", idle_s=30 * DAY_S)
OLD = [
    Group("data/x", {"standard": Copy(10**9, 2, days=100)}, days=100.0),
    Group("data/y", {"standard": Copy(60, days=100)}, days=100.0),
    Group("data/z", {"hot": Copy(1000)}),
]


def test_a_move_has_names_objects_and_figures():
    (move,) = made(OLD, TO_ARCHIVE).moves
    assert (move.number, move.path, move.kind, move.action) == (1, "data/x", "file", "move")
    assert (move.src, move.dst, move.rule) == ("standard", "archive", "cold")
    half = 500_000_000
    assert move.objects == tuple(PlannedObject(f"data/x/{i}", half, f'"{i}"', NOW_S - DAY_S, i) for i in range(2))
    assert move.n_bytes == 10**9


def test_a_refusal_has_names_and_bytes():
    (refusal,) = made(OLD, TO_ARCHIVE).refusals
    assert (refusal.path, refusal.src, refusal.dst, refusal.n_bytes) == ("data/y", "standard", "archive", 60)


def test_a_plan_names_its_tiers_rules_and_prices():
    plan = made(OLD, TO_ARCHIVE)
    assert plan.rules_sha256 == "5" * 64
    assert plan.tiers[1] == PlannedTier("standard", "s3://warm/train", None, "x:r:S")
    assert plan.made_s == NOW_S


@FEWER
@given(worlds(), files(), capacities)
def test_totals_before_and_after_are_those_of_the_groups(groups, file, limits):
    groups = fitting(file, groups)
    snapshot = snapshot_of(groups)
    decisions = decide(snapshot, file, PRICES, capacity_bytes=limits)
    before, after = holdings(snapshot, PRICES), holdings(snapshot, PRICES, decisions)
    left = [one for one in applied(groups, in_rows(decisions), PRICES) if one is not None]
    for tier, name in enumerate(TIERS):
        assert before[name].n_bytes == bytes_in(groups, tier)
        assert after[name].n_bytes == bytes_in(left, tier)
        assert after[name].n_objects == sum(one.copies[name].n_objects for one in left if name in one.copies)


@FEWER
@given(worlds(), files())
def test_monthly_costs_fall_by_the_savings_of_the_moves(groups, file):
    groups = fitting(file, groups)
    # A copy that is written over is paid for before as well: leave the cases where there is one out.
    groups = [replace(one, copies=dict(list(one.copies.items())[:1])) for one in groups]
    snapshot = snapshot_of(groups)
    decisions = decide(snapshot, file, PRICES, capacity_bytes=(None, None, None))
    before, after = (
        sum(one.dollars_month for one in held.values())
        for held in (holdings(snapshot, PRICES), holdings(snapshot, PRICES, decisions))
    )
    assert before - after == pytest.approx(decisions.moves.saving_month.sum(), abs=1e-9)
