"""ShardReader: requests, pages, verification, leases, forks, and files that change under it."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.support.faults import Fault, FaultKind, FaultStore
from tests.support.mixed_shard import SCHEMA, N, batch, fill, wait_until_settled

from tiercache._native import gather
from tiercache.errors import CorruptShard, SchemaError, StoreError
from tiercache.shard import schema
from tiercache.shard.reader import ShardReader
from tiercache.shard.schema import Schema
from tiercache.shard.source import READS_AGAIN
from tiercache.shard.values import as_batch, block_values
from tiercache.shard.writer import ShardOptions, ShardWriter
from tiercache.store.local import LocalFolder
from tiercache.store.memory import MemoryStore


class Watching(MemoryStore):
    """Counts requests and the ranges that were asked for."""

    def __init__(self, name):
        super().__init__(name)
        self.requests = []

    def read_into(self, key, spans, **options):
        self.requests.append([(span.start, span.end) for span, _ in spans])
        super().read_into(key, spans, **options)

    def read_tail(self, key, n_bytes):
        self.requests.append("tail")
        return super().read_tail(key, n_bytes)

    def head(self, key):
        self.requests.append("head")
        return super().head(key)

    @property
    def n_bytes(self):
        return sum(end - start for spans in self.requests for start, end in spans)


@pytest.fixture(scope="module")
def remote():
    store = Watching("reader")
    return store, fill(store)


@pytest.fixture
def folder(tmp_path):
    store = LocalFolder(tmp_path)
    info = fill(store)
    wait_until_settled(store.root / info.name)
    return store, info


def expect(values, rows):
    found, whole = as_batch(values), batch()
    for name in SCHEMA.names:
        if name in found:
            for got, row in zip(found[name], rows, strict=True):
                want = whole[name][row]
                assert np.array_equal(got, want) or (want is None and not got), (name, row)


ROWS = [0, N - 1, 17, 1234, 1234, 2000]


def test_stream_kinds_equal_those_of_the_gather_kernel():
    assert (schema.FIXED, schema.BITS, schema.VAR) == (gather.FIXED, gather.BITS, gather.VAR)


def test_opening_a_shard_costs_one_request_with_its_description_and_at_most_two_without():
    store = Watching("reader-long")
    rng = np.random.default_rng(6)
    with ShardWriter(store, Schema.of({"x": "int64"}), ShardOptions(block_bytes=8, compression="none")) as writer:
        writer.write_batch({"x": rng.integers(0, 2**62, 6000)})
    (info,) = writer.finish()
    assert info.footer_bytes > 1 << 16, "the footer is longer than the guess"
    reader = ShardReader(store, info.name)
    assert len(store.requests) == 2
    assert reader.footer.n_blocks == 6000
    store.requests.clear()
    ShardReader(store, info.name, info=info)
    assert store.requests == [[(info.footer_offset, info.n_bytes)]]


def test_only_the_requested_columns_are_read(remote):
    store, info = remote
    reader = ShardReader(store, info.name, info=info)
    store.requests.clear()
    columns = [SCHEMA.index("i")]
    blocks = reader.load_blocks(range(reader.footer.n_blocks), columns)
    assert store.n_bytes == reader.footer.chunks["stored"][:, columns].sum()
    assert blocks.private_bytes >= store.n_bytes
    store.requests.clear()
    reader.load_blocks([0], range(len(SCHEMA)))
    # Neighbours are one range; the small columns lie together elsewhere.
    assert [len(spans) for spans in store.requests] == [2]


def test_blocks_are_readable_without_a_descriptor_after_the_reader_has_released_its_lease(folder):
    store, info = folder
    closed = []

    class Leasing(LocalFolder):
        def open_local(self, key, identity=None):
            lease = super().open_local(key, identity)
            close = lease.close
            lease.close = lambda: (closed.append(key), close())
            return lease

    reader = ShardReader(Leasing(store.root), info.name)
    blocks = reader.load_blocks([0], [0])
    reader.close()
    reader.close()
    assert closed == [info.name]
    assert not [link for link in Path("/proc/self/fd").iterdir() if str(store.root) in os.path.realpath(link)]
    expect(block_values(blocks, [0], np.zeros(5, np.uint32), np.arange(5, dtype=np.uint32)), range(5))
    with pytest.raises(ValueError, match="closed"):
        reader.load_blocks([0], [0])


def test_a_shard_that_the_cache_does_not_keep_is_read_by_ranges(folder):
    store, info = folder

    class Full(LocalFolder):
        def open_local(self, key, identity=None):
            lease = super().open_local(key, identity)
            lease.present = lambda ranges: False
            lease.wait = lambda ranges, deadline_s=None: False
            return lease

    class Elsewhere(LocalFolder):
        def open_local(self, key, identity=None):
            return None

    for kind in (Full, Elsewhere):
        with ShardReader(kind(store.root), info.name, info=info) as reader:
            expect(reader.take(ROWS, range(len(SCHEMA))), ROWS)
            assert reader.load_blocks([0], [0]).private_bytes > 0


def values_of(blocks, column, rows):
    """Rows of the first of the blocks."""
    row = np.array(rows, np.uint32)
    (found,) = block_values(blocks, [SCHEMA.index(column)], np.zeros(len(row), np.uint32), row)
    return found.values


def flip(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("is_settled", [True, False])
def test_a_changed_local_shard_is_checked_again(folder, is_settled):
    store, info = folder
    column, path = SCHEMA.index("t"), store.root / info.name
    with ShardReader(store, info.name) as reader:
        if not is_settled:
            os.utime(path)
        kept = reader.load_blocks([0], [column])
        values_of(kept, "t", [0])
        reader.take([0], [column])
        flip(path, int(reader.footer.chunks[0, column]["offset"]))
        wait_until_settled(path)
        for read in (
            lambda: values_of(reader.load_blocks([0], [column]), "t", [0]),
            lambda: reader.take([0], [column]),
            lambda: values_of(kept, "t", [0]),
        ):
            with pytest.raises(CorruptShard, match="block 0, column 't': CRC-32C of page 0 does not match"):
                read()


def test_invalid_offsets_are_found_without_checksums(folder):
    store, info = folder
    reader = ShardReader(store, info.name, verify="never")
    row = reader.footer.chunks[0, SCHEMA.index("b")]
    offsets = int(row["offset"] + reader.footer.buffers[int(row["first_buffer"]) + 1, 0])
    kept = reader.load_blocks([0], [SCHEMA.index("b")])
    kept.array(0, SCHEMA.index("b"))
    for value in (2**40, -5):
        with (store.root / info.name).open("r+b") as file:
            file.seek(offsets + 8 * 10)
            file.write(value.to_bytes(8, "little", signed=True))
        blocks = reader.load_blocks([0], [SCHEMA.index("b")])
        with pytest.raises(CorruptShard, match="block 0, column 'b': offsets decrease or exceed"):
            values_of(blocks, "b", range(20))
        assert values_of(blocks, "b", [8, 11]) == [batch()["b"][8], batch()["b"][11]]
        for one in (blocks, kept):  # the offsets are checked again for each array
            with pytest.raises(CorruptShard, match="block 0, column 'b': offsets decrease or exceed"):
                one.array(0, SCHEMA.index("b"))
        for record in (9, 10):
            with pytest.raises(CorruptShard, match="offsets decrease or exceed"):
                reader.take([record], [SCHEMA.index("b")])
    reader.close()


def test_reads_of_an_object_that_has_changed_since_it_was_opened_are_an_error():
    options = []

    class Asked(MemoryStore):
        def read_into(self, key, spans, **given):
            options.append(given)
            super().read_into(key, spans, **given)

    store = Asked("reader-asked")
    info = fill(store)
    reader = ShardReader(store, info.name)
    reader.load_blocks([0], [0])
    assert options[-1]["if_match"] == store.head(info.name).etag
    store.put(info.name, store.get(info.name))
    with pytest.raises(StoreError, match="changed"):
        reader.load_blocks([0], [0])


def test_bfloat16_without_torch_is_a_clear_error(monkeypatch):
    store = MemoryStore("reader-bf16")
    with ShardWriter(store, Schema.of({"x": "bfloat16", "y": "int8"}), ShardOptions()) as writer:
        writer.write_batch({"x": [1.5], "y": [1]})
    (info,) = writer.finish()
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    reader = ShardReader(store, info.name)
    assert reader.take([0], [1])[0].values.tolist() == [1]
    with pytest.raises(SchemaError, match="column 'x': values of dtype bfloat16 are torch tensors: import torch first"):
        reader.take([0], [0])


class DamagedTails(FaultStore):
    """Damages a byte of the footer in as many ends of objects as its script says."""

    def read_tail(self, key, n_bytes):
        data, info = self.inner.read_tail(key, n_bytes)
        if self._fault("read_tail", key) is None:
            return data, info
        return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:], info


@pytest.mark.parametrize("verb", ["read_into", "read_tail"])
@pytest.mark.parametrize("times", [1, 99])
def test_a_footer_that_is_damaged_in_transit_is_fetched_again(remote, verb, times):
    store, info = remote
    faulty = DamagedTails(store, [Fault(verb, kind=FaultKind.BIT_FLIP, times=times)])
    known = info if verb == "read_into" else None
    if times == 1:
        with ShardReader(faulty, info.name, info=known) as reader:
            expect(reader.take(ROWS, range(len(SCHEMA))), ROWS)
    else:
        with pytest.raises(CorruptShard, match=info.name):
            ShardReader(faulty, info.name, info=known)
    assert len(faulty.faulted_calls) == min(times, 1 + READS_AGAIN)


def test_chunks_that_are_damaged_in_transit_are_read_again_alone(remote):
    store, info = remote
    columns = range(len(SCHEMA))
    for times in (1, READS_AGAIN, 99):
        reader = ShardReader(store, info.name, info=info)
        faulty = FaultStore(store, [Fault("read_into", kind=FaultKind.BIT_FLIP, times=times)])
        reader._byte_source._store = faulty
        store.requests.clear()
        if times == 99:
            with pytest.raises(CorruptShard, match="CRC-32C does not match"):
                reader.load_blocks([0], columns)
            assert len(faulty.faulted_calls) == 1 + READS_AGAIN
            break
        loaded = reader.load_blocks([0, 1], columns)
        assert len(faulty.faulted_calls) == times
        n_bytes = [sum(end - start for start, end in request) for request in store.requests]
        assert n_bytes[1] < n_bytes[0], "only the wrong chunk is read again"
        whole = ShardReader(store, info.name, info=info).load_blocks([0, 1], columns)
        every = np.arange(2, dtype=np.uint32)
        ours, theirs = (block_values(one, columns, every, every) for one in (loaded, whole))
        assert str(as_batch(ours)) == str(as_batch(theirs))
