"""Placement files that are damaged, hostile or of a later release are reported, and are read only up to the limits."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from tests.support.placements import row

from tiercache.errors import CorruptShard, StoreError, UnsupportedFormat
from tiercache.store import MemoryStore, placement_log
from tiercache.store.placement_log import TRACKING_MARKER_KEY, placement_key


@pytest.fixture
def store(request):
    store = MemoryStore(f"tier-{request.node.name}")
    yield store
    store.delete([info.key for info in store.list()])


def test_every_flipped_byte_is_reported_or_changes_nothing(store):
    made = placement_log.commit_placement(
        store, {"a": row("a", storage_class="GLACIER", state="archived"), "b": row("b")}
    )
    data = store.get(placement_key(1))
    n_reported = 0
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 0x10
        try:
            found = placement_log.decode_placement(bytes(flipped), 1, url="u")
        except (CorruptShard, UnsupportedFormat):
            n_reported += 1
        else:
            assert found.rows.equals(made.rows)
    assert n_reported > len(data) // 10


def test_a_truncated_or_misnumbered_placement_is_corrupt(store):
    placement_log.commit_placement(store, {"a": row("a")})
    data = store.get(placement_key(1))
    for wrong, number in ((data[:-9], 1), (b"", 1), (data, 2)):
        with pytest.raises(CorruptShard, match="placement"):
            placement_log.decode_placement(wrong, number, url="u")


@pytest.mark.parametrize("column", ["url", "n_bytes"])
def test_a_placement_with_an_invalid_row_is_corrupt(store, column):
    rows = placement_log.commit_placement(store, {"a": row("a")}).rows
    wrong = {"url": pa.array([""], pa.large_string()), "n_bytes": pa.array([-1])}[column]
    field = rows.schema.field(column)
    rows = rows.set_column(rows.schema.get_field_index(column), field, wrong)
    with pytest.raises(CorruptShard, match="without a URL"):
        placement_log.decode_placement(placement_log.encode_placement(placement_log.Placement(1, rows)), 1, url="u")


def file_of(rows, **options):
    """Return a placement file as another program might write it."""
    made = placement_log.decode_placement(placement_log.encode_placement(placement_log.Placement(1, rows)), 1, url="u")
    schema = pa.ipc.open_file(placement_log.encode_placement(made)).schema
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(made.rows.replace_schema_metadata(schema.metadata))
    return sink.getvalue().to_pybytes()


def test_a_placement_whose_rows_exceed_the_size_limit_is_corrupt(store, monkeypatch):
    rows = placement_log.commit_placement(store, {f"a{n}": row(f"a{n}", "u" * 1000) for n in range(100)}).rows
    data = file_of(rows, compression="zstd")
    assert placement_log.decode_placement(data, 1, url="u").rows.equals(rows)
    monkeypatch.setattr(placement_log, "MOST_BYTES", 50_000)
    assert len(data) < 50_000
    with pytest.raises(CorruptShard, match="expected at most 4194304 rows and 50000 bytes"):
        placement_log.decode_placement(data, 1, url="u")


def test_a_placement_of_several_batches_is_corrupt(store):
    rows = placement_log.commit_placement(store, {"a": row("a"), "b": row("b")}).rows
    schema = pa.ipc.open_file(placement_log.encode_placement(placement_log.Placement(1, rows))).schema
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        for at in range(2):
            writer.write_table(rows.slice(at, 1).replace_schema_metadata(schema.metadata))
    with pytest.raises(CorruptShard, match="more than one batch"):
        placement_log.decode_placement(sink.getvalue().to_pybytes(), 1, url="u")


def test_a_placement_over_the_size_limit_is_not_read(store, monkeypatch):
    placement_log.commit_placement(store, {"a": row("a")})
    monkeypatch.setattr(placement_log, "MOST_BYTES", 1 << 20)
    store.put(placement_key(2), b"x" * (3 << 20))
    before = store.counters.snapshot()["bytes_read"]
    with pytest.raises(CorruptShard, match="expected at most 1048576 bytes"):
        placement_log.read_placement(store)
    assert store.counters.snapshot()["bytes_read"] - before < (1 << 20) + 5000


@pytest.mark.parametrize("limit", ["MOST_BYTES", "MOST_ROWS"])
def test_a_placement_that_readers_would_reject_is_not_written(store, monkeypatch, limit):
    monkeypatch.setattr(placement_log, limit, 1)
    with pytest.raises(StoreError, match="which readers reject"):
        placement_log.commit_placement(store, {"a": row("a"), "b": row("b")})
    assert list(store.list(placement_log.PLACEMENT_FOLDER)) == []


def test_a_placement_over_the_row_limit_is_corrupt(store, monkeypatch):
    placement_log.commit_placement(store, {"a": row("a"), "b": row("b")})
    monkeypatch.setattr(placement_log, "MOST_ROWS", 1)
    with pytest.raises(CorruptShard, match="expected at most 1 rows"):
        placement_log.read_placement(store)


@pytest.mark.parametrize("since", [b"1e999", b"NaN", b"1" + b"0" * 400, b"[" * 200_000], ids=range(4))
def test_a_marker_with_an_invalid_time_counts_as_one_without_a_time(store, since):
    store.put(TRACKING_MARKER_KEY, b'{"placement":0,"since":' + since + b"}")
    assert placement_log.tracked_since_s(store) is None
    placement_log.commit_placement(store, {"a": row("a")})
    assert placement_log.read_placement(store).find("a") is not None


def test_a_placement_of_a_later_format_is_reported_as_such(store):
    made = placement_log.commit_placement(store, {"a": row("a")})
    schema = made.rows.schema.with_metadata(
        {b"tiercache": json.dumps({"format": 2, "number": 1, "nonce": "", "crc32c": 0})}
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(made.rows.replace_schema_metadata(schema.metadata))
    store.put(placement_key(2), sink.getvalue().to_pybytes())
    with pytest.raises(UnsupportedFormat, match="format 2, this release reads up to 1"):
        placement_log.read_placement(store)
