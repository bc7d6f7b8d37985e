"""Buffer: values of different lengths stored end to end, with the offset of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """n values of different lengths, end to end: value i is `values[offsets[i]:offsets[i + 1]]`.

    `buffer[i]` returns that value without a copy; a negative i counts from the end. The members are torch tensors (from
    loaders and `tiercache.collate`) or NumPy arrays (from `dataset[[...]]`). A buffer moves between devices and pins as
    a tensor does, so torch's `pin_memory` accepts it in a batch. The caller owns the memory.

    Attributes:
        values: uint8[n_bytes] for bytes, text (UTF-8) and images. For a ragged column its elements: [n_rows, ...] if
            only the first dimension varies, else flat.
        offsets: int64[n + 1], rising from 0, counted in rows of `values`.
        shapes: int32[n, n_dims], the shape of each value, if a dimension other than the first varies; else None.
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
        """Return the buffer with its tensors on another device. See `torch.Tensor.to`.

        Args:
            args: Arguments of `torch.Tensor.to`. A dtype applies to `values` only.
            kwargs: Keyword arguments of `torch.Tensor.to`.

        Raises:
            AttributeError: The members are NumPy arrays.
        """
        values = self.values.to(*args, **kwargs)
        place = {"device": values.device, "non_blocking": bool(kwargs.get("non_blocking", False))}
        shapes = None if self.shapes is None else self.shapes.to(**place)
        return Buffer(values, self.offsets.to(**place), shapes)

    def pin_memory(self, device: Any = None) -> Buffer:
        """Return the buffer in pinned memory. See `torch.Tensor.pin_memory`.

        Args:
            device: Device of the pinned memory. None: the current accelerator.

        Raises:
            AttributeError: The members are NumPy arrays.
        """
        args = () if device is None else (device,)
        shapes = None if self.shapes is None else self.shapes.pin_memory(*args)
        return Buffer(self.values.pin_memory(*args), self.offsets.pin_memory(*args), shapes)
