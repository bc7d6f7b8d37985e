"""What torch's loader has of its own for transforms: tiercache.collate, MixUp and CutMix, and collate functions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.nn.functional import one_hot
from torch.utils.data._utils.collate import collate as collate_by_type
from torch.utils.data._utils.collate import default_collate_fn_map

from tiercache.data.output_spec import Buffer, ReadRecords, apply_layouts, as_columns
from tiercache.load.batch import Batch
from tiercache.shard.schema import Kind
from tiercache.shard.values import ColumnValues
from tiercache.transform_rng import rng, use_fresh_key

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
        *("float16", "bfloat16", "float32", "float64"),
    )
}

Allocate: TypeAlias = Callable[[Sequence[int], torch.dtype], "torch.Tensor | None"]


def collate_into(allocate: Allocate) -> Callable[[list[Any]], Any]:
    """Return torch's default collate function, with tensors stacked in allocated memory.

    In a worker process torch's own function would create a file in /dev/shm for each tensor of each batch.
    """

    def stack(batch: Sequence[torch.Tensor], *, collate_fn_map: Any = None) -> torch.Tensor:
        first = batch[0]
        if first.layout is not torch.strided or first.is_nested:
            own: torch.Tensor = default_collate_fn_map[torch.Tensor](batch, collate_fn_map=collate_fn_map)
            return own
        is_alike = all(one.dtype == first.dtype and not one.requires_grad and one.device.type == "cpu" for one in batch)
        out = allocate((len(batch), *first.shape), first.dtype) if is_alike else None
        return torch.stack(list(batch), 0, out=out)

    functions = default_collate_fn_map
    if functions.get(torch.Tensor) is _TORCHS_STACK:  # otherwise the user has registered another function
        functions = {**functions, torch.Tensor: stack}
    return partial(collate_by_type, collate_fn_map=functions)


_TORCHS_STACK = default_collate_fn_map.get(torch.Tensor)


@dataclass(frozen=True, slots=True)
class TransformedCollate:
    """The collate function of a loader with batch transforms, on torch's path; the native path runs its parts."""

    collate_fn: Callable[[list[Any]], Any]
    batch_transforms: tuple[Callable[[Any], Any], ...]

    def __call__(self, records: list[Any]) -> Any:
        """Return the batch of some records."""
        with use_fresh_key():
            batch = self.collate_fn(records)
            for function in self.batch_transforms:
                batch = function(batch)
        return batch


def collate(records: Sequence[Any]) -> Any:
    """Return a batch of records, for torch's DataLoader over a `tiercache.Dataset`.

    Records that were read together (`Dataset.__getitems__`) and not accessed since become a batch without a copy per
    record, in the layouts of the data set. Other records are stacked, because they may have been changed.

    Args:
        records: Dicts with the same keys, of NumPy arrays and scalars, bytes, str or other objects; or tuples.

    Returns:
        Dict by column: a tensor [n, ...] of the column's dtype if the shapes agree, else a list. For tuples a list of
        such values.

    Raises:
        ValueError: There are no records.
    """
    if isinstance(records, ReadRecords) and records.as_gathered:
        batch = {
            name: _tensor(values)
            for name, values in apply_layouts(records.columns, records.output_spec, records.number).items()
        }
        for values in records.columns:
            if values.column.kind is Kind.RAGGED and records.output_spec.layout(values.column) == "list":
                batch[values.column.name] = _ragged(values)
            elif values.column.name in records.output_spec.decode and isinstance(values.values, list):
                batch[values.column.name] = [_tensor(picture) for picture in values.values]
        return batch if records.output_spec.names is None else as_columns(batch, records.output_spec.names)
    if not records:
        raise ValueError("cannot make a batch of no records")
    if isinstance(records[0], tuple):
        return [_stack(list(values)) for values in zip(*records, strict=True)]
    return {name: _stack([record[name] for record in records]) for name in records[0]}


def _tensor(values: Any) -> Any:
    if isinstance(values, Buffer):
        return Buffer(_tensor(values.values), _tensor(values.offsets), _tensor(values.shapes))
    return torch.from_numpy(values) if isinstance(values, np.ndarray) else values


def _ragged(values: ColumnValues) -> list[torch.Tensor]:
    """Return a list of tensors; a null is an empty tensor, as on the native path."""
    empty = torch.empty([d or 0 for d in values.column.shape], dtype=TORCH_DTYPES[values.column.dtype or ""])
    return [empty.clone() if v is None else torch.as_tensor(v) for v in values.values]


def _stack(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, torch.Tensor) and all(isinstance(v, torch.Tensor) and v.shape == first.shape for v in values):
        return torch.stack(values)
    if isinstance(first, np.ndarray | np.generic) and all(isinstance(v, type(first)) for v in values):
        if all(v.shape == first.shape for v in values):
            return torch.from_numpy(np.stack(values))
        return [torch.from_numpy(v) for v in values]
    if isinstance(first, bool | int | float) and all(isinstance(v, bool | int | float) for v in values):
        return torch.tensor(values)
    return values


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
            if isinstance(images, np.ndarray):
                found = "a NumPy array: use tiercache.DataLoader, which serves tensors"
            raise TypeError(f"{type(self).__name__} needs images of one size as one tensor [n, ...], got {found}")
        labels = self._probabilities(self._column(batch, self.label))
        if len(labels) != len(images):
            raise ValueError(f"{type(self).__name__} needs a label for each image, got {len(labels)} for {len(images)}")
        kept = self._mix(images, rng().numpy)
        return {**batch, self.label: labels.roll(1, 0).mul_(1.0 - kept).add_(labels * kept)}

    @abstractmethod
    def _mix(self, images: torch.Tensor, generator: np.random.Generator) -> float:
        """Mix the images in place; return the share of each image that is its own."""

    def _column(self, batch: Batch, name: str) -> Any:
        if name not in batch:
            raise KeyError(f"{type(self).__name__}: the batch has no column {name!r}, only {', '.join(batch)}")
        return batch[name]

    def _probabilities(self, labels: Any) -> torch.Tensor:
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
        share = float(generator.beta(self.alpha, self.alpha))
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
        share = float(generator.beta(self.alpha, self.alpha))
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
    if image.is_floating_point():
        image.mul_(share).add_(other, alpha=1.0 - share)
    else:
        image.copy_(image.float().mul_(share).add_(other, alpha=1.0 - share).round_())
