"""Numbers into stored form, or the first that does not fit. Nothing is ever wrapped, truncated or guessed.

Integers must fit exactly, also into floats; floats may be rounded to a narrower float, but not become infinite; bool
is only bool.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from tiercache.shard.spec import FLOATS, INTEGERS, STORED

# Enough to know a value by; some have a million digits.
_GOT_CHARACTERS = 200


class MisfitError(ValueError):
    """A value that does not fit its column. index: of the record in the batch."""

    def __init__(self, expected: str, got: str, index: int = 0) -> None:
        got = got if len(got) <= _GOT_CHARACTERS else f"{got[:_GOT_CHARACTERS]}..."
        super().__init__(f"expected {expected}, got {got}")
        self.expected = expected
        self.got = got
        self.index = index


def as_numpy(data: Any) -> tuple[npt.NDArray[Any], str] | None:
    """(array, dtype name) of a numpy scalar or array, torch tensor, or anything with __array__; None for other objects.

    bfloat16 comes as its bits in uint16, with the name "bfloat16". The array may share the object's memory.
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
            raise MisfitError("a dense tensor of a dtype that numpy has", got) from error
    if not isinstance(data, np.ndarray | np.generic):
        if not hasattr(data, "__array__"):
            return None
        try:
            data = np.asarray(data)
        except (TypeError, ValueError, RuntimeError) as error:  # of another library's __array__
            raise MisfitError("what numpy can read", f"a {type(data).__qualname__}: {error}") from error
    array = np.asarray(data)
    if array.dtype.name == "bfloat16":  # of ml_dtypes, which need not be there
        return array.view(np.uint16), "bfloat16"
    return array, array.dtype.name


def fit(array: npt.NDArray[Any], given: str, dtype: str) -> npt.NDArray[Any]:
    """array, whose elements are of the dtype named `given`, as stored elements of the dtype named `dtype`.

    Returns the same memory where no conversion is needed.

    Raises:
        MisfitError: an element does not fit; its index is along the first dimension.
    """
    stored = STORED[dtype]
    if given == dtype:
        return array.view(stored) if array.dtype.isnative else array.astype(stored)
    if given not in STORED or "bool" in (given, dtype):
        raise MisfitError(dtype, f"elements of dtype {given}")
    if dtype in INTEGERS:
        if given not in INTEGERS:
            raise MisfitError(dtype, f"elements of dtype {given}")
        return _fit_integers(array, stored, dtype)
    if given == "bfloat16":
        array, given = widen_bfloat16(array), "float32"
    return _fit_integers_to_float(array, dtype) if given in INTEGERS else _fit_floats(array, dtype)


def _fit_integers(array: npt.NDArray[Any], stored: np.dtype[Any], dtype: str) -> npt.NDArray[Any]:
    have, want = np.iinfo(array.dtype), np.iinfo(stored)
    # Compared only with limits that the array's own dtype can hold: numpy would widen, or refuse, others.
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
        # Through Python integers where float64 itself may have rounded: its neighbours are equal to it there.
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
        raise MisfitError(dtype, f"elements of dtype {array.dtype.name}")
    with np.errstate(over="ignore", invalid="ignore"):
        out = round_to_bfloat16(array) if dtype == "bfloat16" else array.astype(STORED[dtype])
        infinite = np.isinf(widen_bfloat16(out) if dtype == "bfloat16" else out)
    if infinite.any() and (infinite & ~np.isinf(array)).any():
        _fail(array, infinite & ~np.isinf(array), f"a number within the range of {dtype}")
    return out


def round_to_bfloat16(array: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """The bits of the nearest bfloat16s, ties to even. array: any float dtype."""
    single = array.astype(np.float32)
    bits = single.view(np.uint32)
    if array.dtype.itemsize > 4:
        # Rounding twice (to float32, then on) would turn near-ties into ties. Rounded to odd the first time, none is
        # lost: the value next to zero, with the last bit set where anything was cut off.
        inexact = np.isfinite(single) & (single.astype(array.dtype) != array)
        away = inexact & (np.abs(single.astype(array.dtype)) > np.abs(array))
        bits = (bits - away.astype(np.uint32)) | inexact.astype(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(single), quiet_nan, rounded).astype(np.uint16)


def widen_bfloat16(bits: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """The float32s that have the same values."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _fail(array: npt.NDArray[Any], wrong: npt.NDArray[Any], expected: str) -> NoReturn:
    place = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
    raise MisfitError(expected, str(array[place].item()), int(place[0]) if place else 0)
