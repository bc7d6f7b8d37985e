"""restore: objects of class GLACIER in moto, whose restores take as many requests as a test sets."""

import json
import urllib.request
import uuid

import pytest
from botocore.config import Config
from botocore.session import Session

from tiercache.demo.s3_server import S3Server

RULES = """
[tiers.standard]
url = "{url}/{prefix}/standard"
prices = "aws:us-east-1:STANDARD"
storage_options = {options}

[tiers.archive]
url = "{url}/{prefix}/cold"
storage_class = "GLACIER"
prices = "aws:us-east-1:GLACIER"
storage_options = {options}

[tiering]
state_dir = "state"
"""

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
    bucket = Bucket(server, client)
    options = ", ".join(f"{name} = {json.dumps(value)}" for name, value in server.storage_options.items())
    rules = RULES.format(url=server.url, prefix=bucket.prefix, options=f"{{ {options} }}")
    (tmp_path / "tiercache.toml").write_text(rules)
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c"):
        bucket.put("cold", f"runs/{name}/data.bin", name.encode() * 1000, "GLACIER")
    bucket.put("standard", "notes.txt", b"here", "STANDARD")
    return bucket


# Of three objects, 3,000 bytes: a GET from GLACIER and a PUT to STANDARD each, and three days as a temporary copy.
COPIED_HOME = 3 * (0.0004 + 0.005) / 1000 + 3000 / 2**30 * 0.023 * 3 / 30


def test_a_dry_run_prints_the_cost_and_requests_nothing(tiercache, bucket):
    *objects, summary = tiercache("restore", "runs", "--dry-run", "--json").events
    assert [(one["key"], one["state"]) for one in objects] == [(f"runs/{n}/data.bin", "archived") for n in "abc"]
    assert (summary["objects"], summary["n_bytes"], summary["hours"]) == (3, 3000, 5.0)
    assert summary["cost"] == pytest.approx(3 * 0.05 / 1000 + 3000 / 2**30 * 0.01 + COPIED_HOME)
    assert "Restore" not in bucket.head("cold", "runs/a/data.bin")
    assert tiercache("restore", "runs", "--dry-run").out == (
        "would restore 3 objects, 2.9 KiB, for $0.00017, up to 5 h (standard)\n"
    )


def test_restored_objects_are_copied_home_and_the_archived_copies_stay(tiercache, bucket):
    summary = tiercache("restore", "runs/a", "--yes", "--json").events[-1]
    assert (summary["objects"], summary["copied"], summary["stopped"], summary["pending"]) == (1, 1, 0, 0)
    assert bucket.get("standard", "runs/a/data.bin") == b"a" * 1000
    assert bucket.keys("cold") == [f"runs/{n}/data.bin" for n in "abc"]
    assert tiercache("restore", "runs/a").out.startswith("nothing to restore: all objects can be read")


def test_running_restores_exit_with_5_and_the_same_command_continues(tiercache, bucket, restores_take):
    restores_take(6)
    done = tiercache("restore", "runs/a", "--yes", code=5)
    assert done.out == "1 object being restored, up to 5 h (standard); give --wait to wait and to copy them home\n"
    assert bucket.keys("standard") == ["notes.txt"]
    summary = tiercache("restore", "runs/a", "--wait", "--json").events[-1]
    assert (summary["started"], summary["running"], summary["copied"]) == (0, 1, 1)
    assert bucket.get("standard", "runs/a/data.bin") == b"a" * 1000


def test_with_days_only_a_temporary_copy_is_made(tiercache, bucket):
    out = tiercache("restore", "runs/a", "--days", "3", "--yes").out
    assert out == "1 object can be read for 3 days\n"
    assert bucket.keys("standard") == ["notes.txt"]
    assert bucket.get("cold", "runs/a/data.bin") == b"a" * 1000


def test_names_after_a_url_are_relative_to_it(tiercache, bucket):
    """As ArchivedShards says it: the URL of the data set, then names of shards."""
    *objects, _ = tiercache(
        "restore", bucket.url("standard") + "/runs", "a/data.bin", "c/data.bin", "--dry-run", "--json"
    ).events
    assert [one["key"] for one in objects] == ["runs/a/data.bin", "runs/c/data.bin"]


def test_a_glob_selects_objects(tiercache, bucket):
    *objects, _ = tiercache("restore", "runs/[ab]/**", "--dry-run", "--json").events
    assert [one["key"] for one in objects] == ["runs/a/data.bin", "runs/b/data.bin"]


def test_each_speed_has_its_own_price(tiercache, bucket):
    summary = tiercache("restore", "runs", "--speed", "bulk", "--dry-run", "--json").events[-1]
    assert (summary["cost"], summary["hours"]) == (pytest.approx(COPIED_HOME), 12.0)
    assert "--speed: 'slow' is not one of expedited" in tiercache("restore", "runs", "--speed", "slow", code=2).err


def test_a_restore_needs_a_confirmation(tiercache, bucket):
    assert tiercache("restore", "runs", code=2).err.endswith("not a terminal; give --yes\n")
    assert "Restore" not in bucket.head("cold", "runs/a/data.bin")


def test_a_path_that_does_not_exist_is_an_error(tiercache, bucket):
    assert "no object has this name or matches it" in tiercache("restore", "runs/z", code=1).err
