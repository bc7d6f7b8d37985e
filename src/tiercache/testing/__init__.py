"""Test tools for stores: conformance suites, stores that inject faults and delays, and servers.

`tiercache.testing.suite` needs pytest and is therefore not imported here.
"""

from __future__ import annotations

from tiercache.testing.clock import FakeClock, JumpingClock
from tiercache.testing.faults import (
    CountingStore,
    Fault,
    FaultKind,
    FaultStore,
    Gate,
    GateStore,
    LatencyStore,
    WrapperStore,
)

__all__ = [
    "CountingStore",
    "FakeClock",
    "Fault",
    "FaultKind",
    "FaultStore",
    "Gate",
    "GateStore",
    "JumpingClock",
    "LatencyStore",
    "WrapperStore",
]
