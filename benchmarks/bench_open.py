"""Opening a data set of many shards: seconds and memory, as a process of a job pays them.

    python benchmarks/bench_open.py [--objects 1000000] [--repetitions 3] [--only warm local]

warm: through a cache that holds the segment. local: from a local folder, without a cache. Each case runs in a process
of its own, which opens the data set several times; `first_s` is the first time, with what is imported and mapped then.
`private_bytes` is what one open data set adds to the memory of the process without the pages of the mapped segment,
which all processes of the machine share; `segment_bytes` is the size of the segment. The names of the shards are those
of the writer, and each has statistics of three columns. The rows are written to open.jsonl. --quick uses small data.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

import tiercache as tc
from cases import Bench, mib
from rows import spread
from tiercache.config import private_bytes
from tiercache.shard.versions import (
    HINT_KEY,
    encode_hint,
    encode_version,
    fingerprint_of,
    latest,
    pack_segment,
    read_segments,
    version_key,
)
from tiercache.store import LocalFolder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CASES = ("warm", "local")


def make_data_set(folder: Path, n_shards: int) -> int:
    """Write a data set whose segment lists n_shards shards, which do not exist; return the size of the segment."""
    with tc.Writer(folder, schema={"id": "int64", "label": "int64", "data": "bytes"}) as writer:
        for i in range(10):
            writer.write({"id": i, "label": i, "data": b"x" * 100})
    store = LocalFolder(folder)
    first = latest(store)
    (rows,) = read_segments(store, first.dataset_id, first.segments)
    one = rows.slice(0, 1)
    ids = pa.py_buffer(np.random.default_rng(0).bytes(16 * n_shards))
    columns = {name: pa.repeat(one[name][0], n_shards) for name in rows.column_names}
    columns["name"] = pa.array([f"shards/0123456789abcdef-{i:06d}.tcs" for i in range(n_shards)], pa.large_string())
    columns["shard_id"] = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), n_shards, [None, ids])
    ref, data = pack_segment(pa.table(columns, schema=rows.schema))
    store.put(ref.key, data)
    n_records, n_bytes = first.n_records * n_shards, first.n_bytes * n_shards
    second = replace(first, number=2, parent=1, segments=(ref,), n_records=n_records, n_bytes=n_bytes)
    facts = second.dataset_id, 2, second.schema_bytes, n_records
    second = replace(second, fingerprint=fingerprint_of(*facts, [ref.digest]))
    store.put(version_key(2), encode_version(second))
    store.put(HINT_KEY, encode_hint(second))
    return ref.n_bytes


def measure(case: str, options: Mapping[str, int]) -> dict[str, Any]:
    """Measure one case in this process."""
    n_shards, repetitions = options["objects"], options["repetitions"]
    with tempfile.TemporaryDirectory(prefix="tiercache-bench-") as folder:
        url = Path(folder) / "ds"
        segment_bytes = make_data_set(url, n_shards)
        cache = tc.Cache(Path(folder) / "cache", size="8GB", min_free="0%") if case == "warm" else False
        if cache:
            tc.Dataset(url, cache=cache).close()
        times, processor, private = [], [], []
        for _ in range(repetitions):
            before, start_s, start_cpu_s = private_bytes(), time.perf_counter(), time.process_time()
            with closing(tc.Dataset(url, cache=cache)) as dataset:
                times.append(time.perf_counter() - start_s)
                processor.append(time.process_time() - start_cpu_s)
                private.append(private_bytes() - before)
                n_records = len(dataset)
        if cache:
            cache.close()
    return {
        "benchmark": "open",
        "case": case,
        "shards": n_shards,
        "records": n_records,
        "first_s": times[0],
        "seconds": spread(times),
        "cpu_s": spread(processor),
        "private_bytes": max(private),
        "segment_bytes": segment_bytes,
    }


def cells(row: Mapping[str, Any]) -> Sequence[str]:
    """Return the printed cells of a row."""
    times = [f"{row[name]['median']:.2f}" for name in ("seconds", "cpu_s")]
    return [f"{row['shards']:,}", f"{row['first_s']:.2f}", *times, mib(row["private_bytes"]), mib(row["segment_bytes"])]


BENCH = Bench(
    name="open",
    script=__file__,
    doc=str(__doc__),
    cases=CASES,
    options={"objects": 1_000_000, "repetitions": 5},
    measure=measure,
    titles=["shards", "first s", "s", "CPU s", "private MiB", "segment MiB"],
    cells=cells,
)

if __name__ == "__main__":
    BENCH.main()
