"""A process to be killed: it appends versions to a data set. `python -m tests.stress.writing PROGRESS URL`."""

import sys
from pathlib import Path

import numpy as np

import tiercache as tc
from tiercache.shard.schema import Schema

SCHEMA = Schema.of({"id": "int64", "values": tc.Tensor("uint16", (64,)), "text": "str"})
N_RECORDS = 700  # of a version
N_VERSIONS = 4  # of a run


def records(start: int) -> dict[str, object]:
    ids = np.arange(start, start + N_RECORDS)
    values = (ids[:, None] * 31 + np.arange(64)).astype(np.uint16)
    return {"id": ids, "values": values, "text": [f"record {i}" for i in ids]}


def main(progress: str, url: str) -> None:
    with Path(progress).open("a") as file:
        print("begin", file=file, flush=True)
        for _ in range(N_VERSIONS):
            try:
                start, mode = len(tc.Dataset(url)), "append"
            except tc.NotFound:
                start, mode = 0, "create"
            with tc.Writer(url, schema=SCHEMA, mode=mode, shard_size="20KiB", block_size="4KiB") as writer:
                batch = records(start)
                for first in range(0, N_RECORDS, 50):
                    writer.write_batch({name: values[first : first + 50] for name, values in batch.items()})
            print("version", writer.version.number, file=file, flush=True)
        print("end", file=file, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
