"""What people read through `tiercache::`: tables, checkpoints, archives. Bytes are counted at the source."""

from __future__ import annotations

import io

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch

N_ROWS = 100_000
COLUMNS = ("a", "b", "c", "d")
COLUMN_BYTES = 8 * N_ROWS
# pyarrow begins with the last 64 KiB, where the footer is.
FOOTER_BYTES = 64 << 10


@pytest.fixture
def table():
    values = np.random.default_rng(1)
    return pa.table({name: values.integers(0, 1 << 62, N_ROWS) for name in COLUMNS})


@pytest.fixture
def tables(source, table):
    """Two Parquet files of four columns, each in one piece of 800 kB."""
    for name in ("first", "second"):
        out = io.BytesIO()
        pq.write_table(table, out, compression="none", use_dictionary=False, row_group_size=N_ROWS)
        source.pipe_file(f"/b/{name}.parquet", out.getvalue())
    source.n_bytes_read()
    return "/b"


@pytest.fixture
def url_of(cache):
    """URLs that pandas takes, with its storage_options."""
    yield lambda path: (f"tiercache::counted://{path.lstrip('/')}", {"cache": cache})
    for fs in list(fsspec.get_filesystem_class("tiercache")._cache.values()):
        fs.close()
    fsspec.get_filesystem_class("tiercache").clear_instance_cache()


def test_pandas_reads_a_column_and_fetches_that_column(source, tables, table, url_of):
    url, options = url_of("/b/first.parquet")
    frame = pd.read_parquet(url, columns=["b"], storage_options=options)
    assert frame["b"].tolist() == table["b"].to_pylist()
    assert COLUMN_BYTES <= source.n_bytes_read() <= COLUMN_BYTES + FOOTER_BYTES + 8192
    frame = pd.read_parquet(url, columns=["b"], storage_options=options)
    assert len(frame) == N_ROWS
    assert source.n_bytes_read() == 0
    assert pd.read_parquet(url, storage_options=options).equals(table.to_pandas())
    assert source.n_bytes_read() < 3.2 * COLUMN_BYTES


def test_a_pyarrow_dataset_fetches_the_columns_it_reads(fs, source, tables, table):
    for expected_bytes in (2 * COLUMN_BYTES, 0):
        data = pyarrow.dataset.dataset("/b", filesystem=fs, format="parquet")
        assert data.to_table(columns=["c"])["c"].to_pylist() == 2 * table["c"].to_pylist()
        more_bytes = 2 * (FOOTER_BYTES + 16384) if expected_bytes else 0
        assert expected_bytes <= source.n_bytes_read() <= expected_bytes + more_bytes
    assert data.count_rows() == 2 * N_ROWS


def test_reading_row_groups_fetches_only_these(fs, source, table):
    out = io.BytesIO()
    pq.write_table(table, out, compression="none", use_dictionary=False, row_group_size=N_ROWS // 4)
    source.pipe_file("/b/x.parquet", out.getvalue())
    for expected_bytes in (COLUMN_BYTES, 0):
        with fs.open("/b/x.parquet") as file:
            assert pq.ParquetFile(file).read_row_group(2).num_rows == N_ROWS // 4
        assert source.n_bytes_read() <= (expected_bytes + FOOTER_BYTES + 16384 if expected_bytes else 0)


def test_a_checkpoint_is_loaded(fs, source):
    state = {"weights": torch.arange(500_000, dtype=torch.float32), "step": 7, "more": [torch.ones(3), "text"]}
    with source.open("/b/checkpoint.pt", "wb") as file:
        torch.save(state, file)
    source.n_bytes_read()
    for expected_bytes in (2_000_000, 0):
        with fs.open("/b/checkpoint.pt", "rb") as file:
            loaded = torch.load(file)
        assert torch.equal(loaded["weights"], state["weights"])
        assert loaded["step"] == 7
        assert expected_bytes <= source.n_bytes_read() <= 1.1 * expected_bytes


@pytest.mark.s3
def test_s3_sends_each_byte_once(make, s3_server, s3_of, table):
    fs = make("s3", target_options=s3_of(s3_server))
    path = f"{s3_server.bucket}/any-url/t.parquet"
    with fs.fs.open(path, "wb") as file:
        pq.write_table(table, file, compression="none", use_dictionary=False)
    for expected_bytes in (COLUMN_BYTES, 0):
        sent = s3_server.bytes_sent()
        read = pq.read_table(path, columns=["d"], filesystem=fs)
        assert read["d"].equals(table["d"])
        if sent is not None:
            now = s3_server.bytes_sent() - sent
            assert expected_bytes <= now <= expected_bytes + (FOOTER_BYTES + 16384) * (expected_bytes > 0)
    fs.fs.rm(path)
    with pytest.raises(FileNotFoundError):
        fs.open(path)
