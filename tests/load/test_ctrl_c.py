"""Ctrl-C while the lists of the next batch are begun: the batch in hand may be lost, and the next one is not."""

from __future__ import annotations

import pytest
from tests.testing.strikes import strike

import tiercache as tc
from tiercache.waiting import wait_for

TAKING = ("_take", "_next_filled", "_next_slot", "_started")


# One case strikes at every line, as a sample of the others.
@pytest.mark.parametrize("n_taken", [1, *(pytest.param(n, marks=pytest.mark.stress) for n in (0, 4))])
@pytest.mark.parametrize("at", range(1, 40))
def test_ctrl_c_while_a_batch_with_lists_is_taken_loses_that_one_at_most(make_dataset, n_taken, at):
    dataset = tc.Dataset(make_dataset(200), columns=["id", "blob"])
    expected = [batch["id"].tolist() for batch in tc.DataLoader(dataset, batch_size=10)]
    loader = tc.DataLoader(dataset, batch_size=10)
    iterator = iter(loader)
    for _ in range(n_taken):
        next(iterator)
    pipeline = iterator._pipeline
    assert wait_for(lambda: pipeline._ring.figures()["ready"] > 1, 10)
    struck = strike(at, lambda: next(iterator), TAKING, ("line",))
    assert struck or at > 15  # so that it is known to strike
    again = tc.DataLoader(dataset, batch_size=10)
    again.load_state_dict(loader.state_dict())
    rest = [batch["id"].tolist() for batch in iterator]
    assert rest in (expected[n_taken:], expected[n_taken + 1 :])
    assert [batch["id"].tolist() for batch in again] == rest


@pytest.mark.parametrize("at", range(1, 24))
def test_corruption_is_named_with_its_column_after_ctrl_c_lost_a_batch(make_dataset, at):
    path = make_dataset(200)
    for shard in path.rglob("*.tcs"):  # record 54, in a page that begins in batch 4
        shard.write_bytes(shard.read_bytes().replace(bytes([54]) * 10, bytes([55]) + bytes([54]) * 9))
    iterator = iter(tc.DataLoader(tc.Dataset(path, columns=["id", "blob"]), batch_size=10))
    for _ in range(3):
        next(iterator)
    strike(at, lambda: next(iterator), TAKING, ("line",))
    with pytest.raises(tc.CorruptShard, match="column 'blob'"):
        list(iterator)
