"""What our tests use, and others may for stores of their own: suites, fault stores, servers that misbehave.

The suites need pytest (`tiercache.testing.suite`), so they are not imported here.
"""

from __future__ import annotations

from tiercache.testing.clock import FakeClock, JumpingClock
from tiercache.testing.faults import CountingStore, Fault, FaultKind, FaultStore, Gate, GateStore, LatencyStore
from tiercache.testing.wrapper import WrapperStore

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
