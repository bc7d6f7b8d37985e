"""WebDataset: tar shards with raw members, batched inside the workers of WebLoader; curl reads those of a store."""

from __future__ import annotations

import os
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import webdataset as wds

from images import decode
from peers.columns import stack
from peers.job import SEED, Job, Opened
from workloads import KEY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from source import Source
    from workloads import Workload

SHARD_BYTES = 64 << 20
MIN_SHARDS = 8
BUFFER_RECORDS = 1000
# WebDataset passes S3 URLs to no client; its guide pipes the output of a command. curl signs the requests.
CURL = 'pipe:curl --silent --fail --aws-sigv4 aws:amz:us-east-1:s3 --user "$AWS_ACCESS_KEY_ID:$AWS_SECRET_ACCESS_KEY"'


def pack(source: Source, folder: Path) -> None:
    """Write record by record, in enough shards for all workers."""
    workload = source.workload
    shard_bytes = min(SHARD_BYTES, workload.record_bytes * workload.n_records // MIN_SHARDS)
    with wds.ShardWriter(str(folder / "%06d.tar"), maxsize=shard_bytes, maxcount=1 << 30, verbose=0) as writer:
        for record in source.records():
            members = {f"{field.name}.bin": _member(record[field.name]) for field in workload.fields}
            number = record[KEY]
            writer.write({"__key__": f"{number:09d}", **members, "label.id": number.to_bytes(8, "little")})


def _member(value: Any) -> bytes:
    return value.encode("ascii") if isinstance(value, str) else bytes(value)


def _record(workload: Workload, members: dict[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {KEY: np.frombuffer(members["label.id"], np.int64)[0]}
    for field in workload.fields:
        data = members[f"{field.name}.bin"]
        if field.kind == "array":
            record[field.name] = np.frombuffer(data, field.dtype).reshape(field.shape)
        elif field.kind == "jpeg":
            record[field.name] = decode(data)
        else:
            record[field.name] = data.decode("ascii") if field.kind == "text" else data
    return record


def _address(url: str) -> str:
    """Return the HTTP address of an S3 URL."""
    return f"{os.environ['AWS_ENDPOINT_URL']}/{url.removeprefix('s3://')}"


@contextmanager
def opened(job: Job) -> Iterator[Opened]:
    """Yield the loader; it shuffles the shards, and records in a buffer."""
    paths = sorted(job.path.glob("*.tar"))
    shards = [f"{CURL} {_address(job.url)}/{path.name}" if job.url else str(path) for path in paths]
    dataset = wds.WebDataset(shards, shardshuffle=len(shards) if job.shuffled else False, seed=SEED, empty_check=False)
    if job.shuffled:
        dataset = dataset.shuffle(BUFFER_RECORDS)
    dataset = dataset.map(partial(_record, job.workload)).batched(job.workload.batch_size, collation_fn=stack)
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=job.workers, persistent_workers=job.workers > 0)
    note = f"{job.workers} workers" + (f", a buffer of {BUFFER_RECORDS:,} records" if job.shuffled else "")
    yield Opened(lambda: (batch for batch in loader), note)
