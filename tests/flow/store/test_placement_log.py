"""The placement log: its content after any changes, by any number of writers, after a crash, and when it is damaged."""

from __future__ import annotations

import json
import threading
import time

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.faults import Fault, FaultStore
from tests.support.placements import numbers, row, rows_of, stopped_at
from tests.support.stores import CountingStore

from tiercache.errors import CommitConflict, CorruptShard, StoreError, UnsupportedFormat
from tiercache.store import LocalFolder, MemoryStore, placement_log
from tiercache.store.placement_log import N_KEPT, TRACKING_MARKER_KEY, PlacementRow, placement_key

# -- what it says ---------------------------------------------------------------------------------------------------

KEYS = st.sampled_from(["a", "b/c.tcs", "shards/é.tcs", "shards/0.tcs", "z", "A"])
ROWS = st.builds(
    PlacementRow,
    key=st.just("x"),
    url=st.sampled_from(["s3://cold/data", "/nvme/data", "memory://m/d"]),
    storage_class=st.sampled_from([None, "GLACIER"]),
    state=st.sampled_from(["here", "archived"]),
    n_bytes=st.integers(0, 2**62),
    crc32c=st.none() | st.integers(0, 2**32 - 1),
)
CHANGES = st.dictionaries(KEYS, st.none() | ROWS, max_size=4).map(
    lambda found: {
        key: one and PlacementRow(key, *(getattr(one, f) for f in PlacementRow.__slots__[1:]))
        for key, one in found.items()
    }
)


@pytest.fixture
def store(request):
    store = MemoryStore(f"tier-{request.node.name}")
    yield store
    store.delete([info.key for info in store.list()])


@settings(max_examples=40)
@given(steps=st.lists(CHANGES, max_size=14))
def test_after_any_changes_the_placement_equals_a_dict(steps):
    store, oracle = MemoryStore("placement-oracle"), {}
    store.delete([info.key for info in store.list()])
    for changes in steps:
        committed = placement_log.commit_placement(store, changes)
        oracle = {key: one for key, one in {**oracle, **changes}.items() if one is not None}
        assert rows_of(committed) == oracle
        found = placement_log.read_placement(store)
        assert rows_of(found) == oracle
        assert list(rows_of(found)) == sorted(oracle, key=str.encode)
        assert {key: found.find(key) for key in ("a", "shards/0.tcs", "none")} == {
            key: oracle.get(key) for key in ("a", "shards/0.tcs", "none")
        }
        wanted = pa.array(["z", "none", "a"])
        assert [None if at < 0 else found.row(int(at)) for at in found.row_numbers(wanted)] == [
            oracle.get(key) for key in wanted.to_pylist()
        ]


def test_a_forbidden_marker_counts_as_missing(store):
    forbidden = FaultStore(store, [Fault("read_tail", keys=TRACKING_MARKER_KEY, status=403, retryable=False)])
    assert placement_log.read_placement(forbidden) is None
    failing = FaultStore(store, [Fault("read_tail", keys=TRACKING_MARKER_KEY, status=503)])
    with pytest.raises(StoreError, match="scripted fault"):
        placement_log.read_placement(failing)


def test_a_client_that_may_not_list_finds_the_newest_placement(store):
    for n in range(3):
        placement_log.commit_placement(store, {f"{n}": row(f"{n}")})
    keys = [placement_log.placement_key(number) for number in range(4, 60)]
    forbidden = [Fault("read_tail", keys=key, status=403, retryable=False, times=9999) for key in keys]
    cannot_list = Fault("list", status=403, retryable=False, times=9999)
    found = placement_log.read_placement(FaultStore(store, [*forbidden, cannot_list]))
    assert (found.number, len(found)) == (3, 3)


# -- hints ----------------------------------------------------------------------------------------------------------


def test_a_hint_to_a_missing_placement_is_no_error(store):
    for n in range(4):
        placement_log.commit_placement(store, {"a": row("a", n_bytes=n)})
    for hint in [b"", b"not json", b"[]", b'{"placement": -4}', b'{"placement": "7"}', b'{"placement": 99}']:
        store.put(TRACKING_MARKER_KEY, hint)
        assert placement_log.read_placement(store).number == 4, hint


def test_the_marker_keeps_the_start_of_tracking_over_commits(store):
    before_s = int(time.time())
    placement_log.start_tracking(store)
    since_s = placement_log.tracked_since_s(store)
    assert before_s <= since_s <= time.time()
    store.put(TRACKING_MARKER_KEY, placement_log.encode_tracking_marker(0, since_s - 1000))
    for n in range(2):
        placement_log.commit_placement(store, {"a": row("a", n_bytes=n)})
    assert placement_log.tracked_since_s(store) == since_s - 1000


def test_numbers_that_vanish_between_listing_and_reading_are_searched_again(store):
    for n in range(3):
        placement_log.commit_placement(store, {"a": row("a", n_bytes=n)})

    class Rushing(CountingStore):
        def list(self, prefix=""):
            found = list(super().list(prefix))
            if self.n_calls("list") == 1:
                for n in range(2 * N_KEPT):
                    placement_log.commit_placement(store, {"a": row("a", n_bytes=100 + n)})
            return iter(found)

    store.put(TRACKING_MARKER_KEY, b"{}")
    store.delete([placement_key(1)])
    assert placement_log.read_placement(Rushing(store)).number == 2 * N_KEPT + 3


# -- racing, and failing in between ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "local", pytest.param("s3", marks=pytest.mark.s3)])
def test_no_change_of_racing_writers_is_lost(kind, tmp_path, request):
    home = {
        "memory": lambda: MemoryStore(f"race-{tmp_path.name}"),
        "local": lambda: LocalFolder(tmp_path),
        "s3": lambda: request.getfixturevalue("s3_server").store(f"race-{tmp_path.name}"),
    }[kind]()
    n_threads, n_each = (4, 6) if kind != "s3" else (3, 4)
    failures: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for i in range(n_each):
                placement_log.commit_placement(home, {f"{number}/{i}": row(f"{number}/{i}"), f"{number}/{i - 1}": None})
        except BaseException as error:  # noqa: BLE001 -- a thread's top
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    found = placement_log.read_placement(home)
    assert set(rows_of(found)) == {f"{number}/{n_each - 1}" for number in range(n_threads)}
    assert found.number == n_threads * n_each
    home.close()


@pytest.mark.parametrize("point", ["tier_placement.written", "tier_placement.hinted"])
@pytest.mark.parametrize("n_before", [0, N_KEPT + 3])
def test_repeating_a_commit_that_was_killed_at_any_point_completes_it(store, point, n_before):
    for n in range(n_before):
        placement_log.commit_placement(store, {"a": row("a", n_bytes=n)})

    stopped_at(point, lambda: placement_log.commit_placement(store, {"b": row("b")}))
    assert placement_log.read_placement(store).find("b") == row("b")
    assert placement_log.commit_placement(store, {"b": row("b")}).number == n_before + 1
    assert placement_log.commit_placement(store, {"c": row("c")}).number == n_before + 2


def test_losing_every_race_is_a_conflict(store, monkeypatch):
    monkeypatch.setattr(placement_log, "MAX_REBASES", 3)

    class Crowd(FaultStore):
        def put_if_absent(self, key, data):
            if key.endswith(".arrow"):
                placement_log.commit_placement(store, {"n": row("n", n_bytes=int(key[-26:-6]))})
            return super().put_if_absent(key, data)

    with pytest.raises(CommitConflict, match="3 others changed the placement first"):
        placement_log.commit_placement(Crowd(store), {"a": row("a")})


# -- damaged placements --------------------------------------------------------------------------------------------


def damage(store, number: int) -> None:
    data = store.get(placement_key(number))
    store.put(placement_key(number), data.replace(b"s3://", b"s3:/0"))


@pytest.mark.parametrize(
    "mark", [placement_log.encode_tracking_marker(2), placement_log.encode_tracking_marker(7), b"{}", b"", None]
)
def test_a_corrupt_placement_is_reported_to_readers_and_writers(store, mark):
    for n in range(2):
        placement_log.commit_placement(store, {"a": row("a", n_bytes=n)})
    damage(store, 2)
    store.delete([TRACKING_MARKER_KEY])
    if mark is not None:
        store.put(TRACKING_MARKER_KEY, mark)
    with pytest.raises(CorruptShard, match=placement_key(2)):
        placement_log.find_newest_placement(store)
    with pytest.raises(CorruptShard, match=placement_key(2)):
        placement_log.commit_placement(store, {"b": row("b")})
    with pytest.raises(CorruptShard, match=placement_key(2)):
        placement_log.read_placement(store)  # if there was no mark, there is one by now
    assert numbers(store) == [1, 2]


# -- the codec ------------------------------------------------------------------------------------------------------


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


def test_a_placement_with_an_invalid_row_is_corrupt(store):
    rows = placement_log.commit_placement(store, {"a": row("a")}).rows
    wrong = {
        "url": pa.array([""], pa.large_string()),
        "state": pa.array(["gone"], pa.large_string()),
        "n_bytes": pa.array([-1]),
    }
    for column, values in wrong.items():
        bad = rows.set_column(rows.schema.get_field_index(column), rows.schema.field(column), values)
        with pytest.raises(CorruptShard, match="a row without a URL"):
            placement_log.decode_placement(placement_log.encode_placement(placement_log.Placement(1, bad)), 1, url="u")


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


def test_a_placement_that_readers_would_reject_is_not_written(store, monkeypatch):
    for limit in ("MOST_BYTES", "MOST_ROWS"):
        with monkeypatch.context() as patch:
            patch.setattr(placement_log, limit, 1)
            with pytest.raises(StoreError, match="which readers reject"):
                placement_log.commit_placement(store, {"a": row("a"), "b": row("b")})
    assert list(store.list(placement_log.PLACEMENT_FOLDER)) == []


def test_a_marker_with_an_invalid_time_counts_as_one_without_a_time(store):
    for since in (b"1e999", b"NaN", b"1" + b"0" * 400, b"[" * 200_000):
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
