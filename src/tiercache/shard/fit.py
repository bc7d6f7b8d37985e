"""Converts numbers to the stored dtype of a column, and raises ConversionError for the first number that does not fit.

An integer must fit exactly, also into a float. A float may be rounded to a narrower float, but must not become
infinite. A bool fits only a bool. No value wraps around or is truncated.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from tiercache.shard.spec import FLOATS, INTEGERS, STORED

# Messages show at most this many characters of a value; an integer may have a million digits.
_GOT_CHARACTERS = 200


class ConversionError(ValueError):
    """A value does not fit its column. index: Index of the record in the batch."""

    def __init__(self, expected: str, got: str, index: int = 0) -> None:
        got = got if len(got) <= _GOT_CHARACTERS else f"{got[:_GOT_CHARACTERS]}..."
        super().__init__(f"expected {expected}, got {got}")
        self.expected = expected
        self.got = got
        self.index = index


def as_numpy(data: Any) -> tuple[npt.NDArray[Any], str] | None:
    """Return the array and the dtype name of a numpy scalar or array, a torch tensor, or an object with __array__.

    bfloat16 elements are returned as their bits in uint16, with the name "bfloat16". The array may share the object's
    memory. For any other object, the result is None.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(data, torch.Tensor):
        try:
            tensor = data.detach().cpu()
            if tensor.dtype == torch.bfloat16:
                return tensor.view(torch.int16).numpy().view(np.uint16), "bfloat16"
            data = tensor.numpy()
        except (TypeError, RuntimeError) as error:
            got = f"a tensor of {data.dtype}, {data.layout}, on {data.device}"
            raise ConversionError("a dense tensor of a dtype that numpy has", got) from error
    if not isinstance(data, np.ndarray | np.generic):
        if not hasattr(data, "__array__"):
            return None
        try:
            data = np.asarray(data)
        except (TypeError, ValueError, RuntimeError) as error:  # raised by another library's __array__
            raise ConversionError("an object that numpy can read", f"a {type(data).__qualname__}: {error}") from error
    array = np.asarray(data)
    if array.dtype.name == "bfloat16":  # a dtype of ml_dtypes, which need not be installed
        return array.view(np.uint16), "bfloat16"
    return array, array.dtype.name


def fit(array: npt.NDArray[Any], given: str, dtype: str) -> npt.NDArray[Any]:
    """Return the elements of an array in the stored form of another dtype.

    Args:
        array: Elements.
        given: Name of the dtype of the elements; for "bfloat16" the array holds the bits as uint16.
        dtype: Name of the dtype of the result.

    Returns:
        An array of STORED[dtype], over the same memory if no conversion is necessary.

    Raises:
        ConversionError: An element does not fit; its index is along the first dimension.
    """
    stored = STORED[dtype]
    if given == dtype:
        return array.view(stored) if array.dtype.isnative else array.astype(stored)
    if given not in STORED or "bool" in (given, dtype):
        raise ConversionError(dtype, f"elements of dtype {given}")
    if dtype in INTEGERS:
        if given not in INTEGERS:
            raise ConversionError(dtype, f"elements of dtype {given}")
        return _fit_integers(array, stored, dtype)
    if given == "bfloat16":
        array, given = widen_bfloat16(array), "float32"
    return _fit_integers_to_float(array, dtype) if given in INTEGERS else _fit_floats(array, dtype)


def _fit_integers(array: npt.NDArray[Any], stored: np.dtype[Any], dtype: str) -> npt.NDArray[Any]:
    have, want = np.iinfo(array.dtype), np.iinfo(stored)
    # Compare only with limits that the array's dtype can hold: numpy would widen the array, or refuse the comparison.
    too_low = array.size > 0 and want.min > have.min and int(array.min()) < want.min
    too_high = array.size > 0 and want.max < have.max and int(array.max()) > want.max
    if too_low or too_high:
        wrong = np.zeros(array.shape, bool)
        if too_low:
            wrong |= array < want.min
        if too_high:
            wrong |= array > want.max
        _fail(array, wrong, f"{dtype} ({want.min} to {want.max})")
    return array.astype(stored)


def _fit_integers_to_float(array: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    with np.errstate(over="ignore", invalid="ignore"):
        out = _fit_floats(array.astype(np.float64), dtype)
        back = widen_bfloat16(out) if dtype == "bfloat16" else out
        # Above 2**53, float64 rounds, so several integers compare equal to one float: compare as Python integers.
        exact = back.astype(np.float64) == array
        if array.size and max(int(array.max()), -int(array.min())) > 2**53:
            exact = np.array([int(a) == int(b) for a, b in zip(array.flat, back.flat, strict=True)]).reshape(
                array.shape
            )
    if not exact.all():
        _fail(array, ~exact, f"an integer that {dtype} holds exactly")
    return out


def _fit_floats(array: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    if dtype not in FLOATS:
        raise ConversionError(dtype, f"elements of dtype {array.dtype.name}")
    with np.errstate(over="ignore", invalid="ignore"):
        out = round_to_bfloat16(array) if dtype == "bfloat16" else array.astype(STORED[dtype])
        infinite = np.isinf(widen_bfloat16(out) if dtype == "bfloat16" else out)
    if infinite.any() and (infinite & ~np.isinf(array)).any():
        _fail(array, infinite & ~np.isinf(array), f"a number within the range of {dtype}")
    return out


def round_to_bfloat16(array: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """Return the bits of the nearest bfloat16 values, ties to even. array: Array of any float dtype."""
    single = array.astype(np.float32)
    bits = single.view(np.uint32)
    if array.dtype.itemsize > 4:
        # Rounding twice (to float32, then to bfloat16) would turn near-ties into ties. So the first rounding is "to
        # odd": toward zero, with the last bit set if the result is inexact.
        inexact = np.isfinite(single) & (single.astype(array.dtype) != array)
        away = inexact & (np.abs(single.astype(array.dtype)) > np.abs(array))
        bits = (bits - away.astype(np.uint32)) | inexact.astype(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(single), quiet_nan, rounded).astype(np.uint16)


def widen_bfloat16(bits: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return the float32 values that equal bfloat16 values, given by their bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _fail(array: npt.NDArray[Any], wrong: npt.NDArray[Any], expected: str) -> NoReturn:
    place = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
    raise ConversionError(expected, str(array[place].item()), int(place[0]) if place else 0)
