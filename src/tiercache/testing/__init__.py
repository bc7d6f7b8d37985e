"""Test tools for stores: conformance suites, stores and a server that inject faults, and an S3 server on loopback.

`tiercache.testing.suite` and `tiercache.testing.state_machine` need pytest and hypothesis, and
`tiercache.testing.s3_server` needs a server package; they are therefore not imported here, nor is
`tiercache.testing.http_server`, the server whose requests go wrong as told.
"""

from __future__ import annotations

from tiercache.store.contract import WrapperStore
from tiercache.testing.faults import Fault, FaultKind, FaultStore

__all__ = ["Fault", "FaultKind", "FaultStore", "WrapperStore"]
