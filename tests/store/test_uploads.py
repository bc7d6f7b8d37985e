"""Uploads to real S3, larger than one request."""

from __future__ import annotations

import pytest

from tiercache.errors import StoreError
from tiercache.store import FsspecStore
from tiercache.store.options import CloudOptions
from tiercache.testing.suite import pattern

pytestmark = pytest.mark.s3
MIB = 1 << 20
PARTS = [pattern(6 * MIB, seed) for seed in range(3)] + [b"end"]


@pytest.fixture
def store(s3):
    store = s3.server.store(s3.prefix)
    yield store
    store.close()


def _send(upload, order=(0, 1, 2, 3)):
    for number in order:
        upload.put_part(number, PARTS[number])


def test_a_large_upload_is_invisible_until_it_is_complete(s3, store):
    with store.create("big") as upload:
        _send(upload)
        assert list(store.list()) == []
        info = upload.complete()
    assert info.n_bytes == sum(map(len, PARTS))
    assert s3.get("big") == b"".join(PARTS)


def test_a_large_upload_that_is_aborted_leaves_nothing(s3, store):
    with store.create("big") as upload:
        _send(upload)
    assert list(store.list()) == []
    assert s3.uploads() == []


def test_a_large_conditional_upload_replaces_nothing(s3, store):
    for wins in (True, False):
        with store.create("big") as upload:
            _send(upload)
            assert (upload.complete(if_absent=True) is not None) == wins
    assert s3.get("big") == b"".join(PARTS)
    assert [info.key for info in store.list()] == ["big"]
    listed = s3.client.list_objects_v2(Bucket=s3.server.bucket, Prefix=s3.prefix)["Contents"]
    assert [found["Key"] for found in listed] == [f"{s3.prefix}/big"], "no temporary object is left"


def test_s3fs_uploads_large_objects_and_aborts(s3):
    url = f"{s3.server.url}/{s3.prefix}"
    store = FsspecStore(url, url, CloudOptions.parse("s3", s3.server.storage_options).for_s3fs())
    with store.create("big") as upload:
        _send(upload)
        assert upload.complete(if_absent=True) is not None
    assert s3.get("big") == b"".join(PARTS)
    with store.create("big") as upload:
        _send(upload, (0,))
        assert upload.complete(if_absent=True) is None
    with store.create("other") as upload:
        _send(upload, (0,))
    assert s3.uploads() == []
    store.close()


def test_a_failed_part_ends_the_upload_and_leaves_nothing(s3, store, monkeypatch):
    def fail(key, writer, data):
        raise StoreError("broken", url="u", retryable=False)

    with store.create("broken") as upload:
        upload.put_part(0, bytes(17 * MIB))
        monkeypatch.setattr(store, "write", fail)
        with pytest.raises(StoreError, match="broken"):
            upload.put_part(1, b"x")
        for call in (lambda: upload.put_part(2, b"x"), upload.complete):
            with pytest.raises(ValueError, match="failed"):
                call()
    assert list(store.list()) == []
    assert s3.uploads() == []
