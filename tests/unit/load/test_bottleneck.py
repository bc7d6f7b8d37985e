"""The verdict of stats(): which part limits a loader, in one word and a sentence."""

from __future__ import annotations

from typing import Any

import pytest

from tiercache.load.engine import summarise
from tiercache.stats import WaitHistogram


def verdict(wait_s: float, exposed_s: float | None = None, fetched: int = 0, **counters: float) -> str:
    """The bottleneck of a loader that ran for 10 s with two threads."""
    histograms = []
    for total_s in (wait_s, wait_s if exposed_s is None else exposed_s):
        histograms.append(WaitHistogram())
        histograms[-1].add(total_s)
    figures: dict[str, Any] = {"wall_s": 10.0, "samples": 100, "bytes_from_store": fetched, **counters}
    epoch = figures | {"wait_s": histograms[0].total_s, "idle_s": histograms[1].total_s}
    found = summarise(figures, epoch, *histograms, {}, has_cache=True, threads=2)
    text: str = found["bottleneck"]
    return text


@pytest.mark.parametrize(
    ("word", "given"),
    [
        ("consumer", {"wait_s": 0.1, "load_s": 9.0}),
        ("store", {"wait_s": 5.0, "load_s": 5.0, "fetched": 1 << 20}),
        ("disk", {"wait_s": 5.0, "load_s": 5.0}),
        ("plan", {"wait_s": 5.0, "plan_s": 5.0, "load_s": 1.0}),
        ("decode", {"wait_s": 5.0, "decode_ns": 18e9, "load_s": 5.0}),
        ("transform", {"wait_s": 5.0, "transform_ns": 18e9, "decode_ns": 10e9}),
        ("copy", {"wait_s": 5.0, "gather_ns": 18e9}),
        ("copy", {"wait_s": 0.1, "exposed_s": 3.0, "decode_ns": 18e9}),
        ("decode", {"wait_s": 3.0, "exposed_s": 3.1, "decode_ns": 18e9}),
        ("consumer", {"wait_s": 3.0, "exposed_s": 0.0, "decode_ns": 18e9}),
    ],
)
def test_the_bottleneck_begins_with_the_part_that_limits(word, given):
    assert verdict(**given).split()[0] == word


def test_copies_to_the_device_are_told_from_copies_of_records():
    assert "copies to the device" in verdict(wait_s=0.1, exposed_s=3.0)
    assert "copy and check records" in verdict(wait_s=5.0, gather_ns=18e9)
