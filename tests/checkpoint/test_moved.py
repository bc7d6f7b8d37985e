"""Checkpoints in the archive: where they are found, what a restore costs and takes, and the wait for it."""

import time

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from tests.checkpoint.files import write_checkpoint
from tests.tier.bucket import DiskBucket, Script
from torch.distributed.checkpoint.api import CheckpointException

import tiercache as tc
from tiercache.cache import Cache
from tiercache.checkpoint.layout import MANIFEST_NAME
from tiercache.checkpoint.moved import MovedCheckpoints
from tiercache.checkpoint.stored import StoredCheckpoints
from tiercache.errors import ArchivedShards, NotFound, StoreError
from tiercache.keep import Keep
from tiercache.store import LocalFolder
from tiercache.tier.stores import Stores

HOUR_S = 3600.0


class RestoringClock:
    """A clock of hours: when somebody waits, the restores that were requested are done."""

    def __init__(self, bucket):
        self.bucket, self.now_s, self.n_waits = bucket, 0.0, 0

    def monotonic(self):
        return self.now_s

    def sleep(self, duration_s, cancel=None):
        del cancel
        self.now_s += duration_s
        self.n_waits += 1
        for info in list(self.bucket.list()):
            if "true" in (info.restore or ""):
                self.bucket._change(info.key, restore={"ready_s": 0.0, "until_s": time.time() + 99 * HOUR_S})


@pytest.fixture
def bucket(tmp_path):
    return DiskBucket(tmp_path / "bucket", "s3://vault/run", Script())


@pytest.fixture
def cache(tmp_path):
    with Cache(tmp_path / "cache", size="64MiB") as cache:
        yield cache


def archive(bucket, *, manifests=True):
    for info in list(bucket.list()):
        is_own = info.key.startswith("_tiercache/")  # the tier engine never moves these
        if not is_own and (manifests or not info.key.endswith(MANIFEST_NAME)):
            bucket._change(info.key, **{"class": "GLACIER"})


def opened(bucket, cache):
    """Checkpoints of a bucket, whose rule file is the bucket alone."""
    clock = RestoringClock(bucket)

    def stores(file):
        return Stores(file, stores={"remote": bucket}, s3_classes={"remote": bucket})

    archived = MovedCheckpoints(bucket.url, open_stores=stores, clock=clock)
    return StoredCheckpoints(bucket, cache=lambda: cache, moved=archived), clock


def restored(bucket):
    return {info.key for info in bucket.list() if info.restore}


@pytest.mark.parametrize("manifests", [True, False], ids=["all objects", "all but the manifest"])
def test_an_archived_checkpoint_is_an_error_with_size_cost_and_time_and_nothing_is_requested(bucket, cache, manifests):
    write_checkpoint(bucket, 1, {"w": np.arange(100)})
    archive(bucket, manifests=manifests)
    checkpoints, _ = opened(bucket, cache)
    with pytest.raises(
        ArchivedShards, match=r"must be restored, which costs .* and takes .*load\(\.\.\., wait=True\)"
    ) as caught:
        checkpoints.load()
    assert caught.value.n_bytes > 800
    assert restored(bucket) == set()


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("manifests", [True, False], ids=["all objects", "all but the manifest"])
def test_with_wait_the_checkpoint_is_restored_and_loaded(bucket, cache, manifests, share, caplog):
    write_checkpoint(bucket, 1, {"w": np.arange(100)}, share=share)
    other = write_checkpoint(bucket, 2, {"w": np.arange(50)}, share=share)
    archive(bucket, manifests=manifests)
    checkpoints, clock = opened(bucket, cache)
    assert np.array_equal(checkpoints.load(1, wait=True)["w"], np.arange(100))
    assert clock.n_waits > 0
    assert "must be restored, which costs" in caplog.text
    assert not any(key.startswith(other) for key in restored(bucket))


def test_an_archived_checkpoint_is_listed_and_never_deleted_by_a_rule(bucket, cache):
    first = write_checkpoint(bucket, 1)
    archive(bucket)
    write_checkpoint(bucket, 2)
    checkpoints = StoredCheckpoints(bucket, cache=lambda: cache, keep=Keep(last=1))
    checkpoints.apply_retention()
    listed = checkpoints.list()[0]
    assert (listed.name, listed.state, listed.n_bytes > 0) == (first, "archived", True)
    assert f"load(wait=True) or `tiercache tier get {bucket.url}/{first} --wait`" in listed.error


def test_the_metrics_of_an_archived_checkpoint_are_known(bucket, cache):
    state = {"w": np.arange(100)}
    with tc.Checkpoints(bucket) as saving:
        saving.save(1, state, metrics={"loss": 0.1}).wait()
        archive(bucket)
        saving.save(2, state, metrics={"loss": 0.2}).wait()
    checkpoints, _ = opened(bucket, cache)
    assert [(one.step, one.state, one.metrics) for one in checkpoints.list()] == [
        (1, "archived", {"loss": 0.1}),
        (2, "complete", {"loss": 0.2}),
    ]
    assert np.array_equal(checkpoints.load("best:loss:max")["w"], np.arange(100))
    with pytest.raises(ArchivedShards, match="must be restored"):
        checkpoints.load("best:loss")
    assert np.array_equal(checkpoints.load("best:loss", wait=True)["w"], np.arange(100))


def test_an_archived_checkpoint_whose_metrics_are_unknown_may_be_the_best_one(bucket, cache):
    first = write_checkpoint(bucket, 1, metrics={"loss": 0.1})
    archive(bucket)
    write_checkpoint(bucket, 2, metrics={"loss": 0.2})
    checkpoints, _ = opened(bucket, cache)
    with pytest.raises(StoreError, match=rf"best 'loss' cannot be known: the metrics of {first} are not known"):
        checkpoints.load("best:loss")
    assert checkpoints.load("latest")["step"] == 2


def test_with_a_rule_file_the_error_has_the_command_whatever_its_only_tier_is_called(
    bucket, cache, tmp_path, monkeypatch
):
    write_checkpoint(bucket, 1, {"w": np.arange(100)})
    archive(bucket)
    (tmp_path / "tiercache.toml").write_text(
        f'[tiers.remote]\nrole = "archive"\nurl = "{bucket.url}"\nstorage_class = "GLACIER"\n'
    )
    monkeypatch.chdir(tmp_path)
    checkpoints, _ = opened(bucket, cache)
    with pytest.raises(ArchivedShards, match="run `tiercache tier get") as caught:
        checkpoints.load()
    assert caught.value.command.startswith("tiercache tier get step-000000000001")


# -- tiers of a rule file ------------------------------------------------------------------------------------------

RULES = """
[tiers.hot]
url = "{hot}"

[tiers.{name}]
role = "archive"
url = "s3://vault"
storage_class = "GLACIER"
prices = "aws:us-east-1:GLACIER"
"""


@pytest.fixture(params=["archive", "remote"])
def moved(tmp_path, bucket, monkeypatch, request):
    """A checkpoint that the tier engine has moved to a tier of any name, and the folder where it was."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    (work / "tiercache.toml").write_text(RULES.format(hot=tmp_path / "hot", name=request.param))
    vault = DiskBucket(tmp_path / "vault", "s3://vault", Script())
    below = DiskBucket(tmp_path / "vault", "s3://vault/run7", Script(), prefix="run7/")
    home = LocalFolder(tmp_path / "hot" / "run7")
    write_checkpoint(below, 1, {"w": np.arange(100)})
    archive(vault)
    write_checkpoint(home, 2, {"w": np.arange(50)})
    clock = RestoringClock(vault)

    def stores(file):
        return Stores(file, stores={request.param: vault}, s3_classes={request.param: vault})

    monkeypatch.setattr("tiercache.checkpoint.moved.open_store", lambda url, **_options: below)
    return StoredCheckpoints(home, moved=MovedCheckpoints(home.url, open_stores=stores, clock=clock)), vault


def test_a_checkpoint_that_the_tier_engine_has_moved_is_found_with_the_price_and_time_of_its_restore(moved):
    checkpoints, _ = moved
    assert np.array_equal(checkpoints.load()["w"], np.arange(50))
    with pytest.raises(ArchivedShards, match=r"costs less than .* takes at most 5 hours") as caught:
        checkpoints.load(1)
    assert caught.value.command.startswith("tiercache tier get run7/step-000000000001")


def test_a_moved_checkpoint_is_loaded_from_the_archive_after_the_wait(moved):
    checkpoints, vault = moved
    assert np.array_equal(checkpoints.load(1, wait=True)["w"], np.arange(100))
    assert restored(vault)
    with pytest.raises(NotFound, match="of step 3"):
        checkpoints.load(3)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("manifests", [True, False], ids=["all objects", "all but the manifest"])
def test_torch_says_what_the_restore_of_an_archived_checkpoint_costs_and_loads_it_afterwards(bucket, cache, manifests):
    state = {"w": torch.arange(100)}
    with tc.Checkpoints(bucket) as checkpoints:
        dcp.save(state, storage_writer=checkpoints.dcp_writer(1))
        archive(bucket, manifests=manifests)
        restoring, _ = opened(bucket, cache)
        checkpoints._moved = restoring._moved
        state["w"].zero_()
        with pytest.raises(CheckpointException, match="must be restored, which costs"):
            dcp.load(state, storage_reader=checkpoints.dcp_reader())
        assert restored(bucket) == set()
        restoring.load(wait=True)
        dcp.load(state, storage_reader=checkpoints.dcp_reader())
    assert state["w"].tolist() == list(range(100))


def test_a_moved_checkpoint_finds_its_shared_tensors_where_it_was(moved):
    checkpoints, vault = moved
    home = checkpoints.remote_store
    name = write_checkpoint(home, 5, {"w": np.arange(70)}, created_s=1.0, share=True)
    for info in list(home.list(f"{name}/")):
        vault.put(f"run7/{info.key}", home.get(info.key))
    archive(vault)
    home.delete([info.key for info in home.list(f"{name}/")])
    with pytest.raises(ArchivedShards):
        checkpoints.load(5)
    assert np.array_equal(checkpoints.load(5, wait=True)["w"], np.arange(70))
