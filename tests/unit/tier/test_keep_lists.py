"""Keep lists by property: evaluating all runs at once keeps what a loop over each run keeps."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tests.support.planner_oracle import kept_plainly, unscored_plainly
from tests.support.tier_snapshots import DAY_S, Copy, Group, checkpoint, snapshot_of

from tiercache.keep import BestMetric, KeepList, evaluate_keep_list
from tiercache.tier.policy import find_newest

HERE = {"standard": Copy()}


metrics = st.fixed_dictionaries(
    {}, optional={name: st.sampled_from([1.0, 2.0, 2.5, math.nan, math.inf]) for name in ("loss", "eval_loss")}
)
checkpoints = st.builds(
    lambda run, step, **facts: checkpoint(run, step, HERE, **facts),
    st.integers(0, 2),
    st.one_of(st.integers(0, 30), st.just(-1)),
    complete=st.booleans() | st.just(True),
    days=st.integers(0, 12).map(float),
    metrics=metrics,
    unread=st.booleans(),
)
bests = st.builds(
    BestMetric,
    st.sampled_from(["loss", "eval_loss"]),
    st.integers(1, 3),
    st.sampled_from(["min", "max"]),
)
keeps = st.builds(
    KeepList,
    last=st.none() | st.integers(1, 4),
    every_steps=st.none() | st.integers(1, 12),
    every_s=st.none() | st.sampled_from([DAY_S, 2 * DAY_S, 5 * DAY_S]),
    best=st.lists(bests, max_size=2).map(tuple),
    younger_s=st.none() | st.integers(1, 6).map(lambda days: days * DAY_S),
)


@given(st.lists(checkpoints, max_size=14), keeps, st.data())
def test_a_keep_list_keeps_what_a_loop_over_each_run_keeps(groups, keep, data):
    rows = data.draw(st.permutations(range(len(groups)))) if groups else []
    rows = rows[: data.draw(st.integers(0, len(rows)))]
    found = evaluate_keep_list(snapshot_of(groups), np.array(rows, np.int64), keep)
    assert chosen(rows, found.named) == kept_plainly(groups, rows, keep)
    assert chosen(rows, found.unscored) == unscored_plainly(groups, rows, keep)


def chosen(rows: list[int], mask: np.ndarray) -> set[int]:
    return {row for row, is_one in zip(rows, mask.tolist(), strict=True) if is_one}


@given(st.lists(checkpoints, max_size=14))
def test_the_newest_of_a_run_are_its_complete_checkpoints_written_last_and_with_the_highest_step(groups):
    found = set(np.flatnonzero(find_newest(snapshot_of(groups))).tolist())
    wanted = set()
    for run in {group.run for group in groups}:
        rows = [row for row, group in enumerate(groups) if group.run == run and group.complete]
        wanted |= set(sorted(rows, key=lambda row: (-groups[row].days, groups[row].step, row))[-1:])
        wanted |= set(sorted(rows, key=lambda row: (groups[row].step, -groups[row].days, row))[-1:])
    assert found == wanted


def named_steps(groups: list[Group], **keys: object) -> list[int]:
    snapshot = snapshot_of(groups)
    found = evaluate_keep_list(snapshot, np.arange(len(groups)), KeepList(**keys))
    return sorted(group.step for group, is_named in zip(groups, found.named.tolist(), strict=True) if is_named)


def run(*steps: int, **facts: object) -> list[Group]:
    return [checkpoint(0, step, HERE, days=float(1000 - step), **facts) for step in steps]


def test_the_last_checkpoints_are_those_written_last_after_a_restart_at_a_lower_step():
    """Step 400 was written; the run restarted at 100."""
    groups = [checkpoint(0, step, HERE, days=days) for step, days in ((200, 9), (300, 8), (400, 7), (101, 2), (102, 1))]
    assert named_steps(groups, last=2) == [101, 102]


def test_a_checkpoint_before_the_first_multiple_is_not_kept_for_it():
    assert named_steps(run(0, 10, 20, 60, 90, 110), every_steps=50) == [60, 110]


def test_a_restart_at_a_lower_step_begins_a_new_series_of_multiples():
    groups = [checkpoint(0, step, HERE, days=days) for step, days in ((100, 9), (200, 8), (110, 2), (210, 1), (220, 0))]
    assert named_steps(groups, every_steps=100) == [100, 110, 200, 210]


def test_a_metric_that_no_checkpoint_of_a_run_has_keeps_all_of_that_run_and_of_no_other():
    """A misspelt name would otherwise keep nothing, and delete_after would take last copies."""
    groups = [*run(10, 20, 30), *(checkpoint(1, step, HERE, metrics={"loss": float(step)}) for step in (10, 20, 30))]
    found = evaluate_keep_list(snapshot_of(groups), np.arange(6), KeepList(best=(BestMetric("loss", n=1),)))
    assert found.unscored.tolist() == [True, True, True, False, False, False]
    assert found.named.tolist() == [False, False, False, True, False, False]
