"""Drop compared with lists of records in memory: over generations, beside other writers, and after kills."""

from __future__ import annotations

import secrets
import signal
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.support.clocked_store import ClockedStore
from tests.support.every_kind import EVERY_KIND, columns_of_every_kind, is_same
from tests.support.faults import Fault, FaultStore
from tests.support.moved_shards import Moved
from tests.support.stores import CountingStore, GateStore

import tiercache as tc
from tiercache.data.drop import drop
from tiercache.errors import CommitConflict, SchemaError, StoreError
from tiercache.load.loader import DataLoader
from tiercache.shard.gc import collect_garbage
from tiercache.shard.reader import ShardReader
from tiercache.shard.schema import Schema
from tiercache.shard.verify import verify_dataset
from tiercache.shard.versions import (
    Commit,
    find_latest,
    find_version,
    latest,
    list_versions,
    open_latest,
    read_shards,
    read_version,
)
from tiercache.shard.writer import ShardOptions, ShardWriter
from tiercache.store import MemoryStore, open_store

LABEL, ID = pc.field("label"), pc.field("id")


@pytest.fixture
def store():
    return MemoryStore(secrets.token_hex(8), "set")


def write(store, start, n, mode="append", **options):
    """Write records that follow from their ids; some are null."""
    ids = range(start, start + n)
    with tc.Writer(
        store.url, schema={"id": "int64", "label": "int8?", "text": "str?"}, mode=mode,
        **{"shard_size": "2KiB", "block_size": "512", "compression": "none", **options},
    ) as writer:  # fmt: skip
        writer.write_batch({"id": list(ids), "label": [label_of(i) for i in ids], "text": [text_of(i) for i in ids]})


def label_of(i):
    return None if i % 5 == 0 else i % 4


def text_of(i):
    return None if i % 7 == 0 else f"text {i} " * (i % 6)


def ids_of(store, version=None):
    dataset = tc.Dataset(store.url, version=version)
    found = [record["id"] for record in dataset]
    dataset.close()
    return found


def names(store, version=None):
    return read_shards(store, find_version(store, version)).names.to_pylist()


def keys(store):
    return {info.key for info in store.list()}


class TestRecords:
    def test_shards_without_dropped_records_stay_and_shards_without_others_leave_the_version(self, store):
        write(store, 0, 400, "create")
        before, first = names(store), open_latest(store)[1].first_record.tolist()
        condition = (first[2] <= ID) & (first[3] + 1 > ID) | (first[6] == ID)
        report = tc.Versions(store.url).drop(condition)
        assert (report.version.number, report.version.kind, report.version.parent) == (2, "drop", 1)
        assert (report.n_records, report.n_rewritten, report.n_removed) == (first[3] - first[2] + 2, 2, 1)
        after = names(store)
        new = set(after) - set(before)
        assert after == [*before[:2], after[2], *before[4:6], after[5], *before[7:]]
        assert new == {after[2], after[5]}
        left = [i for i in range(400) if not (first[2] <= i <= first[3] or i == first[6])]
        assert ids_of(store) == left
        assert ids_of(store, 1) == list(range(400))
        assert list(verify_dataset(store)) == []

    def test_a_null_condition_keeps_its_record(self, store):
        write(store, 0, 100, "create")
        tc.Versions(store.url).drop(~(LABEL == 1))
        assert ids_of(store) == [i for i in range(100) if label_of(i) in (None, 1)]
        tc.Versions(store.url).drop(LABEL.is_null())
        assert ids_of(store) == [i for i in range(100) if label_of(i) == 1]

    def test_values_of_every_kind_stay_the_same(self, store):
        with tc.Writer(store.url, schema=EVERY_KIND, block_size="1KiB") as writer:
            writer.write_batch(columns_of_every_kind(80))
        before = list(tc.Dataset(store.url))
        tc.Versions(store.url).drop(pc.field("label") == 6, columns=["nothing"])
        expected = [
            {name: value for name, value in record.items() if name != "nothing"}
            for record in before
            if record["label"] != 6
        ]
        found = list(tc.Dataset(store.url))
        assert len(found) < len(before)
        assert all(is_same(one, other) for one, other in zip(found, expected, strict=True))
        before_schema, after = read_version(store, 1).schema, latest(store).schema
        assert after == before_schema.select([name for name in before_schema.names if name != "nothing"])

    @pytest.mark.parametrize("compression", ["none", "auto"])
    def test_blocks_keep_their_size_and_raw_columns_stay_raw(self, store, compression):
        write(store, 0, 9000, "create", shard_size="9MiB", block_size="64KiB", compression=compression)

        def footer():
            info = read_shards(store, latest(store)).info(0)
            with ShardReader(store, info.name, info=info) as reader:
                return reader.footer

        footers = [footer()]
        for arguments in ({"where": ID < 20}, {"columns": ["label"]}):
            tc.Versions(store.url).drop(**arguments)
            footers.append(footer())
        for one in footers:
            sizes = one.block_raw_bytes[:-1]
            assert 40 << 10 < sizes.min() <= sizes.max() < 80 << 10
            is_raw = (one.chunks["codec"] == 0).all(axis=0)
            assert is_raw[one.schema.index("text")] == (compression == "none")

    def test_if_nothing_matches_nothing_is_written(self, store):
        write(store, 0, 50, "create")
        before = keys(store)
        report = tc.Versions(store.url).drop(ID > 100)
        assert (report.version, report.n_records) == (latest(store), 0)
        assert keys(store) == before

    def test_a_dry_run_counts_and_writes_nothing(self, store):
        write(store, 0, 300, "create")
        before, n_shards = keys(store), len(names(store))
        report = tc.Versions(store.url).drop(ID < 5, columns=["text"], dry_run=True)
        assert (report.version.number, report.n_records, report.n_rewritten) == (1, 5, n_shards)
        assert keys(store) == before

    def test_a_version_without_records_is_valid_and_can_be_appended_to(self, store):
        write(store, 0, 50, "create")
        assert tc.Versions(store.url).drop(pc.scalar(True)).n_removed == len(names(store, 1))
        assert (ids_of(store), len(tc.Dataset(store.url)), latest(store).n_shards) == ([], 0, 0)
        assert tc.Versions(store.url).drop(pc.scalar(True)).version.number == 2
        write(store, 50, 10)
        assert ids_of(store) == list(range(50, 60))

    def test_condition_columns_alone_are_read_of_shards_that_stay(self, store):
        with tc.Writer(store.url, schema={"id": "int64", "raw": "bytes"}, compression="none") as writer:
            writer.write_batch({"id": np.arange(64), "raw": [bytes(100_000)] * 64})
        counting = CountingStore(open_store(store.url))
        assert drop(counting, ID == 64).n_records == 0
        assert counting.bytes_read < 100_000

    def test_shards_that_were_moved_to_another_tier_are_read_there(self, store, tmp_path):
        moved = Moved(tmp_path / "packed", store)
        elsewhere = MemoryStore(secrets.token_hex(8))
        before = list(tc.Dataset(store.url))
        moved.move(moved.keys[:2], elsewhere)
        report = tc.Versions(store.url).drop(pc.field("id") == 3)
        assert (report.n_records, report.n_rewritten) == (1, 1)
        found = list(tc.Dataset(store.url))
        expected = [record for record in before if record["id"] != 3]
        assert all(is_same(one, other) for one, other in zip(found, expected, strict=True))

    def test_a_loader_that_resumes_keeps_the_version_that_it_read(self, store):
        write(store, 0, 100, "create")

        def loader():
            return DataLoader(tc.Dataset(store.url), batch_size=10, shuffle=True, options=tc.LoaderOptions(seed=1))

        expected = [batch["id"].tolist() for batch in loader()]
        old = tc.Dataset(store.url).fingerprint
        interrupted = loader()
        batches = iter(interrupted)
        for _ in range(3):
            next(batches)
        state = interrupted.state_dict()
        tc.Versions(store.url).drop(LABEL == 1)
        assert tc.Dataset(store.url).fingerprint != old
        resumed = loader()
        resumed.load_state_dict(state)
        assert [batch["id"].tolist() for batch in resumed] == expected[3:]


class TestColumns:
    def test_a_dropped_column_is_gone_and_the_others_stay(self, store):
        write(store, 0, 200, "create")
        report = tc.Versions(store.url).drop(columns=["label"])
        assert (report.n_records, report.n_rewritten) == (0, len(names(store, 1)))
        assert list(tc.Dataset(store.url)) == [{"id": i, "text": text_of(i)} for i in range(200)]
        assert tc.Dataset(store.url, version=1).column_names == ["id", "label", "text"]

    def test_the_condition_may_name_a_column_that_is_dropped(self, store):
        write(store, 0, 200, "create")
        tc.Versions(store.url).drop(LABEL == 2, columns=["label", "text"])
        assert list(tc.Dataset(store.url)) == [{"id": i} for i in range(200) if label_of(i) != 2]

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({}, ValueError, "nothing to drop: give a condition"),
            ({"columns": ["labl"]}, SchemaError, "column 'labl': no such column"),
            ({"columns": ["id", "label", "text"]}, SchemaError, "at least one column"),
            ({"columns": "label"}, TypeError, r"columns= takes a list of names, got 'label'"),
            ({"where": pc.field("labl") == 1}, SchemaError, "there is no such column; there are id, label, text"),
            ({"where": LABEL + 1}, SchemaError, "its type is int8, not bool"),
            ({"where": "label == 1"}, TypeError, "takes a pyarrow expression"),
            ({"where": pc.divide(ID, 0) == 1}, SchemaError, "divide by zero"),
        ],
    )
    def test_invalid_arguments_are_errors_and_change_nothing(self, store, arguments, error, message):
        write(store, 0, 50, "create")
        before = keys(store)
        with pytest.raises(error, match=message):
            tc.Versions(store.url).drop(**arguments)
        assert keys(store) == before

    def test_a_url_without_a_data_set_is_an_error(self, store):
        with pytest.raises(tc.NotFound, match="no data set here"):
            tc.Versions(store.url).drop(LABEL == 1)


class TestOthersAtOnce:
    def commit_while_dropping(self, store, act, *, where=LABEL == 1, columns=()):
        """Drop, and act after its shards are written and before its commit. Return the result, or raise its error."""
        gated = GateStore(open_store(store.url))
        with (
            gated.stop_at("before_put_if_absent", "_tiercache/versions/*") as gate,
            ThreadPoolExecutor(1) as pool,
        ):
            dropping = pool.submit(drop, gated, where, columns)
            gate.wait_reached()
            act()
            gate.open()
            return dropping.result()

    def test_an_append_meanwhile_is_kept_and_its_records_are_dropped_too(self, store):
        write(store, 0, 200, "create")
        report = self.commit_while_dropping(store, lambda: write(store, 200, 100))
        assert report.version.number == 3
        assert ids_of(store) == [i for i in range(300) if label_of(i) != 1]
        assert ids_of(store, 2) == list(range(300))
        assert report.n_records == 300 - len(ids_of(store))

    def test_an_append_meanwhile_has_no_column_that_is_dropped(self, store):
        write(store, 0, 100, "create")
        self.commit_while_dropping(store, lambda: write(store, 100, 50), where=None, columns=["label"])
        assert list(tc.Dataset(store.url)) == [{"id": i, "text": text_of(i)} for i in range(150)]

    def test_shards_that_were_written_again_are_used_after_a_lost_race(self, store):
        write(store, 0, 200, "create")
        self.commit_while_dropping(store, lambda: write(store, 200, 10))
        shards = {key for key in keys(store) if key.startswith("shards/")}
        assert shards == {*names(store, 1), *names(store, 2), *names(store, 3)}

    def test_two_drops_at_once_are_both_made(self, store):
        write(store, 0, 200, "create")
        self.commit_while_dropping(store, lambda: tc.Versions(store.url).drop(LABEL == 2))
        assert ids_of(store) == [i for i in range(200) if label_of(i) not in (1, 2)]
        assert [read_version(store, n).kind for n in list_versions(store)] == ["create", "drop", "drop"]

    def test_an_overwrite_meanwhile_is_dropped_from_if_it_has_the_same_columns(self, store):
        write(store, 0, 200, "create")
        self.commit_while_dropping(store, lambda: write(store, 500, 100, "overwrite"))
        assert ids_of(store) == [i for i in range(500, 600) if label_of(i) != 1]

    def test_other_columns_meanwhile_are_a_conflict(self, store):
        write(store, 0, 200, "create")
        with pytest.raises(CommitConflict, match=r"version 2 \(drop\).* has other columns; nothing was dropped"):
            self.commit_while_dropping(store, lambda: tc.Versions(store.url).drop(columns=["text"]))
        assert ids_of(store) == list(range(200))

    def test_an_overwrite_that_began_before_does_not_undo_the_drop(self, store):
        write(store, 0, 200, "create")
        writer = tc.Writer(store.url, schema={"id": "int64"}, mode="overwrite")
        writer.write({"id": 1})
        tc.Versions(store.url).drop(LABEL == 1)
        with pytest.raises(CommitConflict, match=r"\(drop\) before this overwrite"):
            writer.close()

    def test_a_lost_answer_of_the_commit_is_resolved(self, store):
        write(store, 0, 100, "create")
        faulty = FaultStore(open_store(store.url))
        faulty.add(Fault("put_if_absent", error=StoreError))
        with pytest.raises(StoreError):
            drop(faulty, LABEL == 1)
        assert list_versions(store) == [1]
        assert drop(faulty, LABEL == 1).version.number == 2


def test_an_error_deletes_what_was_written_and_changes_nothing(store):
    write(store, 0, 300, "create")
    before = keys(store)
    assert len(names(store)) > 4
    faulty = FaultStore(open_store(store.url))
    faulty.add(Fault("create", nth=4, times=99, keys="shards/*", retryable=False))
    with pytest.raises(StoreError, match="scripted fault"):
        drop(faulty, LABEL == 1)
    assert keys(store) == before


@pytest.mark.timeout(300)
def test_a_drop_that_is_killed_before_any_of_its_changes_leaves_the_data_set_as_it_was(tmp_path, warm_python):
    folder = tmp_path / "set"
    store = open_store(folder)
    write(store, 0, 60, "create", shard_size="1KiB")
    left = [i for i in range(60) if label_of(i) != 1]
    n_leftovers = 0
    for n_changes in range(3, 100):  # from the end of the first shard
        with tempfile.TemporaryFile("w+") as out:
            arguments = ["-m", "tests.stress.dropping", str(folder), str(n_changes)]
            code = warm_python.start(arguments, out=out, errors=out, is_strict=True).wait()
            out.seek(0)
            assert code in (0, -signal.SIGKILL), out.read()
        is_committed = len(list_versions(store)) == 2
        assert ids_of(store) == (left if is_committed else list(range(60)))
        assert ids_of(store, 1) == list(range(60))
        if is_committed:
            break
        n_leftovers += len(collect_garbage(store, older_than_s=0).shards)
    assert (n_leftovers > 3, n_changes) == (True, 9)
    collect_garbage(store, older_than_s=0, keep_versions=1)
    assert {key for key in keys(store) if key.startswith("shards/")} == set(names(store))
    assert ids_of(store) == left


CONDITIONS = {
    "label": (lambda k: k == LABEL, lambda record, k: record["label"] == k),
    "null": (lambda _: LABEL.is_null(), lambda record, _: record["label"] is None),
    "other": (lambda k: k != LABEL, lambda record, k: record["label"] not in (None, k)),
    "text": (lambda k: pc.starts_with(pc.field("text"), f"text {k}"),
             lambda record, k: (record["text"] or "").startswith(f"text {k}")),
    "below": (lambda k: 40 * k > ID, lambda record, k: record["id"] < 40 * k),
    "above": (lambda k: 40 * k <= ID, lambda record, k: record["id"] >= 40 * k),
}  # fmt: skip
DAY_S = 86400.0


def records_of(dataset):
    return [record for batch in dataset.to_arrow() for record in batch.to_pylist()]


class Generations(RuleBasedStateMachine):
    """Appends, drops, overwrites and collections; each version has the records of its model, until it is deleted."""

    @initialize(n=st.integers(1, 150))
    def create(self, n):
        self.store = ClockedStore(secrets.token_hex(8))
        self.next_id = 0
        self.records = {}
        self.readers = {}
        self.write("create", ["id", "label", "text"], n)

    def write(self, mode, columns, n):
        ids = range(self.next_id, self.next_id + n)
        self.next_id += n
        new = [{"id": i, "label": label_of(i), "text": text_of(i)} for i in ids]
        new = [{name: record[name] for name in columns} for record in new]
        schema = Schema.of({"id": "int64", "label": "int8?", "text": "str?"}).select(columns)
        with ShardWriter(self.store, schema, ShardOptions(1500, 400)) as writer:
            writer.write_batch(pa.Table.from_pylist(new))
            infos = writer.finish()
        version = Commit(self.store, infos, schema=schema, mode=mode, parent=find_latest(self.store)).run()
        before = self.records[version.parent] if mode == "append" else []
        self.records[version.number] = before + new

    def columns(self):
        return latest(self.store).schema.names

    @rule(n=st.integers(1, 150))
    def append(self, n):
        self.write("append", self.columns(), n)

    @rule(n=st.integers(1, 150), columns=st.sampled_from([["id", "label", "text"], ["text", "id"], ["label", "id"]]))
    def overwrite(self, n, columns):
        self.write("overwrite", columns, n)

    @rule(kind=st.sampled_from(sorted(CONDITIONS)), k=st.integers(0, 3), column=st.sampled_from(["label", "text", ""]))
    def drop(self, kind, k, column):
        needs = {"below": "id", "above": "id", "text": "text"}.get(kind, "label")
        condition, matches = CONDITIONS[kind]
        columns = [column] if column in self.columns() else []
        if needs not in self.columns():
            with pytest.raises(SchemaError, match="no such column"):
                drop(self.store, condition(k), columns)
            return
        before = latest(self.store)
        report = drop(self.store, condition(k), columns, jobs=2)
        old = self.records[before.number]
        new = [record for record in old if not matches(record, k)]
        new = [{name: value for name, value in record.items() if name not in columns} for record in new]
        assert (report.n_records, latest(self.store)) == (len(old) - len(new), report.version)
        if new == old and not columns:
            assert report.version == before
        else:
            assert (report.version.number, report.version.kind) == (before.number + 1, "drop")
            self.records[report.version.number] = new

    @rule(number=st.integers(0, 100))
    def open_reader(self, number):
        numbers = list_versions(self.store)
        number = numbers[number % len(numbers)]
        self.readers.setdefault(number, tc.Dataset(self.store.url, version=number))

    @rule(keep=st.sampled_from([None, 1, 2, 3]), days=st.integers(0, 10))
    def collect(self, keep, days):
        self.store.advance(days * DAY_S)
        report = collect_garbage(self.store, older_than_s=7 * DAY_S, keep_versions=keep)
        for number in report.versions:
            self.readers.pop(number, None)
            del self.records[number]

    @invariant()
    def every_version_has_its_records(self):
        if not hasattr(self, "store"):
            return
        assert list_versions(self.store) == sorted(self.records)
        assert latest(self.store).number == max(self.records)
        for number, dataset in self.readers.items():
            assert records_of(dataset) == self.records[number]
        assert records_of(tc.Dataset(self.store.url)) == self.records[max(self.records)]

    def teardown(self):
        if hasattr(self, "store"):
            for number, records in self.records.items():
                assert records_of(tc.Dataset(self.store.url, version=number)) == records
            for dataset in self.readers.values():
                dataset.close()


TestGenerations = Generations.TestCase
TestGenerations.settings = settings(max_examples=15, stateful_step_count=12)
