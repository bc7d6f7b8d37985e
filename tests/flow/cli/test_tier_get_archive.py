"""tier get of objects of class GLACIER in moto: restored first, then copied to a local tier and held."""

import json
import urllib.request
import uuid
from contextlib import suppress

import fsspec
import pytest
from botocore.config import Config
from botocore.session import Session
from tests.support.clock import JumpingClock
from tests.support.s3 import s3fs_options
from tests.support.s3_server import S3Server
from tests.support.tier_moves import HookAt, Killed

import tiercache as tc
from tiercache.cli.app import app

RULES = """
state_dir = "state"
[tiers.hot]
url = "nvme"
capacity = "1MB"

[tiers.standard]
url = "{url}/{prefix}/standard"
prices = "aws:us-east-1:STANDARD"
storage_options = {options}

[tiers.archive]
url = "{url}/{prefix}/cold"
storage_class = "GLACIER"
prices = "aws:us-east-1:GLACIER"
storage_options = {options}

[[rules]]
match = "runs/**"
keep_hot = {{ last = 1 }}
then = "archive"

[tiering]
grace = "0s"
"""
PARTS = {"__0_0.distcp": b"zero" * 5000, "__1_0.distcp": b"one" * 5000, ".metadata": b"about"}

pytestmark = pytest.mark.s3


@pytest.fixture(scope="module")
def server():
    with S3Server(kind="moto") as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    client = Session().create_client(
        "s3",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=server.access_key_id,
        aws_secret_access_key=server.secret_access_key,
        config=Config(proxies={}, s3={"addressing_style": "path"}),
    )
    yield client
    client.close()


class Bucket:
    """A folder of the server's bucket with two tiers in it."""

    def __init__(self, server, client):
        self.server, self.client, self.prefix = server, client, f"test-{uuid.uuid4().hex[:8]}"

    def url(self, tier):
        return f"{self.server.url}/{self.prefix}/{tier}"

    def put(self, tier, key, data, storage_class):
        where = {"Bucket": self.server.bucket, "Key": f"{self.prefix}/{tier}/{key}"}
        self.client.put_object(**where, Body=data, StorageClass=storage_class)

    def head(self, tier, key):
        return self.client.head_object(Bucket=self.server.bucket, Key=f"{self.prefix}/{tier}/{key}")

    def get(self, tier, key):
        with self.client.get_object(Bucket=self.server.bucket, Key=f"{self.prefix}/{tier}/{key}")["Body"] as body:
            return body.read()

    def keys(self, tier):
        prefix = f"{self.prefix}/{tier}/"
        found = self.client.list_objects_v2(Bucket=self.server.bucket, Prefix=prefix).get("Contents", [])
        return [item["Key"].removeprefix(prefix) for item in found if "_tiercache/" not in item["Key"]]


@pytest.fixture
def restores_take(server):
    """Sets how many times the server is asked before a restore is done; 0: at once."""

    def run(n):
        progression = {"progression": "manual", "times": n} if n else {"progression": "immediate"}
        body = json.dumps({"model_name": "s3::keyrestore", "transition": progression}).encode()
        request = urllib.request.Request(
            f"{server.endpoint}/moto-api/state-manager/set-transition", body, {"Content-Type": "application/json"}
        )
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).close()

    yield run
    run(0)


@pytest.fixture
def bucket(server, client, tmp_path, monkeypatch):
    """Two checkpoints in the archive, a newer one on the local disk."""
    bucket = Bucket(server, client)
    options = ", ".join(f"{name} = {json.dumps(value)}" for name, value in server.storage_options.items())
    rules = RULES.format(url=server.url, prefix=bucket.prefix, options=f"{{ {options} }}")
    (tmp_path / "tiercache.toml").write_text(rules)
    monkeypatch.chdir(tmp_path)
    for step in (1, 2):
        for name, data in PARTS.items():
            bucket.put("cold", f"runs/a/step-{step}/{name}", data, "GLACIER")
    newest = tmp_path / "nvme/runs/a/step-3"
    newest.mkdir(parents=True)
    for name, data in PARTS.items():
        (newest / name).write_bytes(data)
    return bucket


def recalled(tmp_path, step=1):
    folder = tmp_path / f"nvme/runs/a/step-{step}"
    return {path.name: path.read_bytes() for path in folder.glob("*")} | {
        path.name: path.read_bytes() for path in folder.glob(".metadata")
    }


def test_an_archived_checkpoint_is_restored_copied_verified_and_held(tiercache, bucket, tmp_path):
    *_, summary = tiercache("tier", "get", "runs/a/step-1", "--yes", "--json").events
    assert (summary["copied"], summary["restores"], summary["pending"], summary["stopped"]) == (1, 0, 0, 0)
    assert recalled(tmp_path) == PARTS
    with JumpingClock() as clock:
        clock.jump(86400.0)
        tiercache("tier", "run", "--once")
        tiercache("tier", "run", "--once")
        assert recalled(tmp_path) == PARTS
        clock.jump(8 * 86400.0)
        tiercache("tier", "run", "--once", code=0)
        tiercache("tier", "run", "--once", code=0)
    assert recalled(tmp_path) == {}
    assert len(bucket.keys("cold")) == 6


def test_the_plan_states_the_cost_and_the_time_of_the_restore(tiercache, bucket):
    *rows, summary = tiercache("tier", "get", "runs/a/*", "--dry-run", "--json").events
    restores = [one for one in rows if one["event"] == "restore"]
    assert [(one["path"], one["tier"], one["to"]) for one in restores] == [
        ("runs/a/step-1", "archive", "hot"),
        ("runs/a/step-2", "archive", "hot"),
    ]
    assert (summary["groups"], summary["here"], summary["restores"], summary["hours"]) == (3, 1, 6, 5.0)
    assert summary["cost"] > 6 * 0.05 / 1000
    assert "Restore" not in bucket.head("cold", "runs/a/step-1/.metadata")
    assert tiercache("tier", "get", "runs/a/step-1", "--dry-run").out.splitlines()[-1] == (
        "would recall 1 group, 34.2 KiB, for $0.00015; 3 objects to restore, up to 5 h (standard)"
    )


def test_a_running_restore_exits_with_5_and_the_same_command_continues(tiercache, bucket, tmp_path, restores_take):
    restores_take(6)
    done = tiercache("tier", "get", "runs/a/step-1", "--yes", code=5)
    assert "3 objects being restored; the same command continues, --wait waits" in done.out
    assert recalled(tmp_path) == {}
    *_, summary = tiercache("tier", "get", "runs/a/step-1", "--wait", "--yes", "--json").events
    assert (summary["copied"], summary["pending"]) == (1, 0)
    assert recalled(tmp_path) == PARTS


def test_the_error_of_a_file_that_must_be_restored_names_the_command(tiercache, bucket, tmp_path):
    for path in (tmp_path / "nvme/runs/a/step-1", tmp_path / "nvme/runs/a/step-1/.metadata"):
        with pytest.raises(tc.ArchivedShards, match=r"tiercache tier get .*/cold/runs/a/step-1.* --wait") as caught:
            tc.locate(path)
        words = caught.value.command.split()
        assert words[:3] == ["tiercache", "tier", "get"]
        tiercache(*words[1:], "--dry-run")


@pytest.fixture
def file_system(tmp_path):
    """Makes `tiercache` file systems over a target."""
    made = []
    with tc.Cache(tmp_path / "cache", size="64MiB", min_free="0") as cache:

        def over(target, **options):
            fs = fsspec.filesystem(
                "tiercache", target_protocol=target, cache=cache, skip_instance_cache=True, **options
            )
            made.append(fs)
            return fs

        yield over
        for fs in made:
            fs.close()


def test_a_file_that_moved_to_s3_is_read_through_the_cache_by_its_old_local_path(bucket, tmp_path, file_system):
    bucket.put("standard", "runs/b/step-1/model.bin", b"moved" * 1000, "STANDARD")
    fs, path = file_system("file"), tmp_path / "nvme/runs/b/step-1/model.bin"
    assert fs.cat_file(str(path)) == b"moved" * 1000
    assert fs.find(str(path.parent)) == [str(path)]
    assert tc.locate(path) == bucket.url("standard") + "/runs/b/step-1/model.bin"


def test_reading_an_archived_object_by_its_url_names_the_command(bucket, server, file_system):
    options = s3fs_options(server)
    fs = file_system("s3", target_options=options | {"skip_instance_cache": True})
    url = bucket.url("cold") + "/runs/a/step-1/__0_0.distcp"
    with pytest.raises(tc.ArchivedShards, match=r"tiercache tier get s3://.*__0_0\.distcp --wait"):
        fs.cat_file(url)


def test_a_recall_killed_at_any_point_goes_on_with_the_same_command(bucket, tmp_path, server, client, tiercache):
    def get():
        app(["tier", "get", "runs/a/step-1", "--yes"], standalone_mode=False)

    with HookAt() as reached:
        get()
    # tests/crash/tier strikes at every point of moves; these are of a recall alone, and the two ends of its copies.
    points = sorted({name for name in reached.reached if name.startswith("tier_recall.")})
    for name in (*points, "tier_move.parts_copied", "tier_move.copied", "tier_move.ended"):
        for path in sorted((tmp_path / "nvme/runs/a/step-1").glob("*")):
            path.unlink()
        with suppress(FileNotFoundError):
            (tmp_path / "nvme/runs/a/step-1/.metadata").unlink()
        with HookAt(name) as hook, pytest.raises(Killed):
            get()
        assert hook.hit
        found = recalled(tmp_path)
        assert ".metadata" not in found or found == PARTS, f"{name}: half a checkpoint looks whole"
        tiercache("tier", "run", "--once")  # a run in between takes nothing away
        assert recalled(tmp_path).keys() >= found.keys(), name
        get()
        assert recalled(tmp_path) == PARTS, name
        assert len(bucket.keys("cold")) == 6
