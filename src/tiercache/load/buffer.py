"""Buffer: values of different lengths laid end to end, and where each begins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """n values of different lengths, end to end: value i is `values[offsets[i]:offsets[i + 1]]`.

    `buffer[i]` is that value, without a copy; a negative i counts from the end. Members are torch tensors (of loaders
    and `tiercache.collate`) or numpy arrays (of `dataset[[...]]`). Moves and pins as a tensor does, so that torch's
    `pin_memory` takes it in a batch. The memory is the caller's own.

    values: uint8[n_bytes] of bytes, text (UTF-8) and images; of a ragged column its elements, [n_rows, ...] where only
        the first dimension varies, else flat.
    offsets: int64[n + 1], rising from 0, in rows of `values`.
    shapes: None, or int32[n, n_dims], the shape of each value, where another dimension than the first varies.
    """

    values: Any
    offsets: Any
    shapes: Any = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Any:
        n = len(self)
        at = index + n if index < 0 else index
        if not 0 <= at < n:
            raise IndexError(f"value {index} of a buffer of {n}")
        value = self.values[int(self.offsets[at]) : int(self.offsets[at + 1])]
        return value if self.shapes is None else value.reshape(self.shapes[at].tolist())

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def to(self, *args: Any, **kwargs: Any) -> Buffer:
        """The buffer with its tensors on another device, as `torch.Tensor.to`; a dtype is that of `values` alone.

        Raises:
            AttributeError: it is of numpy arrays.
        """
        values = self.values.to(*args, **kwargs)
        place = {"device": values.device, "non_blocking": bool(kwargs.get("non_blocking", False))}
        shapes = None if self.shapes is None else self.shapes.to(**place)
        return Buffer(values, self.offsets.to(**place), shapes)

    def pin_memory(self, device: Any = None) -> Buffer:
        """The buffer in pinned memory, as `torch.Tensor.pin_memory`. Raises AttributeError for numpy arrays."""
        args = () if device is None else (device,)
        shapes = None if self.shapes is None else self.shapes.pin_memory(*args)
        return Buffer(self.values.pin_memory(*args), self.offsets.pin_memory(*args), shapes)
