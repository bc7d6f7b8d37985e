"""Ctrl-C while a batch of a sampler is counted: it may be lost, and those after it keep their places."""

from __future__ import annotations

import pytest
from tests.testing.strikes import strike
from torch.utils.data import SequentialSampler

import tiercache as tc
from tiercache.waiting import wait_for

COUNTING = ("n_yielded", "drop_oldest")


@pytest.mark.parametrize("columns", [["id"], ["id", "blob"]])
@pytest.mark.parametrize("at", range(1, 13))
def test_ctrl_c_while_a_batch_is_counted_moves_no_later_one(make_dataset, columns, at):
    dataset = tc.Dataset(make_dataset(200), columns=columns)

    def make():
        return tc.DataLoader(dataset, batch_size=10, sampler=SequentialSampler(dataset))

    loader = make()
    iterator = iter(loader)
    for _ in range(2):
        next(iterator)
    assert wait_for(lambda: iterator._native._pipeline._ring.figures()["ready"] > 0, 10)
    struck = strike(at, lambda: next(iterator), COUNTING, ("call", "return"))
    assert struck or at > 8  # so that it is known to strike
    again = make()
    again.load_state_dict(loader.state_dict())
    assert next(iter(again))["id"].tolist() == next(iterator)["id"].tolist()
    iterator.close()
