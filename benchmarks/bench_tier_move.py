"""Speed of moving objects between stores with tier/transfer.py, compared with a plain copy by the same client.

    python benchmarks/bench_tier_move.py [--megabytes 512] [--repetitions 7] [--jobs 4] [--only folder-s3 ...] [--quick]

The plain copy reads a part, writes it, and reads the next one. Like a transfer, it copies several objects at a time and
uploads the parts of an S3 object concurrently; unlike a transfer, it computes no checksums and verifies nothing. The S3
server is SeaweedFS on this machine. A case is a pair of stores (from, to) with objects of one size. The two ways are
interleaved, and each repetition begins with the other one. The disk is idle when the clock starts, and files are
durable when it stops.

Before the source of a copy in a folder is deleted, the copy is read back from its disk after a grace period. This is
timed separately: "proof" is its speed, and "in all" is the speed relative to the plain copy with both included.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rows import OUT, spread, table, write_rows
from support import S3Server
from tiercache.model import ByteRange
from tiercache.store import LocalFolder
from tiercache.tier.journal import PlannedObject
from tiercache.tier.rules import RuleFile, Tier
from tiercache.tier.stores import Stores
from tiercache.tier.transfer import PartBufferPool, Transfer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tiercache.store import Store
    from tiercache.store.archive import S3StorageClasses

PART_BYTES = 8 << 20
TOGETHER = 6
SIZES = {"64 MiB": 64 << 20, "8 MiB": 8 << 20, "64 KiB": 64 << 10}
MOST_OBJECTS = 1000
QUICK_BYTES = 256 << 10
WAYS = ("folder-folder", "folder-s3", "s3-folder", "s3-s3", "folder-s3.obstore")
TITLES = (
    "way",
    "objects",
    "plain MB/s",
    "moved MB/s",
    "share",
    "min - max",
    "proof MB/s",
    "in all",
    "CPU s/GB plain",
    "CPU s/GB",
)


@dataclass(frozen=True)
class Case:
    """Objects in one store that are copied to another.

    archive: The client that writes to dst if dst is S3 by boto3.
    """

    name: str
    src: str
    dst: str
    stores: Stores
    objects: tuple[PlannedObject, ...]
    jobs: int

    @property
    def n_bytes(self) -> int:
        """Total size in bytes."""
        return sum(one.n_bytes for one in self.objects)


def plain(case: Case) -> None:
    """Copy with the same client and nothing else."""
    src, dst, archive = case.stores.store(case.src), case.stores.store(case.dst), case.stores.s3_classes(case.dst)

    def copy(one: PlannedObject) -> None:
        if archive is None:
            copy_in_order(src, dst, one, buffers)
        else:
            copy_side_by_side(src, archive, one, threads)

    buffers = PartBufferPool()
    with ThreadPoolExecutor(max(case.jobs, TOGETHER)) as threads, ThreadPoolExecutor(case.jobs) as pool:
        list(pool.map(copy, case.objects))


def copy_in_order(src: Store, dst: Store, one: PlannedObject, buffers: PartBufferPool) -> None:
    """Copy part by part, in page-aligned memory as in a transfer, which a folder writes past the page cache."""
    buffer = buffers.take(min(one.n_bytes, PART_BYTES))
    with dst.create(one.key) as upload:
        for number, span in enumerate(parts(one.n_bytes)):
            part = buffer[: span.n_bytes]
            src.read_into(one.key, [(span, part)])
            upload.put_part(number, part)
        upload.complete()
    buffers.give(buffer)


def copy_side_by_side(src: Store, archive: S3StorageClasses, one: PlannedObject, threads: ThreadPoolExecutor) -> None:
    """Copy with a multipart upload by boto3 without checksums; an object of one part with one request."""

    def read(span: ByteRange) -> bytearray:
        data = bytearray(span.n_bytes)
        src.read_into(one.key, [(span, memoryview(data))])
        return data

    spans = list(parts(one.n_bytes))
    if len(spans) == 1:
        archive.call("put_object", one.key, Body=read(spans[0]))
        return
    upload_id = archive.call("create_multipart_upload", one.key)["UploadId"]

    def send(number: int, span: ByteRange) -> dict[str, Any]:
        said = archive.call("upload_part", one.key, UploadId=upload_id, PartNumber=number, Body=read(span))
        return {"PartNumber": number, "ETag": said["ETag"]}

    sent = list(threads.map(send, range(1, len(spans) + 1), spans))
    archive.call("complete_multipart_upload", one.key, UploadId=upload_id, MultipartUpload={"Parts": sent})


def parts(n_bytes: int) -> Iterator[ByteRange]:
    """Return the parts of an object."""
    return (ByteRange(start, min(start + PART_BYTES, n_bytes)) for start in range(0, n_bytes, PART_BYTES))


def moved(case: Case) -> None:
    """Copy, checksum and verify the objects, as the mover does."""
    with Transfer(case.stores, jobs=case.jobs) as transfer, ThreadPoolExecutor(case.jobs) as pool:
        list(pool.map(lambda one: transfer.copy(case.src, case.dst, one), case.objects))


def proven(case: Case) -> None:
    """Read back the copies, as the mover does before it deletes the sources."""
    with Transfer(case.stores, jobs=case.jobs) as transfer, ThreadPoolExecutor(case.jobs) as pool:
        list(
            pool.map(lambda one: transfer.checksum_on_disk(case.dst, case.stores.head(case.dst, one.key)), case.objects)
        )


def cases(server: S3Server, folder: Path, asked: argparse.Namespace, wanted_bytes: int) -> Iterator[Case]:
    """Yield the cases one after another. Each one finds its objects written and deletes them at its end."""
    for way in asked.only:
        for size, n_bytes in SIZES.items():
            each_bytes = min(n_bytes, wanted_bytes // 2)
            n_objects = min(max(wanted_bytes // each_bytes, 2), MOST_OBJECTS)
            with opened(way, server, folder) as stores:
                store = stores.store("standard")
                objects = tuple(written(store, f"{size}-{number}", each_bytes) for number in range(n_objects))
                yield Case(f"{way}, {size}", "standard", "archive", stores, objects, asked.jobs)
                store.delete([one.key for one in objects])


def opened(way: str, server: S3Server, folder: Path) -> Stores:
    """Return the tiers of a case, without their archives if obstore writes."""
    src, _, dst = way.removesuffix(".obstore").partition("-")

    def tier(name: str, kind: str) -> Tier:
        options = server.storage_options if kind == "s3" else {}
        url = f"{server.url}/{name}" if kind == "s3" else str(folder / name)
        # Another region, so that the server does not copy by itself.
        return Tier(name=name, url=url, storage_options={**options, **({"region": name} if options else {})})

    tiers = (tier("standard", src), tier("archive", dst))
    file = RuleFile(path=Path("bench.toml"), sha256="", tiers=tiers)
    if way.endswith(".obstore"):
        with Stores(file) as plain_stores:
            return Stores(file, stores={name: plain_stores.store(name) for name in ("standard", "archive")})
    return Stores(file)


def written(store: Store, key: str, n_bytes: int) -> PlannedObject:
    """Write an object of random bytes."""
    with store.create(key) as upload:
        for number, span in enumerate(parts(n_bytes)):
            upload.put_part(number, os.urandom(span.n_bytes))
        upload.complete()
    info = store.head(key)
    return PlannedObject(key, info.n_bytes, info.etag, info.modified_s)


def measure(case: Case, repetitions: int) -> dict[str, Any]:
    """Return the seconds of both ways, interleaved."""
    ways: dict[str, Callable[[Case], None]] = {"plain": plain, "moved": moved}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    proof_s: list[float] = []
    is_folder = isinstance(case.stores.store(case.dst), LocalFolder)
    for copy in ways.values():  # The first request of a client takes longer.
        copy(replace(case, objects=case.objects[:1]))
        case.stores.store(case.dst).delete([case.objects[0].key])
    for repetition in range(repetitions):
        for name in sorted(ways, reverse=repetition % 2 == 0):
            os.sync()
            start_s, start_cpu_s = time.perf_counter(), time.process_time()
            ways[name](case)
            seconds[name].append(time.perf_counter() - start_s)
            cpu[name].append(time.process_time() - start_cpu_s)
            if name == "moved" and is_folder:
                start_s = time.perf_counter()
                proven(case)
                proof_s.append(time.perf_counter() - start_s)
            case.stores.store(case.dst).delete([one.key for one in case.objects])
    return {**row(case, seconds, cpu), **proof_row(case, seconds, proof_s)}


def proof_row(case: Case, seconds: dict[str, list[float]], proof_s: list[float]) -> dict[str, Any]:
    """Return the speed of reading back, and the relative speed with it included; None if nothing is read back."""
    if not proof_s:
        return {"proof_bytes_per_s": None, "share_in_all": None}
    in_all = [a / (b + c) for a, b, c in zip(seconds["plain"], seconds["moved"], proof_s, strict=True)]
    return {"proof_bytes_per_s": spread([case.n_bytes / s for s in proof_s]), "share_in_all": spread(in_all)}


def row(case: Case, seconds: dict[str, list[float]], cpu: dict[str, list[float]]) -> dict[str, Any]:
    """Return the figures of a case.

    share: Speed relative to the plain copy, by medians. shares: The same for each repetition.
    """
    speeds = {name: spread([case.n_bytes / s for s in found]) for name, found in seconds.items()}
    shares = [a / b for a, b in zip(seconds["plain"], seconds["moved"], strict=True)]
    return {
        "benchmark": "tier_move",
        "case": case.name,
        "n_objects": len(case.objects),
        "n_bytes": case.n_bytes,
        "jobs": case.jobs,
        "bytes_per_s": speeds,
        "share": speeds["moved"]["median"] / speeds["plain"]["median"],
        "shares": spread(shares),
        "cpu_s_per_gb": {name: spread([s / case.n_bytes * 1e9 for s in found]) for name, found in cpu.items()},
    }


def line(found: dict[str, Any]) -> Sequence[str]:
    """Return the printed cells of a row."""
    speeds, cpu = found["bytes_per_s"], found["cpu_s_per_gb"]
    proof, in_all = found["proof_bytes_per_s"], found["share_in_all"]
    return [
        found["case"],
        f"{found['n_objects']:,}",
        f"{speeds['plain']['median'] / 1e6:,.0f}",
        f"{speeds['moved']['median'] / 1e6:,.0f}",
        f"{found['share']:.2f}",
        f"{found['shares']['min']:.2f} - {found['shares']['max']:.2f}",
        f"{proof['median'] / 1e6:,.0f}" if proof else "",
        f"{in_all['median']:.2f}" if in_all else "",
        f"{cpu['plain']['median']:.2f}",
        f"{cpu['moved']['median']:.2f}",
    ]


def main(given: list[str] | None = None) -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=512, help="Megabytes that each way copies in each repetition.")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--jobs", type=int, default=4, help="Number of objects that are copied concurrently.")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument("--folder", type=Path, default=OUT / "tier_move", help="Folder on the disk to measure.")
    parser.add_argument("--quick", action="store_true", help="Smoke test: little data, and no meaningful figures.")
    asked = parser.parse_args(given)
    n_bytes, repetitions = (QUICK_BYTES, 1) if asked.quick else (asked.megabytes << 20, asked.repetitions)
    data = asked.folder / "data"
    with S3Server(data / "server") as server:
        rows = [measure(case, repetitions) for case in cases(server, data, asked, n_bytes)]
    print(table(TITLES, [line(found) for found in rows]))
    write_rows(asked.folder / "tier_move.jsonl", rows)
    shutil.rmtree(data)
    print(f"rows: {asked.folder / 'tier_move.jsonl'}")


if __name__ == "__main__":
    main()
