"""Ctrl-C while a batch of a sampler is counted: it may be lost, and those after it keep their places."""

from __future__ import annotations

import sys

import pytest
from torch.utils.data import SequentialSampler

import tiercache as tc
from tiercache.waiting import wait_for

COUNTING = ("n_yielded", "let_go")


def strike(at, call):
    """Do call(), with Ctrl-C the time number `at` that Python enters or leaves what counts; whether it struck."""
    n_seen = 0

    def trace(frame, event, argument):
        nonlocal n_seen
        if event in ("call", "return") and frame.f_code.co_name in COUNTING:
            n_seen += 1
            if n_seen == at:
                sys.settrace(None)
                raise KeyboardInterrupt
            return trace
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


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
    struck = strike(at, lambda: next(iterator))
    assert struck or at > 8  # so that it is known to strike
    again = make()
    again.load_state_dict(loader.state_dict())
    assert next(iter(again))["id"].tolist() == next(iterator)["id"].tolist()
    iterator.close()
