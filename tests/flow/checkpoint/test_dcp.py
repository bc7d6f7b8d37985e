"""torch.distributed.checkpoint over Checkpoints in one process; flow/distributed/test_checkpoints.py has ranks."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from fsspec.implementations.memory import MemoryFileSystem
from tests.support.checkpoint_reader import same
from tests.support.faults import Fault, FaultKind, FaultStore
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

import tiercache as tc
from tiercache.checkpoint.format import header_bytes, parse_header
from tiercache.store import FsspecStore, LocalFolder
from tiercache.store.access import CallOptions
from tiercache.store.contract import WrapperStore

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def checkpoints(tmp_path):
    with tc.Checkpoints(tmp_path / "remote", local=tmp_path / "local") as found:
        yield found


def state_with(value: float) -> dict:
    """A state of every kind of value that a training run has; value is in all of its tensors."""
    model = torch.nn.Linear(3, 5)
    with torch.no_grad():
        model.weight.fill_(value)
        model.bias.fill_(value)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.full((2, 3), value)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "strided": torch.full((4, 6), value).T,
        "bf16": torch.full((7,), value, dtype=torch.bfloat16),
        "scalar": torch.tensor(value),
        "empty": torch.empty(0, 4),
        "loader": {"epoch": int(value), "served": [1, 2], "pair": (value, None), "nan": float("inf")},
        "random": np.full(5, value),
        "size": np.float64(value),
        "$name": "a key that begins with $",
    }


def steps(checkpoints) -> list[int]:
    return [info.step for info in checkpoints.list() if info.state == "complete"]


def test_a_state_comes_back_with_all_kinds_of_values(checkpoints):
    dcp.save(state_with(1.5), storage_writer=checkpoints.dcp_writer(7, metrics={"loss": 0.5}, note={"run": "a"}))
    loaded = state_with(-1.0)
    dcp.load(loaded, storage_reader=checkpoints.dcp_reader("best:loss"))
    assert same(loaded, state_with(1.5))
    (info,) = checkpoints.list()
    assert (info.step, info.tiers, info.note) == (7, ("local", "remote"), {"run": "a"})
    assert checkpoints.verify().is_right
    files = [path for path in Path(checkpoints.remote_store.url).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        data = path.read_bytes()
        if path.suffix == ".json":
            json.loads(data)
        else:
            assert "model.weight" in parse_header(data[: header_bytes(data)], len(data))
    state = {"weights": torch.ones(1000)}
    saved = dcp.async_save(state, storage_writer=checkpoints.dcp_writer(8))
    state["weights"].zero_()
    saved.result()
    assert checkpoints.load()["weights"].tolist() == [1.0] * 1000, "the state of the call"


class Unknown:
    """A class whose instances only pickle could store."""


def test_a_value_that_only_pickle_could_store_is_refused_with_its_key(checkpoints):
    state = {"weights": torch.ones(2), "run": {"tokenizer": Unknown()}}
    with pytest.raises(CheckpointException, match=r"run\.tokenizer"):
        dcp.save(state, storage_writer=checkpoints.dcp_writer(0))
    assert steps(checkpoints) == []


class HalfPlanner(DefaultSavePlanner):
    def resolve_data(self, write_item):
        found = super().resolve_data(write_item)
        return found.half() if isinstance(found, torch.Tensor) else found


def test_a_planner_that_changes_what_is_stored_is_refused(checkpoints):
    for planner, text in (
        (HalfPlanner(), "HalfPlanner changes what is stored"),
        (DefaultSavePlanner(flatten_state_dict=False), "leave flatten_state_dict=False out"),
    ):
        with pytest.raises(CheckpointException, match=text):
            dcp.save({"weights": torch.ones(4)}, storage_writer=checkpoints.dcp_writer(0), planner=planner)
    assert steps(checkpoints) == []


def test_torch_loads_what_a_plain_save_wrote_and_the_reverse(checkpoints):
    state = state_with(2.0)
    checkpoints.save(0, state).wait()
    loaded = state_with(-1.0)
    dcp.load(loaded, storage_reader=checkpoints.dcp_reader())
    assert same(loaded, state)
    dcp.save(state, storage_writer=checkpoints.dcp_writer(1))
    into = {"strided": torch.zeros(6, 4), "model": torch.nn.Linear(3, 5)}
    checkpoints.load("latest", into=into)
    assert same(into["strided"], state["strided"])
    assert same(into["model"].state_dict(), state["model"])


def test_what_would_not_commit_one_checkpoint_of_all_ranks_is_refused(checkpoints):
    state = {"weights": torch.ones(2)}
    with pytest.raises(ValueError, match="checkpoint_id"):
        dcp.save(state, storage_writer=checkpoints.dcp_writer(0), checkpoint_id="mine")
    with pytest.raises(ValueError, match="use_collectives"):
        dcp.save(state, storage_writer=checkpoints.dcp_writer(0), use_collectives=False)
    with pytest.raises(TypeError, match=r"AsyncCheckpointerType\.THREAD"):
        pickle.dumps(checkpoints.dcp_writer(0))
    planner = DefaultSavePlanner(enable_plan_caching=True)
    dcp.save(state, storage_writer=checkpoints.dcp_writer(1), planner=planner)
    with pytest.raises(CheckpointException, match="enable_plan_caching"):
        dcp.save(state, storage_writer=checkpoints.dcp_writer(2), planner=planner)
    assert steps(checkpoints) == [1]


# -- silent failures of other libraries ------------------------------------------------------------------------------


def test_a_checkpoint_at_the_store_without_a_local_copy_is_a_warning(checkpoints):
    writer = checkpoints._house.writers[0]
    writer.store = FaultStore(writer.store, [Fault("complete", keys="*state.json", retryable=False)])
    saving = checkpoints.dcp_writer(3)
    with pytest.warns(RuntimeWarning, match=r"is committed at .*, but has no complete local copy: .*scripted fault"):
        dcp.save(state_with(1.0), storage_writer=saving)
    assert saving.done()
    (info,) = checkpoints.list()
    assert info.tiers == ("remote",)
    assert checkpoints.verify().is_right
    loaded = state_with(-1.0)
    dcp.load(loaded, storage_reader=checkpoints.dcp_reader())
    assert same(loaded, state_with(1.0))


@pytest.mark.parametrize("keys", ["*.safetensors", "*state.json"])
def test_a_save_that_fails_is_not_done_and_a_rank_that_fails_leaves_no_local_files(checkpoints, keys):
    writer = checkpoints._house.writers[-1]
    whole = writer.store
    writer.store = FaultStore(whole, [Fault("complete", keys=keys, retryable=False)])
    saving = checkpoints.dcp_writer(3)
    with pytest.raises(CheckpointException, match="scripted fault"):
        dcp.save(state_with(1.0), storage_writer=saving)
    assert not saving.done()
    assert steps(checkpoints) == []
    if keys == "*.safetensors":
        assert [info.key for info in checkpoints.local_store.list() if info.key != "run.json"] == []
    writer.store = whole
    dcp.save(state_with(2.0), storage_writer=saving)  # the same save again
    assert saving.done()
    assert steps(checkpoints) == [3]


def test_a_writer_saves_one_checkpoint(checkpoints):
    writer = checkpoints.dcp_writer(0)
    dcp.save({"weights": torch.ones(2)}, storage_writer=writer)
    with pytest.raises(CheckpointException, match=f"this writer has saved {writer.name}: make one for each"):
        dcp.save({"weights": torch.zeros(2)}, storage_writer=writer)
    assert checkpoints.load()["weights"].tolist() == [1.0, 1.0]


class DroppingFileSystem(MemoryFileSystem):
    """A file system in memory whose writers lose the end of large files, as if it was not flushed."""

    store: dict = {}  # noqa: RUF012 - fsspec's own attributes
    pseudo_dirs: list = [""]  # noqa: RUF012
    drops = False

    def pipe_file(self, path, value, mode="overwrite", **options):
        super().pipe_file(path, value[:4096] if self.drops else value, mode, **options)


@pytest.fixture
def dropping():
    yield DroppingFileSystem
    DroppingFileSystem.drops = False
    DroppingFileSystem.store.clear()


def test_a_store_that_drops_unflushed_data_commits_nothing(dropping):
    def write(checkpoints, step):
        dcp.save({"weights": torch.full((9000,), step)}, storage_writer=checkpoints.dcp_writer(step))

    store = FsspecStore("/run", "dropping://run", {}, CallOptions(is_single_writer=True), dropping)
    checkpoints = tc.Checkpoints(store)
    write(checkpoints, 0)
    dropping.drops = True
    with pytest.raises((tc.StoreError, CheckpointException), match=r"the store has 4096 bytes, .* was written"):
        write(checkpoints, 1)
    dropping.drops = False
    assert steps(checkpoints) == [0]
    assert checkpoints.load()["weights"].tolist() == [0] * 9000
    checkpoints.join()


def test_retention_after_another_save_leaves_the_local_files_of_a_save_alone(tmp_path):
    """A plain save that began later is committed while the files of all ranks are uploaded."""
    others = []

    class Overtaken(WrapperStore):
        def around(self, method, key, call):
            if method == "create" and "tensors-rank" in key and not others:
                others.append(checkpoints.save(2, {"a": 1}))
                assert others[0].wait(timeout_s=60)
                checkpoints.join()
            return call()

    store = Overtaken(LocalFolder(tmp_path / "remote"))
    with tc.Checkpoints(store, local=tmp_path / "local", keep=tc.Keep(last=3)) as checkpoints:
        dcp.save({"w": torch.ones(100)}, storage_writer=checkpoints.dcp_writer(1))
        assert [(one.step, one.tiers) for one in checkpoints.list()] == [(n, ("local", "remote")) for n in (1, 2)]
        assert checkpoints._house.unfinished() == {}


# -- loading ---------------------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def test_a_corrupt_local_file_is_skipped_with_a_warning(checkpoints, tmp_path):
    dcp.save({"weights": torch.ones(1000)}, storage_writer=checkpoints.dcp_writer(0))
    (file,) = (tmp_path / "local").rglob("*.safetensors")
    flip(file, -5)
    loaded = {"weights": torch.zeros(1000)}
    with pytest.warns(RuntimeWarning, match="block 0 of weights"):
        dcp.load(loaded, storage_reader=checkpoints.dcp_reader())
    assert loaded["weights"].tolist() == [1.0] * 1000
    (file,) = (tmp_path / "remote").rglob("*.safetensors")
    flip(file, -5)
    reader = checkpoints.dcp_reader()
    with pytest.warns(RuntimeWarning), pytest.raises(CheckpointException, match="block 0 of weights"):
        dcp.load(loaded, storage_reader=reader)


def test_bytes_that_are_damaged_in_transit_are_read_again(tmp_path):
    store = FaultStore(LocalFolder(tmp_path))
    checkpoints = tc.Checkpoints(store)
    dcp.save({"weights": torch.ones(1000)}, storage_writer=checkpoints.dcp_writer(0))
    store.add(Fault("read_into", kind=FaultKind.BIT_FLIP, keys="*.safetensors"))
    loaded = {"weights": torch.zeros(1000)}
    dcp.load(loaded, storage_reader=checkpoints.dcp_reader())
    assert loaded["weights"].tolist() == [1.0] * 1000
    assert len(store.faulted_calls) == 1
    checkpoints.close()


class OneBox:
    """A load planner that wants one box of one tensor."""

    def __init__(self, offsets, target):
        self.item = ReadItem(
            LoadItemType.TENSOR, MetadataIndex("weights", [0, 0]), torch.Size([0, 0]),
            MetadataIndex("weights", [0, 0]), torch.Size(offsets), target.shape,
        )  # fmt: skip
        self.target, self.is_committed = target, False

    def resolve_tensor(self, _item):
        return self.target

    def commit_tensor(self, _item, tensor):
        self.is_committed = tensor.data_ptr() == self.target.data_ptr()


@pytest.mark.parametrize(
    ("offsets", "shape", "most_bytes"),
    [((512, 0), (256, 1024), 1 << 20), ((0, 1000), (1024, 24), 4 << 20), ((3, 5), (1, 1), 1 << 20)],
    ids=["rows", "columns", "one value"],
)
def test_a_rank_reads_the_blocks_that_it_needs(tmp_path, offsets, shape, most_bytes):
    checkpoints = tc.Checkpoints(tmp_path)
    values = torch.randn(1024, 1024)  # 4 MiB
    dcp.save({"weights": values}, storage_writer=checkpoints.dcp_writer(0))
    reader, box = checkpoints.dcp_reader(), OneBox(offsets, torch.zeros(shape))
    reader.set_up_storage_reader(reader.read_metadata(), is_coordinator=True)
    checkpoints.join()  # the housekeeping thread reads, too
    before = checkpoints.remote_store.counters["bytes_read"]
    reader.read_data(LoadPlan([box.item]), box).wait()
    assert checkpoints.remote_store.counters["bytes_read"] - before <= most_bytes
    rows, columns = (slice(start, start + n) for start, n in zip(offsets, shape, strict=True))
    assert torch.equal(box.target, values[rows, columns])
    assert box.is_committed


def test_ranks_that_find_different_checkpoints_do_not_load(checkpoints):
    dcp.save({"weights": torch.ones(2)}, storage_writer=checkpoints.dcp_writer(0))
    first, second = checkpoints.dcp_reader(), checkpoints.dcp_reader()
    first.read_metadata()
    dcp.save({"weights": torch.ones(2)}, storage_writer=checkpoints.dcp_writer(1))
    second.read_metadata()
    plans = [reader.prepare_local_plan(LoadPlan([])) for reader in (first, second)]
    with pytest.raises(tc.StoreError, match="found different checkpoints"):
        first.prepare_global_plan(plans)


@pytest.mark.s3
def test_a_checkpoint_in_an_object_store_comes_back(s3_server, tmp_path):
    url, options = f"{s3_server.url}/dcp", s3_server.storage_options
    with tc.Checkpoints(url, storage_options=options) as checkpoints:
        dcp.save(state_with(4.0), storage_writer=checkpoints.dcp_writer(3))
        loaded = state_with(-1.0)
        dcp.load(loaded, storage_reader=checkpoints.dcp_reader())
        assert same(loaded, state_with(4.0))
