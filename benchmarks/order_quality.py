"""Quality of the shuffle of data stored in sorted order: statistics, and models trained with it on real data.

The orders come from `EpochOrder` over synthetic sizes: they are what a loader would serve, without written shards.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from tiercache.order.epoch_order import EpochOrder
from tiercache.order.window import BlockSizes, DatasetSizes, OrderOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

RECORD_BYTES = 1000
HELD_OUT_EVERY = 8

# Each installed package is a class: its source in windows of 256 bytes.
PACKAGES = (
    "botocore", "hypothesis", "moto", "mypy", "networkx", "numpy", "pandas", "pyarrow",
    "pydantic", "pygments", "scipy", "setuptools", "sklearn", "sympy", "torch", "torchvision",
)  # fmt: skip
WINDOW_BYTES = 256
HASHES = 4096


@dataclass(frozen=True, slots=True)
class Setting:
    """An order of n records.

    n_groups: Number of groups in the epoch; 0 for a full shuffle by numpy, None for the stored order. n_windows: Number
    of
    windows in the epoch.
    """

    name: str
    n_groups: int | None
    n_shards: int = 1
    n_windows: int = 1
    block_records: int = 1
    streams: int = 1

    def order(self, n: int, seed: int, epoch: int) -> np.ndarray:
        """Return the stored numbers of the records in output order, int64[n]."""
        if self.n_groups is None:
            return np.arange(n)
        if self.n_groups == 0:
            return np.random.default_rng((seed, epoch)).permutation(n)
        sizes, first = even_sizes(n, self.n_shards, self.block_records)
        total = n * RECORD_BYTES
        options = OrderOptions(
            seed,
            shuffle=True,
            group_bytes=-(-total // self.n_groups) if self.n_groups > 1 else None,
            window_bytes=-(-total // self.n_windows) if self.n_windows > 1 else None,
            streams=self.streams,
        )
        return served(EpochOrder(sizes, options, epoch), first, self.block_records)


def even_sizes(n: int, n_shards: int, block_records: int) -> tuple[DatasetSizes, np.ndarray]:
    """Return shards of about equal size in blocks of block_records records, and the first record of each shard."""
    ends = np.linspace(0, n, n_shards + 1).astype(np.int64)
    records = np.diff(ends)

    def tables(shards: Sequence[int]) -> list[BlockSizes]:
        found = [np.diff(np.append(np.arange(0, records[shard], block_records), records[shard])) for shard in shards]
        return [BlockSizes(blocks, blocks * RECORD_BYTES) for blocks in found]

    return DatasetSizes(records, records * RECORD_BYTES, tables), ends[:-1]


def served(order: EpochOrder, first: np.ndarray, block_records: int) -> np.ndarray:
    """Return the stored numbers of all records in the global sequence, int64[n]."""
    out = np.empty(order.n_records, np.int64)
    for stream in range(order.n_streams):
        found = [np.empty(0, np.int64)]
        for window in order.windows(stream):
            block, row = window.rows(0, window.stop - window.start)
            found.append(first[window.shards[block]] + window.blocks[block].astype(np.int64) * block_records + row)
        out[stream :: order.n_streams] = np.concatenate(found)
    return out


def rank_correlation(order: np.ndarray) -> float:
    """Return Spearman's correlation of stored and output order: 1 if equal, 0 +- 1 / sqrt(n) if fully shuffled."""
    return float(np.corrcoef(order, np.arange(len(order)))[0, 1])


def clumping(order: np.ndarray, run: int) -> float:
    """Return the similarity of a run's records: variance of runs' mean stored numbers, relative to a full shuffle.

    It is 1 for a full shuffle, `run` for the stored order; with 4, a run of 100 is as good as a random sample of 25.
    """
    n = len(order) // run * run
    means = order[:n].reshape(-1, run).mean(axis=1)
    expected = order.var() / run * (len(order) - run) / (len(order) - 1)
    return float(((means - order.mean()) ** 2).mean() / expected)


@dataclass(frozen=True, slots=True)
class Task:
    """Records stored sorted by label. x: float32[n, d]; y: int64[n]; and the same of held-out records."""

    name: str
    x: torch.Tensor
    y: torch.Tensor
    held_x: torch.Tensor
    held_y: torch.Tensor

    @staticmethod
    def of(name: str, x: np.ndarray, y: np.ndarray) -> Task:
        """Standardise, sort by label (stable), hold out every 8th record."""
        turn = np.argsort(y, kind="stable")
        spread = x.std(axis=0)
        features = torch.from_numpy(((x - x.mean(axis=0)) / np.where(spread > 0, spread, 1))[turn].astype(np.float32))
        labels = torch.from_numpy(y[turn].astype(np.int64))
        held = torch.arange(len(y)) % HELD_OUT_EVERY == 0
        return Task(name, features[~held], labels[~held], features[held], labels[held])


def digits() -> Task:
    """Return scikit-learn's digits: 1,797 handwritten digits, 10 classes."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return Task.of("digits", x, y)


def sources(per_class: int) -> Task:
    """Return Python source by package: hashed 3-grams of bytes, projected at random. 16 classes."""
    root = Path(sysconfig.get_paths()["purelib"])
    windows = [_windows(root / package, per_class) for package in PACKAGES]
    labels = np.repeat(np.arange(len(PACKAGES)), [len(found) for found in windows])
    projection = np.random.default_rng(1).standard_normal((HASHES, 160)).astype(np.float32)
    return Task.of("source", np.concatenate([_hashed(found) @ projection for found in windows]), labels)


def _windows(folder: Path, most: int) -> np.ndarray:
    text = b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))
    n = len(text) // WINDOW_BYTES
    chosen = np.linspace(0, n - 1, min(n, most)).astype(np.int64)
    return np.frombuffer(text, np.uint8, n * WINDOW_BYTES).reshape(n, WINDOW_BYTES)[chosen]


def _hashed(windows: np.ndarray) -> np.ndarray:
    x = windows.astype(np.uint64)
    triples = x[:, :-2] << np.uint64(16) | x[:, 1:-1] << np.uint64(8) | x[:, 2:]
    hashes = (triples * np.uint64(2654435761) & np.uint64(0xFFFFFFFF)) >> np.uint64(20)
    at = hashes.astype(np.int64) + np.arange(len(x))[:, None] * HASHES
    return np.sqrt(np.bincount(at.ravel(), minlength=len(x) * HASHES).reshape(len(x), HASHES).astype(np.float32))


@dataclass(frozen=True, slots=True)
class Training:
    """How models are trained: SGD with momentum 0.9. decays: Whether the rate falls linearly to 0 or stays constant."""

    epochs: int
    batch: int
    rate: float
    decays: bool


def train(task: Task, orders: Sequence[tuple[Setting, int]], how: Training) -> tuple[np.ndarray, np.ndarray]:
    """Train one small network (one hidden layer of 96) for each setting and seed, all in one batched product.

    Networks with equal seeds start equal.

    Returns:
        Held-out loss and held-out accuracy, float64[m] each.
    """
    weights = [_layers(task, [seed for _, seed in orders], layer) for layer in (0, 1)]
    tensors = [tensor for pair in weights for tensor in pair]
    moments = [torch.zeros_like(tensor) for tensor in tensors]
    n_batches = len(task.y) // how.batch
    for epoch in range(how.epochs):
        order = torch.from_numpy(np.stack([setting.order(len(task.y), seed, epoch) for setting, seed in orders]))
        for i in range(n_batches):
            rows = order[:, i * how.batch : (i + 1) * how.batch]
            logits = _forward(task.x[rows], weights)
            loss = F.cross_entropy(logits.flatten(0, 1), task.y[rows].flatten(), reduction="sum") / how.batch
            done = (epoch * n_batches + i) / (how.epochs * n_batches)
            rate = how.rate * (1 - done) if how.decays else how.rate
            with torch.no_grad():
                for tensor, moment, slope in zip(tensors, moments, torch.autograd.grad(loss, tensors), strict=True):
                    moment.mul_(0.9).add_(slope)
                    tensor.sub_(moment, alpha=rate)
    with torch.no_grad():
        logits = _forward(task.held_x.expand(len(orders), -1, -1), weights)
        losses = [float(F.cross_entropy(of_one, task.held_y)) for of_one in logits]
        hits = [float((of_one.argmax(1) == task.held_y).double().mean()) for of_one in logits]
    return np.array(losses), np.array(hits)


def _layers(task: Task, seeds: Sequence[int], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = (task.x.shape[1], 96, int(task.y.max()) + 1)
    fan_in, fan_out = sizes[layer : layer + 2]
    made = [torch.randn(fan_in, fan_out, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    weight = (torch.stack(made) * (2 / fan_in) ** 0.5).requires_grad_()
    return weight, torch.zeros(len(seeds), 1, fan_out, requires_grad=True)


def _forward(x: torch.Tensor, weights: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    (first, first_bias), (second, second_bias) = weights
    return torch.relu(x @ first + first_bias) @ second + second_bias
