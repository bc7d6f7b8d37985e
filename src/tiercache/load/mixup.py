"""MixUp and CutMix: batch transforms that mix each image with the one before it in its batch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import one_hot

from tiercache.load.batch import Batch
from tiercache.transform_rng import rng

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class _BatchMixing(ABC):
    """What MixUp and CutMix have in common: their settings, and the mixing of labels."""

    alpha: float = 1.0
    n_classes: int | None = None
    image: str = "image"
    label: str = "label"

    def __post_init__(self) -> None:
        """Check the values."""
        alpha: Any = self.alpha
        n_classes: Any = self.n_classes
        if not (isinstance(alpha, int | float) and 0 < alpha < math.inf):
            raise ValueError(f"alpha must be a number greater than 0, got {alpha!r}")
        if n_classes is not None and (not isinstance(n_classes, int) or n_classes < 1):
            raise ValueError(f"n_classes must be an int of 1 or more, or None, got {n_classes!r}")

    def __call__(self, batch: Batch) -> Batch:
        """Mix the images of a batch in place, and return the batch with mixed labels.

        Args:
            batch: Batch with the images and the labels. The memory of its images is overwritten.

        Returns:
            The same entries, but with the labels float32 [n, n_classes], or of their own dtype if they were floats.

        Raises:
            KeyError: The batch has no such column.
            TypeError, ValueError: The images or the labels are not of a supported dtype or shape.
            RuntimeError: The call is not inside a transform: there is no `tiercache.rng()`.
        """
        images = self._column(batch, self.image)
        if not isinstance(images, torch.Tensor) or images.ndim != 4:
            found = f"a tensor of shape {list(images.shape)}" if isinstance(images, torch.Tensor) else "a list"
            raise TypeError(f"{type(self).__name__} needs images of one size as one tensor [n, ...], got {found}")
        labels = self._probabilities(self._column(batch, self.label))
        if len(labels) != len(images):
            raise ValueError(f"{type(self).__name__} needs a label for each image, got {len(labels)} for {len(images)}")
        kept = self._mix(images, rng().numpy)
        return {**batch, self.label: labels.roll(1, 0).mul_(1.0 - kept).add_(labels * kept)}

    @abstractmethod
    def _mix(self, images: torch.Tensor, generator: np.random.Generator) -> float:
        """Mix the images in place; return the share of each image that is its own."""

    def _draw_share(self, generator: np.random.Generator) -> float:
        return float(generator.beta(self.alpha, self.alpha))

    def _column(self, batch: Batch, name: str) -> Any:
        if name not in batch:
            raise KeyError(f"{type(self).__name__}: the batch has no column {name!r}, only {', '.join(batch)}")
        return batch[name]

    def _probabilities(self, labels: Any) -> torch.Tensor:
        """Return the labels as probabilities of classes, [n, n_classes]."""
        if not isinstance(labels, torch.Tensor) or labels.ndim not in (1, 2):
            raise TypeError(f"{type(self).__name__} needs labels as a tensor [n] or [n, n_classes] in {self.label!r}")
        if labels.ndim == 2:
            if self.n_classes not in (None, labels.shape[1]):
                raise ValueError(f"labels have {labels.shape[1]} classes, and n_classes is {self.n_classes}")
            return labels if labels.is_floating_point() else labels.float()
        if self.n_classes is None or labels.is_floating_point():
            raise ValueError(f"labels [n] must be class numbers, with n_classes given; got {labels.dtype}")
        numbers = labels.long()
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < self.n_classes:
            span = f"{int(numbers.min())} to {int(numbers.max())}"
            raise ValueError(
                f"class numbers must be 0 to {self.n_classes - 1} (n_classes={self.n_classes}), got {span}"
            )
        return one_hot(numbers, self.n_classes).float()


class MixUp(_BatchMixing):
    """Batch transform that blends each image, and its label, with the one before it.

    Use it as `LoaderOptions(batch_transform=tc.MixUp(0.2, n_classes=10))`. The result is share * image + (1 - share) *
    previous image, with one share per batch, drawn from Beta(alpha, alpha) by `tiercache.rng()`; the first image is
    blended with the last one. Labels become probabilities, blended alike.
    Results equal those of torchvision's v2.MixUp for the same share. uint8 images are supported too: they are blended
    in float32 and rounded to the nearest value.

    Attributes:
        alpha: Parameter of the Beta distribution; with 1, shares are uniform.
        n_classes: Number of classes. None: the labels are probabilities [n, n_classes] already.
        image: Name of the column of decoded images, a tensor [n, ...] in any layout.
        label: Name of the column of labels: class numbers [n], or probabilities.
    """

    def _mix(self, images: torch.Tensor, generator: np.random.Generator) -> float:
        if not (images.is_floating_point() or images.dtype == torch.uint8):
            raise TypeError(f"MixUp blends uint8 and float images, got {images.dtype}")
        share = self._draw_share(generator)
        # From the last image to the first, so that the image before is not yet blended. One image is in the caches;
        # a rolled copy of the batch would not be.
        last = images[-1].clone() if len(images) else images
        for number in range(len(images) - 1, -1, -1):
            _blend(images[number], images[number - 1] if number else last, share)
        return share


class CutMix(_BatchMixing):
    """Batch transform that replaces a box of each image by that of the one before it.

    Use it as `LoaderOptions(batch_transform=tc.CutMix(1.0, n_classes=10))`. The box is the same in the whole batch. Its
    share of the area is 1 - share, with the share drawn from Beta(alpha, alpha), its center is uniform, and it is cut
    at the edges; `tiercache.rng()` draws them. The first image gets the box of the last one. Labels become
    probabilities, blended by the area that was replaced. Results equal those of torchvision's v2.CutMix for the same
    box. Images may be of any dtype.

    Attributes:
        alpha: Parameter of the Beta distribution; with 1, shares are uniform.
        n_classes: Number of classes. None: the labels are probabilities [n, n_classes] already.
        image: Name of the column of decoded images, a tensor [n, 3, height, width] or [n, height, width, 3].
        label: Name of the column of labels: class numbers [n], or probabilities.
    """

    def _mix(self, images: torch.Tensor, generator: np.random.Generator) -> float:
        share = self._draw_share(generator)
        is_hwc = images.shape[3] == 3 and images.shape[1] != 3
        shown = images.movedim(3, 1) if is_hwc else images
        height, width = shown.shape[2:]
        x, y = int(generator.integers(width)), int(generator.integers(height))
        half = 0.5 * math.sqrt(1.0 - share)
        half_width, half_height = int(half * width), int(half * height)
        columns = slice(max(x - half_width, 0), min(x + half_width, width))
        rows = slice(max(y - half_height, 0), min(y + half_height, height))
        box = shown[:, :, rows, columns]
        box.copy_(box.roll(1, 0))
        return 1.0 - box.shape[2] * box.shape[3] / (height * width)


def _blend(image: torch.Tensor, other: torch.Tensor, share: float) -> None:
    """Set image to share * image + (1 - share) * other."""
    if image.is_floating_point():
        image.mul_(share).add_(other, alpha=1.0 - share)
    else:
        image.copy_(image.float().mul_(share).add_(other, alpha=1.0 - share).round_())
