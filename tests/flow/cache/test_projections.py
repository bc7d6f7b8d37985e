"""A data set through the cache: only the served columns are fetched."""

import numpy as np
import pytest

import tiercache as tc

MIB = 1 << 20


@pytest.fixture
def wide(tmp_path):
    """A data set in a local folder, read through a cache all the same: a small column, and one that is nearly all."""
    rng = np.random.default_rng(1)
    url = str(tmp_path / "wide")
    with tc.Writer(url, schema={"x": "int64", "blob": "bytes"}, shard_size=2 * MIB, block_size=MIB // 4) as writer:
        for number in range(3000):
            writer.write({"x": number, "blob": rng.bytes(2000)})
    return url


def test_a_projection_fetches_its_columns_and_nothing_else(wide, tmp_path):
    with tc.Cache(tmp_path / "cache", size="100MB", min_free=0) as cache:
        dataset = tc.Dataset(wide, columns=["x"], cache=cache)
        loader = tc.DataLoader(dataset, batch_size=100)
        assert np.concatenate([batch["x"] for batch in loader]).tolist() == list(range(3000))
        projected = cache.stats()["bytes_fetched"]
        assert projected < 1 * MIB
        dataset.close()
        again = tc.Dataset(wide, columns=["x"], cache=cache)
        assert [again[i]["x"] for i in range(0, 3000, 100)] == list(range(0, 3000, 100))
        assert cache.stats()["bytes_fetched"] == projected
        again.close()
        whole = tc.Dataset(wide, cache=cache)
        for batch in tc.DataLoader(whole, batch_size=100):
            assert len(batch["blob"]) == 100
        whole.close()
        n_bytes = sum(p.stat().st_size for p in (tmp_path / "wide").rglob("*") if p.is_file())
        assert cache.stats()["bytes_fetched"] <= n_bytes
        assert not list((tmp_path / "cache" / "copies").glob("*.part"))
