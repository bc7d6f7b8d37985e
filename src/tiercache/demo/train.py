"""A training process of the demo: `python -m tiercache.demo.train`, a Job on standard input, events on standard output.

It is written like a user's training script: a Dataset, a DataLoader, torch, and the loader's state saved with the
model.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from tiercache.cache import Cache
from tiercache.dataset import Dataset
from tiercache.demo.events import BATCH_SIZE, SEED, Epoch, Event, Job, event_to_line
from tiercache.load.loader import DataLoader
from tiercache.load.options import LoaderOptions

CONTEXT_BYTES = 8


def decode_digits(images: list[bytes]) -> Tensor:
    """Return PNG files of 8 x 8 grey pixels as float32[n, 1, 8, 8] in [0, 1]."""
    pixels = np.empty((len(images), 1, 8, 8), np.float32)
    for i, png in enumerate(images):
        with Image.open(io.BytesIO(png)) as image:
            pixels[i, 0] = np.asarray(image)
    return torch.from_numpy(pixels / 255)


class Task(ABC):
    """A model with its data set, its loss and its accuracy."""

    name: str
    train: str
    held_out: str | None
    model: nn.Module

    @abstractmethod
    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the mean loss over a batch."""

    @abstractmethod
    def hits(self, batch: dict[str, Any]) -> int:
        """Return the number of records of a held-out batch that the model predicts correctly."""


class Digits(Task):
    """Classification of 8 x 8 pixels into ten digits."""

    name = "digits"
    train = "digits/train"
    held_out = "digits/test"

    def __init__(self) -> None:
        self.model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 16, 10),
        )

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the cross entropy over the classes."""
        return F.cross_entropy(self.model(decode_digits(batch["image"])), batch["label"])

    def hits(self, batch: dict[str, Any]) -> int:
        """Return the number of digits that are recognized."""
        return int((self.model(decode_digits(batch["image"])).argmax(1) == batch["label"]).sum())


class NextByte(nn.Module):
    """Logits of the next byte from the CONTEXT_BYTES before it: uint8[n, length] -> float32[n, 256, length]."""

    def __init__(self, width: int = 32, hidden: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.mix = nn.Conv1d(width, hidden, CONTEXT_BYTES)
        self.out = nn.Conv1d(hidden, 256, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        signal = F.pad(self.embed(tokens.long()).transpose(1, 2), (CONTEXT_BYTES - 1, 0))
        logits: Tensor = self.out(torch.relu(self.mix(signal)))
        return logits


class Python(Task):
    """A byte-level language model of Python source."""

    name = "python"
    train = "python"
    held_out = None

    def __init__(self) -> None:
        self.model = NextByte()

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the cross entropy per byte, in nats."""
        tokens = batch["tokens"]
        return F.cross_entropy(self.model(tokens[:, :-1]), tokens[:, 1:].long())

    def hits(self, batch: dict[str, Any]) -> int:
        """Return the number of windows whose last byte is predicted."""
        tokens = batch["tokens"]
        return int((self.model(tokens[:, :-1])[:, :, -1].argmax(1) == tokens[:, -1]).sum())


def digest_batch(batch: dict[str, Any]) -> str:
    """Return the SHA-256 of a batch's columns in the order of their names, to compare two runs."""
    total = hashlib.sha256()
    for name in sorted(batch):
        values = batch[name]
        total.update(name.encode())
        for part in [values] if isinstance(values, Tensor) else values:
            total.update(part.numpy().tobytes() if isinstance(part, Tensor) else str(part).encode())
    return total.hexdigest()


def digest_weights(model: nn.Module) -> str:
    """Return the SHA-256 of all weights."""
    total = hashlib.sha256()
    for weights in model.state_dict().values():
        total.update(weights.numpy().tobytes())
    return total.hexdigest()


LEARNING_RATE = 3e-3
CHECKPOINTS_AN_EPOCH = 4
# "whole" serves only the comparison, and "moved" only reads.
WITHOUT_CHECKPOINTS = ("whole", "moved")


class Trainer:
    """Trains one task. Not thread-safe."""

    def __init__(self, job: Job, task: Task) -> None:
        torch.manual_seed(SEED)  # all runs must start with the same weights
        self.task = task
        self._folder = Path(job.folder)
        self._checkpoints = Path(job.checkpoints) / task.name
        self._step = 0
        self._optimizer = torch.optim.AdamW(task.model.parameters(), LEARNING_RATE)
        self._cache = Cache(job.cache, size=job.cache_bytes)
        self.loader = self._open(job, task.train, shuffle=True)
        self._held_out = self._open(job, task.held_out, shuffle=False) if task.held_out else None
        # Loaders count from their creation; segments were fetched before, but belong to the first epoch too.
        self._opening_bytes = self._cache.stats()["bytes_fetched"]
        self._seen = (0, 0, 0, 0)

    def _open(self, job: Job, name: str, *, shuffle: bool) -> DataLoader[dict[str, Any]]:
        dataset = Dataset(job.urls[name], cache=self._cache, storage_options=dict(job.storage_options))
        return DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=shuffle, options=LoaderOptions(seed=SEED))

    def start(self, epoch: int) -> Iterator[dict[str, Any]]:
        """Return the batches of an epoch from its beginning. epoch counts from 1."""
        self.loader.set_epoch(epoch - 1)
        return iter(self.loader)

    def run(self, batches: Iterator[dict[str, Any]], *, epoch: int, how: str, n_batches: int | None = None) -> Epoch:
        """Train on n_batches batches, or on all, and return the result."""
        started_s = time.perf_counter()
        digests: list[str] = []
        losses, n_samples, waited_s = 0.0, 0, 0.0
        while n_batches is None or len(digests) < n_batches:
            asked_s = time.perf_counter()
            batch = next(batches, None)
            waited_s += time.perf_counter() - asked_s
            if batch is None:
                break
            digests.append(digest_batch(batch))
            n = len(next(iter(batch.values())))
            losses += self._learn(batch) * n
            n_samples += n
            if how not in WITHOUT_CHECKPOINTS:
                self._keep(loss=losses / n_samples)
        elapsed_s = time.perf_counter() - started_s
        accuracy = self._accuracy()
        served, fetched, hits, misses = self._counted()
        return Epoch(
            task=self.task.name,
            epoch=epoch,
            mode=how,
            n_samples=n_samples,
            elapsed_s=elapsed_s,
            wait_share=waited_s / elapsed_s,
            served_bytes=served,
            fetched_bytes=fetched,
            hits=hits,
            misses=misses,
            loss=losses / max(n_samples, 1),
            accuracy=accuracy,
            digests=tuple(digests),
            weights=digest_weights(self.task.model),
        )

    def _learn(self, batch: dict[str, Any]) -> float:
        loss = self.task.loss(batch)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._step += 1
        return float(loss.detach())

    def _accuracy(self) -> float | None:
        if self._held_out is None:
            return None
        hits = n_samples = 0
        with torch.no_grad():
            for batch in self._held_out:
                hits += self.task.hits(batch)
                n_samples += len(batch["label"])
        return hits / n_samples

    def _counted(self) -> list[int]:
        """Return bytes served (in training), bytes fetched, cache hits and cache misses since the last call."""
        loaders = [self.loader] if self._held_out is None else [self.loader, self._held_out]
        fetched_bytes = self._opening_bytes + sum(loader.stats()["bytes_fetched"] for loader in loaders)
        cache = self._cache.stats()
        now = (self.loader.stats()["bytes_served"], fetched_bytes, cache["hits"], cache["misses"])
        new = [after - before for after, before in zip(now, self._seen, strict=True)]
        self._seen = now
        return new

    def _keep(self, *, loss: float) -> None:
        """Write a checkpoint to a folder named by the step, CHECKPOINTS_AN_EPOCH times per epoch."""
        if self._step % (len(self.loader) // CHECKPOINTS_AN_EPOCH):
            return
        folder = self._checkpoints / f"step-{self._step}"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self._state(), folder / "model.pt")
        (folder / "metrics.json").write_text(json.dumps({"loss": loss}))

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.task.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "step": self._step,
        }

    def save(self, name: str) -> None:
        """Save weights, optimizer and the loader's position under a name."""
        torch.save(self._state(), self._path(name, "pt"))
        self._path(name, "json").write_text(json.dumps(self.loader.state_dict()))

    def load(self, name: str) -> None:
        """Load weights and optimizer that were saved under a name."""
        state = torch.load(self._path(name, "pt"))
        self.task.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._step = state["step"]

    def resume(self, name: str) -> Iterator[dict[str, Any]]:
        """Return the rest of the epoch from the position that was saved under a name."""
        self.loader.load_state_dict(json.loads(self._path(name, "json").read_text()))
        return iter(self.loader)

    def _path(self, name: str, suffix: str) -> Path:
        return self._folder / f"{self.task.name}-{name}.{suffix}"


def run_cold(trainer: Trainer) -> Iterator[Event]:
    """Epoch 1, with an empty cache."""
    yield trainer.run(trainer.start(1), epoch=1, how="cold")
    trainer.save("epoch1")


def run_warm(trainer: Trainer) -> Iterator[Event]:
    """Epoch 2, from the cache."""
    trainer.load("epoch1")
    yield trainer.run(trainer.start(2), epoch=2, how="warm")
    trainer.save("epoch2")


def run_stop(trainer: Trainer) -> Iterator[Event]:
    """Epoch 3 as a whole, for comparison; then again, up to its middle."""
    trainer.load("epoch2")
    yield trainer.run(trainer.start(3), epoch=3, how="whole")
    trainer.load("epoch2")
    yield trainer.run(trainer.start(3), epoch=3, how="stopped", n_batches=len(trainer.loader) // 2)
    trainer.save("middle")


def run_resume(trainer: Trainer) -> Iterator[Event]:
    """The second half of epoch 3, from the state that the stopped run saved."""
    trainer.load("middle")
    yield trainer.run(trainer.resume("middle"), epoch=3, how="resumed")


def run_moved(trainer: Trainer) -> Iterator[Event]:
    """Epoch 2 again, from the same weights, after its data was moved."""
    trainer.load("epoch1")
    yield trainer.run(trainer.start(2), epoch=2, how="moved")


PHASES = {"cold": run_cold, "warm": run_warm, "stop": run_stop, "resume": run_resume, "moved": run_moved}


def main() -> int:
    """Run the job on standard input."""
    job = Job.from_json(sys.stdin.read())
    # Models this small do not gain from more threads, and on a busy machine threads lose time waiting for each other.
    torch.set_num_threads(1)
    try:
        for task in (Digits(), Python()):
            for event in PHASES[job.phase](Trainer(job, task)):
                sys.stdout.write(event_to_line(event) + "\n")
                sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
