"""Stores that fail, wait and stop as scripted."""

from __future__ import annotations

import uuid
from threading import Thread

import pytest
from tests.support.faults import Fault, FaultKind, FaultStore
from tests.support.stores import GateStore

from tiercache.errors import NotFound, ObjectChanged, StoreError
from tiercache.model import ByteRange
from tiercache.store import MemoryStore, memory


@pytest.fixture
def inner():
    store = MemoryStore(uuid.uuid4().hex)
    store.put("a", b"0123456789")
    yield store
    memory._buckets.pop(store.name, None)


def test_only_the_scripted_calls_of_the_named_keys_fail(inner):
    inner.put("shards/x", b"x")
    store = FaultStore(inner, [Fault("get", nth=2, times=2, status=500), Fault("get", keys="shards/*", error=NotFound)])
    assert store.get("a")
    for _ in range(2):
        with pytest.raises(StoreError, match="scripted fault in get") as caught:
            store.get("a")
        assert (caught.value.retryable, caught.value.status) == (True, 500)
    assert store.get("a")
    assert store.faulted_calls == [("get", "a"), ("get", "a")]
    with pytest.raises(NotFound):
        store.get("shards/x")
    assert store.get("shards/x") == b"x"
    for wrong in ({"verb": "fetch"}, {"verb": "get", "nth": 0}, {"verb": "put", "kind": FaultKind.SHORT_READ}):
        with pytest.raises(ValueError, match=r"verb|applies only to"):
            Fault(**wrong)


def test_an_error_comes_before_the_effect_and_a_lost_response_after_it(inner):
    store = FaultStore(inner, [Fault("put"), Fault("complete"), Fault("delete")])
    with pytest.raises(StoreError):
        store.put("new", b"x")
    with store.create("new") as upload:
        upload.put_part(0, b"x")
        with pytest.raises(StoreError):
            upload.complete()
    with pytest.raises(StoreError):
        store.delete(["a"])
    assert [info.key for info in inner.list()] == ["a"]
    for verb in ("put", "put_if_absent"):
        store.add(Fault(verb, kind=FaultKind.LOST_RESPONSE))
        with pytest.raises(StoreError) as caught:
            getattr(store, verb)(verb, b"written")
        assert caught.value.maybe_done
        assert inner.get(verb) == b"written"


def test_a_short_read_fails_a_bit_flip_is_silent_and_a_replaced_object_is_noticed(inner):
    store = FaultStore(inner, [Fault("read_into", kind=FaultKind.SHORT_READ)])
    buffer = bytearray(10)
    whole = [(ByteRange(0, 10), memoryview(buffer))]
    with pytest.raises(StoreError):
        store.read_into("a", whole)
    assert bytes(buffer) == b"01234" + bytes(5)
    store.add(*(Fault(verb, kind=FaultKind.BIT_FLIP) for verb in ("get", "read_tail", "read_into")))
    store.read_into("a", whole)
    for data in (store.get("a"), store.read_tail("a", 10)[0], bytes(buffer)):
        assert sum(bin(x ^ y).count("1") for x, y in zip(data, b"0123456789", strict=True)) == 1
    store.add(Fault("read_into", kind=FaultKind.REPLACED))
    halves = [(ByteRange(0, 5), memoryview(bytearray(5))), (ByteRange(5, 10), memoryview(bytearray(5)))]
    with pytest.raises(ObjectChanged):
        store.read_into("a", halves)
    assert inner.get("a") == b"9876543210"


def test_a_gate_stops_one_call_at_its_point_and_fails_the_test_if_nobody_reaches_or_opens_it(inner):
    for point in ("before_put", "after_put"):
        store = GateStore(inner)
        gate = store.stop_at(point, keys=point)
        thread = Thread(target=store.put, args=(point, b"x"))
        thread.start()
        gate.wait_reached()
        assert (point in [info.key for info in inner.list()]) == (point == "after_put")
        store.put("other", b"x")
        gate.open()
        thread.join()
        assert inner.get(point) == b"x"
    gate = store.stop_at("before_get")
    gate.timeout_s = 0.01
    with pytest.raises(AssertionError, match="no call reached before_get"):
        gate.wait_reached()
    with pytest.raises(AssertionError, match="was not opened within"):
        store.get("a")
