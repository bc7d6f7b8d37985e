"""A hypothesis state machine that compares a store with a dict.

Usage::

    TestMyStore = store_machine(lambda: MyStore(...)).TestCase
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tiercache.errors import NotFound, ObjectChanged
from tiercache.model import ByteRange
from tiercache.store.contract import Store

_keys = st.sampled_from(["a", "b", "a.b", "f/a", "f/b", "f/g/a", "fa/a", "ü b/+%"])
_data = st.binary(max_size=40) | st.integers(0, 255).map(lambda n: bytes([n]) * 70_000)


class StoreMachine(RuleBasedStateMachine):
    """Rules over a store and a dict; store_machine() provides the store."""

    open_empty: ClassVar[staticmethod[[], AbstractContextManager[Store]]]

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.store = self.stack.enter_context(self.open_empty())
        self.model: dict[str, bytes] = {}
        self.etags: dict[str, str | None] = {}

    def teardown(self) -> None:
        self.stack.close()

    def missing(self, call: Callable[[], object]) -> bool:
        try:
            call()
        except NotFound:
            return True
        return False

    @rule(key=_keys, data=_data)
    def put(self, key: str, data: bytes) -> None:
        self.etags[key] = self.store.put(key, data).etag
        self.model[key] = data

    @rule(key=_keys, data=_data)
    def put_if_absent(self, key: str, data: bytes) -> None:
        written = self.store.put_if_absent(key, data)
        assert written == (key not in self.model)
        if written:
            self.model[key] = data
            self.etags.pop(key, None)

    @rule(key=_keys, parts=st.lists(st.binary(min_size=1, max_size=20), max_size=1), if_absent=st.booleans())
    def upload(self, key: str, parts: list[bytes], if_absent: bool) -> None:
        with self.store.create(key) as upload:
            for number, part in enumerate(parts):
                upload.put_part(number, part)
            done = upload.complete(if_absent=if_absent)
        assert (done is None) == (if_absent and key in self.model)
        if done is not None:
            self.model[key] = b"".join(parts)
            self.etags[key] = done.etag

    @rule(key=_keys, part=st.binary(max_size=20))
    def abort(self, key: str, part: bytes) -> None:
        with self.store.create(key) as upload:
            upload.put_part(0, part)

    @rule(keys=st.lists(_keys, max_size=3))
    def delete(self, keys: list[str]) -> None:
        self.store.delete(keys)
        for key in keys:
            self.model.pop(key, None)

    @rule(key=_keys, start=st.integers(0, 60), n_bytes=st.integers(0, 60), with_etag=st.booleans())
    def read(self, key: str, start: int, n_bytes: int, with_etag: bool) -> None:
        if key not in self.model:
            assert self.missing(lambda: self.store.head(key))
            return
        data = self.model[key]
        wanted = ByteRange(min(start, len(data)), min(start + n_bytes, len(data)))
        buffer = bytearray(wanted.n_bytes)
        etag = self.store.head(key).etag if with_etag else None
        self.store.read_into(key, [(wanted, memoryview(buffer))], if_match=etag)
        assert buffer == data[wanted.start : wanted.end]
        tail, info = self.store.read_tail(key, n_bytes)
        assert tail == data[len(data) - min(n_bytes, len(data)) :]
        assert info.n_bytes == len(data)

    @rule(key=_keys, data=_data)
    def replace_under_a_reader(self, key: str, data: bytes) -> None:
        if not self.model.get(key) or len(data) == len(self.model[key]) or not data:
            return
        etag = self.store.head(key).etag
        self.put(key, data)
        try:
            self.store.read_into(key, [(ByteRange(0, 1), memoryview(bytearray(1)))], if_match=etag)
        except ObjectChanged:
            return
        raise AssertionError("a replaced object was read by its old ETag")

    @invariant()
    def holds_what_the_dict_holds(self) -> None:
        listed = {info.key: info.n_bytes for info in self.store.list()}
        assert listed == {key: len(data) for key, data in self.model.items()}
        assert {info.key for info in self.store.list("f/")} == {key for key in self.model if key.startswith("f/")}
        for key, data in self.model.items():
            assert self.store.get(key) == data


def store_machine(open_empty: Callable[[], AbstractContextManager[Store]]) -> type[StoreMachine]:
    """Return the class of the state machine.

    Args:
        open_empty: Function that returns a context with a new, empty store.
    """
    return type("StoreMachine", (StoreMachine,), {"open_empty": staticmethod(open_empty)})
