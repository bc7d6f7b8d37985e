"""torch's DataLoader over a map-style data set in memory: the simplest data set, and its fastest."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from images import decode
from peers.job import SEED, Job, Opened
from workloads import DECODED_SIZE, JITTER, KEY, MEAN, STD

if TYPE_CHECKING:
    from collections.abc import Iterator

    from source import Source


class InMemory(torch.utils.data.Dataset[dict[str, Any]]):
    """Columns in memory: tensors, or lists of bytes or str; images are decoded record by record."""

    def __init__(self, source: Source) -> None:
        whole = source.batch(0, source.workload.n_records)
        self._columns: dict[str, Any] = {
            name: torch.from_numpy(np.array(column)) if isinstance(column, np.ndarray) else column
            for name, column in whole.items()
        }
        for field in source.workload.fields:
            if field.kind == "jpeg":
                make = Augmented if field.is_augmented else Images
                self._columns[field.name] = make(self._columns[field.name])

    def __len__(self) -> int:
        return len(self._columns[KEY])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in self._columns.items()}


class Images:
    """Images that are decoded when they are requested."""

    def __init__(self, encoded: list[bytes]) -> None:
        self._encoded = encoded

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(decode(self._encoded[index]))


class Augmented:
    """Images that torchvision decodes and augments when they are requested."""

    def __init__(self, encoded: list[bytes]) -> None:
        self._encoded = encoded
        self._decode = import_module("torchvision.io").decode_jpeg
        v2 = import_module("torchvision.transforms.v2")
        self._augment = v2.Compose(
            [
                # Without antialias, which costs more, as the other contenders resize.
                v2.RandomResizedCrop(DECODED_SIZE, antialias=False),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(JITTER, JITTER, JITTER),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
                v2.ToDtype(torch.float16),
            ]
        )

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._augment(self._decode(torch.frombuffer(bytearray(self._encoded[index]), dtype=torch.uint8)))


@contextmanager
def opened(job: Job) -> Iterator[Opened]:
    """Yield the loader; its workers persist over the epochs, so that their start is not timed."""
    # More workers than cores are tried on purpose.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    loader = torch.utils.data.DataLoader(
        InMemory(job.source),
        batch_size=job.workload.batch_size,
        shuffle=job.shuffled,
        num_workers=job.workers,
        persistent_workers=job.workers > 0,
        generator=torch.Generator().manual_seed(SEED),
    )
    yield Opened(lambda: (batch for batch in loader), f"{job.workers} workers")
