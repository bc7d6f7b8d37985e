"""The array library of a loader: what its batches consist of.

The native path is the same for every library. `torch_library` has torch's; NumPy's is here, so that batches of
NumPy arrays need no torch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from tiercache.errors import SchemaError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache._native.ring import RowType, Slot
    from tiercache.data.output_spec import OutputSpec
    from tiercache.shard.schema import Schema


class ArrayLibrary(ABC):
    """Base of the array libraries: stateless and picklable.

    A dtype is named as in a schema ("uint8", "bfloat16", "bool").

    Attributes:
        profiler: Object whose `_is_profiler_enabled` says whether `record_function(name)` must be entered for a batch.
        from_dlpack: Function that makes an array of a DLPack capsule. None: rows_over() makes all arrays.
        nested: Function that makes the jagged nested array of (values end to end, offsets). None: there are none.
    """

    profiler: Any
    from_dlpack: Callable[[object], Any] | None = None
    nested: Callable[[Any, Any], Any] | None = None

    @abstractmethod
    def row_type(self, dtype: str, shape: tuple[int, ...]) -> RowType | None:
        """Return the type of rows that from_dlpack() takes; None: rows_over() makes such arrays."""

    @abstractmethod
    def rows_over(self, dtype: str, shape: tuple[int, ...] = ()) -> Callable[[Slot, int, int], Any]:
        """Return a function that makes an array [n, *shape] of a column, from the slot, an offset in bytes and n.

        The array lies over the slot, or, if it is small, in memory of its own.
        """

    @abstractmethod
    def over(self, memory: Any, dtype: str, shape: tuple[int, ...], offset: int = 0) -> Any:
        """Return an array with one element or more over a writable buffer, which it keeps alive. offset: in bytes."""

    @abstractmethod
    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """Return a new array with arbitrary content."""

    @abstractmethod
    def split(self, array: Any, sizes: list[int]) -> Sequence[Any]:
        """Return consecutive parts of an array as views, by their numbers of rows."""

    @abstractmethod
    def mask(self, flags: Sequence[bool]) -> Any:
        """Return bool[n]."""

    @abstractmethod
    def from_numpy(self, stored: Any, dtype: str) -> Any:
        """Return an array over the memory of a NumPy array that has the stored elements (bfloat16: their bits)."""

    @abstractmethod
    def to_numpy(self, array: Any) -> Any:
        """Return a NumPy array over the memory of an array."""

    @abstractmethod
    def small_arrays(self, values: dict[str, Any], most_bytes: int) -> dict[str, Any]:
        """Return the arrays among the values, if all arrays together have at most that many bytes, else {}.

        Nested arrays are left out.
        """


def numpy_dtype(dtype: str, column: str | None = None) -> np.dtype[Any]:
    """Return NumPy's dtype of a name. Raises SchemaError: bfloat16, and ml_dtypes is not installed."""
    if dtype != "bfloat16":
        return np.dtype(dtype)
    try:
        bfloat16: np.dtype[Any] = np.dtype(import_module("ml_dtypes").bfloat16)
    except ModuleNotFoundError as error:
        message = "NumPy itself has no bfloat16: install ml_dtypes, or serve float32 (cast=, or DecodeImage's dtype=)"
        raise SchemaError(message, column=column, expected="ml_dtypes", got="no ml_dtypes") from error
    return bfloat16


class _Held:
    """An array that arrays over its memory keep alive.

    An array over an array refers to the owner of the memory instead, and BatchMemory takes the memory back at the end
    of the array that it lent.
    """

    def __init__(self, array: NDArray[Any]) -> None:
        self.array, self.__array_interface__ = array, array.__array_interface__


class NumpyLibrary(ArrayLibrary):
    """Batches of NumPy arrays. Nothing here imports torch."""

    profiler = SimpleNamespace(_is_profiler_enabled=False)

    def check(self, schema: Schema, output_spec: OutputSpec) -> None:
        """Raise SchemaError for a column that cannot be served as NumPy arrays. schema: as stored."""
        for column in output_spec.schema(schema).columns:
            if output_spec.layout(column) == "nested":
                message = "the layout 'nested' is a torch tensor; 'buffer' is of NumPy arrays"
                expected = "'list', 'padded', 'buffer'"
                raise SchemaError(message, column=column.name, expected=expected, got="'nested'")
            decode = output_spec.decode.get(column.name)
            if "bfloat16" in (column.dtype, decode.dtype if decode is not None else None):
                numpy_dtype("bfloat16", column.name)

    def row_type(self, dtype: str, shape: tuple[int, ...]) -> None:
        """See ArrayLibrary. None: an array that NumPy makes of a DLPack capsule is read-only."""

    def rows_over(self, dtype: str, shape: tuple[int, ...] = ()) -> Callable[[Slot, int, int], Any]:
        """See ArrayLibrary."""
        kind = numpy_dtype(dtype)
        if 0 in shape:
            return lambda _slot, _offset, n: np.empty((n, *shape), kind)
        array: Callable[..., Any] = np.ndarray  # NumPy's stubs accept only built-in buffers
        row_bytes = math.prod(shape) * kind.itemsize
        if not shape:  # building a tuple takes a sixth of the time of the array
            return lambda slot, offset, n: array(n, kind, slot.column(offset, n * row_bytes))
        return lambda slot, offset, n: array((n, *shape), kind, slot.column(offset, n * row_bytes))

    def over(self, memory: Any, dtype: str, shape: tuple[int, ...], offset: int = 0) -> Any:
        """See ArrayLibrary."""
        if isinstance(memory, np.ndarray):
            memory = np.asarray(_Held(memory))
        return np.frombuffer(memory, numpy_dtype(dtype), math.prod(shape), offset).reshape(shape)

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """See ArrayLibrary."""
        return np.empty(tuple(shape), numpy_dtype(dtype))

    def split(self, array: Any, sizes: list[int]) -> Sequence[Any]:
        """See ArrayLibrary."""
        return [array[start:stop] for start, stop in pairwise(accumulate(sizes, initial=0))]

    def mask(self, flags: Sequence[bool]) -> Any:
        """See ArrayLibrary."""
        return np.array(flags, np.bool_)

    def from_numpy(self, stored: Any, dtype: str) -> Any:
        """See ArrayLibrary."""
        return stored.view(numpy_dtype(dtype)) if dtype == "bfloat16" else stored

    def to_numpy(self, array: Any) -> Any:
        """See ArrayLibrary."""
        return array

    def small_arrays(self, values: dict[str, Any], most_bytes: int) -> dict[str, Any]:
        """See ArrayLibrary."""
        arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        return arrays if sum(array.nbytes for array in arrays.values()) <= most_bytes else {}
