"""Writer: commits, errors, races and kills."""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from tests.support.faults import Fault, FaultKind, FaultStore

from tiercache._native.checksum import crc32c
from tiercache.data.dataset import Dataset
from tiercache.errors import CommitConflict, NotFound, SchemaError, StoreError
from tiercache.shard import versions as manifest
from tiercache.shard import writer as dataset_writer
from tiercache.shard.reader import ShardReader
from tiercache.shard.schema import Schema
from tiercache.shard.versions import version_key
from tiercache.shard.writer import Writer
from tiercache.store import LocalFolder, MemoryStore, Store

SCHEMA = {"x": "int64", "text": "str"}


def batch(start: int, n: int) -> dict[str, object]:
    return {"x": np.arange(start, start + n), "text": [f"record {i}" for i in range(start, start + n)]}


@pytest.fixture
def url() -> str:
    return f"memory://{secrets.token_hex(8)}"


@pytest.fixture
def store(url: str) -> MemoryStore:
    return MemoryStore(url.removeprefix("memory://"))


def shard_keys(store: Store) -> set[str]:
    return {info.key for info in store.list("shards/")}


def records(store: Store) -> list[tuple[int, str]]:
    """Every record of the newest version, in order."""
    found: list[tuple[int, str]] = []
    for info in manifest.read_shards(store, manifest.latest(store)).infos():
        with ShardReader(store, info.name, info=info) as reader:
            x, text = reader.take(np.arange(info.n_records), [0, 1])
            found += zip(x.values.tolist(), text.values, strict=True)
    return found


def written(start: int, n: int) -> list[tuple[int, str]]:
    return [(i, f"record {i}") for i in range(start, start + n)]


@pytest.fixture
def faulty(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> FaultStore:
    """The store that Writer opens, with an empty script."""
    faulty = FaultStore(store)
    monkeypatch.setattr(dataset_writer, "open_store", lambda url: faulty)
    return faulty


class Stream:
    """A table of another library, such as polars, which Arrow reads by its C interface."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self.table.__arrow_c_stream__(requested_schema)


class TestWriting:
    def test_a_commit_lists_complete_shards_in_order(self, url: str, store: MemoryStore) -> None:
        with Writer(url, schema=SCHEMA, shard_size="4KiB", block_size="1KiB", compression="none") as writer:
            for start in range(0, 1000, 100):
                writer.write_batch(batch(start, 100))
            assert manifest.list_versions(store) == []
        version = manifest.latest(store)
        assert writer.version == version
        assert (version.kind, version.n_records, writer.n_records, version.schema) == (
            "create",
            1000,
            1000,
            Schema.of(SCHEMA),
        )
        infos = list(manifest.read_shards(store, version).infos())
        assert len(infos) > 3
        assert {info.name for info in infos} == shard_keys(store)
        assert [info.name for info in infos] == sorted(info.name for info in infos)
        assert all(info.name.startswith(f"shards/{version.writer}-") for info in infos)
        for info in infos:
            data = store.get(info.name)
            assert (len(data), crc32c(data)) == (info.n_bytes, info.crc32c)
        assert records(store) == written(0, 1000)

    def test_close_can_be_repeated_and_write_after_it_is_an_error(self, url: str, store: MemoryStore) -> None:
        writer = Writer(url, schema=SCHEMA)
        writer.write_batch(batch(0, 3))
        writer.close()
        writer.close()
        writer.abort()
        assert manifest.list_versions(store) == [1]
        assert len(shard_keys(store)) == 1
        with pytest.raises(ValueError, match="the writer is"):
            writer.write({"x": 1, "text": "a"})


class TestSchemas:
    def test_the_schema_is_inferred_from_the_first_record(self, url: str) -> None:
        with Writer(url) as writer:
            assert writer.schema is None
            writer.write({"x": 1, "tokens": np.zeros(4, np.uint16)})
        assert str(writer.schema) == "Schema(x: int64, tokens: uint16[4])"

    def test_types_come_from_the_first_records_that_have_values(self, url: str) -> None:
        with Writer(url) as writer:
            tokens = np.zeros(2, np.uint8)
            writer.write({"x": None, "tokens": [], "ok": tokens})
            tokens[:] = 1  # the caller may use its memory again
            with pytest.raises(SchemaError, match="column 'ok', record 1: expected uint8"):
                writer.write({"x": None, "tokens": [1], "ok": "text"})
            writer.write({"tokens": [], "ok": tokens})
            assert (writer.schema, writer.n_records) == (None, 2)
            writer.write({"x": "a", "tokens": [1, 2], "ok": tokens})
            assert str(writer.schema) == "Schema(x: str?, tokens: int64[*], ok: uint8[2])"
        dataset = Dataset(url)
        assert dataset[:]["x"] == [None, None, "a"]
        assert [record["tokens"].tolist() for record in dataset] == [[], [], [1, 2]]
        assert dataset[:]["ok"].tolist() == [[0, 0], [1, 1], [1, 1]]

    def test_a_batch_gives_the_types_of_records_that_wait_for_them(self, url: str) -> None:
        with Writer(url) as writer:
            writer.write({"x": None, "y": 1})
            with pytest.raises(SchemaError, match="column 'y': no such column"):
                writer.write_batch({"x": ["a"], "z": [2]})
            writer.write_batch({"x": ["a"], "y": [2]})
        assert str(writer.schema) == "Schema(x: str?, y: int64)"
        assert Dataset(url)[:]["y"].tolist() == [1, 2]

    def test_a_column_without_any_value_is_an_error_that_names_it(self, url: str) -> None:
        writer = Writer(url)
        for _ in range(99):
            writer.write({"x": None, "y": 1})
        with pytest.raises(SchemaError, match=r"column 'x': cannot infer .*pass a schema"):
            writer.write({"x": None, "y": 1})
        assert writer.n_records == 99
        with pytest.raises(SchemaError, match=r"column 'x': cannot infer .*pass a schema"):
            writer.close()

    def test_only_nulls_make_a_column_of_an_arrow_table_or_a_frame_nullable(self, url: str) -> None:
        columns = {"x": [1, 2], "text": ["a", None], "tokens": [[1], [2, 3]]}
        frame = pd.DataFrame(columns, index=[7, 3])
        for number, given in enumerate((pa.table(columns), frame, frame.set_index("x"), Stream(pa.table(columns)))):
            with Writer(f"{url}-{number}") as writer:
                writer.write_batch(given)
                writer.write_batch(given)
                assert writer.n_records == 4
                assert {str(column) for column in writer.schema.columns} == {"int64", "str?", "int64[*]"}
                nulls = pa.table({"x": pa.nulls(1, pa.int64()), "text": ["a"], "tokens": [[1]]})
                with pytest.raises(
                    SchemaError, match=r"record 4: .*got null; a column with nulls has the type 'int64\?'"
                ):
                    writer.write_batch(nulls)

    def test_class_names_are_an_argument_and_appended_records_have_the_same(self, url: str) -> None:
        names = {"label": ["ant", "bee"]}
        with Writer(url, classes=names) as writer:
            writer.write({"label": 1})
        Writer(url, classes=names, mode="append").close()
        Writer(url, mode="append").close()
        with Writer(url, schema={"label": "int64"}, classes=names, mode="overwrite") as writer:
            writer.write({"label": 1})
        assert writer.version is not None
        assert writer.version.schema.columns[0].classes == ("ant", "bee")
        with pytest.raises(SchemaError, match="column 'label': the appended batch has other class names"):
            Writer(url, classes={"label": ["bee", "ant"]}, mode="append")
        with pytest.raises(SchemaError, match=r"class names must differ from each other, got \['ant', 'ant'\]"):
            Writer(url, schema={"label": "int64"}, classes={"label": ["ant", "ant"]}, mode="overwrite")

    def test_a_nan_of_numpys_floats_in_a_frame_stays_a_nan_and_a_missing_value_is_a_null(self, url: str) -> None:
        with Writer(url) as writer:
            for values in ([1.0, 2.0], [np.nan, 3.0]):
                missing = pd.array([None, 1.0], "Float64")
                writer.write_batch(pd.DataFrame({"x": np.array(values, "f4"), "y": missing}))
        assert writer.version is not None
        assert [str(column) for column in writer.version.schema.columns] == ["float32", "float64?"]
        records = Dataset(url)
        assert [record["x"].item() for record in (records[0], records[1])] == [1.0, 2.0]
        assert np.isnan(records[2]["x"])

    def test_a_rejected_first_record_does_not_fix_the_schema(self, url: str) -> None:
        with Writer(url) as writer:
            for bad in ({"x": object()}, {}):
                with pytest.raises(SchemaError):
                    writer.write(bad)
            with pytest.raises(SchemaError):
                writer.write_batch({"x": [1, 2], "y": [1]})
            writer.write({"z": True})
        assert writer.version is not None
        assert writer.version.schema.names == ("z",)

    def test_a_writer_that_cannot_write_is_an_error_at_once(self, url: str, store: MemoryStore) -> None:
        with pytest.raises(SchemaError, match="no schema was given"), Writer(url):
            pass
        with pytest.raises(NotFound, match='mode="create"'):
            Writer(url, schema=SCHEMA, mode="append")
        for wrong in ({"mode": "add"}, {"shard_size": "huge"}, {"block_size": 0}, {"compression": "lz77"}):
            with pytest.raises(ValueError, match=r"mode must be|size|compression must be"):
                Writer(url, schema=SCHEMA, **wrong)
        assert manifest.list_versions(store) == []
        Writer(url, schema=SCHEMA).close()
        with pytest.raises(CommitConflict, match=r'mode="append".*mode="overwrite"'):
            Writer(url, schema=SCHEMA)
        with pytest.raises(SchemaError, match="column 'x': the data set has int64, the appended batch has float32"):
            Writer(url, schema={"x": "float32", "text": "str"}, mode="append")


class TestFailures:
    def test_an_exception_in_the_with_block_commits_nothing_and_leaves_no_shard(
        self, url: str, store: MemoryStore
    ) -> None:
        writer = Writer(url, schema=SCHEMA, shard_size=4000, block_size=1000)

        def fail() -> None:
            with writer:
                writer.write_batch(batch(0, 1000))
                assert shard_keys(store)
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert [info.key for info in store.list()] == []
        assert writer.version is None
        with pytest.raises(ValueError, match="the writer is aborted"):
            writer.close()

    def test_a_shard_that_cannot_be_finished_by_close_aborts(
        self, url: str, store: MemoryStore, faulty: FaultStore
    ) -> None:
        faulty.add(Fault("complete", keys="shards/*"))
        writer = Writer(url, schema=SCHEMA)
        writer.write_batch(batch(0, 10))
        with pytest.raises(StoreError):
            writer.close()
        with pytest.raises(ValueError, match="the writer is aborted"):
            writer.close()
        assert [info.key for info in store.list()] == []

    @pytest.mark.parametrize("end", [Writer.close, Writer.abort])
    def test_after_a_commit_that_may_have_happened_close_settles_it_and_abort_deletes_nothing(
        self, url: str, store: MemoryStore, faulty: FaultStore, end
    ) -> None:
        faulty.add(Fault("put_if_absent", kind=FaultKind.LOST_RESPONSE), Fault("get", keys=version_key(1)))
        writer = Writer(url, schema=SCHEMA)
        writer.write_batch(batch(0, 10))
        with pytest.raises(StoreError, match="may have happened") as failure:
            writer.close()
        assert (failure.value.maybe_done, failure.value.details["number"]) == (True, 1)
        end(writer)
        assert writer.version == (manifest.latest(store) if end is Writer.close else None)
        assert manifest.list_versions(store) == [1]
        assert {info.name for info in manifest.read_shards(store, manifest.latest(store)).infos()} == shard_keys(store)


def test_a_killed_writer_needs_no_clean_up(tmp_path: Path) -> None:
    store = LocalFolder(tmp_path)
    Writer(tmp_path, schema=SCHEMA).close()
    script = Path(__file__).with_name("write_in_a_process.py")
    with subprocess.Popen([sys.executable, script, tmp_path], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for _ in range(8):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        assert child.wait(60) == -signal.SIGKILL
    assert manifest.list_versions(store) == [1]
    with Writer(tmp_path, mode="append") as writer:
        writer.write_batch(batch(0, 5))
    assert records(store) == written(0, 5)


@pytest.mark.parametrize("schema", [SCHEMA, None])
def test_a_dropped_writer_reports_the_records_that_it_loses(url, store, capsys, schema):
    Writer(url, schema={"x": "int64"}).close()
    writer = Writer(url, schema=schema, mode="overwrite", shard_size=1000, block_size=100)
    writer.write_batch(batch(0, 500))
    with pytest.warns(ResourceWarning, match=f"{url}: a Writer with 500 records was not closed"):
        del writer
    assert capsys.readouterr().err == (
        f"tiercache: error: {url}: a Writer with 500 records was not closed, so nothing was committed: "
        "use `with`, or call close()\n"
    )
    assert manifest.list_versions(store) == [1]


def test_a_dropped_writer_reports_records_that_wait_for_their_types(url, capsys):
    writer = Writer(url)
    writer.write({"x": None})
    writer.write({"x": None})
    with pytest.warns(ResourceWarning, match=f"{url}: a Writer with 2 records was not closed"):
        del writer
    assert "a Writer with 2 records was not closed" in capsys.readouterr().err


def test_a_dropped_writer_that_was_ended_or_has_no_records_is_silent(url, capsys):
    with pytest.raises(SchemaError):
        Writer(url).write({"x": object()})
    for end in (Writer.abort, Writer.close):
        writer = Writer(url)
        writer.write({"x": 1})
        end(writer)
        del writer
    assert capsys.readouterr().err == ""


def test_a_forked_child_does_not_report_the_writer_of_its_parent(tmp_path):
    code = (
        "import os, sys, tiercache; w = tiercache.Writer(sys.argv[1], schema={'x': 'int64'}); w.write({'x': 1}); "
        "pid = os.fork(); pid and (os.waitpid(pid, 0), w.abort())"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
