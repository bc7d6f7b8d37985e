"""Buckets through obstore."""

from __future__ import annotations

import pytest
from tests.support.store_suite import StoreSuite, pattern, read_ranges

from tiercache.errors import NotFound, StoreError
from tiercache.model import ByteRange
from tiercache.store import CloudStore, open_store
from tiercache.store.obstore import ObstoreClient

MIB = 1 << 20


@pytest.mark.s3
class TestS3(StoreSuite):
    @pytest.fixture
    def store(self, s3):
        self.door = s3
        store = s3.server.store(s3.prefix)
        assert isinstance(store, CloudStore)
        yield store
        assert isinstance(store.client, ObstoreClient)
        store.close()

    def raw_put(self, store, key, data):
        self.door.put(key, data)

    def raw_get(self, store, key):
        return self.door.get(key)


@pytest.mark.s3
def test_google_objects_are_written_read_listed_and_deleted(moto):
    """Google's client uses the XML interface, which is S3's in these requests.

    moto knows neither x-goog-if-generation-match nor x-goog-copy-source, so conditional puts are not tested;
    gcp-storage-emulator and fake-gcs-server refuse the uploads of the XML interface.
    """
    given = {"base_url": moto.server.endpoint, "bearer_token": "token"}
    store = open_store(f"gs://{moto.server.bucket}/{moto.prefix}", **given)
    parts = [pattern(9 * MIB, seed) for seed in range(2)]
    etag = store.put("small", b"data").etag
    assert store.get("small") == b"data"
    assert store.read_tail("small", 3) == (b"ata", store.head("small"))
    assert read_ranges(store, "small", [ByteRange(1, 3), ByteRange(0, 1)], if_match=etag) == [b"at", b"d"]
    with pytest.raises(NotFound):
        store.get("no/such")
    with store.create("folder/big") as upload:
        for number, part in enumerate(parts):
            upload.put_part(number, part)
        assert [info.key for info in store.list()] == ["small"]
        upload.complete()
    assert moto.get("folder/big") == b"".join(parts)
    assert sorted((info.key, info.n_bytes) for info in store.list()) == [("folder/big", 18 * MIB), ("small", 4)]
    with store.create("other") as upload:
        for number, part in enumerate(parts):
            upload.put_part(number, part)
    assert moto.uploads() == []
    store.delete(["small", "missing", "folder/big"])
    assert list(store.list()) == []
    store.close()


@pytest.mark.s3
def test_explicit_keys_are_not_combined_with_a_token_of_the_environment(s3, monkeypatch):
    s3.put("a", b"data")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of other keys")
    store = s3.server.store(s3.prefix)
    assert store.get("a") == b"data"
    store.close()


@pytest.mark.s3
def test_wrong_keys_are_an_error_that_is_not_retryable(s3):
    store = open_store(s3.server.url, **{**s3.server.storage_options, "secret_access_key": "wrong-s3cret"})
    with pytest.raises(StoreError, match="403") as caught:
        store.get("a")
    assert not caught.value.retryable
    assert "wrong-s3cret" not in str(caught.value)
    store.close()
