"""Saved and loaded by one object: retention in the background, the list, verification and deletion."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.faults import Fault, FaultStore
from tests.support.stores import GateStore

from tiercache.cache import Cache
from tiercache.checkpoint.checkpoints import Checkpoints
from tiercache.checkpoint.format import list_names
from tiercache.checkpoint.weights import open_weights
from tiercache.errors import StoreError
from tiercache.keep import Keep
from tiercache.store import LocalFolder

WAIT_S = 60.0


@pytest.fixture
def remote(tmp_path):
    return LocalFolder(tmp_path / "remote")


def steps_of(store):
    return [int(name[5:17]) for name in list_names(store)]


def test_old_checkpoints_are_deleted_in_the_background_after_each_commit(tmp_path):
    keep = [Keep(last=1, tier="local"), Keep(last=2, tier="remote"), Keep(best="loss:1")]
    with Checkpoints(tmp_path / "remote", local=tmp_path / "local", keep=keep) as checkpoints:
        for step, loss in enumerate([0.5, 0.1, 0.9, 0.8, 0.7], start=1):
            checkpoints.save(step, {"w": np.full(9, step)}, metrics={"loss": loss}).wait()
        checkpoints.join()
        assert steps_of(checkpoints.local_store) == [2, 5]
        assert steps_of(checkpoints.remote_store) == [2, 4, 5]
        loaded = checkpoints.load("best:loss")
        assert (loaded["w"][0], loaded.step, loaded.metrics) == (2, 2, {"loss": 0.1})
        folders = [path.name for path in Path(checkpoints.remote_store.url).glob("step-*")]
        assert sorted(folders) == sorted(list_names(checkpoints.remote_store)), "deleted folders are gone, too"
        metrics = [path.stem for path in Path(checkpoints.remote_store.url).glob("_tiercache/metrics/*")]
        assert sorted(metrics) == sorted(folders)


def test_a_failed_deletion_is_logged_and_repeated_after_the_next_commit(remote, caplog):
    broken = FaultStore(remote, [Fault("delete", retryable=False)])
    with Checkpoints(broken, keep=Keep(last=1)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"n": step}).wait()
            checkpoints.join()  # each commit is followed by one look at what may be deleted
        assert steps_of(remote) == [1, 2]
        assert "old checkpoints were not deleted" in caplog.text
        checkpoints.save(3, {"n": 3}).wait()
        checkpoints.join()
        assert steps_of(remote) == [3]


def test_the_list_names_failed_and_unfinished_saves(remote):
    broken = FaultStore(remote, [Fault("put_if_absent", nth=2, retryable=False)])
    gates = GateStore(broken)
    checkpoints = Checkpoints(gates)
    checkpoints.save(1, {"n": 1}, metrics={"loss": 0.5}, note={"data": "v3"}).wait()
    with pytest.raises(StoreError):
        checkpoints.save(2, {"n": 2}).wait()
    with gates.stop_at("before_put_if_absent") as gate:
        checkpoints.save(3, {"n": 3})
        gate.wait_reached()
        found = {one.step: one for one in checkpoints.list()}
    checkpoints.wait()
    assert {step: one.state for step, one in found.items()} == {1: "complete", 2: "failed", 3: "saving"}
    assert (found[1].metrics, found[1].note, found[1].n_bytes > 0) == ({"loss": 0.5}, {"data": "v3"}, True)
    assert "was not saved" in found[2].error
    checkpoints.close()


def test_verify_reads_every_copy_and_names_the_wrong_files(tmp_path):
    with Checkpoints(tmp_path / "remote", local=tmp_path / "local") as checkpoints:
        saved = checkpoints.save(1, {"w": np.arange(1000)})
        saved.wait()
        assert checkpoints.verify().is_right
        (file,) = (tmp_path / "local" / saved.name).glob("*.safetensors")
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        result = checkpoints.verify(1)
        assert not result.is_right
        assert result.problems["remote"] == ()
        assert file.name in result.problems["local"][0]
        file.unlink()
        assert "is missing" in checkpoints.verify(1).problems["local"][0]


# -- S3 ------------------------------------------------------------------------------------------------------------


@pytest.mark.s3
def test_checkpoints_in_s3_are_loaded_mapped_retained_and_deleted(s3_server, tmp_path, monkeypatch):
    state = {"model": {"w": torch.arange(1 << 20), "b": torch.ones(3)}, "epoch": 4}
    store = s3_server.store("checkpoints-read")
    with Cache(tmp_path / "cache", size="64MiB") as cache:
        checkpoints = Checkpoints(store, keep=Keep(last=2))
        monkeypatch.setattr(Cache, "default", lambda: cache)
        for step in range(1, 4):
            checkpoints.save(step, {**state, "epoch": step}).wait(timeout_s=WAIT_S)
        checkpoints.join()
        assert [one.step for one in checkpoints.list()] == [2, 3]
        loaded = checkpoints.load("latest")
        assert torch.equal(loaded["model"]["w"], state["model"]["w"])
        assert loaded["epoch"] == 3
        assert checkpoints.verify().is_right
        url, options = f"{s3_server.url}/checkpoints-read", s3_server.storage_options
        with open_weights(url, prefix="model.", cache=cache, storage_options=options) as weights:
            assert torch.equal(weights["w"], state["model"]["w"])
        checkpoints.pin(2, "release")
        assert checkpoints.list()[0].why_pinned == "release"
        checkpoints.delete(3)
        assert checkpoints.load()["epoch"] == 2
        checkpoints.close()
