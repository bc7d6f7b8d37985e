"""Copies and class changes in buckets: on SeaweedFS, which returns checksums, and on moto, which archives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tiercache._native.checksum import crc32c
from tiercache.errors import ObjectChanged, StoreError
from tiercache.prices import PART_BYTES
from tiercache.tier.journal import PlannedObject
from tiercache.tier.rules import RuleFile, Tier
from tiercache.tier.stores import Stores
from tiercache.tier.transfer import Transfer

pytestmark = pytest.mark.s3

SMALL = b"a small object"
LARGE = os.urandom(2 * PART_BYTES + 1234)
SIZES = pytest.mark.parametrize(
    "data", [b"", SMALL, LARGE[:PART_BYTES], LARGE], ids=["empty", "small", "part", "large"]
)


class Bucket:
    """Tiers in a folder of a server's bucket."""

    def __init__(self, server, tmp_path):
        self.server, self.folder = server, f"transfer-{os.urandom(4).hex()}"
        self.options = server.storage_options
        self.url = f"{server.url}/{self.folder}"
        tiers = (
            self._tier("hot", str(tmp_path / "hot"), {}),
            self._tier("standard", f"{self.url}/standard"),
            self._tier("cold", f"{self.url}/standard", storage_class="GLACIER_IR"),
            self._tier("archive", f"{self.url}/archive", storage_class="GLACIER"),
            self._tier("other", f"{self.url}/other"),
        )
        self.stores = Stores(RuleFile(path=Path("rules.toml"), sha256="", tiers=tiers))
        self.transfer = Transfer(self.stores)

    def _tier(self, name, url, options=None, **more):
        return Tier(name=name, url=url, storage_options=self.options if options is None else options, **more)

    def planned(self, tier, key="a"):
        info = self.stores.head(tier, key)
        return PlannedObject(key, info.n_bytes, info.etag, info.modified_s)

    def copy(self, src, dst, key="a", **more):
        return self.transfer.copy(src, dst, self.planned(src, key), **more)

    def bytes_read(self, tier):
        return self.stores.store(tier).counters["bytes_read"]


@pytest.fixture(params=["seaweedfs", "moto"])
def bucket(request, tmp_path):
    server = request.getfixturevalue("s3_server" if request.param == "seaweedfs" else "moto_server")
    made = Bucket(server, tmp_path)
    yield made
    made.transfer.close()
    made.stores.close()


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_a_copy_into_an_archive_has_its_class_and_is_verified_without_being_read(bucket, data):
    bucket.stores.store("hot").put("a", data)
    assert bucket.copy("hot", "archive").crc32c == crc32c(data)
    info = bucket.stores.head("archive", "a")
    assert (info.storage_class, info.n_bytes, bucket.bytes_read("archive")) == ("GLACIER", len(data), 0)


def test_an_archived_object_cannot_be_copied(bucket):
    bucket.stores.store("hot").put("a", SMALL)
    bucket.copy("hot", "archive")
    with pytest.raises(StoreError, match="must be restored first: tiercache tier get a") as caught:
        bucket.copy("archive", "standard")
    assert caught.value.details["archived"]


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_the_server_copies_between_its_folders(bucket, data):
    bucket.stores.store("standard").put("a", data)
    copied = bucket.copy("standard", "archive")
    info = bucket.stores.head("archive", "a")
    assert (copied.n_bytes, info.storage_class) == (len(data), "GLACIER")
    assert (copied.etag, bucket.bytes_read("standard")) == (info.etag, 0)


def test_bytes_are_streamed_if_the_checksums_of_the_server_prove_nothing(s3_server, tmp_path):
    here = Bucket(s3_server, tmp_path)
    with here.transfer, here.stores:
        with here.stores.store("standard").create("a") as upload:  # in parts: its ETag is of parts, and there is no sum
            upload.put_part(0, LARGE)
            upload.complete()
        assert here.copy("standard", "archive").crc32c == crc32c(LARGE)
        assert here.bytes_read("standard") == len(LARGE)


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_a_class_is_changed_in_place(bucket, data):
    bucket.stores.store("standard").put("a", data)
    done = bucket.transfer.change_class("cold", bucket.planned("standard"))
    info = bucket.stores.head("cold", "a")
    assert (info.storage_class, info.n_bytes, done.etag) == ("GLACIER_IR", len(data), info.etag)
    assert bucket.stores.store("standard").get("a") == data


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_without_boto3_a_copy_is_read_back(s3_server, tmp_path, monkeypatch, data):
    monkeypatch.setattr("tiercache.tier.stores.has_boto3", lambda: False)
    here = Bucket(s3_server, tmp_path)
    here.stores.store("hot").put("a", data)
    with here.transfer, here.stores:
        here.copy("hot", "standard")
        assert here.bytes_read("standard") == len(data)


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_the_class_of_a_changed_object_is_not_changed(bucket, data):
    bucket.stores.store("standard").put("a", data)
    one = bucket.planned("standard")
    bucket.stores.store("standard").put("a", data[::-1])
    with pytest.raises(ObjectChanged, match="what was planned"):
        bucket.transfer.change_class("cold", one)
    assert bucket.stores.head("standard", "a").storage_class == "STANDARD"


@pytest.mark.parametrize("dst", ["archive", "other"])
def test_a_server_side_copy_is_compared_with_the_known_checksum(bucket, dst):
    bucket.stores.store("standard").put("a", SMALL)
    info = bucket.stores.head("standard", "a")
    known = PlannedObject("a", info.n_bytes, info.etag, crc32c=crc32c(SMALL))
    assert bucket.transfer.copy("standard", dst, known).crc32c == crc32c(SMALL)
    with pytest.raises(StoreError, match="the source is not what it should be"):
        bucket.transfer.copy("standard", dst, known._replace(crc32c=crc32c(SMALL) ^ 1))


@pytest.mark.parametrize("src", ["hot", "standard"])
@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_a_copy_that_must_be_new_replaces_nothing(s3_server, tmp_path, src, data):
    here = Bucket(s3_server, tmp_path)
    with here.transfer, here.stores:
        here.stores.store(src).put("a", data)
        assert here.copy(src, "other", replaces=False).n_bytes == len(data)
        here.stores.store("other").put("a", b"mine")
        with pytest.raises(ObjectChanged, match="not overwritten"):
            here.copy(src, "other", replaces=False)
        assert here.stores.store("other").get("a") == b"mine"
        assert here.copy(src, "other").n_bytes == len(data)


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_a_copy_that_must_be_new_replaces_nothing_without_boto3(s3_server, tmp_path, monkeypatch, data):
    monkeypatch.setattr("tiercache.tier.stores.has_boto3", lambda: False)
    here = Bucket(s3_server, tmp_path)
    here.stores.store("hot").put("a", data)
    here.stores.store("other").put("a", b"mine")
    with here.transfer, here.stores, pytest.raises(ObjectChanged, match="not overwritten"):
        here.copy("hot", "other", replaces=False)
    assert here.stores.store("other").get("a") == b"mine"
    here.stores.close()


def test_a_changed_object_is_not_deleted(s3_server, tmp_path):
    here = Bucket(s3_server, tmp_path)
    with here.transfer, here.stores:
        here.stores.store("standard").put("a", b"old")
        planned = here.planned("standard")
        here.stores.store("standard").put("a", b"new")
        with pytest.raises(StoreError, match="PreconditionFailed"):
            here.transfer.delete_objects("standard", [planned])
        assert here.stores.store("standard").get("a") == b"new"
