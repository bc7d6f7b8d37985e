"""Ray: pack by tasks of a local cluster, one of whose workers is killed; Ray Data reads and writes data sets."""

import os
import sys
from contextlib import closing

import numpy as np
import pyarrow as pa
import pytest
from tests.integration import ray_functions

import tiercache as tc
from tiercache.errors import SchemaError
from tiercache.packer import rearrange
from tiercache.shard.packings import list_packings
from tiercache.shard.verify import verify_dataset
from tiercache.shard.versions import find_version, read_shards
from tiercache.store import open_store

ray = pytest.importorskip("ray", reason="`make integration` has it")
pytest.importorskip("ray.data")

from tiercache.integrations.ray import DatasetSink, read_dataset  # noqa: E402 - after the check

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]

N = 1500
OPTIONS = {"shard_size": 4000, "block_size": 500}


@pytest.fixture(scope="module")
def mark(tmp_path_factory):
    return tmp_path_factory.mktemp("ray") / "killed"


@pytest.fixture(scope="module", autouse=True)
def cluster(mark, tmp_path_factory):
    """A local cluster of four workers, which import what the tests import."""
    folder = tmp_path_factory.mktemp("cache")
    environment = {
        "RAY_TEST_MARK": str(mark),
        "TIERCACHE_CACHE_DIR": str(folder),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    ray.init("local", num_cpus=4, runtime_env={"env_vars": environment}, include_dashboard=False, log_to_driver=False)
    ray.data.range(1).take_all()  # Ray Data opens its log
    yield
    ray.shutdown()


def shard_counts(url):
    with closing(open_store(url)) as store:
        return read_shards(store, find_version(store, None)).n_records.tolist()


def xs(url):
    return tc.Dataset(url)[:]["x"].tolist()


class TestPack:
    def test_a_killed_worker_loses_no_record_and_writes_none_twice(self, tmp_path, mark):
        tc.pack(ray_functions.record, range(N), tmp_path / "here", **OPTIONS)
        tc.pack(ray_functions.kill_a_worker_once, range(N), tmp_path / "ray", engine="ray", **OPTIONS)
        assert mark.exists()
        assert list(tc.Dataset(tmp_path / "ray")) == list(tc.Dataset(tmp_path / "here"))
        counts = shard_counts(tmp_path / "ray")
        assert counts == shard_counts(tmp_path / "here")
        assert len(counts) > 4
        assert list(list_packings(open_store(tmp_path / "ray"))) == []
        assert list(verify_dataset(open_store(tmp_path / "ray"))) == []

    def test_an_error_names_the_record_and_the_packing_continues_in_this_process(self, tmp_path):
        with pytest.raises(SchemaError, match=r"input \d+ of fail: expected int64, got a str"):
            tc.pack(ray_functions.fail, range(N), tmp_path / "out", engine="ray", **OPTIONS)
        (tmp_path / "a.jsonl").write_text("".join(f'{{"x": {i}}}\n' for i in range(N)))

        def stop(progress):
            if progress.n_records:
                raise KeyboardInterrupt

        options = {"shard_size": 1000, "block_size": 200}
        with pytest.raises(KeyboardInterrupt):
            tc.pack(tmp_path / "a.jsonl", tmp_path / "all", engine="ray", on_progress=stop, **options)
        tc.pack(tmp_path / "a.jsonl", tmp_path / "all", **options)
        assert xs(tmp_path / "all") == list(range(N))

    def test_progress_counts_all_records_and_functions_need_not_be_importable(self, tmp_path):
        seen = []
        given = {"map": lambda record: {"x": record["x"] * 2}, "split": {"a": 0.5, "b": 0.5}}
        tc.pack(
            [{"x": i} for i in range(N)], tmp_path / "out", engine="ray", on_progress=seen.append, **given, **OPTIONS
        )
        assert seen[-1].n_records == N
        assert sorted(xs(tmp_path / "out" / "a") + xs(tmp_path / "out" / "b")) == list(range(0, 2 * N, 2))

    def test_all_passes_run_on_the_cluster_and_write_the_shards_of_one_machine(self, tmp_path, monkeypatch):
        monkeypatch.setattr(rearrange, "RUN_BYTES", 3000)
        rows = [{"x": (11 * i) % (N - 100), "text": f"{i}"} for i in range(N)]
        given = {"dedup": "x", "sort": "x", **OPTIONS}
        for name, engine in (("here", "process"), ("ray", "ray")):
            tc.pack(rows, tmp_path / name, engine=engine, **given)
        assert xs(tmp_path / "ray") == list(range(N - 100))
        assert shard_counts(tmp_path / "ray") == shard_counts(tmp_path / "here")
        assert list(tc.Dataset(tmp_path / "ray")) == list(tc.Dataset(tmp_path / "here"))

    def test_a_memory_store_and_workers_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="a memory store exists in one process only"):
            tc.pack([{"x": 1}], "memory://ray", engine="ray")
        with pytest.raises(ValueError, match="workers= is for engine='process'"):
            tc.pack([{"x": 1}], tmp_path / "out", engine="ray", workers=2)


class TestData:
    def test_a_data_set_is_read_by_several_tasks_with_each_record_once(self, tmp_path):
        tc.pack(ray_functions.record, range(N), tmp_path / "out", **OPTIONS)
        data = read_dataset(str(tmp_path / "out"), parallelism=5, columns=["x", "text"])
        assert data.count() == N
        rows = sorted(data.take_all(), key=lambda row: row["x"])
        assert rows == [dict(ray_functions.record(i)) for i in range(N)]
        some = read_dataset(tc.Dataset(tmp_path / "out").select(range(10, 20)), parallelism=3)
        assert sorted(row["x"] for row in some.take_all()) == list(range(10, 20))
        with pytest.raises(tc.NotFound):
            read_dataset(str(tmp_path / "absent"))

    def test_what_is_read_mapped_and_written_is_a_data_set_with_one_commit(self, tmp_path):
        tc.pack(ray_functions.record, range(N), tmp_path / "in", **OPTIONS)

        def double(batch):
            return {"x": batch["x"] * 2, "text": batch["text"]}

        data = read_dataset(str(tmp_path / "in"), parallelism=6).map_batches(double)
        sink = DatasetSink(tmp_path / "out", shard_size=4000, schema={"x": "int64", "text": "str"})
        data.write_datasink(sink)
        assert sink.version.n_records == N
        found = sorted(tc.Dataset(tmp_path / "out"), key=lambda record: record["x"])
        assert [record["x"] for record in found] == list(range(0, 2 * N, 2))
        assert found[20]["text"] == ray_functions.record(20)["text"]
        with pytest.raises(Exception, match="exists"):
            DatasetSink(tmp_path / "out")
        data.write_datasink(DatasetSink(tmp_path / "out", mode="append"))
        assert len(tc.Dataset(tmp_path / "out")) == 2 * N
        assert tc.Dataset(tmp_path / "out").version == 2

    def test_the_types_follow_from_rays_blocks_and_tensors_from_a_schema(self, tmp_path):
        ray.data.from_arrow(pa.table({"x": [1, 2, 3], "y": ["a", None, "c"]})).write_datasink(
            DatasetSink(tmp_path / "plain")
        )
        assert list(tc.Dataset(tmp_path / "plain")) == [{"x": 1, "y": "a"}, {"x": 2, "y": None}, {"x": 3, "y": "c"}]
        arrays = np.arange(60, dtype=np.float32).reshape(10, 2, 3)
        sink = DatasetSink(tmp_path / "tensors", schema={"data": "float32[2, 3]"})
        ray.data.from_numpy(arrays).write_datasink(sink)
        found = [record["data"] for record in tc.Dataset(tmp_path / "tensors")]
        assert np.array_equal(np.sort(np.stack(found).ravel()), arrays.ravel())

    def test_a_relative_path_is_that_of_this_process_and_not_of_the_workers(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        tc.pack(ray_functions.record, range(N), "in", engine="ray", **OPTIONS)
        tc.ray.read_dataset("in").write_datasink(tc.ray.DatasetSink("out"))
        assert xs(tmp_path / "in") == sorted(xs(tmp_path / "out")) == list(range(N))

    def test_a_failed_write_commits_nothing(self, tmp_path):
        def fail(batch):
            raise RuntimeError("no")

        with pytest.raises(Exception, match="no"):
            ray.data.range(100).map_batches(fail).write_datasink(DatasetSink(tmp_path / "out"))
        with pytest.raises(tc.NotFound):
            len(tc.Dataset(tmp_path / "out"))
