"""Transforms on the native path, compared with torch's DataLoader over the same data set, with as many workers.

    python benchmarks/bench_transforms.py [--repetitions 5] [--workers 0 2] [--folder benchmarks/out/transforms]

Whole shuffled epochs of data in the page cache; workers live on between epochs, and the first epoch is not counted. The
two loaders are interleaved in each repetition. Reported are the median records per second, and the median ratio.

"trivial" converts records of 256 tokens; "torchvision" augments images of 64 x 64 (crop, flip, jitter, normalise).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import tiercache as tc
from rows import OUT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

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


def pack(folder: Path) -> tuple[tc.Dataset, tc.Dataset]:
    """Return the data sets with their transforms, packed unless they exist."""
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
    return tc.Dataset(tokens, transform=trivial), tc.Dataset(images, transform=torchvision)


def records_per_s(loader: Iterable[Any]) -> float:
    """Return the records per second of one epoch."""
    begin = time.perf_counter()
    n = sum(len(batch["id"]) for batch in loader)
    return n / (time.perf_counter() - begin)


def compare(dataset: tc.Dataset, batch_size: int, workers: int, repetitions: int) -> tuple[float, float, float]:
    """Return (our records per second, torch's, their ratio), medians."""
    arguments: dict[str, Any] = {"batch_size": batch_size, "shuffle": True, "num_workers": workers}
    if workers:
        arguments |= {"persistent_workers": True, "multiprocessing_context": "fork"}
    makes: tuple[Callable[..., Any], ...] = (tc.DataLoader, DataLoader)
    loaders = [make(dataset, **arguments) for make in makes]
    for loader in loaders:
        records_per_s(loader)
    pairs = [[records_per_s(loader) for loader in loaders] for _ in range(repetitions)]
    ours, torchs = (median(pair[i] for pair in pairs) for i in (0, 1))
    return ours, torchs, median(pair[0] / pair[1] for pair in pairs)


def main() -> None:
    """Run all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--folder", type=Path, default=OUT / "transforms")
    asked = parser.parse_args()
    print(f"{'transform':12} {'workers':>7} {'ours, records/s':>16} {'torch':>10} {'ratio':>6}")
    for dataset, batch_size in zip(pack(asked.folder), (256, 64), strict=True):
        for workers in asked.workers:
            ours, torchs, ratio = compare(dataset, batch_size, workers, asked.repetitions)
            name = dataset.transform.__name__ if dataset.transform else ""
            print(f"{name:12} {workers:7} {ours:16,.0f} {torchs:10,.0f} {ratio:6.2f}", flush=True)


if __name__ == "__main__":
    main()
