"""A URL of files of another library may have wildcards, as a source of `tiercache pack` may."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tiercache as tc
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
    assert len(tc.Dataset(tmp_path / "data")) == 16
    with pytest.raises(NotFound):
        tc.Dataset(tmp_path / "data" / "validation-*")
