"""Saves and loads of checkpoints, compared with a plain copy in memory, with the disk alone, and with other libraries.

    python benchmarks/bench_checkpoint.py [--megabytes 2048] [--repetitions 5] [--only copy save ...] [--folder DIR]

All ways handle the same state: large and small tensors of a model and its optimizer. They run in one process and are
interleaved; each repetition begins with another way. One repetition that is not counted comes first, as in a training
run, which saves many times: our memory is then allocated, and so is that of the others where they keep it.

    copy         a plain copy of all tensors into memory that was used before
    disk         the bytes written to one file and read back, past the page cache, by several threads; synced
    page-cache   a file of as many bytes read into memory by several threads through the page cache, as load() reads:
                 processes that load the same checkpoint then share one read of the disk
    save         Checkpoints.save: blocked seconds, and seconds until it is committed on the disk; then load()
    save-s3      the same with an upload: seconds until it is committed at the store
    torch        torch.save to the disk and fsync, then an upload of the file by boto3; torch.load
    dcp          torch.distributed.checkpoint.async_save with its FileSystemWriter, as it is and tuned; dcp.load
    dcp-s3       the same with s3torchconnector's S3StorageWriter, if s3torchconnector[dcp] is installed

"blocked" is the time for which training would wait. The S3 server is SeaweedFS on this machine, so an upload writes to
the same disk again, and its processor time is taken from the writer's. Files are dropped from the page cache before
they are loaded, and loaded into existing tensors.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import shutil
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import bench_disk
from rows import OUT, spread, table, write_rows
from support import S3Server
from tiercache.checkpoint.checkpoints import Checkpoints

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DISK_THREADS = 8
QUICK_BYTES = 4 << 20
STEP_BYTES = 1 << 20
TITLES = (
    "way",
    "blocked s",
    "of a copy",
    "on disk s",
    "MB/s",
    "of the disk",
    "at the store s",
    "MB/s",
    "load MB/s",
    "of the disk",
)
Seconds = dict[str, float]


@dataclass
class World:
    """The state, the memory of the plain copy, and where the ways write."""

    state: dict[str, torch.Tensor]
    folder: Path
    server: S3Server | None
    copied: dict[str, torch.Tensor] = field(default_factory=dict)
    n_saved: int = 0

    def __post_init__(self) -> None:
        """Prepare the memory of the plain copy, and buffers of whole pages for the disk."""
        self.copied = {name: torch.zeros_like(tensor) for name, tensor in self.state.items()}
        self.buffers = [bench_disk.memory() for _ in range(DISK_THREADS)]

    @property
    def n_bytes(self) -> int:
        """Size of the state."""
        return sum(tensor.nbytes for tensor in self.state.values())

    def path(self, way: str) -> Path:
        """Return a new path."""
        self.n_saved += 1
        folder = self.folder / way
        folder.mkdir(parents=True, exist_ok=True)
        return folder / str(self.n_saved)

    def url(self, way: str) -> str:
        """Return a new URL at the S3 server."""
        self.n_saved += 1
        return f"{self.needed_server.url}/{way}/{self.n_saved}"

    @property
    def needed_server(self) -> S3Server:
        """The S3 server. Raises ValueError without one."""
        if self.server is None:
            raise ValueError("this way needs the S3 server")
        return self.server


def make_state(n_bytes: int) -> dict[str, torch.Tensor]:
    """Return a state of about n_bytes: per layer two matrices, their two moments in float32, and small tensors."""
    n_layers = max(n_bytes // (96 << 20), 2)
    width = max(int((n_bytes / n_layers / 4 / 12) ** 0.5) // 64 * 64, 64)
    generator = torch.Generator().manual_seed(1)
    state: dict[str, torch.Tensor] = {}
    for layer in range(n_layers):
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            state[f"{layer}.attention.{kind}"] = torch.rand(width, width, generator=generator)
            state[f"{layer}.mlp.{kind}"] = torch.rand(3 * width, width, generator=generator)
            state[f"{layer}.norm.{kind}"] = torch.rand(width, generator=generator)
        state[f"{layer}.step"] = torch.tensor(float(layer))
    return state


def clock() -> float:
    """Return the seconds of a clock."""
    return time.perf_counter()


def drop_cached(folder: Path) -> None:
    """Drop the files below a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def plain_copy(world: World) -> Seconds:
    """Copy all tensors into memory that was used before."""
    start_s = clock()
    for name, tensor in world.state.items():
        world.copied[name].copy_(tensor)
    return {"blocked_s": clock() - start_s}


def disk_alone(world: World) -> Seconds:
    """Write and read as many bytes past the page cache."""
    path, n_parts = world.path("disk"), max(world.n_bytes // bench_disk.PART_BYTES, 1)
    start_s = clock()
    bench_disk.write(path, n_parts, DISK_THREADS, world.buffers)
    written_s = clock()
    bench_disk.read(path, n_parts, DISK_THREADS, world.buffers)
    share = world.n_bytes / (n_parts * bench_disk.PART_BYTES)
    return {"disk_s": (written_s - start_s) * share, "load_s": (clock() - written_s) * share}


def page_cache_alone(world: World) -> Seconds:
    """Read as many bytes through the page cache."""
    path, n_parts = world.path("page-cache"), max(world.n_bytes // bench_disk.PART_BYTES, 1)
    bench_disk.write(path, n_parts, DISK_THREADS, world.buffers)
    drop_cached(path.parent)
    part_bytes = bench_disk.PART_BYTES
    start_s, fd = clock(), os.open(path, os.O_RDONLY)

    def read(number: int) -> None:
        buffer, position = memoryview(world.buffers[number % DISK_THREADS]), number * part_bytes
        for start in range(0, part_bytes, STEP_BYTES):
            os.preadv(fd, [buffer[start : start + STEP_BYTES]], position + start)

    with ThreadPoolExecutor(DISK_THREADS) as pool:
        list(pool.map(read, range(n_parts)))
    os.close(fd)
    return {"load_s": (clock() - start_s) * world.n_bytes / (n_parts * part_bytes)}


class OurSaves:
    """Checkpoints that live as long as the benchmark, as in a training run."""

    def __init__(self, world: World, way: str, *, uploads: bool) -> None:
        self._world, self._way, self._uploads = world, way, uploads
        if uploads:
            server = world.needed_server
            options: dict[str, Any] = {"local": world.folder / way, "storage_options": server.storage_options}
            self._checkpoints = Checkpoints(f"{server.url}/{way}", **options)
        else:
            self._checkpoints = Checkpoints(world.folder / way)

    def __call__(self, world: World) -> Seconds:
        """Save, wait and load."""
        world.n_saved += 1
        start_s = clock()
        saved = self._checkpoints.save(world.n_saved, world.state)
        found = {"blocked_s": clock() - start_s}
        saved.wait("local" if self._uploads else "remote")
        found["disk_s"] = clock() - start_s
        if self._uploads:
            saved.wait("remote")
            return {**found, "store_s": clock() - start_s}
        drop_cached(world.folder / self._way)
        start_s = clock()
        self._checkpoints.load(saved.name, into=world.copied)
        return {**found, "load_s": clock() - start_s}


def torch_script(world: World) -> Seconds:
    """torch.save, fsync, and an upload by boto3's transfer manager; then torch.load."""
    path = world.path("torch")
    start_s = clock()
    with path.open("wb") as file:
        torch.save(world.state, file)
        file.flush()
        os.fsync(file.fileno())
    found = {"blocked_s": clock() - start_s, "disk_s": clock() - start_s}
    if world.server is not None:
        server = world.server
        client = boto3.client(
            "s3",
            endpoint_url=server.endpoint,
            aws_access_key_id=server.access_key_id,
            aws_secret_access_key=server.secret_access_key,
            region_name="us-east-1",
        )
        client.upload_file(str(path), server.bucket, f"torch/{path.name}")
        found["store_s"] = clock() - start_s
        client.delete_object(Bucket=server.bucket, Key=f"torch/{path.name}")
        client.close()
    drop_cached(path.parent)
    start_s = clock()
    loaded = torch.load(path, weights_only=True)
    for name, tensor in loaded.items():
        world.copied[name].copy_(tensor)
    return {**found, "load_s": clock() - start_s}


class DcpSaves:
    """dcp.async_save with torch's writer to the disk.

    is_tuned: With 8 threads; with an accelerator also with the memory of the staged state kept, which torch pins.
    """

    def __init__(self, *, is_tuned: bool) -> None:
        keeps_memory = torch.cuda.is_available()
        self._options = {"thread_count": DISK_THREADS, "cache_staged_state_dict": keeps_memory} if is_tuned else {}
        self._writer: Any = None

    def __call__(self, world: World) -> Seconds:
        """Save, wait and load."""
        path = world.path("dcp")
        writer = self._writer = self._writer or dcp.FileSystemWriter(path, **self._options)  # it keeps the memory
        start_s = clock()
        future = dcp.async_save(world.state, storage_writer=writer, checkpoint_id=path)
        found = {"blocked_s": clock() - start_s}
        done(future)
        found["disk_s"] = clock() - start_s
        drop_cached(path)
        start_s = clock()
        dcp.load(world.copied, checkpoint_id=path)
        return {**found, "load_s": clock() - start_s}


def dcp_to_s3(world: World) -> Seconds:
    """dcp.async_save with s3torchconnector's writer."""
    from s3torchconnector import S3ClientConfig
    from s3torchconnector._s3client import S3Client
    from s3torchconnector.dcp import S3StorageWriter
    from s3torchconnector.dcp.s3_file_system import S3FileSystem

    server, url = world.needed_server, world.url("dcp")
    os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"] = (
        server.access_key_id,
        server.secret_access_key,
    )
    config = S3ClientConfig(force_path_style=True)
    writer = S3StorageWriter("us-east-1", url, s3client_config=config, thread_count=DISK_THREADS)
    writer.fs = S3FileSystem(
        "us-east-1", S3Client("us-east-1", endpoint=server.endpoint, s3client_config=config), s3client_config=config
    )
    start_s = clock()
    future = dcp.async_save(world.state, storage_writer=writer)
    found = {"blocked_s": clock() - start_s}
    done(future)
    return {**found, "store_s": clock() - start_s}


def done(future: Any) -> None:
    """Wait for the result of dcp.async_save."""
    (future if isinstance(future, Future) else future.upload_completion).result()


def ways(world: World, only: list[str]) -> Iterator[tuple[str, Callable[[World], Seconds]]]:
    """Yield the ways that were asked for, each with its name."""
    for name in only:
        if name == "copy":
            yield name, plain_copy
        elif name == "disk":
            yield name, disk_alone
        elif name == "page-cache":
            yield name, page_cache_alone
        elif name in ("save", "save-s3"):
            yield name, OurSaves(world, name, uploads=name == "save-s3")
        elif name == "torch":
            yield name, torch_script
        elif name == "dcp":
            yield name, DcpSaves(is_tuned=False)
            yield "dcp, tuned", DcpSaves(is_tuned=True)
        elif importlib.util.find_spec("s3torchconnector") and importlib.util.find_spec("tenacity"):
            yield name, dcp_to_s3
        else:
            print("s3torchconnector[dcp] is not installed: dcp-s3 is left out")


WAYS = ("copy", "disk", "page-cache", "save", "save-s3", "torch", "dcp", "dcp-s3")


def measure(world: World, only: list[str], repetitions: int) -> list[dict[str, Any]]:
    """Return a row for each way; the first repetition is not counted."""
    chosen = list(ways(world, only))
    found: dict[str, list[Seconds]] = {name: [] for name, _ in chosen}
    for repetition in range(repetitions + 1):
        turn = repetition % len(chosen)
        for name, way in chosen[turn:] + chosen[:turn]:
            gc.collect()
            os.sync()
            seconds = way(world)
            if repetition:
                found[name].append(seconds)
            remove_saved(world)
    return [row(name, world, seconds, found) for name, seconds in found.items()]


def remove_saved(world: World) -> None:
    """Delete what the ways have written."""
    for folder in world.folder.iterdir():
        shutil.rmtree(folder)
    if world.server is not None:
        store = world.server.store("")
        store.delete([info.key for info in store.list()])
        store.close()


def row(name: str, world: World, seconds: list[Seconds], others: dict[str, list[Seconds]]) -> dict[str, Any]:
    """Return the figures of a way: seconds, bytes per second, and their ratios to copy and disk of the same run."""
    ratios: dict[str, list[float]] = {}
    for number, one in enumerate(seconds):
        for key, base, title in (
            ("blocked_s", "copy", "blocked_of_copy"),
            ("disk_s", "disk", "disk_share"),
            ("load_s", "disk", "load_share"),
        ):
            if key in one and others.get(base):
                ratio = one[key] / others[base][number][key]
                ratios.setdefault(title, []).append(ratio if base == "copy" else 1 / ratio)
    keys = {key for one in seconds for key in one}
    return {
        "benchmark": "checkpoint",
        "case": name,
        "n_bytes": world.n_bytes,
        "n_tensors": len(world.state),
        **{key: spread([one[key] for one in seconds]) for key in sorted(keys)},
        **{title: spread(values) for title, values in ratios.items()},
    }


def line(found: dict[str, Any]) -> list[str]:
    """Return the printed cells of a row."""

    def median(key: str, digits: int) -> str:
        return f"{found[key]['median']:.{digits}f}" if key in found else ""

    def speed(key: str) -> str:
        return f"{found['n_bytes'] / found[key]['median'] / 1e6:,.0f}" if key in found else ""

    return [
        found["case"],
        median("blocked_s", 3),
        median("blocked_of_copy", 2),
        median("disk_s", 2),
        speed("disk_s"),
        median("disk_share", 2),
        median("store_s", 2),
        speed("store_s"),
        speed("load_s"),
        median("load_share", 2),
    ]


def main(given: list[str] | None = None) -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=2048, help="Size of the state.")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument("--folder", type=Path, default=OUT / "checkpoint", help="Folder on the disk to measure.")
    parser.add_argument("--quick", action="store_true", help="Smoke test: little data, and no meaningful figures.")
    asked = parser.parse_args(given)
    n_bytes, repetitions = (QUICK_BYTES, 1) if asked.quick else (asked.megabytes << 20, asked.repetitions)
    data, needs_server = asked.folder / "data", bool({"save-s3", "torch", "dcp-s3"} & {*asked.only})
    shutil.rmtree(data, ignore_errors=True)
    (data / "saved").mkdir(parents=True)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    dist.init_process_group("gloo", init_method=f"file://{data / 'group'}", rank=0, world_size=1)
    server = S3Server(data / "server") if needs_server else None
    try:
        if server is not None:
            server.start()
        rows = measure(World(make_state(n_bytes), data / "saved", server), asked.only, repetitions)
    finally:
        if server is not None:
            server.stop()
        dist.destroy_process_group()
        shutil.rmtree(data)
    print(table(TITLES, [line(found) for found in rows]))
    write_rows(asked.folder / "checkpoint.jsonl", rows)
    print(f"rows: {asked.folder / 'checkpoint.jsonl'}")


if __name__ == "__main__":
    main()
