"""Transforms on the native path, compared with torch's DataLoader with as many workers, and with the bare functions.

    python benchmarks/bench_transforms.py [--repetitions 5] [--workers 0 2] [--folder benchmarks/out/transforms]

Whole shuffled epochs of data in the page cache; workers live on between epochs, and the first epoch is not counted. The
two loaders and the bare functions are interleaved in each repetition. The bare functions are the transform and torch's
default collate function, called in a loop over records that are in memory. Reported are the median records per second,
the median ratio of the loaders, and the processor time of each loader as a multiple of that of the bare functions, with
worker processes included (medians).

"trivial" converts records of 256 tokens; "torchvision" augments images of 64 x 64 (crop, flip, jitter, normalise).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import FunctionType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import v2

import tiercache as tc
from rows import OUT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

N_TOKENS, N_IMAGES = 40_000, 3_000
AUGMENT = v2.Compose(
    [
        v2.RandomResizedCrop(56, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(0.4, 0.4, 0.4),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
)


def trivial(record: dict[str, Any]) -> dict[str, Any]:
    """The tokens as torch takes them."""
    return {"tokens": record["tokens"].astype(np.int64), "id": record["id"]}


def torchvision(record: dict[str, Any]) -> dict[str, Any]:
    """The image, augmented."""
    return {"image": AUGMENT(torch.from_numpy(record["image"])), "id": record["id"]}


TRANSFORMS = trivial, torchvision


def pack(folder: Path) -> tuple[Path, Path]:
    """Return the data sets of tokens and of images, packed unless they exist."""
    numbers = np.random.default_rng(1)
    tokens, images = folder / "tokens", folder / "images"
    if not tokens.exists():
        with tc.Writer(tokens, schema={"id": "int64", "tokens": tc.Tensor("uint16", (256,))}) as out:
            ids = np.arange(N_TOKENS)
            out.write_batch({"id": ids, "tokens": numbers.integers(0, 65536, (N_TOKENS, 256)).astype(np.uint16)})
    if not images.exists():
        with tc.Writer(images, schema={"id": "int64", "image": tc.Tensor("uint8", (3, 64, 64))}) as out:
            pixels = numbers.integers(0, 256, (N_IMAGES, 3, 64, 64)).astype(np.uint8)
            out.write_batch({"id": np.arange(N_IMAGES), "image": pixels})
    return tokens, images


@dataclass(frozen=True, slots=True)
class BareFunctions:
    """A transform and torch's default collate function, called in a loop over records that are in memory."""

    transform: FunctionType
    records: list[dict[str, Any]]
    batch_size: int

    def __iter__(self) -> Iterator[Any]:
        for first in range(0, len(self.records), self.batch_size):
            records = self.records[first : first + self.batch_size]
            yield default_collate([self.transform(record) for record in records])


def cpu_s() -> float:
    """Return the processor seconds of this process and its living worker processes."""
    pids = os.getpid(), *(process.pid for process in multiprocessing.active_children() if process.pid is not None)
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)  # as clock_getcpuclockid(3) makes the clock's number


def measure_epoch(loader: Iterable[Any]) -> tuple[float, float]:
    """Return the records per second of one epoch, and its processor seconds per record."""
    begin, used_s = time.perf_counter(), cpu_s()
    n = sum(len(batch["id"]) for batch in loader)
    return n / (time.perf_counter() - begin), (cpu_s() - used_s) / n


def compare(path: Path, transform: FunctionType, batch_size: int, workers: int, repetitions: int) -> list[float]:
    """Return medians: our records per second, torch's, their ratio; our processor time and torch's, of the bare one."""
    arguments: dict[str, Any] = {"batch_size": batch_size, "shuffle": True, "num_workers": workers}
    if workers:
        arguments |= {"persistent_workers": True, "multiprocessing_context": "fork"}
    plain, dataset = tc.Dataset(path), tc.Dataset(path, transform=transform)
    bare = BareFunctions(transform, [plain[i] for i in range(len(plain))], batch_size)
    loaders = tc.DataLoader(dataset, **arguments), DataLoader(dataset, **arguments), bare
    for loader in loaders:
        measure_epoch(loader)
    rounds = [[measure_epoch(loader) for loader in loaders] for _ in range(repetitions)]
    rates = [(ours[0], torchs[0], ours[0] / torchs[0]) for ours, torchs, _ in rounds]
    costs = [(ours[1] / alone[1], torchs[1] / alone[1]) for ours, torchs, alone in rounds]
    return [median(column) for found in (rates, costs) for column in zip(*found, strict=True)]


def main() -> None:
    """Run all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--folder", type=Path, default=OUT / "transforms")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # as in workers; threads that spin while they wait would count as processor time
    print(f"{'':20} {'records/s':>18} {'':6} {'processor time / bare':>22}")
    print(f"{'transform':12} {'workers':>7} {'ours':>9} {'torch':>8} {'ratio':>6} {'ours':>12} {'torch':>9}")
    for path, transform, batch_size in zip(pack(asked.folder), TRANSFORMS, (256, 64), strict=True):
        for workers in asked.workers:
            ours, torchs, ratio, *costs = compare(path, transform, batch_size, workers, asked.repetitions)
            our_cost, torchs_cost = costs
            print(
                f"{transform.__name__:12} {workers:7} {ours:9,.0f} {torchs:8,.0f} {ratio:6.2f} {our_cost:12.2f} "
                f"{torchs_cost:9.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
