"""The conformance suite of the Store contract.

The test file of a store is a subclass of a few lines::

    class TestMyStore(StoreSuite):
        @pytest.fixture
        def store(self, tmp_path): return MyStore(tmp_path)
        def raw_put(self, store, key, data): (store.root / key).write_bytes(data)
        def raw_get(self, store, key): return (store.root / key).read_bytes()

raw_put and raw_get must not use the class under test. A read-only store subclasses ReadSuite. Needs pytest.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from random import Random
from threading import Barrier, Event, Lock

import pytest

from tiercache.errors import NotFound, ObjectChanged, StoreError
from tiercache.model import ByteRange, ObjectInfo, ShardIdentity
from tiercache.store.contract import Lease, LocalStore, Store

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
        raise NotImplementedError

    def raw_put(self, store: Store, key: str, data: bytes) -> None:
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

    def test_read_tail_gives_the_end_and_what_the_object_is(self, store: Store) -> None:
        self.raw_put(store, "t", data := pattern(1000))
        for n_bytes in (1, 999, 1000, 5000):
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
        store.read_into("s", [])

    def test_read_pieces_gives_the_bytes_of_each_range_in_order(self, store: Store) -> None:
        self.raw_put(store, "s", data := pattern(3 << 20))
        ranges = [ByteRange(0, 2 << 20), ByteRange((2 << 20) + 100, (2 << 20) + 200), ByteRange(2_900_000, len(data))]
        found = {wanted.start: b"" for wanted in ranges}
        lock = Lock()

        def receive(offset: int, piece: memoryview) -> None:
            with lock:
                start = max(start for start in found if start <= offset)
                assert offset == start + len(found[start])
                found[start] += bytes(piece)

        store.read_pieces("s", ranges, receive)
        assert found == {wanted.start: data[wanted.start : wanted.end] for wanted in ranges}

    def test_read_into_reads_more_than_one_request_holds(self, store: Store) -> None:
        self.raw_put(store, "big", data := pattern((9 << 20) + 17))
        ranges = [ByteRange(0, len(data)), ByteRange(5 << 20, (5 << 20) + 3)]
        assert read_ranges(store, "big", ranges) == [data, data[5 << 20 : (5 << 20) + 3]]

    def test_a_range_beyond_the_end_is_an_error_that_trying_again_does_not_mend(self, store: Store) -> None:
        self.raw_put(store, "s", pattern(100))
        for start, end in ((90, 101), (100, 101), (500, 600), (0, 101)):
            with pytest.raises(StoreError) as caught:
                read_ranges(store, "s", [ByteRange(0, 10), ByteRange(start, end)])
            assert not caught.value.retryable, (start, end)
            assert not isinstance(caught.value, NotFound), (start, end)

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
        again = pickle.loads(pickle.dumps(store))
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


ODD_KEYS = ("a b", "a%20b", "ü/日本", "a+b=c&d", "x/#?!*'()", "~t/@:;,$", '{a}[b]^`|<>"')


class WriteSuite:
    """Tests of what a store writes; a mixin for a ReadSuite."""

    def raw_put(self, store: Store, key: str, data: bytes) -> None:
        raise NotImplementedError

    def raw_get(self, store: Store, key: str) -> bytes:
        raise NotImplementedError

    def test_put_writes_the_whole_object_of_any_buffer(self, store: Store) -> None:
        for kind in (bytes, bytearray, memoryview):
            data = pattern(10_000)
            info = store.put("x/y/z", kind(data))
            assert self.raw_get(store, "x/y/z") == data, kind
            assert (info.key, info.n_bytes) == ("x/y/z", 10_000)
            assert info.etag == store.head("x/y/z").etag
        assert store.put("x/y/z", b"").n_bytes == 0
        assert self.raw_get(store, "x/y/z") == b""

    def test_put_replaces(self, store: Store) -> None:
        first = store.put("x", b"first")
        second = store.put("x", b"second!")
        assert self.raw_get(store, "x") == b"second!"
        assert first.etag != second.etag

    def test_put_if_absent_writes_only_a_free_key(self, store: Store) -> None:
        assert store.put_if_absent("once", b"first") is True
        assert store.put_if_absent("once", b"second") is False
        assert self.raw_get(store, "once") == b"first"
        store.delete(["once"])
        assert store.put_if_absent("once", b"third") is True

    def test_put_if_absent_has_one_winner_of_many(self, store: Store) -> None:
        n_racers = 8
        barrier = Barrier(n_racers)

        def race(number: int) -> bool:
            barrier.wait()
            return store.put_if_absent("prize", b"%d" % number * 1000)

        with ThreadPoolExecutor(n_racers) as pool:
            won = list(pool.map(race, range(n_racers)))
        assert won.count(True) == 1
        assert self.raw_get(store, "prize") == b"%d" % won.index(True) * 1000

    def test_odd_characters_in_keys_come_back_as_they_went(self, store: Store) -> None:
        for key in ODD_KEYS:
            store.put(key, key.encode())
            assert store.get(key) == key.encode()
            assert store.head(key).key == key
        assert sorted(info.key for info in store.list()) == sorted(ODD_KEYS)
        store.delete(ODD_KEYS)
        assert list(store.list()) == []

    def test_an_upload_joins_its_parts(self, store: Store) -> None:
        parts = [pattern(store.min_part_bytes, seed) for seed in range(2)] + [b"the end"]
        with store.create("up/loaded") as upload:
            for number, part in enumerate(parts):
                upload.put_part(number, part)
            assert [info.key for info in store.list()] == []
            info = upload.complete()
        assert info is not None
        assert (info.key, info.n_bytes) == ("up/loaded", sum(map(len, parts)))
        assert info.etag == store.head("up/loaded").etag
        assert self.raw_get(store, "up/loaded") == b"".join(parts)

    def test_parts_come_from_any_thread_and_their_buffers_are_not_kept(self, store: Store) -> None:
        parts = [pattern(store.min_part_bytes, seed) for seed in range(4)]

        def send(number: int) -> None:
            buffer = bytearray(parts[number])
            upload.put_part(number, buffer)
            buffer[:] = bytes(len(buffer))

        with store.create("threads") as upload, ThreadPoolExecutor(4) as pool:
            for number in range(4):
                pool.submit(send, number).result()
            upload.complete()
        assert self.raw_get(store, "threads") == b"".join(parts)

    def test_an_upload_may_be_small(self, store: Store) -> None:
        for parts in ([], [b""], [b"small"]):
            with store.create("small") as upload:
                for number, part in enumerate(parts):
                    upload.put_part(number, part)
                upload.complete()
            assert self.raw_get(store, "small") == b"".join(parts)

    def test_an_upload_that_is_left_leaves_nothing(self, store: Store) -> None:
        for n_parts in (0, 1, 3):
            with store.create("left") as upload:
                for number in range(n_parts):
                    upload.put_part(number, pattern(store.min_part_bytes))
            upload.abort()
            assert list(store.list()) == [], n_parts
            with pytest.raises(NotFound):
                store.head("left")

    def test_a_completed_or_aborted_upload_takes_no_more(self, store: Store) -> None:
        with store.create("done") as upload:
            upload.put_part(0, b"x")
            upload.complete()
            with pytest.raises(ValueError, match="done"):
                upload.put_part(1, b"y")
            with pytest.raises(ValueError, match="done"):
                upload.complete()
        assert self.raw_get(store, "done") == b"x"

    def test_a_missing_part_is_an_error_and_publishes_nothing(self, store: Store) -> None:
        with store.create("gap") as upload:
            upload.put_part(0, pattern(store.min_part_bytes))
            with pytest.raises(ValueError, match="part 1 is missing"):  # noqa: PT012 - other stores raise it at the end
                upload.put_part(2, b"end")
                upload.complete()
        assert list(store.list()) == []

    def test_an_upload_completes_if_absent_only_on_a_free_key(self, store: Store) -> None:
        for n_parts in (1, 4):

            def send(n_parts: int = n_parts) -> ObjectInfo | None:
                with store.create("free") as upload:
                    for number in range(n_parts):
                        upload.put_part(number, pattern(store.min_part_bytes, seed=number))
                    return upload.complete(if_absent=True)

            assert send() == store.head("free"), n_parts
            store.put("free", b"taken")
            assert send() is None, n_parts
            assert self.raw_get(store, "free") == b"taken"
            assert [info.key for info in store.list()] == ["free"]
            store.delete(["free"])

    def test_delete_takes_many_and_does_not_mind_the_missing(self, store: Store) -> None:
        keys = [f"d/{number}" for number in range(12)]
        for key in keys:
            self.raw_put(store, key, b"x")
        self.raw_put(store, "kept", b"x")
        store.delete([*keys, "d/missing", "no/such/folder"])
        assert [info.key for info in store.list()] == ["kept"]
        store.delete([])

    def test_list_gives_the_objects_below_a_folder(self, store: Store) -> None:
        for number, key in enumerate(("a/1", "a/b/2", "ab/3", "a.b", "z")):
            self.raw_put(store, key, b"x" * number)
        assert {(info.key, info.n_bytes) for info in store.list()} == {
            ("a/1", 0), ("a/b/2", 1), ("ab/3", 2), ("a.b", 3), ("z", 4),
        }  # fmt: skip
        assert sorted(info.key for info in store.list("a/")) == ["a/1", "a/b/2"]
        assert [info.key for info in store.list("a/b/")] == ["a/b/2"]
        assert list(store.list("nothing/here/")) == []

    def test_a_key_that_cannot_be_is_refused_when_writing(self, store: Store) -> None:
        calls: tuple[Callable[[str], object], ...] = (
            lambda key: store.put(key, b""),
            lambda key: store.put_if_absent(key, b""),
            store.create,
            lambda key: store.delete([key]),
        )
        self.raw_put(store, "a", b"")
        for key, call in product(BAD_KEYS, calls):
            with pytest.raises(ValueError, match="key"):
                call(key)

    def test_writing_is_counted(self, store: Store) -> None:
        before = store.counters.snapshot()
        store.put("n", pattern(1000))
        after = store.counters.snapshot()
        assert after["requests"] > before["requests"]
        assert after["bytes_written"] - before["bytes_written"] == 1000


class StoreSuite(WriteSuite, ReadSuite):
    """Tests of the whole Store contract."""


class LocalStoreSuite:
    """Tests of what a LocalStore adds; a mixin for a StoreSuite."""

    def raw_put(self, store: Store, key: str, data: bytes) -> None:
        raise NotImplementedError

    def leased(self, store: Store, key: str, identity: ShardIdentity | None = None) -> Lease | None:
        """Return a lease of the store, which must be a LocalStore."""
        assert isinstance(store, LocalStore)
        return store.open_local(key, identity)

    def test_a_lease_gives_a_descriptor_of_the_bytes(self, store: Store) -> None:
        self.raw_put(store, "l", data := pattern(10_000))
        lease = self.leased(store, "l")
        assert lease is not None
        try:
            ranges = [ByteRange(10, 20), ByteRange(0, 10_000)]
            lease.prefetch(ranges)
            assert lease.wait(ranges, deadline_s=30.0)
            assert lease.present(ranges)
            assert lease.n_bytes == 10_000
            assert os.pread(lease.fd, 10_000, 0) == data
            assert not os.get_inheritable(lease.fd)
        finally:
            lease.close()
            lease.close()

    def test_a_copy_of_another_size_than_the_identity_is_a_miss(self, store: Store) -> None:
        self.raw_put(store, "l", pattern(100))
        identity = ShardIdentity("d" * 32, "5" * 32, n_bytes=99, crc32c=0)
        assert self.leased(store, "l", identity) is None

    def test_a_lease_of_nothing_is_not_found(self, store: Store) -> None:
        with pytest.raises(NotFound):
            self.leased(store, "no/such")

    def test_a_lease_outlives_the_object(self, store: Store) -> None:
        self.raw_put(store, "l", data := pattern(1000))
        lease = self.leased(store, "l")
        assert lease is not None
        assert lease.wait([ByteRange(0, 1000)], deadline_s=30.0)
        store.delete(["l"])
        assert os.pread(lease.fd, 1000, 0) == data
        lease.close()
