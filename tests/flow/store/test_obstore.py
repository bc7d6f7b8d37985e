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
def test_aws_environment_variables_open_a_bucket(s3, monkeypatch):
    for name, value in s3.server.environment.items():
        monkeypatch.setenv(name, value)
    store = open_store(f"{s3.server.url}/{s3.prefix}")
    store.put("a", b"x")
    assert s3.get("a") == b"x"
    store.close()


@pytest.mark.s3
def test_option_names_of_s3fs_open_a_bucket(s3):
    server = s3.server
    names = {"key": server.access_key_id, "secret": server.secret_access_key, "anon": False, "token": None}
    store = open_store(
        f"{server.url}/{s3.prefix}",
        endpoint_url=server.endpoint,
        region="us-east-1",
        **names,
    )
    store.put("a", b"x")
    assert s3.get("a") == b"x"
    store.close()


@pytest.mark.s3
def test_a_profile_opens_a_bucket(s3, monkeypatch, tmp_path):
    file = tmp_path / "credentials"
    keys = f"aws_access_key_id={s3.server.access_key_id}\naws_secret_access_key={s3.server.secret_access_key}\n"
    file.write_text(f"[work]\n{keys}")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.server.endpoint)
    for options in ({"profile": "work"}, {}):
        store = open_store(f"{s3.server.url}/{s3.prefix}", **options)
        store.put("a", b"x")
        assert s3.get("a") == b"x"
        store.close()
        monkeypatch.setenv("AWS_PROFILE", "work")


@pytest.mark.s3
def test_wrong_keys_are_an_error_that_is_not_retryable(s3):
    store = open_store(s3.server.url, **{**s3.server.storage_options, "secret_access_key": "wrong-s3cret"})
    with pytest.raises(StoreError, match="403") as caught:
        store.get("a")
    assert not caught.value.retryable
    assert "wrong-s3cret" not in str(caught.value)
    store.close()
