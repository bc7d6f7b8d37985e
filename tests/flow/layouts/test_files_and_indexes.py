"""Files of another library: a URL with wildcards, and the folder of kept indexes."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tiercache as tc
from tiercache.cache import Cache
from tiercache.errors import NotFound


def test_a_url_with_wildcards_opens_the_files_that_match(tmp_path, monkeypatch):
    monkeypatch.setenv("TIERCACHE_CACHE_DIR", str(tmp_path / "default-cache"))
    (tmp_path / "data").mkdir()
    for split, n in (("train", 3), ("test", 5)):
        for number in range(2):
            pq.write_table(
                pa.table({"x": list(range(n))}), tmp_path / "data" / f"{split}-0000{number}-of-00002.parquet"
            )
    assert len(tc.Dataset(tmp_path / "data" / "train-*")) == 6
    assert len(tc.Dataset(tmp_path / "*" / "test-*.parquet")) == 10
    assert len(tc.Dataset(tmp_path / "data" / "*")) == 16
    with pytest.raises(NotFound):
        tc.Dataset(tmp_path / "data" / "validation-*")


def test_a_cache_can_be_made_where_only_indexes_were_kept(tmp_path, monkeypatch):
    place = tmp_path / "default-cache"
    monkeypatch.setenv("TIERCACHE_CACHE_DIR", str(place))
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"x": [1, 2]}), tmp_path / "data" / "a.parquet")
    assert len(tc.Dataset(tmp_path / "data")) == 2
    assert [path.name for path in place.iterdir()] == ["indexes"]
    with Cache(place, size="1GB") as cache:
        assert len(tc.Dataset(tmp_path / "data", cache=cache)) == 2
