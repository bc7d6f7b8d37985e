"""Plain HTTP ranges from a real nginx."""

from __future__ import annotations

import numpy as np
import pytest
from tests.support.local_servers import nginx_over
from tests.support.store_suite import ReadSuite

import tiercache as tc
from tiercache.store import CloudStore, open_store


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder, and the URL under which nginx serves it."""
    root = tmp_path_factory.mktemp("served")
    with nginx_over(root, tmp_path_factory.mktemp("nginx")) as url:
        yield root, url


@pytest.mark.stress
class TestHttpOnNginx(ReadSuite):
    @pytest.fixture
    def store(self, served, request):
        self.folder = served[0] / f"{abs(hash(request.node.name))}"
        store = open_store(f"{served[1]}/{self.folder.name}")
        assert isinstance(store, CloudStore)
        yield store
        store.close()

    def raw_put(self, store, key, data):
        (self.folder / key).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / key).write_bytes(data)


def test_an_epoch_is_read_from_nginx(served):
    root, url = served
    values = np.random.default_rng(1).integers(0, 256, (1000, 256), np.uint8)
    data = root / "data"
    with tc.Writer(data, schema={"id": "int64", "x": tc.Tensor("uint8", (256,))}, shard_size="64KiB") as writer:
        writer.write_batch({"id": np.arange(1000), "x": values})
    dataset = tc.Dataset(f"{url}/data", cache=False)
    seen = []
    for batch in tc.DataLoader(dataset, batch_size=50, shuffle=True):
        seen += batch["id"].tolist()
        np.testing.assert_array_equal(batch["x"].numpy(), values[batch["id"].numpy()])
    assert sorted(seen) == [*range(1000)]
    dataset.close()
