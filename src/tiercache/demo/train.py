"""A training process of the demo: `python -m tiercache.demo.train`, a Job on standard input, Epochs on standard output.

It is written like a user's training script: a Dataset, a DataLoader, torch, and the loader's state saved with the
model.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from tiercache.cache import Cache
from tiercache.data.dataset import Dataset
from tiercache.demo.results import BATCH_SIZE, SEED, Epoch, Job
from tiercache.load.loader import DataLoader
from tiercache.load.options import LoaderOptions
from tiercache.transform_rng import rng

CONTEXT_BYTES = 8
LEARNING_RATE = 3e-3
CHECKPOINTS_PER_EPOCH = 4


class Digits(nn.Module):
    """Logits and labels of 8 x 8 images of digits."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = (nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU())
        self.layers = nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 16, 10))

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return logits float32[n, 10] and labels int64[n]."""
        return self.layers(batch["image"][:, None]), batch["label"]


class NextByte(nn.Module):
    """Logits of each byte of Python source from the CONTEXT_BYTES before it, and these bytes."""

    def __init__(self, width: int = 32, hidden: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.mix = nn.Conv1d(width, hidden, CONTEXT_BYTES)
        self.out = nn.Conv1d(hidden, 256, 1)

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return logits float32[n, 256, length] and bytes int64[n, length]."""
        tokens = batch["tokens"].long()
        signal = F.pad(self.embed(tokens[:, :-1]).transpose(1, 2), (CONTEXT_BYTES - 1, 0))
        return self.out(torch.relu(self.mix(signal))), tokens[:, 1:]


def read_digit(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record with its image as float32[8, 8] from 0 to 1."""
    pixels = np.asarray(Image.open(io.BytesIO(record["image"])), np.float32) / 255
    return {"image": pixels, "label": record["label"]}


def augment_digit(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record with noise in its image: an augmentation that a resumed run repeats."""
    digit = read_digit(record)
    noise = rng().numpy.normal(0, 0.05, digit["image"].shape)
    return {**digit, "image": digit["image"] + noise.astype(np.float32)}


# Functions that the loader applies to each record, by data set.
TRANSFORMS = {"digits/train": augment_digit, "digits/test": read_digit}
# Model class, data set for training, held-out data set, by name.
MODELS: dict[str, tuple[type[nn.Module], str, str | None]] = {
    "digits": (Digits, "digits/train", "digits/test"),
    "python": (NextByte, "python", None),
}


def digest_batch(batch: dict[str, Any]) -> str:
    """Return the SHA-256 of a batch's columns in the order of their names, to compare two runs."""
    total = hashlib.sha256()
    for name in sorted(batch):
        total.update(name.encode())
        for value in [batch[name]] if isinstance(batch[name], Tensor) else batch[name]:
            total.update(value.numpy().tobytes() if isinstance(value, Tensor) else str(value).encode())
    return total.hexdigest()


def find_accelerator() -> torch.device | None:
    """Return the device to which a loader can copy batches; None: this machine has none."""
    accelerator: Any = getattr(torch, "accelerator", None)  # torch 2.6 and later
    if accelerator is None:
        return torch.device("cuda") if torch.cuda.is_available() else None
    found: torch.device | None = accelerator.current_accelerator() if accelerator.is_available() else None
    return None if found is None or found.type == "mps" else found


class Trainer:
    """Trains one model. Not thread-safe."""

    def __init__(self, job: Job, name: str) -> None:
        torch.manual_seed(SEED)  # all runs must start with the same weights
        model, train, held_out = MODELS[name]
        self._job, self._name, self._step = job, name, 0
        self._model = model()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), LEARNING_RATE)
        self._cache = Cache(job.cache, size=job.cache_bytes)
        self._loader = self._open(train, shuffle=True)
        self._device = find_accelerator()
        self._held_out = self._open(held_out, shuffle=False, device=self._device) if held_out else None
        # Loaders count from their creation; segments were fetched before, but belong to the first epoch too.
        self._opening_bytes = self._cache.stats()["bytes_fetched"]
        self._counted = (0.0, 0.0, 0.0)

    def _open(self, name: str, *, shuffle: bool, device: torch.device | None = None) -> DataLoader[dict[str, Any]]:
        url, storage = self._job.urls[name], dict(self._job.storage_options)
        dataset = Dataset(url, cache=self._cache, transform=TRANSFORMS.get(name), storage_options=storage)
        options = LoaderOptions(seed=SEED, device=device)
        return DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=shuffle, options=options)

    def run_phase(self) -> Iterator[Epoch]:
        """Yield the epochs of the job's phase."""
        half = len(self._loader) // 2
        match self._job.phase:
            case "cold":
                yield self._train(1, "cold")
                self._save("epoch1")
            case "warm":
                self._load("epoch1")
                yield self._train(2, "warm")
                self._save("epoch2")
            case "stop":  # epoch 3 as a whole, for comparison; then again, up to its middle
                self._load("epoch2")
                yield self._train(3, "whole", keeps_checkpoints=False)
                self._load("epoch2")
                yield self._train(3, "stopped", n_batches=half)
                self._save("middle")
            case "resume":
                self._loader.load_state_dict(self._load("middle"))
                yield self._train(3, "resumed", is_new=False)
            case "moved":  # epoch 2 again, from the same weights
                self._load("epoch1")
                yield self._train(2, "moved", keeps_checkpoints=False)

    def _train(
        self,
        epoch: int,
        mode: str,
        *,
        n_batches: int | None = None,
        is_new: bool = True,
        keeps_checkpoints: bool = True,
    ) -> Epoch:
        """Train on n_batches batches, or on all that are left.

        Args:
            epoch: Epoch, counted from 1.
            mode: Name of the result.
            n_batches: Number of batches; None: all.
            is_new: Whether the epoch begins; otherwise it goes on from the loader's state.
            keeps_checkpoints: Whether checkpoints are written.
        """
        if is_new:
            self._loader.set_epoch(epoch - 1)
        digests: list[str] = []
        losses, n_samples, started_s = 0.0, 0, time.perf_counter()
        for batch in self._loader:
            loss = F.cross_entropy(*self._model(batch))
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            self._step += 1
            digests.append(digest_batch(batch))
            n = len(next(iter(batch.values())))
            losses += float(loss.detach()) * n
            n_samples += n
            if keeps_checkpoints and self._step % (len(self._loader) // CHECKPOINTS_PER_EPOCH) == 0:
                self._keep_checkpoint(losses / n_samples)
            if len(digests) == n_batches:
                break
        elapsed_s = time.perf_counter() - started_s
        accuracy = self._accuracy()
        fetched_bytes, hit_ratio = self._count()
        weights = hashlib.sha256()
        for tensor in self._model.state_dict().values():
            weights.update(tensor.numpy().tobytes())
        loss_mean = losses / max(n_samples, 1)
        result = (n_samples, elapsed_s, fetched_bytes, hit_ratio, loss_mean, accuracy, digests, weights.hexdigest())
        return Epoch(self._name, epoch, mode, *result)

    def _accuracy(self) -> float | None:
        """Return the share of held-out images that the model recognises: on the accelerator, if there is one.

        Training stays on the CPU, where two runs have equal weights to the bit.
        """
        if self._held_out is None:
            return None
        model = self._model if self._device is None else copy.deepcopy(self._model).to(self._device)
        with torch.no_grad():
            outputs = [model(batch) for batch in self._held_out]
        right = [logits.argmax(1) == labels for logits, labels in outputs]
        return float(torch.cat(right).float().mean())

    def _count(self) -> tuple[int, float]:
        """Return the bytes fetched, and the cache's hit ratio, since the last call."""
        loaders = [self._loader] if self._held_out is None else [self._loader, self._held_out]
        fetched_bytes = self._opening_bytes + sum(loader.stats()["bytes_fetched"] for loader in loaders)
        cache = self._cache.stats()
        now = (fetched_bytes, cache["hits"], cache["misses"])
        n_bytes, hits, misses = (after - before for after, before in zip(now, self._counted, strict=True))
        self._counted = now
        return int(n_bytes), hits / (hits + misses) if hits + misses else 1.0

    def _state(self) -> dict[str, Any]:
        return {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict(), "step": self._step}

    def _keep_checkpoint(self, loss: float) -> None:
        folder = Path(self._job.checkpoints, self._name, f"step-{self._step}")
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self._state(), folder / "model.pt")
        (folder / "metrics.json").write_text(json.dumps({"loss": loss}))

    def _save(self, name: str) -> None:
        torch.save({**self._state(), "loader": self._loader.state_dict()}, self._path(name))

    def _load(self, name: str) -> Any:
        """Load what _save() saved under a name, and return the loader's state, which only a resumed epoch needs."""
        state = torch.load(self._path(name))
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._step = state["step"]
        return state["loader"]

    def _path(self, name: str) -> Path:
        return Path(self._job.folder, f"{self._name}-{name}.pt")


def main() -> int:
    """Run the job on standard input."""
    job = Job(**json.load(sys.stdin))
    # Models this small do not gain from more threads, and on a busy machine threads lose time waiting for each other.
    torch.set_num_threads(1)
    try:
        for name in MODELS:
            for epoch in Trainer(job, name).run_phase():
                sys.stdout.write(json.dumps(asdict(epoch)) + "\n")
                sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
