"""The part of the store conformance suite that read-only stores also pass. Needs pytest."""
# ruff: noqa: D102 - the names of tests are sentences

from __future__ import annotations

import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from random import Random
from threading import Event

import pytest

from tiercache.errors import NotFound, ObjectChanged, StoreError
from tiercache.model import ByteRange
from tiercache.store.contract import Store

BAD_KEYS = ("", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/./b", "a\\b", "a\0b", "s3://a/b")
CANARY = 0xA5


def pattern(n_bytes: int, seed: int = 0) -> bytes:
    """Return n_bytes pseudo-random bytes, which depend only on seed."""
    return Random(seed).randbytes(n_bytes)


def read_ranges(store: Store, key: str, ranges: list[ByteRange], **options: object) -> list[bytes]:
    """Return ranges of an object, read with read_into; check that no byte outside the buffers was written."""
    memories = [bytearray([CANARY]) * (wanted.n_bytes + 16) for wanted in ranges]
    spans = [(wanted, memoryview(memory)[8:-8]) for wanted, memory in zip(ranges, memories, strict=True)]
    store.read_into(key, spans, **options)  # type: ignore[arg-type]
    for memory in memories:
        assert bytes(memory[:8] + memory[-8:]) == bytes([CANARY]) * 16, "bytes outside the buffer were written"
    return [bytes(memory[8:-8]) for memory in memories]


class ReadSuite:
    """Tests that every store passes, including read-only stores."""

    key_prefix = ""

    @pytest.fixture
    def store(self) -> Iterator[Store]:
        """The store under test, empty. Subclasses override it."""
        raise NotImplementedError

    def raw_put(self, store: Store, key: str, data: bytes) -> None:
        """Write an object without using the class under test. Subclasses override it."""
        raise NotImplementedError

    def test_head_tells_size_and_an_etag_that_lasts(self, store: Store) -> None:
        self.raw_put(store, "a/b", b"12345")
        info = store.head("a/b")
        assert (info.key, info.n_bytes) == ("a/b", 5)
        assert info.etag
        assert store.head("a/b").etag == info.etag

    def test_get_gives_the_whole_object(self, store: Store) -> None:
        self.raw_put(store, "a", data := pattern(70_000))
        assert store.get("a") == data

    def test_an_empty_object_is_an_object(self, store: Store) -> None:
        self.raw_put(store, "empty", b"")
        assert store.head("empty").n_bytes == 0
        assert store.get("empty") == b""
        assert store.read_tail("empty", 10)[0] == b""
        assert read_ranges(store, "empty", [ByteRange(0, 0)]) == [b""]

    def test_what_is_not_there_is_not_found_and_the_error_names_it(self, store: Store) -> None:
        buffer = memoryview(bytearray(1))
        calls = (
            lambda: store.head("no/such"),
            lambda: store.get("no/such"),
            lambda: store.read_tail("no/such", 5),
            lambda: store.read_into("no/such", [(ByteRange(0, 1), buffer)]),
        )
        for call in calls:
            with pytest.raises(NotFound, match="no/such") as caught:
                call()
            assert isinstance(caught.value, FileNotFoundError)
            assert not caught.value.retryable

    @pytest.mark.parametrize("n_bytes", [1, 999, 1000, 5000])
    def test_read_tail_gives_the_end_and_what_the_object_is(self, store: Store, n_bytes: int) -> None:
        self.raw_put(store, "t", data := pattern(1000))
        tail, info = store.read_tail("t", n_bytes)
        assert tail == data[-n_bytes:]
        assert (info.key, info.n_bytes, info.etag) == ("t", 1000, store.head("t").etag)

    def test_read_into_fills_spans_of_any_order_overlap_and_length(self, store: Store) -> None:
        self.raw_put(store, "s", data := pattern(300_000))
        random = Random(1)
        for _ in range(10):
            cuts = [sorted(random.choices(range(len(data) + 1), k=2)) for _ in range(random.randrange(1, 12))]
            ranges = [ByteRange(start, end) for start, end in cuts] + [ByteRange(7, 7), ByteRange(0, len(data))]
            assert read_ranges(store, "s", ranges) == [data[r.start : r.end] for r in ranges]

    def test_read_into_reads_more_than_one_request_holds(self, store: Store) -> None:
        self.raw_put(store, "big", data := pattern((9 << 20) + 17))
        ranges = [ByteRange(0, len(data)), ByteRange(5 << 20, (5 << 20) + 3)]
        assert read_ranges(store, "big", ranges) == [data, data[5 << 20 : (5 << 20) + 3]]

    def test_read_into_without_spans_does_nothing(self, store: Store) -> None:
        self.raw_put(store, "s", b"x")
        store.read_into("s", [])

    @pytest.mark.parametrize(
        "wanted", [ByteRange(90, 101), ByteRange(100, 101), ByteRange(500, 600), ByteRange(0, 101)]
    )
    def test_a_range_beyond_the_end_is_an_error_that_trying_again_does_not_mend(
        self, store: Store, wanted: ByteRange
    ) -> None:
        self.raw_put(store, "s", pattern(100))
        with pytest.raises(StoreError) as caught:
            read_ranges(store, "s", [ByteRange(0, 10), wanted])
        assert not caught.value.retryable
        assert not isinstance(caught.value, NotFound)

    def test_a_buffer_that_does_not_fit_its_range_is_refused(self, store: Store) -> None:
        self.raw_put(store, "s", pattern(100))
        for wrong in (memoryview(bytearray(9)), memoryview(bytes(10)), memoryview(bytearray(20))[::2]):
            with pytest.raises(ValueError, match="buffer"):
                store.read_into("s", [(ByteRange(0, 10), wrong)])

    def test_if_match_reads_the_object_it_names_and_no_other(self, store: Store) -> None:
        self.raw_put(store, "m", pattern(100, seed=1))
        etag = store.head("m").etag
        assert read_ranges(store, "m", [ByteRange(3, 9)], if_match=etag) == [pattern(100, seed=1)[3:9]]
        self.raw_put(store, "m", pattern(120, seed=2))
        with pytest.raises(ObjectChanged, match="m") as caught:
            read_ranges(store, "m", [ByteRange(3, 9)], if_match=etag)
        assert not caught.value.retryable

    def test_a_set_cancel_ends_a_read(self, store: Store) -> None:
        self.raw_put(store, "c", pattern(100))
        cancel = Event()
        cancel.set()
        with pytest.raises(StoreError):
            read_ranges(store, "c", [ByteRange(0, 100)], cancel=cancel)

    def test_a_generous_deadline_is_met(self, store: Store) -> None:
        self.raw_put(store, "d", data := pattern(100))
        assert read_ranges(store, "d", [ByteRange(0, 100)], deadline_s=60.0) == [data]

    def test_many_threads_read_at_once(self, store: Store) -> None:
        self.raw_put(store, "p", data := pattern(50_000))
        ranges = [ByteRange(i * 1000, i * 1000 + 1500) for i in range(40)]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda wanted: read_ranges(store, "p", [wanted])[0], ranges))
        assert found == [data[r.start : r.end] for r in ranges]

    def test_a_key_that_cannot_be_is_refused_when_reading(self, store: Store) -> None:
        calls = (store.head, store.get, lambda k: store.read_tail(k, 1), lambda k: store.read_into(k, []))
        for key, call in product(BAD_KEYS, calls):
            with pytest.raises(ValueError, match="key"):
                call(key)

    def test_a_pickled_store_works(self, store: Store) -> None:
        self.raw_put(store, "p", b"pickled")
        again = pickle.loads(pickle.dumps(store))  # noqa: S301 - our own bytes
        assert (again.get("p"), again.url) == (b"pickled", store.url)
        again.close()

    def test_a_closed_store_may_be_used_again(self, store: Store) -> None:
        self.raw_put(store, "c", b"closed")
        assert store.get("c") == b"closed"
        store.close()
        store.close()
        assert store.get("c") == b"closed"

    def test_reading_is_counted(self, store: Store) -> None:
        self.raw_put(store, "n", pattern(1000))
        before = store.counters.snapshot()
        read_ranges(store, "n", [ByteRange(0, 1000)])
        after = store.counters.snapshot()
        assert after["requests"] > before["requests"]
        assert after["bytes_read"] - before["bytes_read"] == 1000
