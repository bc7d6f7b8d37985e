"""The bucket of the tests of tiers keeps the contract of stores, and archives and restores as S3 does."""

import pytest
from tests.support.clock import JumpingClock
from tests.support.disk_bucket import (
    RESTORE_S,
    DiskBucket,
    Script,
    about_now,
    file_name,
    read_object,
    write_object,
)
from tests.support.store_suite import StoreSuite

from tiercache.errors import StoreError
from tiercache.tier.snapshot import ARCHIVED, RESTORED, RESTORING
from tiercache.tier.stores import state_of


class TestDiskBucket(StoreSuite):
    @pytest.fixture
    def store(self, tmp_path):
        return DiskBucket(tmp_path / "bucket", "s3://bucket", Script())

    def raw_put(self, store, key, data):
        write_object(store.root / file_name(key), about_now(data, ""), data)

    def raw_get(self, store, key):
        return read_object(store.root / file_name(key))[1]


@pytest.fixture
def bucket(tmp_path):
    return DiskBucket(tmp_path, "s3://bucket", Script())


def archive(bucket, key="a", data=b"data"):
    with bucket.create(key, storage_class="GLACIER") as upload:
        upload.put_part(0, data)
        upload.complete()


def test_an_archived_object_cannot_be_read_copied_or_reclassed(bucket):
    archive(bucket)
    for read in (bucket.get, lambda key: bucket.set_class(key, "STANDARD")):
        with pytest.raises(StoreError, match="InvalidObjectState") as caught:
            read("a")
        assert caught.value.details["archived"]


def test_a_restored_copy_can_be_read_until_it_expires(bucket):
    archive(bucket)
    with JumpingClock() as clock:
        states = [state_of(bucket.head("a"))]
        assert bucket.restore("a", days=2) == "started"
        assert bucket.restore("a", days=2) == "running"
        states.append(state_of(bucket.head("a")))
        clock.jump(RESTORE_S + 1)
        states.append(state_of(bucket.head("a")))
        assert bucket.get("a") == b"data"
        clock.jump(3 * 86_400)
        states.append(state_of(bucket.head("a")))
    assert states == [ARCHIVED, RESTORING, RESTORED, ARCHIVED]
