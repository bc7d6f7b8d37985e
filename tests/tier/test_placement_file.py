"""A placement's file that is damaged, hostile, or of a later release is reported, and read no further than any is."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from tests.tier.placements import row

from tiercache.errors import CorruptShard, NotFound, StoreError, UnsupportedFormat
from tiercache.testing import Fault, FaultStore
from tiercache.tier.placement import log
from tiercache.tier.placement.log import TRACKING_MARKER_KEY, placement_key


def test_every_flipped_byte_is_reported_or_changes_nothing(store):
    made = log.commit_placement(store, {"a": row("a", storage_class="GLACIER", state="archived"), "b": row("b")})
    data = store.get(placement_key(1))
    n_reported = 0
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 0x10
        try:
            found = log.decode_placement(bytes(flipped), 1, url="u")
        except (CorruptShard, UnsupportedFormat):
            n_reported += 1
        else:
            assert found.rows.equals(made.rows)
    assert n_reported > len(data) // 10


def test_one_that_is_cut_short_or_lies_under_another_number_is_reported(store):
    log.commit_placement(store, {"a": row("a")})
    data = store.get(placement_key(1))
    for wrong, number in ((data[:-9], 1), (b"", 1), (data, 2)):
        with pytest.raises(CorruptShard, match="placement"):
            log.decode_placement(wrong, number, url="u")


@pytest.mark.parametrize("column", ["url", "n_bytes"])
def test_one_with_a_row_that_cannot_be_is_reported(store, column):
    rows = log.commit_placement(store, {"a": row("a")}).rows
    wrong = {"url": pa.array([""], pa.large_string()), "n_bytes": pa.array([-1])}[column]
    field = rows.schema.field(column)
    rows = rows.set_column(rows.schema.get_field_index(column), field, wrong)
    with pytest.raises(CorruptShard, match="without a URL"):
        log.decode_placement(log.encode_placement(log.Placement(1, rows)), 1, url="u")


def test_one_whose_facts_are_nested_beyond_reading_is_reported(store):
    rows = log.commit_placement(store, {"a": row("a")}).rows
    schema = rows.schema.with_metadata({b"tiercache": b"[" * 200_000})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(rows.replace_schema_metadata(schema.metadata))
    with pytest.raises(CorruptShard, match="cannot be read"):
        log.decode_placement(sink.getvalue().to_pybytes(), 1, url="u")


def file_of(rows, **options):
    """A placement's file as somebody else might write it."""
    made = log.decode_placement(log.encode_placement(log.Placement(1, rows)), 1, url="u")
    schema = pa.ipc.open_file(log.encode_placement(made)).schema
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(made.rows.replace_schema_metadata(schema.metadata))
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_one_that_is_compressed_is_reported_and_not_blown_up(store, compression):
    rows = log.commit_placement(store, {f"a{n}": row(f"a{n}", "u" * 1000) for n in range(100)}).rows
    with pytest.raises(CorruptShard, match="compressed rows"):
        log.decode_placement(file_of(rows, compression=compression), 1, url="u")
    assert log.decode_placement(file_of(rows), 1, url="u").rows.equals(rows)


def test_one_of_many_batches_is_reported(store):
    rows = log.commit_placement(store, {"a": row("a"), "b": row("b")}).rows
    schema = pa.ipc.open_file(log.encode_placement(log.Placement(1, rows))).schema
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        for at in range(2):
            writer.write_table(rows.slice(at, 1).replace_schema_metadata(schema.metadata))
    with pytest.raises(CorruptShard, match="more than one batch"):
        log.decode_placement(sink.getvalue().to_pybytes(), 1, url="u")


def test_one_that_is_longer_than_any_is_read_no_further(store, monkeypatch):
    log.commit_placement(store, {"a": row("a")})
    monkeypatch.setattr(log, "MOST_BYTES", 1 << 20)
    store.put(placement_key(2), b"x" * (3 << 20))
    before = store.counters.snapshot()["bytes_read"]
    with pytest.raises(CorruptShard, match="expected at most 1048576 bytes"):
        log.read_placement(store)
    assert store.counters.snapshot()["bytes_read"] - before < (1 << 20) + 5000


@pytest.mark.parametrize("limit", ["MOST_BYTES", "MOST_ROWS"])
def test_one_that_nobody_would_read_is_not_written(store, monkeypatch, limit):
    monkeypatch.setattr(log, limit, 1)
    with pytest.raises(StoreError, match="which readers reject"):
        log.commit_placement(store, {"a": row("a"), "b": row("b")})
    assert list(store.list(log.PLACEMENT_FOLDER)) == []


def test_one_of_more_rows_than_any_is_reported(store, monkeypatch):
    log.commit_placement(store, {"a": row("a"), "b": row("b")})
    monkeypatch.setattr(log, "MOST_ROWS", 1)
    with pytest.raises(CorruptShard, match="expected at most 1 rows, found 2"):
        log.read_placement(store)


def test_a_mark_that_is_longer_than_any_is_read_no_further_and_is_a_mark(store):
    store.put(TRACKING_MARKER_KEY, b'{"placement": 1, "since": 5}' + b" " * (1 << 20))
    before = store.counters.snapshot()["bytes_read"]
    assert (log.is_tracked(store), log.tracked_since_s(store)) == (True, None)
    assert store.counters.snapshot()["bytes_read"] - before == 2 * (64 << 10)


@pytest.mark.parametrize("since", [b"1e999", b"NaN", b"1" + b"0" * 400, b"[" * 200_000], ids=range(4))
def test_a_mark_that_says_no_time_that_can_be_is_a_mark_without_one(store, since):
    store.put(TRACKING_MARKER_KEY, b'{"placement":0,"since":' + since + b"}")
    assert log.tracked_since_s(store) is None
    log.commit_placement(store, {"a": row("a")})
    assert log.read_placement(store).find("a") is not None


def test_one_of_a_later_release_says_so(store):
    made = log.commit_placement(store, {"a": row("a")})
    schema = made.rows.schema.with_metadata(
        {b"tiercache": json.dumps({"format": 2, "number": 1, "nonce": "", "crc32c": 0})}
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(made.rows.replace_schema_metadata(schema.metadata))
    store.put(placement_key(2), sink.getvalue().to_pybytes())
    with pytest.raises(UnsupportedFormat, match="format 2, this release reads up to 1"):
        log.read_placement(store)


def test_reading_one_from_a_store_that_fails_passes_the_error_on(store):
    log.commit_placement(store, {"a": row("a")})
    faulty = FaultStore(store, [Fault("read_tail", keys="*.arrow", times=9)])
    with pytest.raises(StoreError, match="scripted fault") as caught:
        log.read_placement(faulty)
    assert not isinstance(caught.value, NotFound)
