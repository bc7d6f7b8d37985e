"""polars and DuckDB read data sets through Arrow's stream interface."""

import re
from pathlib import Path

import numpy as np
import pytest

import tiercache as tc

pytestmark = pytest.mark.integration


def test_the_examples_of_the_guide_with_polars_and_duckdb_run(tmp_path, monkeypatch):
    for needed in ("polars", "duckdb", "torch", "pandas"):
        pytest.importorskip(needed)
    page = (Path(__file__).parents[2] / "docs" / "guide" / "datasets.md").read_text()
    code = re.findall(r"^```python[^\n]*\n(.*?)^```", page, re.M | re.S)
    assert any("duckdb.sql" in block for block in code)
    monkeypatch.chdir(tmp_path)
    exec("\n".join(code), {})


def test_polars_and_duckdb_read_each_kind_of_column_as_the_guide_says(tmp_path):
    polars, duckdb = pytest.importorskip("polars"), pytest.importorskip("duckdb")
    schema = {"image": "image<png>", "x": "float32[2, 2]", "track": "int16[*, 2]", "half": "bfloat16", "meta": "json?"}
    with tc.Writer(tmp_path / "set", schema=schema, block_size=200) as writer:
        for i in range(50):
            meta = None if i % 3 == 0 else {"i": i}
            track = np.full((i % 4, 2), i)
            writer.write({"image": bytes([i]), "x": np.full((2, 2), i), "track": track, "half": i, "meta": meta})
    dataset = tc.Dataset(tmp_path / "set")
    frame = polars.from_arrow(dataset.to_arrow())
    if hasattr(polars.Series, "ext"):
        tc.pack(frame, tmp_path / "again", schema={"meta": "json?"})
        assert tc.Dataset(tmp_path / "again").schema == dataset.schema
        frame = frame.with_columns(polars.col("image", "x", "track", "half").ext.storage())
    found = duckdb.from_arrow(dataset.to_arrow()).fetchall()
    for i, (row, (image, x, track, half, meta)) in enumerate(zip(frame.rows(named=True), found, strict=True)):
        assert row["image"] == image == bytes([i])
        assert list(row["x"]) == list(x) == [i] * 4
        assert list(row["track"]["shape"]) == list(track["shape"]) == [i % 4, 2]
        assert list(row["track"]["data"]) == list(track["data"]) == [i] * (i % 4 * 2)
        assert row["half"] == half == np.float32(i).view(np.uint32) >> 16
        assert row["meta"] == meta == (None if i % 3 == 0 else f'{{"i":{i}}}')
