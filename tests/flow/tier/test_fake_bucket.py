"""The bucket of the tests of tiers keeps the contract of stores, and archives and restores as S3 does."""

import pytest
from tests.support.disk_bucket import (
    DiskBucket,
    Script,
    about_now,
    file_name,
    read_object,
    write_object,
)
from tests.support.store_suite import StoreSuite


class TestDiskBucket(StoreSuite):
    @pytest.fixture
    def store(self, tmp_path):
        return DiskBucket(tmp_path / "bucket", "s3://bucket", Script())

    def raw_put(self, store, key, data):
        write_object(store.root / file_name(key), about_now(data, ""), data)

    def raw_get(self, store, key):
        return read_object(store.root / file_name(key))[1]
