"""The policy: what is moved, what is refused, and with which reasons and figures."""

from dataclasses import replace

import pytest
from tests.tier.snapshots import (
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
from tiercache.tier.model import ARCHIVED, RESTORED, RESTORING
from tiercache.tier.plan.policy import decide
from tiercache.tier.plan.proposals import ago
from tiercache.tier.rules import Pin, Rule

MB = 1_000_000
BIG = Copy(100 * MB, days=100)
TO_ARCHIVE = Rule(name="cold", match=("**",), to="archive", idle_s=30 * DAY_S)
KEEP = Rule(
    name="runs",
    match=("ckpt/**",),
    keep={"hot": KeepList(last=1), "standard": KeepList(last=2)},
    then="archive",
    after_s=14 * DAY_S,
    delete_after_s=365 * DAY_S,
)
DELETE = Rule(name="old", match=("**",), delete_after_s=10 * DAY_S)


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


# -- metrics that are not found ---------------------------------------------------------------------------------------

BEST = KEEP.model_copy(update={"keep": {"standard": KeepList(best=(BestMetric(("val_los",), n=2),))}})


def scored(run: int, *steps: int, metric: str = "val_loss", **facts) -> list[Group]:
    facts = {"days": 400.0, **facts}
    return [checkpoint(run, step, {"standard": BIG}, metrics={metric: float(step)}, **facts) for step in steps]


def test_a_misspelt_metric_deletes_nothing_and_moves_nothing_of_the_run():
    groups = scored(0, 1, 2, 3, 4)
    moves, refusals = planned(groups, BEST)
    assert moves == ()
    assert [(groups[one.group].step, one.action) for one in refusals] == [(1, "delete"), (2, "delete"), (3, "delete")]
    assert all("'val_los'" in one.reason and "no checkpoint of its run" in one.reason for one in refusals)


def test_the_refusal_names_only_the_metric_that_is_not_found():
    rule = BEST.model_copy(
        update={"keep": {"standard": KeepList(best=(BestMetric(("val_loss",), n=1), BestMetric(("val_los",), n=1)))}}
    )
    _, refusals = planned(scored(0, 1, 2, 3), rule)
    assert {one.group for one in refusals} == {1}
    assert all("'val_los'" in one.reason and "'val_loss'" not in one.reason for one in refusals)


def test_a_metric_that_one_run_has_holds_for_that_run_alone():
    groups = [*scored(0, 1, 2, 3, 4), *scored(1, 1, 2, 3, 4, metric="val_los")]
    assert moves_of(groups, BEST) == [("ckpt/r1/step-3", "delete", "standard", None)]


def test_a_checkpoint_outside_one_keep_list_moves_to_the_tier_whose_list_keeps_all():
    rule = BEST.model_copy(update={"keep": {"hot": KeepList(last=1), **BEST.keep}})
    groups = [checkpoint(0, step, {"hot": BIG}, days=400.0) for step in (1, 2, 3)]
    assert moves_of(groups, rule) == [(f"ckpt/r0/step-{step}", "move", "hot", "standard") for step in (1, 2)]


def test_a_watermark_moves_nothing_of_a_run_whose_metric_is_not_found():
    groups = [*scored(0, 1, 2, 3), *scored(1, 1, 2, 3, 4, metric="val_los")]
    rule = BEST.model_copy(update={"delete_after_s": None, "then": None, "after_s": None})
    moves = moves_of(groups, rule, capacity=(None, 100 * MB, None))
    assert moves
    assert {path.split("/")[1] for path, *_ in moves} == {"r1"}


def test_deleting_a_checkpoint_without_the_metric_of_its_run_says_so():
    groups = [*scored(0, 1, 2, metric="val_los"), checkpoint(0, 3, {"standard": BIG}, days=400.0)]
    groups.append(checkpoint(0, 4, {"standard": BIG}, days=400.0, metrics={"val_los": 9.0}))
    (move,), _ = planned(groups, BEST)
    assert (groups[move.group].step, move.action) == (3, "delete")
    assert "it lacks 'val_los'" in move.reason


def test_a_checkpoint_whose_metrics_cannot_be_read_is_not_deleted():
    groups = [*scored(0, 1, 2, 4, metric="val_los"), checkpoint(0, 3, {"archive": BIG}, days=400.0, unread=True)]
    moves, (refusal,) = planned(groups, BEST)
    assert (moves, groups[refusal.group].step) == ((), 3)
    assert "cannot be read" in refusal.reason


# -- rules -----------------------------------------------------------------------------------------------------------


def test_an_idle_group_moves_and_the_reason_states_the_days():
    (move,), _ = planned([lying("standard", unused_days=45)], TO_ARCHIVE)
    assert (move.action, move.rule) == ("move", "cold")
    assert move.reason == "not used for 45 days (idle = 30 days)"


def test_a_recently_used_group_stays():
    assert moves_of([lying("standard", unused_days=29)], TO_ARCHIVE) == []


def test_idle_time_starts_at_the_last_write_or_use():
    assert moves_of([lying("standard", days=5, unused_days=45)], TO_ARCHIVE) == []


def test_a_group_is_not_idle_while_a_machine_has_not_reported():
    assert "its use is not known yet" in refusal_of([lying("standard", unreported=True)], TO_ARCHIVE)


def test_a_group_without_recorded_uses_is_not_idle_and_after_needs_none():
    untracked = lying("standard", counted_days=None)
    why = refusal_of([untracked], TO_ARCHIVE)
    assert "its use is not known" in why
    assert "`after` in place of `idle`" in why
    (move,), _ = planned([untracked], Rule(name="old", match=("**",), to="archive", after_s=30 * DAY_S))
    assert move.reason == "written 100 days ago (after = 30 days)"


def test_idle_time_is_at_most_the_time_since_uses_are_recorded():
    assert moves_of([lying("standard", counted_days=29)], TO_ARCHIVE) == []
    (move,), _ = planned([lying("standard", counted_days=45)], TO_ARCHIVE)
    assert move.reason == "not used for 45 days (idle = 30 days)"


def test_idle_0_needs_no_report_of_uses():
    rule = Rule(name="r", match=("**",), to="archive", idle_s=0.0)
    assert moves_of([lying("standard", unreported=True, unused_days=0)], rule)


def test_after_does_not_depend_on_uses():
    rule = Rule(name="old", match=("**",), to="archive", after_s=30 * DAY_S)
    assert moves_of([lying("standard", unreported=True, unused_days=0)], rule)


def test_all_conditions_must_hold_and_the_reason_names_all():
    rule = Rule(name="r", match=("**",), to="archive", idle_s=DAY_S, after_s=DAY_S)
    (move,), _ = planned([lying("standard")], rule)
    assert move.reason == "not used for 100 days (idle = 24 hours), written 100 days ago (after = 24 hours)"
    assert moves_of([lying("standard", days=0.5)], rule) == []


def test_only_the_first_matching_rule_applies():
    first = Rule(name="stay", match=("data/**",))
    assert moves_of([lying("standard")], first, TO_ARCHIVE) == []


def test_a_copy_is_dropped_if_the_destination_has_a_verified_one():
    (move,), _ = planned([lying("hot", "archive")], TO_ARCHIVE)
    assert (move.action, move.src, move.dst) == ("drop", 0, 2)
    assert move.reason.endswith("; a verified copy is in archive")


@pytest.mark.parametrize("wrong", [{"whole": False}, {"verified": False}])
def test_a_partial_or_unverified_copy_is_no_reason_to_drop_another(wrong):
    group = Group("data/x", {"hot": BIG, "archive": replace(BIG, **wrong)}, days=100)
    assert moves_of([group], TO_ARCHIVE) == [("data/x", "move", "hot", "archive")]


def test_a_group_that_was_rewritten_after_its_copy_is_copied_again():
    group = Group("data/x", {"hot": replace(BIG, days=50, verified=False), "archive": BIG}, days=100)
    assert moves_of([group], TO_ARCHIVE) == [("data/x", "move", "hot", "archive")]


def test_a_newer_copy_of_a_shard_counts_as_equal():
    group = Group("data/x", {"hot": replace(BIG, days=50, verified=False), "archive": BIG}, "shard", days=100)
    assert moves_of([group], TO_ARCHIVE) == [("data/x", "drop", "hot", "archive")]


def test_between_classes_of_one_bucket_the_storage_class_is_changed():
    assert moves_of([lying("standard")], TO_ARCHIVE, one_bucket=True) == [("data/x", "reclass", "standard", "archive")]


def test_the_cheaper_of_two_source_copies_is_used():
    """Through this machine from hot each part is a request; within the provider each object is."""
    assert moves_of([lying("hot", "standard")], TO_ARCHIVE) == [("data/x", "move", "standard", "archive")]


def test_at_equal_cost_the_faster_tier_is_read():
    assert moves_of([lying("hot", "standard")], TO_ARCHIVE, prices=(None,) * 3) == [
        ("data/x", "move", "hot", "archive")
    ]


def test_durations_in_reasons_use_the_singular_for_one_hour():
    assert [ago(0), ago(1), ago(2), ago(48)] == ["0 hours", "1 hour", "2 hours", "2 days"]


# -- what is held ----------------------------------------------------------------------------------------------------


def test_a_pinned_group_stays_and_the_refusal_gives_the_reason():
    pins = (Pin(match=("other/**",)), Pin(match=("data/**",), why="the paper's figures"))
    assert refusal_of([lying("standard")], TO_ARCHIVE, pins=pins) == "pinned (pins[2]): the paper's figures"


def test_a_pin_of_all_objects_in_a_checkpoint_pins_the_checkpoint():
    assert "pinned" in refusal_of([lying("standard")], TO_ARCHIVE, pins=(Pin(match=("data/x/**",)),))


def test_an_expired_pin_has_no_effect():
    assert moves_of([lying("standard")], TO_ARCHIVE, pins=(Pin(match=("**",), until_s=1.0),))


def test_a_held_group_is_neither_moved_nor_deleted_and_the_refusal_gives_the_reason():
    held = lying("standard", held="held until tomorrow: recalled")
    assert refusal_of([held], TO_ARCHIVE) == "held until tomorrow: recalled"
    assert moves_of([held], Rule(name="gone", match=("**",), delete_after_s=1.0)) == []


def test_a_group_in_use_stays():
    assert refusal_of([lying("standard", in_use=True)], TO_ARCHIVE) == "in use"


def test_an_incomplete_checkpoint_stays():
    groups = [checkpoint(0, step, {"standard": BIG}, days=100.0, complete=step == 2) for step in (1, 2)]
    _, refusals = planned(groups[:1], TO_ARCHIVE)
    assert refusals[0].reason == "not complete yet"


def test_a_checkpoint_without_a_whole_copy_stays_and_the_refusal_says_why():
    half = replace(BIG, whole=False)
    _, refusals = planned([checkpoint(0, 1, {"standard": half}, days=100.0, complete=False)], TO_ARCHIVE)
    assert "no copy of it is whole" in refusals[0].reason


def test_the_newest_checkpoint_is_copied_and_dropped_only_when_the_copy_is_readable():
    newest = checkpoint(0, 9, {"standard": BIG}, days=100.0)
    (move,), _ = planned([newest], TO_ARCHIVE)
    assert (move.action, move.src, move.dst) == ("copy", 1, 2)
    assert move.reason.endswith("; copied only: it is the newest complete checkpoint of its run")
    both = checkpoint(0, 9, {"standard": BIG, "archive": BIG}, days=100.0)
    assert moves_of([both], TO_ARCHIVE) == [(both.path, "drop", "standard", "archive")]
    frozen = checkpoint(0, 9, {"standard": BIG, "archive": replace(BIG, state=ARCHIVED)}, days=100.0)
    assert "is never deleted" in refusal_of([frozen], TO_ARCHIVE)


def test_the_storage_class_of_the_newest_checkpoint_is_not_changed():
    newest = checkpoint(0, 9, {"standard": BIG}, days=100.0)
    assert "newest" in refusal_of([newest], TO_ARCHIVE, one_bucket=True)


# -- keep lists ------------------------------------------------------------------------------------------------------


def run_of(*steps: int, tier: str = "hot", **facts) -> list[Group]:
    return [checkpoint(0, step, {tier: BIG}, **{"days": 20.0, **facts}) for step in steps]


def test_a_checkpoint_outside_a_keep_list_moves_down_and_outside_all_lists_to_then():
    assert moves_of(run_of(1, 2, 3), KEEP) == [
        ("ckpt/r0/step-1", "move", "hot", "archive"),
        ("ckpt/r0/step-2", "move", "hot", "standard"),
    ]


def test_a_checkpoint_younger_than_after_waits_in_the_last_tier_with_a_keep_list():
    groups = [checkpoint(0, 1, {"standard": BIG}, days=13.0), *run_of(2, 3, tier="standard", days=12.0)]
    assert moves_of(groups, KEEP) == []
    young = [checkpoint(0, 1, {"hot": BIG}, days=13.0), *run_of(2, 3, tier="standard", days=12.0)]
    assert moves_of(young, KEEP) == [("ckpt/r0/step-1", "move", "hot", "standard")]


def test_a_checkpoint_with_a_verified_copy_further_down_is_dropped():
    groups = [checkpoint(0, 1, {"hot": BIG, "archive": BIG}, days=13.0), *run_of(2, 3, tier="standard", days=12.0)]
    assert moves_of(groups, KEEP) == [("ckpt/r0/step-1", "drop", "hot", "archive")]


def test_a_copy_below_the_tier_of_then_stays():
    rule = Rule(name="r", match=("**",), keep={"hot": KeepList(last=1)}, then="standard")
    assert moves_of([*run_of(1, tier="archive"), *run_of(2)], rule) == []


def test_without_then_a_checkpoint_moves_to_the_next_tier():
    rule = Rule(name="r", match=("**",), keep={"hot": KeepList(last=1)})
    assert moves_of(run_of(1, 2), rule) == [("ckpt/r0/step-1", "move", "hot", "standard")]


def test_keep_lists_do_not_apply_to_files():
    log = Group("ckpt/r0/train.log", {"hot": BIG}, days=1000.0)
    assert planned([log], KEEP) == ((), ())


# -- deleting --------------------------------------------------------------------------------------------------------


def test_delete_after_deletes_old_groups_from_all_tiers():
    (move,), _ = planned([lying("standard", "archive", copy=replace(BIG, days=95))], DELETE)
    assert (move.action, move.src, move.dst) == ("delete", 1, None)
    assert move.reason == "written 100 days ago (delete_after = 10 days)"
    assert move.saving_month == pytest.approx(BIG.n_bytes / 2**30 * (0.02 + 0.004))


def test_the_newest_checkpoint_is_never_deleted():
    groups = run_of(1, 2, 3, tier="standard")
    moves, refusals = planned(groups, DELETE)
    assert len(moves) == len(groups) - 1
    assert "newest" in refusals[-1].reason


def test_the_checkpoint_written_last_stays_after_a_restart_at_a_lower_step():
    """The run was at step 900, and went on from step 100 in a new job: it is resumed from step 110."""
    groups = [
        *(checkpoint(0, step, {"hot": BIG}, days=30.0 - step / 100) for step in (700, 800, 900)),
        checkpoint(0, 110, {"hot": BIG}, days=1.0),
    ]
    assert [path for path, *_ in moves_of(groups, KEEP)] == ["ckpt/r0/step-700", "ckpt/r0/step-800"]
    deleted = [path for path, action, *_ in moves_of(groups, DELETE) if action == "delete"]
    assert deleted == ["ckpt/r0/step-700", "ckpt/r0/step-800"]


def test_a_checkpoint_in_a_keep_list_is_never_deleted():
    deleted = [path for path, action, *_ in moves_of(run_of(1, 2, 3, 4, days=400.0), KEEP) if action == "delete"]
    assert deleted == ["ckpt/r0/step-1", "ckpt/r0/step-2"]


# -- dollars ---------------------------------------------------------------------------------------------------------


def test_moves_of_small_objects_that_cost_more_are_refused():
    """1,000 files of 5 KB to GLACIER: 40 KiB are billed beside each."""
    table = price_table()[1]
    prices = (FREE, table["aws:us-east-1:STANDARD"], table["aws:us-east-1:GLACIER"])
    group = lying("standard", copy=Copy(5_000_000, 1000, 5000, days=100))
    assert "never earned back" in refusal_of([group], TO_ARCHIVE, prices=prices)


def test_objects_below_the_minimum_size_are_refused_if_storage_gets_dearer():
    small = lying("standard", copy=Copy(15, days=100))  # 0.02 a GB for 15 B, or 0.004 for 100 B
    assert "never earned back" in refusal_of([small], TO_ARCHIVE)


def test_one_small_file_does_not_keep_a_checkpoint_from_moving():
    assert moves_of([lying("standard", copy=Copy(50 * MB, 2, 10, days=100))], TO_ARCHIVE)


def test_an_early_deletion_fee_is_part_of_the_cost():
    prices = (FREE, COLD, replace(FROZEN, restore={}))
    (move,), _ = planned([lying("standard", copy=Copy(2**30, days=60))], TO_ARCHIVE, prices=prices)
    assert move.cost == pytest.approx(0.004 * 30 / 30 + 0.03 + 0.01 / 1000)


def test_a_move_to_a_dearer_tier_is_refused():
    assert "never earned back" in refusal_of(
        [lying("standard", copy=Copy(2**30, days=100))], TO_ARCHIVE, prices=(FREE, COLD, STANDARD)
    )


def test_a_move_must_pay_back_before_its_rule_deletes_the_group():
    def rule(days: float) -> Rule:
        return TO_ARCHIVE.model_copy(update={"delete_after_s": days * DAY_S})

    group = lying("standard", copy=Copy(2**30, days=100))
    assert moves_of([group], rule(300))
    assert "it is deleted in 10 days" in refusal_of([group], rule(110))
    (move,), _ = planned([group], rule(180))
    (lasting,), _ = planned([group], TO_ARCHIVE)
    assert move.cost - lasting.cost == pytest.approx(0.004 * 10 / 30)


def test_a_move_must_break_even_within_a_year_and_the_refusal_has_the_figures():
    group = lying("standard", copy=Copy(2**30, days=100))
    dear = {days: (FREE, STANDARD, replace(COLD, put_1000=0.016 / 30 * days * 1000)) for days in (360, 370)}
    assert moves_of([group], TO_ARCHIVE, prices=dear[360])
    assert refusal_of([group], TO_ARCHIVE, prices=dear[370]) == (
        "costs $0.197 once and saves $0.016 a month: earned back in 370 days (at most 365); "
        "use larger files or another class, or give no `prices` to ignore costs"
    )


def test_a_move_without_cost_and_savings_breaks_even_at_once():
    prices = (FREE, STANDARD, Prices("x:r:S2", store_gb_month=0.02))
    free_reads = (FREE, replace(STANDARD, get_1000=0.0), prices[2])
    assert moves_of([lying("standard")], TO_ARCHIVE, prices=free_reads)


def test_a_move_to_a_dearer_class_never_breaks_even():
    group = lying("standard", copy=Copy(2**30, days=100))
    prices = (FREE, STANDARD, replace(COLD, store_gb_month=0.03))
    assert "saves -$0.01 a month: never earned back" in refusal_of([group], TO_ARCHIVE, prices=prices)


def test_moves_from_an_unpriced_local_disk_are_not_checked_for_cost():
    assert moves_of([lying("hot")], TO_ARCHIVE, prices=(FREE, STANDARD, replace(COLD, store_gb_month=9.0)))


def test_without_prices_costs_are_not_considered():
    (move,), _ = planned([lying("standard")], TO_ARCHIVE, prices=(FREE, None, replace(COLD, store_gb_month=9.0)))
    assert (move.cost, move.saving_month) == (0.0, 0.0)


# -- what cannot be read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (ARCHIVED, "its copy in standard is archived: restore it first: tiercache tier get data/x"),
        (RESTORING, "its copy in standard is being restored: it can be read when that is done"),
    ],
)
def test_an_archived_copy_is_no_source(state, why):
    assert refusal_of([lying("standard", copy=replace(BIG, state=state))], TO_ARCHIVE) == why


def test_a_temporarily_restored_copy_is_a_source():
    assert moves_of([lying("standard", copy=replace(BIG, state=RESTORED))], TO_ARCHIVE)


def test_a_partial_copy_is_no_source():
    assert "is not whole" in refusal_of([lying("hot", copy=replace(BIG, whole=False))], TO_ARCHIVE)


# -- capacities ------------------------------------------------------------------------------------------------------

STAY = Rule(name="stay", match=("**",))
UNPRICED = (None, None, None)  # objects of some bytes never pay back


def ten_in_hot(**facts) -> list[Group]:
    return [Group(f"f{i}", {"hot": Copy(10, days=100)}, days=100.0, unused_days=float(i), **facts) for i in range(10)]


def test_above_high_the_least_recently_used_groups_move_down_until_low():
    moves, refusals = planned(ten_in_hot(), STAY, capacity=(105, None, None))
    assert [one.group for one in moves] == [9, 8, 7]
    assert {one.rule for one in moves} == {"tiers.hot.capacity"}
    assert moves[0].reason == "hot is 95.2% full, and at most 90% are wanted; not used for 9 days"
    assert refusals == ()


def test_a_watermark_moves_nothing_below_high():
    assert moves_of(ten_in_hot(), STAY, capacity=(112, None, None)) == []


def test_moves_of_rules_count_before_the_watermark():
    rule = Rule(name="r", match=("f9", "f8"), to="standard", after_s=0.0)
    assert [path for path, *_ in moves_of(ten_in_hot(), rule, STAY, capacity=(105, None, None))] == ["f8", "f9"]


def test_a_watermark_drops_copies_that_have_a_verified_copy_further_down():
    groups = [replace(one, copies={"hot": Copy(10, days=100), "archive": Copy(10, days=100)}) for one in ten_in_hot()]
    assert {way[1:] for way in moves_of(groups, STAY, capacity=(105, None, None))} == {("drop", "hot", "archive")}


def test_a_watermark_respects_keep_lists_and_pins():
    groups = [checkpoint(0, step, {"hot": Copy(10)}, unused_days=float(9 - step), days=20.0) for step in range(10)]
    rule = Rule(name="runs", match=("**",), keep={"hot": KeepList(every_steps=1)})
    assert moves_of(groups, rule, capacity=(105, None, None)) == []
    assert moves_of(ten_in_hot(), STAY, capacity=(105, None, None), pins=(Pin(match=("**",)),)) == []


def test_a_watermark_spares_held_groups():
    held = [replace(one, held="held until tomorrow") for one in ten_in_hot()]
    assert moves_of(held, STAY, capacity=(105, None, None)) == []


def test_a_watermark_does_not_move_the_newest_checkpoint():
    groups = [checkpoint(run, 1, {"hot": Copy(10)}, days=20.0) for run in range(10)]
    assert planned(groups, STAY, capacity=(50, None, None)) == ((), ())


def test_a_watermark_ignores_the_break_even():
    groups = [Group(f"f{i}", {"standard": Copy(10, days=100)}, days=100.0) for i in range(10)]
    prices = (FREE, STANDARD, replace(STANDARD, name="x:r:T"))
    assert moves_of(groups, STAY, capacity=(None, 105, None), prices=prices)


def test_a_smaller_group_may_fit_where_a_larger_one_does_not():
    groups = [Group(f"f{n}", {"standard": Copy(n, days=100)}, days=100.0) for n in (400, 600, 300)]
    moves, refusals = planned(groups, TO_ARCHIVE, prices=UNPRICED, capacity=(None, None, 900))
    assert [[one.group for one in found] for found in (moves, refusals)] == [[0, 2], [1]]


def test_capacity_that_one_rule_uses_is_not_available_to_the_next():
    groups = [Group(f"f{i}", {"standard": Copy(400, days=100)}, days=100.0) for i in range(3)]
    rules = [TO_ARCHIVE.model_copy(update={"match": (f"f{i}",)}) for i in range(3)]
    assert [path for path, *_ in moves_of(groups, *rules, prices=UNPRICED, capacity=(None, None, 900))] == ["f0", "f1"]


def test_a_move_to_a_full_tier_is_refused():
    groups = [Group(f"f{i}", {"standard": Copy(400, days=100)}, days=100.0) for i in range(3)]
    moves, refusals = planned(groups, TO_ARCHIVE, prices=UNPRICED, capacity=(None, None, 900))
    assert [one.group for one in moves] == [0, 1]
    assert refusals[0].reason == "no room in archive: its capacity is 900 B"


# -- arguments -------------------------------------------------------------------------------------------------------


def test_a_snapshot_of_other_tiers_is_refused():
    snapshot = snapshot_of([], tiers=("hot", "standard"))
    with pytest.raises(ValueError, match="the snapshot has tiers"):
        decided(snapshot, tier_file(), PRICES, capacity_bytes=(None, None, None))


@pytest.mark.parametrize(("prices", "limits"), [(PRICES[:2], (None,) * 3), (PRICES, (None,) * 2)])
def test_prices_and_capacities_need_one_entry_per_tier(prices, limits):
    with pytest.raises(ValueError, match="of 3 tiers, got 2"):
        decided(snapshot_of([]), tier_file(), prices, capacity_bytes=limits)


def test_an_empty_snapshot_has_no_decisions():
    assert planned([], TO_ARCHIVE, KEEP) == ((), ())


# -- conflicts, links and pin.json -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [
        TO_ARCHIVE,
        DELETE,
        Rule(name="r", match=("**",), keep={"hot": KeepList(last=1)}),
        Rule(name="r", match=("**",), keep={"hot": KeepList(last=1)}, then="archive", delete_after_s=DAY_S),
    ],
    ids=["to", "delete", "keep", "keep and delete"],
)
def test_a_group_that_no_move_may_touch_is_refused_with_its_reason(rule):
    groups = [checkpoint(0, step, {"hot": BIG}, days=400.0 - step) for step in (1, 2, 3)]
    groups[0] = replace(groups[0], immovable="conflict: hot and archive", copies={"hot": BIG, "archive": BIG})
    moves, refusals = planned(groups, rule)
    assert 0 not in [move.group for move in moves]
    assert [one.reason for one in refusals if one.group == 0] == ["conflict: hot and archive"]


def test_a_watermark_moves_no_group_that_no_move_may_touch():
    full = [Group(name, {"hot": BIG}, days=float(days)) for name, days in (("a", 9), ("b", 8))]
    full[0] = replace(full[0], immovable="conflict")
    snapshot = snapshot_of(full)
    found = decide(snapshot, tier_file([]), PRICES, capacity_bytes=[BIG.n_bytes, None, None])
    assert found.moves.group.tolist() == [1]


def test_a_copy_that_a_link_needs_is_neither_moved_nor_deleted():
    linked = Copy(BIG.n_bytes, link="last")
    assert "symbolic link last" in refusal_of([Group("a", {"hot": linked}, days=100.0)], TO_ARCHIVE)
    assert "symbolic link last" in refusal_of([Group("a", {"hot": linked, "archive": BIG}, days=100.0)], TO_ARCHIVE)
    groups = [checkpoint(0, step, {"hot": linked}, days=400.0 - step) for step in (1, 2)]
    assert moves_of(groups, DELETE) == []


def test_a_checkpoint_that_its_own_pin_file_pins_is_neither_moved_nor_deleted():
    groups = [checkpoint(0, step, {"hot": BIG}, days=400.0 - step, is_pinned=step == 1) for step in (1, 2, 3)]
    for rule in (DELETE, Rule(name="r", match=("**",), keep={"hot": KeepList(last=1)})):
        assert [path for path, *_ in moves_of(groups, rule)] == ["ckpt/r0/step-2"]
