"""Core distance (csrc/core_distance.h): measured on request, and changed only by repeated measurements."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess

import numpy as np
import pytest
from tests.support import ROOT

from tiercache._native import gather, ring
from tiercache._native.ring import Plan, Ring
from tiercache.waiting import wait_for

IDLE, REQUESTED, WRITTEN = 0, 1, 2
CSRC = ROOT / "csrc"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Return csrc/core_distance.c, compiled as a library of its own: the package does not export its functions."""
    target = tmp_path_factory.mktemp("core_distance") / "core_distance.so"
    compiler = shlex.split(os.environ.get("CC", "cc"))
    source = str(CSRC / "core_distance.c")
    command = [*compiler, "-std=c11", "-D_GNU_SOURCE", "-O2", "-shared", "-fPIC", "-pthread", source, "-o", str(target)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(target))


class Distance:
    """A tc_distance, which must lie at a multiple of 4096 bytes."""

    def __init__(self, library):
        self._library = library
        self._memory = np.zeros(65536 + 4096, np.uint8)
        self._address = ctypes.c_void_p(-(-self._memory.ctypes.data // 4096) * 4096)

    def request(self):
        self._library.tc_distance_request(self._address)

    def write(self):
        self._library.tc_distance_write(self._address)

    def measure(self):
        self._library.tc_distance_measure(self._address)

    def add(self, is_far):
        self._library.tc_distance_add(self._address, ctypes.c_int(is_far))

    @property
    def step(self):
        return self._library.tc_distance_step(self._address)

    @property
    def is_far(self):
        return self._library.tc_distance_is_far(self._address) == 1


def test_lines_are_written_once_per_request(library):
    distance = Distance(library)
    distance.write()
    assert distance.step == IDLE
    distance.request()
    assert distance.step == REQUESTED
    distance.measure()
    assert distance.step == REQUESTED
    distance.write()
    distance.request()
    assert distance.step == WRITTEN
    distance.measure()
    assert distance.step == IDLE


def test_seven_more_measurements_of_one_kind_change_the_estimate_and_six_do_not(library):
    distance = Distance(library)
    for _ in range(100):
        distance.add(is_far=False)
    for _ in range(6):
        distance.add(is_far=True)
    assert not distance.is_far
    distance.add(is_far=True)
    assert distance.is_far
    for _ in range(100):
        distance.add(is_far=True)
    for is_far in (False, True, False, False, False, False, False, False):
        distance.add(is_far=is_far)
    assert distance.is_far
    distance.add(is_far=False)
    assert distance.is_far is False


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
