"""Buckets through obstore."""

from __future__ import annotations

import pytest

from tiercache.store import CloudStore
from tiercache.store.obstore import ObstoreClient
from tiercache.testing.suite import StoreSuite


class S3Suite(StoreSuite):
    @pytest.fixture
    def store(self, door):
        store = door.server.store(door.prefix)
        assert isinstance(store, CloudStore)
        yield store
        assert isinstance(store.client, ObstoreClient)
        store.close()

    def raw_put(self, store, key, data):
        self.door.put(key, data)

    def raw_get(self, store, key):
        return self.door.get(key)

    @pytest.fixture(autouse=True)
    def _keep_door(self, door):
        self.door = door


@pytest.mark.s3
class TestS3OnSeaweedFS(S3Suite):
    @pytest.fixture
    def door(self, s3):
        return s3


@pytest.mark.s3
class TestS3OnMoto(S3Suite):
    @pytest.fixture
    def door(self, moto):
        return moto


def test_keys_that_are_given_are_not_joined_with_a_token_of_the_environment(s3, monkeypatch):
    s3.put("a", b"data")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of other keys")
    store = s3.server.store(s3.prefix)
    assert store.get("a") == b"data"
    store.close()
