"""The policy: what is moved, what is refused, and with which reasons and figures.

test_policy_property.py compares the moves of any groups with those of an oracle; the examples here anchor both.
"""

from dataclasses import replace

import pytest
from tests.support.tier_snapshots import (
    COLD,
    DAY_S,
    FROZEN,
    PRICES,
    STANDARD,
    TIERS,
    Copy,
    Group,
    checkpoint,
    decided,
    snapshot_of,
    tier_file,
)

from tiercache.keep import BestMetric, KeepList
from tiercache.prices import FREE, Prices, price_table
from tiercache.tier.policy import ago
from tiercache.tier.rules import Pin, Rule
from tiercache.tier.snapshot import ARCHIVED, RESTORING

MB = 1_000_000
BIG = Copy(100 * MB, days=100)
GB = Copy(2**30, days=100)
TO_ARCHIVE = Rule(name="cold", match=("**",), to="archive", idle_s=30 * DAY_S)
AFTER = Rule(name="old", match=("**",), to="archive", after_s=30 * DAY_S)
KEEP = Rule(
    name="runs",
    match=("ckpt/**",),
    keep={"hot": KeepList(last=1), "standard": KeepList(last=2)},
    then="archive",
    after_s=14 * DAY_S,
    delete_after_s=365 * DAY_S,
)
KEEP_HOT = Rule(name="r", match=("**",), keep={"hot": KeepList(last=1)})
DELETE = Rule(name="old", match=("**",), delete_after_s=10 * DAY_S)
UNPRICED = (None, None, None)


def planned(groups, *rules, prices=PRICES, capacity=(None, None, None), **file):
    found = decided(snapshot_of(groups), tier_file(rules, **file), prices, capacity_bytes=capacity)
    return found.moves, found.refusals


def moves_of(groups, *rules, **keys):
    """(path, action, src, dst) of each move."""
    moves, _ = planned(groups, *rules, **keys)
    return [
        (groups[one.group].path, one.action, TIERS[one.src], None if one.dst is None else TIERS[one.dst])
        for one in moves
    ]


def refusal_of(groups, *rules, **keys):
    """The reason of the one refusal, where nothing is moved."""
    moves, refusals = planned(groups, *rules, **keys)
    assert moves == ()
    (refusal,) = refusals
    return refusal.reason


def lying(*tiers: str, copy: Copy = BIG, **facts) -> Group:
    return Group("data/x", dict.fromkeys(tiers, copy), **{"days": 100.0, **facts})


def run_of(*steps: int, tier: str = "hot", **facts) -> list[Group]:
    return [checkpoint(0, step, {tier: BIG}, **{"days": 20.0, **facts}) for step in steps]


# -- rules -----------------------------------------------------------------------------------------------------------

REASONS = {  # group, rule, reason of the move
    "idle": (lying("standard", unused_days=45), TO_ARCHIVE, "not used for 45 days (idle = 30 days)"),
    "since uses are recorded": (
        lying("standard", counted_days=45), TO_ARCHIVE, "not used for 45 days (idle = 30 days)",
    ),
    "after": (lying("standard", counted_days=None), AFTER, "written 100 days ago (after = 30 days)"),
    "both": (
        lying("standard"), Rule(name="r", match=("**",), to="archive", idle_s=DAY_S, after_s=DAY_S),
        "not used for 100 days (idle = 24 hours), written 100 days ago (after = 24 hours)",
    ),
    "drop": (
        lying("hot", "archive"), TO_ARCHIVE,
        "not used for 100 days (idle = 30 days); a verified copy is in archive",
    ),
    "delete": (
        lying("standard", "archive", copy=replace(BIG, days=95)), DELETE,
        "written 100 days ago (delete_after = 10 days)",
    ),
    "newest": (
        checkpoint(0, 9, {"standard": BIG}, days=100.0), TO_ARCHIVE,
        "not used for 100 days (idle = 30 days); copied only: it is the newest complete checkpoint of its run",
    ),
}  # fmt: skip


def test_a_move_has_its_reason():
    for name, (group, rule, reason) in REASONS.items():
        (move,), _ = planned([group], rule)
        assert move.reason == reason, name
    assert [ago(0), ago(1), ago(2), ago(48)] == ["0 hours", "1 hour", "2 hours", "2 days"]


def test_the_newest_checkpoint_is_dropped_only_when_its_copy_is_readable_and_never_deleted_or_reclassed():
    both = checkpoint(0, 9, {"standard": BIG, "archive": BIG}, days=100.0)
    assert moves_of([both], TO_ARCHIVE) == [(both.path, "drop", "standard", "archive")]
    frozen = checkpoint(0, 9, {"standard": BIG, "archive": replace(BIG, state=ARCHIVED)}, days=100.0)
    assert "is never deleted" in refusal_of([frozen], TO_ARCHIVE)
    newest = checkpoint(0, 9, {"standard": BIG}, days=100.0)
    assert "newest" in refusal_of([newest], TO_ARCHIVE, one_bucket=True)
    moves, refusals = planned(run_of(1, 2, 3, tier="standard"), DELETE)
    assert len(moves) == 2
    assert "newest" in refusals[-1].reason


# -- what is refused -------------------------------------------------------------------------------------------------

PINS = (Pin(match=("other/**",)), Pin(match=("data/**",), why="the paper's figures"))
TABLE = price_table()[1]
REFUSED = {  # group, options, part of the reason
    "a pin": (lying("standard"), {"pins": PINS}, "pinned (pins[2]): the paper's figures"),
    "a pin of all in it": (lying("standard"), {"pins": (Pin(match=("data/x/**",)),)}, "pinned"),
    "a hold": (lying("standard", held="held until tomorrow: recalled"), {}, "held until tomorrow: recalled"),
    "in use": (lying("standard", in_use=True), {}, "in use"),
    "incomplete": (checkpoint(0, 1, {"standard": BIG}, days=100.0, complete=False), {}, "not complete yet"),
    "not whole": (
        checkpoint(0, 1, {"standard": replace(BIG, whole=False)}, days=100.0, complete=False), {},
        "no copy of it is whole",
    ),
    "unreported": (lying("standard", unreported=True), {}, "its use is not known yet"),
    "untracked": (lying("standard", counted_days=None), {}, "`after` in place of `idle`"),
    "archived": (
        lying("standard", copy=replace(BIG, state=ARCHIVED)), {},
        "its copy in standard is archived: restore it first: tiercache tier get data/x",
    ),
    "being restored": (
        lying("standard", copy=replace(BIG, state=RESTORING)), {},
        "its copy in standard is being restored: it can be read when that is done",
    ),
    "a partial source": (lying("hot", copy=replace(BIG, whole=False)), {}, "is not whole"),
    "a link": (Group("a", {"hot": replace(BIG, link="last")}, days=100.0), {}, "symbolic link last"),
    # 1,000 files of 5 KB to GLACIER: 40 KiB are billed beside each.
    "small objects": (
        lying("standard", copy=Copy(5_000_000, 1000, 5000, days=100)),
        {"prices": (FREE, TABLE["aws:us-east-1:STANDARD"], TABLE["aws:us-east-1:GLACIER"])}, "never earned back",
    ),
    # 0.02 a GB for 15 B, or 0.004 for 100 B.
    "below the minimum size": (lying("standard", copy=Copy(15, days=100)), {}, "never earned back"),
    "a dearer tier": (
        lying("standard", copy=GB), {"prices": (FREE, STANDARD, replace(COLD, store_gb_month=0.03))},
        " once and $0.01 more a month: never earned back",
    ),
    "dear": (
        lying("standard", copy=GB), {"prices": (FREE, STANDARD, replace(COLD, put_1000=0.016 / 30 * 370 * 1000))},
        "costs $0.197 once and saves $0.016 a month: earned back in 370 days (at most 365); use larger files",
    ),
}  # fmt: skip


def test_a_refusal_has_its_reason():
    for name, (group, options, reason) in REFUSED.items():
        assert reason in refusal_of([group], TO_ARCHIVE, **options), name


def test_a_group_that_no_move_may_touch_is_refused_with_its_reason():
    groups = [checkpoint(0, step, {"hot": BIG}, days=400.0 - step) for step in (1, 2, 3)]
    groups[0] = replace(groups[0], immovable="conflict: hot and archive", copies={"hot": BIG, "archive": BIG})
    both = KEEP_HOT.model_copy(update={"then": "archive", "delete_after_s": DAY_S})
    for rule in (TO_ARCHIVE, DELETE, KEEP_HOT, both):
        moves, refusals = planned(groups, rule)
        assert 0 not in [move.group for move in moves], rule
        assert [one.reason for one in refusals if one.group == 0] == ["conflict: hot and archive"], rule


def test_what_a_link_or_its_own_pin_file_holds_is_neither_moved_nor_deleted():
    linked = [checkpoint(0, step, {"hot": replace(BIG, link="last")}, days=400.0 - step) for step in (1, 2)]
    assert moves_of(linked, DELETE) == []
    groups = [checkpoint(0, step, {"hot": BIG}, days=400.0 - step, is_pinned=step == 1) for step in (1, 2, 3)]
    for rule in (DELETE, KEEP_HOT):
        assert [path for path, *_ in moves_of(groups, rule)] == ["ckpt/r0/step-2"]


# -- metrics that are not found ---------------------------------------------------------------------------------------

BEST = KEEP.model_copy(update={"keep": {"standard": KeepList(best=(BestMetric("val_los", n=2),))}})


def scored(run: int, *steps: int, metric: str = "val_loss", **facts) -> list[Group]:
    facts = {"days": 400.0, **facts}
    return [checkpoint(run, step, {"standard": BIG}, metrics={metric: float(step)}, **facts) for step in steps]


def test_a_misspelt_metric_deletes_nothing_and_moves_nothing_of_the_run():
    groups = scored(0, 1, 2, 3, 4)
    moves, refusals = planned(groups, BEST)
    assert moves == ()
    assert [(groups[one.group].step, one.action) for one in refusals] == [(1, "delete"), (2, "delete"), (3, "delete")]
    assert all("'val_los'" in one.reason and "no checkpoint of its run" in one.reason for one in refusals)
    assert moves_of([*groups, *scored(1, 1, 2, 3, 4, metric="val_los")], BEST) == [
        ("ckpt/r1/step-3", "delete", "standard", None)
    ]


def test_the_refusal_names_only_the_metric_that_is_not_found():
    rule = BEST.model_copy(
        update={"keep": {"standard": KeepList(best=(BestMetric("val_loss", n=1), BestMetric("val_los", n=1)))}}
    )
    _, refusals = planned(scored(0, 1, 2, 3), rule)
    assert {one.group for one in refusals} == {1}
    assert all("'val_los'" in one.reason and "'val_loss'" not in one.reason for one in refusals)


def test_a_checkpoint_without_the_metric_of_its_run_is_deleted_with_that_reason_unless_it_cannot_be_read():
    others = scored(0, 1, 2, 4, metric="val_los")
    (move,), _ = planned([*others, checkpoint(0, 3, {"standard": BIG}, days=400.0)], BEST)
    assert (move.group, move.action) == (3, "delete")
    assert "it lacks 'val_los'" in move.reason
    unread = checkpoint(0, 3, {"archive": BIG}, days=400.0, unread=True)
    assert "cannot be read" in refusal_of([*others, unread], BEST)


# -- dollars ---------------------------------------------------------------------------------------------------------


def test_figures_of_moves():
    prices = (FREE, COLD, replace(FROZEN, restore={}))
    (move,), _ = planned([lying("standard", copy=Copy(2**30, days=60))], TO_ARCHIVE, prices=prices)
    assert move.cost == pytest.approx(0.004 * 30 / 30 + 0.03 + 0.01 / 1000), "an early deletion has a fee"
    (move,), _ = planned([lying("standard", "archive", copy=replace(BIG, days=95))], DELETE)
    assert move.saving_month == pytest.approx(BIG.n_bytes / 2**30 * (0.02 + 0.004))
    (move,), _ = planned([lying("standard")], TO_ARCHIVE, prices=(FREE, None, replace(COLD, store_gb_month=9.0)))
    assert (move.cost, move.saving_month) == (0.0, 0.0), "without prices costs are not considered"


def test_a_move_must_pay_back_within_a_year_and_before_its_rule_deletes_the_group():
    def rule(days: float) -> Rule:
        return TO_ARCHIVE.model_copy(update={"delete_after_s": days * DAY_S})

    group = lying("standard", copy=GB)
    assert moves_of([group], rule(300))
    assert "it is deleted in 10 days" in refusal_of([group], rule(110))
    (move,), _ = planned([group], rule(180))
    (lasting,), _ = planned([group], TO_ARCHIVE)
    assert move.cost - lasting.cost == pytest.approx(0.004 * 10 / 30)
    dear = (FREE, STANDARD, replace(COLD, put_1000=0.016 / 30 * 360 * 1000))
    free_reads = (FREE, replace(STANDARD, get_1000=0.0), Prices("x:r:S2", store_gb_month=0.02))
    from_disk = (FREE, STANDARD, replace(COLD, store_gb_month=9.0))
    for priced, tier in ((dear, "standard"), (free_reads, "standard"), (from_disk, "hot")):
        assert moves_of([lying(tier, copy=GB)], TO_ARCHIVE, prices=priced)


# -- capacities ------------------------------------------------------------------------------------------------------

STAY = Rule(name="stay", match=("**",))


def ten_in_hot(**facts) -> list[Group]:
    return [Group(f"f{i}", {"hot": Copy(10, days=100)}, days=100.0, unused_days=float(i), **facts) for i in range(10)]


def test_above_high_the_least_recently_used_groups_move_down_until_low():
    moves, refusals = planned(ten_in_hot(), STAY, capacity=(105, None, None))
    assert [one.group for one in moves] == [9, 8, 7]
    assert {one.rule for one in moves} == {"tiers.hot.capacity"}
    assert moves[0].reason == "hot is 95.2% full, and at most 90% are wanted; not used for 9 days"
    assert refusals == ()
    assert moves_of(ten_in_hot(), STAY, capacity=(112, None, None)) == [], "below high nothing moves"
    rule = Rule(name="r", match=("f9", "f8"), to="standard", after_s=0.0)
    moves = moves_of(ten_in_hot(), rule, STAY, capacity=(105, None, None))
    assert [path for path, *_ in moves] == ["f8", "f9"], "moves of rules count before"


def test_a_watermark_spares_what_is_held_or_in_conflict():
    for facts in ({"held": "held until tomorrow"}, {"immovable": "conflict"}):
        assert moves_of(ten_in_hot(**facts), STAY, capacity=(105, None, None)) == [], facts


def test_moves_take_the_room_that_there_is_and_a_move_to_a_full_tier_is_refused():
    groups = [Group(f"f{n}", {"standard": Copy(n, days=100)}, days=100.0) for n in (400, 600, 300)]
    options = {"prices": UNPRICED, "capacity": (None, None, 900)}
    moves, (refusal,) = planned(groups, TO_ARCHIVE, **options)
    assert ([one.group for one in moves], refusal.group) == ([0, 2], 1)
    assert refusal.reason == "no room in archive: its capacity is 900 B"
    rules = [TO_ARCHIVE.model_copy(update={"match": (one.path,)}) for one in groups]
    assert [path for path, *_ in moves_of(groups, *rules, **options)] == ["f400", "f300"], "one rule after the other"
