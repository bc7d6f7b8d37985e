"""A packed data set of which every record says its number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tiercache as tc


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that packs n records, in shards of some 100 and blocks of some 13, and gives the folder."""

    def make(n: int, name: str | None = None) -> Path:
        path = tmp_path_factory.mktemp("packed") / (name or f"of-{n}")
        schema = {"id": "int64", "values": tc.Tensor("float32", (17,))}
        with tc.Writer(path, schema=schema, shard_size="8KiB", block_size="1KiB") as writer:
            append_records(writer, 0, n)
        return path

    return make


def append_records(writer: tc.Writer, first: int, n: int) -> None:
    """Records that follow from their number."""
    ids = np.arange(first, first + n)
    writer.write_batch({"id": ids, "values": np.sin(ids[:, None] * np.arange(1, 18)).astype("float32")})
