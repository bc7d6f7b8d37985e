"""Two small models: one recognizes digits in images, one predicts the next byte of a text."""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

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
