"""Core distance (csrc/core_distance.h): measured on request, and changed only by repeated measurements."""

from __future__ import annotations

import numpy as np
import pytest
from tests.support import ROOT

from tiercache._native import gather, ring
from tiercache._native.ring import Plan, Ring
from tiercache.waiting import wait_for

IDLE, REQUESTED, WRITTEN = 0, 1, 2
CSRC = ROOT / "csrc"


def test_the_consumer_of_a_ring_measures_the_distance_of_its_workers():
    """Lines older than a millisecond, as most are on a loaded machine, are ignored: read until a measurement counts."""
    if not ring.has_nontemporal_copies():
        pytest.skip("this processor has no non-temporal copies")
    before = ring.n_distance_measurements()
    assert wait_for(lambda: _read_through_a_ring() > before, 120)


def _read_through_a_ring() -> int:
    """Read a busy ring of 2,000 batches, and return the number of measurements so far."""
    rows = np.zeros((64, 2048), np.uint8)
    addresses = np.array([[[rows.ctypes.data, 0, 0]]], np.uint64)
    order = np.zeros(64 * 2000, np.uint32)
    busy = Ring(np.array([[gather.FIXED, 2048]], np.uint32), batch_rows=64, depth=4, n_threads=2)
    assert busy.push(Plan(addresses, order, order, rows))
    busy.finish()
    while not isinstance(busy.take(10), int):
        pass
    busy.close()
    return ring.n_distance_measurements()
