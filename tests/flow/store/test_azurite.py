"""Azure with the real protocol, against Azurite, whose installation takes half a minute and whose start takes 4 s."""

from __future__ import annotations

import uuid

import numpy as np
import obstore.store
import pytest
from tests.support.local_servers import azurite
from tests.support.store_suite import StoreSuite

import tiercache as tc
from tiercache.errors import CommitConflict, StoreError
from tiercache.store import CloudStore, open_store

pytestmark = pytest.mark.integration
MIB = 1 << 20


@pytest.fixture(scope="module")
def account(tmp_path_factory):
    with azurite(tmp_path_factory.mktemp("azurite"), "tiercache") as options:
        yield options


@pytest.fixture
def url():
    return f"az://tiercache/test-{uuid.uuid4().hex[:8]}"


class TestAzureOnAzurite(StoreSuite):
    @pytest.fixture
    def store(self, account, url):
        folder = url.rpartition("/")[2]
        config = {name: account[name] for name in ("account_name", "account_key", "endpoint")}
        self.raw = obstore.store.AzureStore(
            "tiercache", prefix=folder, config=config, client_options={"allow_http": True}
        )
        store = open_store(url, **account)
        assert isinstance(store, CloudStore)
        yield store
        store.close()

    def raw_put(self, store, key, data):
        obstore.put(self.raw, key, data)

    def raw_get(self, store, key):
        return bytes(obstore.get(self.raw, key).bytes())


def test_a_data_set_is_written_appended_to_and_read(account, url):
    schema = {"id": "int64", "x": tc.Tensor("uint8", (256,))}
    values = np.random.default_rng(1).integers(0, 256, (1000, 256), np.uint8)
    for mode, first in (("create", 0), ("append", 500)):
        with tc.Writer(url, schema=schema, mode=mode, shard_size="64KiB", storage_options=account) as writer:
            writer.write_batch({"id": np.arange(first, first + 500), "x": values[first : first + 500]})
    with pytest.raises(CommitConflict):
        tc.Writer(url, schema=schema, storage_options=account)
    dataset = tc.Dataset(url, cache=False, storage_options=account)
    seen = []
    for batch in tc.DataLoader(dataset, batch_size=50, shuffle=True):
        seen += batch["id"].tolist()
        np.testing.assert_array_equal(batch["x"].numpy(), values[batch["id"].numpy()])
    assert sorted(seen) == [*range(1000)]
    dataset.close()


def test_a_wrong_account_key_is_an_error_that_is_not_retryable(account, url):
    store = open_store(url, **{**account, "account_key": "d3Jvbmcta2V5"})
    with pytest.raises(StoreError, match="403") as caught:
        store.get("a")
    assert not caught.value.retryable
    assert "d3Jvbmcta2V5" not in str(caught.value)
    store.close()
