"""A shard of three blocks: a column of each kind, all of them raw but the text."""

import time

import numpy as np

from tiercache.shard.blocks import STAT_INTERVAL_S
from tiercache.shard.schema import Image, Ragged, Schema, Tensor
from tiercache.shard.source import MIN_CTIME_AGE_NS
from tiercache.shard.writer import ShardOptions, ShardWriter
from tiercache.waiting import wait_for

N = 3000
SCHEMA = Schema.of(
    {
        "i": "int64",
        "t": Tensor("uint16", (100,)),
        "b": Image("jpeg"),
        "s": "str",
        "r": Ragged("float32", (None, 2)),
        "n": "bool?",
    }
)


def batch(n=N):
    rng = np.random.default_rng(5)
    return {
        "i": np.arange(n),
        "t": rng.integers(0, 2**16, (n, 100), np.uint16),
        "b": [rng.bytes(k % 1000) for k in range(n)],
        "s": [f"record {k}" for k in range(n)],
        "r": [np.full((k % 4, 2), k, np.float32) for k in range(n)],
        "n": [None if k % 5 == 0 else k % 2 == 0 for k in range(n)],
    }


def fill(store, **options):
    with ShardWriter(
        store,
        SCHEMA,
        ShardOptions(**({"compression": {"i": "none", "t": "none", "r": "none", "n": "none", "s": "zstd"}} | options)),
        writer_id="w",
    ) as writer:
        writer.write_batch(batch())
    return writer.finish()[0]


def wait_until_settled(*paths):
    """Wait until each file's ctime tells it from what the next write makes of it, and readers have looked at it."""
    changed_ns = max(path.stat().st_ctime_ns for path in paths)
    assert wait_for(lambda: time.time_ns() - changed_ns > MIN_CTIME_AGE_NS + STAT_INTERVAL_S * 1e9, 60.0)
