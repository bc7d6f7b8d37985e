"""Checkpoints in the archive: they are listed, and loading one is an error that names the command."""

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from tests.support.checkpoint_files import write_checkpoint
from tests.support.disk_bucket import DiskBucket, Script
from torch.distributed.checkpoint.api import CheckpointException

import tiercache as tc
from tiercache.cache import Cache
from tiercache.checkpoint.checkpoints import Checkpoints
from tiercache.checkpoint.format import MANIFEST_NAME
from tiercache.errors import ArchivedShards, NotFound, StoreError
from tiercache.keep import Keep
from tiercache.store import LocalFolder

STATE = {"w": np.arange(100)}


@pytest.fixture
def bucket(tmp_path):
    return DiskBucket(tmp_path / "bucket", "s3://vault/run", Script())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    with Cache(tmp_path / "cache", size="64MiB") as cache:
        monkeypatch.setattr(Cache, "default", lambda: cache)
        yield


def archive(bucket, *, manifests=True):
    for info in list(bucket.list()):
        is_own = info.key.startswith("_tiercache/")  # the tier engine never moves these
        if not is_own and (manifests or not info.key.endswith(MANIFEST_NAME)):
            bucket._change(info.key, **{"class": "GLACIER"})


@pytest.mark.parametrize("manifests", [True, False], ids=["all objects", "all but the manifest"])
def test_an_archived_checkpoint_is_an_error_that_names_the_command_and_nothing_is_requested(bucket, manifests):
    name = write_checkpoint(bucket, 1, STATE)
    archive(bucket, manifests=manifests)
    with pytest.raises(ArchivedShards, match="is archived and must be restored before it can be read") as caught:
        Checkpoints(bucket).load()
    assert caught.value.command == f"tiercache tier get {bucket.url}/{name} --wait"
    assert caught.value.n_bytes > 800
    assert not any(info.restore for info in bucket.list())


def test_an_archived_checkpoint_is_listed_and_never_deleted_by_a_rule(bucket):
    first = write_checkpoint(bucket, 1)
    archive(bucket)
    write_checkpoint(bucket, 2)
    checkpoints = Checkpoints(bucket, keep=Keep(last=1))
    checkpoints._house._retain(None)
    listed = checkpoints.list()[0]
    assert (listed.name, listed.state, listed.n_bytes > 0) == (first, "archived", True)
    assert f"tiercache tier get {bucket.url}/{first} --wait" in listed.error


def test_the_metrics_of_an_archived_checkpoint_are_known(bucket):
    with tc.Checkpoints(bucket) as saving:
        saving.save(1, STATE, metrics={"loss": 0.1}).wait()
        archive(bucket)
        saving.save(2, STATE, metrics={"loss": 0.2}).wait()
    checkpoints = Checkpoints(bucket)
    assert [(one.step, one.state, one.metrics) for one in checkpoints.list()] == [
        (1, "archived", {"loss": 0.1}),
        (2, "complete", {"loss": 0.2}),
    ]
    assert np.array_equal(checkpoints.load("best:loss:max")["w"], np.arange(100))
    with pytest.raises(ArchivedShards, match="must be restored"):
        checkpoints.load("best:loss")


def test_an_archived_checkpoint_whose_metrics_are_unknown_may_be_the_best_one(bucket):
    first = write_checkpoint(bucket, 1, metrics={"loss": 0.1})
    archive(bucket)
    write_checkpoint(bucket, 2, metrics={"loss": 0.2})
    checkpoints = Checkpoints(bucket)
    with pytest.raises(StoreError, match=rf"best 'loss' cannot be known: the metrics of {first} are not known"):
        checkpoints.load("best:loss")
    assert checkpoints.load("latest")["step"] == 2


@pytest.mark.parametrize("tier", ["archive", "remote"])
def test_a_checkpoint_that_the_tier_engine_has_moved_to_the_archive_is_found(tmp_path, monkeypatch, tier):
    (tmp_path / "tiercache.toml").write_text(
        f'[tiers.hot]\nurl = "{tmp_path}/hot"\n\n'
        f'[tiers.{tier}]\nrole = "archive"\nurl = "s3://vault"\nstorage_class = "GLACIER"\n'
    )
    monkeypatch.chdir(tmp_path)
    below = DiskBucket(tmp_path / "vault", "s3://vault/run7", Script(), prefix="run7/")
    home = LocalFolder(tmp_path / "hot" / "run7")
    moved = write_checkpoint(below, 1, STATE)
    archive(below)
    write_checkpoint(home, 2, {"w": np.arange(50)})
    monkeypatch.setattr("tiercache.checkpoint.run_stores.open_store", lambda url, **_options: below)
    checkpoints = Checkpoints(home)
    assert np.array_equal(checkpoints.load()["w"], np.arange(50))
    with pytest.raises(ArchivedShards) as caught:
        checkpoints.load(1)
    assert caught.value.command == f"tiercache tier get s3://vault/run7/{moved} --wait"
    with pytest.raises(NotFound, match="of step 3"):
        checkpoints.load(3)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("manifests", [True, False], ids=["all objects", "all but the manifest"])
def test_torch_gets_the_same_error(bucket, manifests):
    state = {"w": torch.arange(100)}
    with tc.Checkpoints(bucket) as checkpoints:
        dcp.save(state, storage_writer=checkpoints.dcp_writer(1))
        archive(bucket, manifests=manifests)
        with pytest.raises(CheckpointException, match="must be restored before it can be read: tiercache tier get"):
            dcp.load(state, storage_reader=checkpoints.dcp_reader())
