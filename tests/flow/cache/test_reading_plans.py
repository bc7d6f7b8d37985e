"""Plan files: all processes see the plans of all live jobs."""

import gc
import os
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.cache_world import open_below

from tiercache import crash_points
from tiercache.cache.accounts import Owners
from tiercache.cache.folder import Folder
from tiercache.cache.names import NameTable
from tiercache.cache.reading_plans import UNPLANNED, PlanTable, ReadingPlans, decode, encode
from tiercache.model import NEVER, ReadingPlan


def names_of(*numbers):
    """Names that share no bytes in their order with their numbers."""
    return np.random.default_rng(7).integers(0, 256, (64, 20), np.uint8)[list(numbers)]


def plan_of(rows, owner="rank 0"):
    """A plan of (first, last, then) by shard number."""
    first, last, then = (np.array(column, np.int64) for column in zip(*rows, strict=True))
    return ReadingPlan(owner, np.arange(len(rows)), first, last, then)


def next_use(plans, names):
    """Bytes that a job still reads before it needs each copy."""
    return plans.uses(NameTable.of(names))[0][0]


class Side:
    """A process that has the folder open, as far as plans are concerned."""

    def __init__(self, folder):
        self.folder = folder
        self.owners = Owners(folder)
        self.plans = ReadingPlans(folder, self.owners)

    def close(self):
        self.plans.close()
        self.owners.close()


@pytest.fixture
def open_side(tmp_path):
    sides = []

    def open_():
        sides.append(Side(Folder(tmp_path / "c")))
        return sides[-1]

    yield open_
    for side in sides:
        side.close()


def files(side):
    return sorted(path.name for path in side.folder.plans.iterdir())


def open_files(side):
    """What this process has open of the folder's plan files."""
    return open_below(side.folder.plans)


@contextmanager
def at_point(name, action):
    """Do action() where that point is reached for the first time."""

    def hook(reached):
        if reached == name:
            crash_points.set_hook(before)
            action()

    before = crash_points.set_hook(hook)
    try:
        yield
    finally:
        crash_points.set_hook(before)


def fail():
    raise OSError(5, "scripted")


def test_a_published_plan_and_its_clock_are_visible_to_other_processes(open_side):
    mine, yours = open_side(), open_side()
    following = mine.plans.publish(names_of(0, 1), plan_of([(0, 10, 100), (10, 30, NEVER)]))
    seen = names_of(1, 0, 9)
    assert next_use(yours.plans, seen).tolist() == [10, 0, UNPLANNED]
    following.advance(40)
    assert next_use(yours.plans, seen).tolist() == [NEVER, 60, UNPLANNED]
    following.close()
    following.close()
    following.advance(50)
    assert next_use(yours.plans, seen).tolist() == [UNPLANNED] * 3
    assert files(mine) == []


def left_by(side, numbers, rows, reader="rank 0 of 2"):
    """A plan that its reader has read through and withdrawn."""
    plan = replace(plan_of(rows), reader=reader)
    following = side.plans.publish(names_of(*numbers), plan)
    following.advance(int(plan.last[plan.last < NEVER - 1].max()))
    following.close()


def test_a_plan_read_to_its_end_stays_valid_for_some_time(open_side):
    mine, yours = open_side(), open_side()
    left_by(mine, (0, 1), [(0, 10, 100), (10, 30, 120)])
    mine.plans.close()
    assert next_use(yours.plans, names_of(0, 1)).tolist() == [70, 90]
    assert yours.plans.labels() == []
    other = yours.plans.publish(names_of(2), replace(plan_of([(0, 5, 9)]), reader="rank 1 of 2"))
    assert next_use(yours.plans, names_of(0, 1, 2)).tolist() == [70, 90, 0]
    next_epoch = yours.plans.publish(names_of(0), replace(plan_of([(0, 10, 50)]), reader="rank 0 of 2"))
    assert next_use(yours.plans, names_of(0, 1)).tolist() == [0, UNPLANNED]
    assert not any(file.endswith(".left") for file in files(yours))
    for one in (other, next_epoch):
        one.advance(1)
        one.close()
    assert files(yours) == []  # both were given up


def test_copies_in_use_all_the_time_do_not_delay_the_end_of_a_plan(open_side):
    side = open_side()
    left_by(side, (0, 1), [(0, 10, 100), (0, NEVER - 1, NEVER)])
    assert next_use(side.plans, names_of(0)).tolist() == [90]


def test_a_plan_left_behind_expires(open_side):
    side = open_side()
    left_by(side, (0,), [(0, 10, 100)])
    assert next_use(side.plans, names_of(0)).tolist() == [90]
    (file,) = side.folder.plans.iterdir()
    os.utime(file, (1, 1))
    assert next_use(side.plans, names_of(0)).tolist() == [UNPLANNED]
    assert files(side) == []
    (side.folder.plans / "x.left").write_bytes(b"nothing")
    assert next_use(side.plans, names_of(0)).tolist() == [UNPLANNED]
    left_by(side, (0,), [(0, 10, 100)], reader="")
    assert not any("left" in file and file != "x.left" for file in files(side))


@st.composite
def uses_of_a_shard(draw):
    """(first, last, then): a shard is read again only after it was read for the last time in this epoch."""
    first = draw(st.one_of(st.integers(0, 40), st.just(NEVER)))
    last = NEVER if first == NEVER else first + draw(st.integers(0, 20))
    then = draw(st.one_of(st.integers(0, 40), st.just(NEVER)))
    return first, last, then if NEVER in (then, last) else last + then


rows_of_a_plan = st.lists(uses_of_a_shard(), min_size=1, max_size=8)


def uses_one_by_one(row, clock):
    """When a shard is used from now on, in order, told row by row and not by arrays."""
    first, last, then = row
    coming = []
    if first != NEVER and clock < last:
        coming.append(max(first - clock, 0))
    if then != NEVER:
        coming.append(max(then - clock, 1))
    return coming


@given(st.lists(st.tuples(rows_of_a_plan, st.integers(0, 60)), max_size=4))
def test_merged_uses_are_the_two_nearest_of_all_plans(tmp_path_factory, given_plans):
    side = Side(Folder(tmp_path_factory.mktemp("side") / "merged"))
    try:
        followings = []
        for rows, clock in given_plans:
            followings.append(side.plans.publish(names_of(*range(len(rows))), plan_of(rows)))
            followings[-1].advance(clock)
        coming, after = (column.tolist() for column in side.plans.uses(NameTable.of(names_of(*range(9))))[0])
        for i in range(9):
            its = [(rows[i], clock) for rows, clock in given_plans if i < len(rows)]
            if not its:
                assert (coming[i], after[i]) == (UNPLANNED, UNPLANNED)
                continue
            expected = sorted(use for row, clock in its for use in uses_one_by_one(row, clock))
            assert [coming[i], after[i]] == [*expected, NEVER, NEVER][:2]
    finally:
        side.close()


def test_shards_with_one_copy_keep_it_in_use_until_the_last_is_read(open_side):
    side = open_side()
    rows = [(40, 50, 200), (10, 20, 300), (NEVER, NEVER, 150)]
    following = side.plans.publish(names_of(5, 5, 5), plan_of(rows))
    assert next_use(side.plans, names_of(5)).tolist() == [10]
    following.advance(30)
    assert next_use(side.plans, names_of(5)).tolist() == [0]
    following.advance(60)
    assert next_use(side.plans, names_of(5)).tolist() == [90]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_plan_of_a_process_that_was_killed_is_void_and_swept(open_side):
    side, (ready, told), (end, go) = open_side(), os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        published = Side(side.folder).plans.publish(names_of(1), plan_of([(5, 6, 7)], "killed"))
        os.write(told, b"x")
        os.read(end, 1)
        os._exit(9 if published else 1)
    os.read(ready, 1)
    assert next_use(side.plans, names_of(1)).tolist() == [5]
    os.write(go, b"x")
    os.waitpid(pid, 0)
    assert next_use(side.plans, names_of(1)).tolist() == [UNPLANNED]
    assert files(side) == []
    for fd in (ready, told, end, go):
        os.close(fd)


def test_a_plan_without_references_is_withdrawn(open_side):
    side = open_side()
    following = side.plans.publish(names_of(1), plan_of([(5, 6, 7)]))
    assert len(files(side)) == 1
    del following
    gc.collect()
    assert files(side) == []


def test_a_forked_child_neither_withdraws_nor_advances_the_plan_of_its_parent(open_side):
    side = open_side()
    following = side.plans.publish(names_of(1), plan_of([(5, 6, 70)]))
    pid = os.fork()
    if pid == 0:
        try:
            following.advance(50)
            following.close()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert next_use(side.plans, names_of(1)).tolist() == [5]
    assert len(files(side)) == 1


@pytest.mark.parametrize(
    "spoil", [lambda d: d[:-1], lambda d: b"x" + d[1:], lambda d: b"", lambda d: d[:8] + b"\xff" * 16 + d[24:]]
)
def test_an_invalid_plan_file_is_ignored(open_side, spoil):
    side = open_side()
    following = side.plans.publish(names_of(1), plan_of([(5, 6, 7)]))
    (file,) = side.folder.plans.iterdir()
    data = file.read_bytes()
    for path in (file, side.folder.plans / "of-nobody.plan", side.folder.plans / "of-nobody.new"):
        path.write_bytes(spoil(data))
    other = open_side()
    assert next_use(other.plans, names_of(1)).tolist() == [UNPLANNED]
    assert files(side) == [file.name], "what nobody owns is swept"
    following.close()


def test_invalid_numbers_in_a_plan_do_not_overflow():
    rows = [(-(1 << 63), (1 << 63) - 1, -5)]
    table = decode(encode(PlanTable.of(names_of(3), plan_of(rows))))
    coming, after = table.uses(np.array([0]), 100)
    assert coming.tolist() == [0]
    assert after.tolist() == [1]


def test_a_folder_that_was_deleted_has_no_plans(open_side):
    side = open_side()
    side.plans.publish(names_of(1), plan_of([(5, 6, 7)]))
    side.folder.plans.rename(side.folder.root / "away")
    assert next_use(side.plans, names_of(1)).tolist() == [UNPLANNED]


# -- closed under who is at work --------------------------------------------------------------------------------------


def test_queries_after_close_are_answered_and_leave_no_file_open(open_side):
    mine, yours = open_side(), open_side()
    left_by(yours, (0,), [(0, 10, 100)])
    following = yours.plans.publish(names_of(1), plan_of([(5, 6, 7)], "yours"))
    open_before = open_files(mine)
    mine.plans.close()
    assert next_use(mine.plans, names_of(0, 1)).tolist() == [90, 5]
    assert mine.plans.labels() == ["yours"]
    assert open_files(mine) == open_before
    following.close()


def test_a_plan_published_during_close_is_withdrawn(open_side):
    side, late = open_side(), []
    following = side.plans.publish(names_of(1), plan_of([(5, 6, 7)]))
    with at_point("plan.withdrawn", lambda: late.append(side.plans.publish(names_of(2), plan_of([(5, 6, 7)])))):
        side.plans.close()
    assert len(late) == 1
    assert files(side) == []
    assert open_files(side) == []
    for one in (following, *late):
        one.advance(6)
        one.close()


def test_a_plan_written_just_before_close_is_withdrawn(open_side):
    side = open_side()
    with at_point("plan.named", side.plans.close):
        following = side.plans.publish(names_of(1), plan_of([(5, 6, 7)]))
    assert files(side) == []
    assert open_files(side) == []
    following.close()


def test_a_plan_may_be_closed_while_its_clock_is_written(open_side, monkeypatch):
    side, n_written = open_side(), []
    following = side.plans.publish(names_of(1), plan_of([(5, 6, 7)]))
    write = os.pwrite

    def write_late(fd, data, at):
        following.close()  # as by the finalizer of who had it; it must not wait for its own thread
        n_written.append(write(fd, data, at))

    monkeypatch.setattr(os, "pwrite", write_late)
    following.advance(5)
    assert n_written == [8], "by now another file may have its descriptor"
    assert files(side) == []
    assert open_files(side) == []


# -- what fails halfway -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["plan.written", "plan.named", "plan.withdrawn"])
def test_a_plan_that_cannot_be_published_or_withdrawn_leaves_neither_a_file_nor_a_descriptor(open_side, point):
    side = open_side()
    with at_point(point, fail), pytest.raises(OSError, match="scripted"):
        side.plans.publish(names_of(1), plan_of([(5, 6, 7)])).close()
    assert files(side) == []
    assert open_files(side) == []
