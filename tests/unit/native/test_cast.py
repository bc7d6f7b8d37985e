"""The cast kernels against numpy's astype, for every pair of dtypes, at any alignment, in rows of any length."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tiercache._native import gather
from tiercache.shard.conversion import round_to_bfloat16, widen_bfloat16
from tiercache.shard.schema import FLOATS, INTEGERS, STORED
from tiercache.shard.values import DTYPE_NUMBERS

WHOLE = (*sorted(INTEGERS), "bool")
PAIRS = [(a, b) for a, b in itertools.product(STORED, STORED) if a != b and (a in WHOLE or b in FLOATS)]
NO_PAIRS = [(a, b) for a, b in itertools.product(STORED, STORED) if (a, b) not in PAIRS]
# Where kinds of numbers begin and end: of integers, of what floats hold exactly, of floats themselves.
EDGES = [s * (2**k + d) for k in (0, 7, 8, 11, 15, 16, 24, 31, 32, 53, 62, 63) for d in (-1, 0, 1) for s in (1, -1)]
FLOAT_EDGES = [0.0, -0.0, 65504.0, 65519.9, 65520.0, 6e-8, 2.98e-8, 2.99e-8, 6.1e-5, 3.39e38, 3.4e38, 1e300, 1e-45]


def kind_of(stored: str, served: str, kind: int) -> int:
    return kind | DTYPE_NUMBERS[stored] << 8 | DTYPE_NUMBERS[served] << 16


def cast(values: np.ndarray, stored: str, served: str, n_rows: int = 1, misaligned: int = 0) -> np.ndarray:
    """What the kernel makes of the values, cut into rows that are gathered backwards, and put in order again."""
    width = values.nbytes // n_rows
    held = np.zeros(values.nbytes + misaligned + 64, np.uint8)
    held[misaligned : misaligned + values.nbytes] = values.view(np.uint8)
    sources = np.array([[held.ctypes.data + misaligned, 0, 0]], np.uint64)
    out = np.full(values.size * STORED[served].itemsize + misaligned + 3, 0xA5, np.uint8)
    inside = out[misaligned : len(out) - 3]
    block, row = np.zeros(n_rows, np.uint32), np.arange(n_rows, dtype=np.uint32)[::-1].copy()
    gather.gather(kind_of(stored, served, gather.FIXED), width, sources, block, row, inside)
    assert (out[:misaligned] == 0xA5).all()
    assert (out[len(out) - 3 :] == 0xA5).all()
    return inside.copy().view(STORED[served]).reshape(n_rows, -1)[::-1].reshape(-1)


def as_numbers(values: np.ndarray, dtype: str) -> np.ndarray:
    """Stored elements as what they mean, in a dtype that numpy has."""
    if dtype == "bfloat16":
        return widen_bfloat16(values)
    return values != 0 if dtype == "bool" else values


def expected(values: np.ndarray, stored: str, served: str) -> np.ndarray:
    """What numpy's astype gives, as stored elements."""
    numbers = as_numbers(values, stored)
    with np.errstate(over="ignore", invalid="ignore"):
        if served == "bfloat16":
            return round_to_bfloat16(numbers.astype(np.float64))
        return numbers.astype(np.bool_ if served == "bool" else STORED[served]).view(STORED[served])


def fitting(values: np.ndarray, stored: str, served: str) -> np.ndarray:
    """bool[n]: which values have an equal in the other dtype, in exact arithmetic."""
    numbers = as_numbers(values, stored)
    if stored in FLOATS:
        out = as_numbers(expected(values, stored, served), served)
        return ~(np.isinf(out) & ~np.isinf(numbers))
    if served in FLOATS:
        out = as_numbers(expected(values, stored, served), served)
        pairs = zip(numbers.tolist(), out.tolist(), strict=True)
        return np.array([np.isfinite(b) and int(b) == int(a) for a, b in pairs], np.bool_)
    low, high = (0, 1) if served == "bool" else (np.iinfo(STORED[served]).min, np.iinfo(STORED[served]).max)
    return np.array([low <= int(n) <= high for n in numbers.tolist()], np.bool_)


def edges_of(dtype: str) -> list[np.ndarray]:
    """Where the values of other dtypes begin and end, as far as this one has them; each as an array of one."""
    stored = STORED[dtype]
    if dtype in ("bool", "bfloat16"):
        bits = range(2) if dtype == "bool" else (0, 0x8000, 0x3F80, 0x7F7F, 0x7F80, 0x0001)
        return [np.array([value], stored) for value in bits]
    if dtype in INTEGERS:
        info = np.iinfo(stored)
        return [np.array([e], stored) for e in sorted({e for e in EDGES if info.min <= e <= info.max})]
    with np.errstate(over="ignore"):
        return list(np.array([*FLOAT_EDGES, *EDGES], np.float64).astype(stored).reshape(-1, 1))


def elements(dtype: str) -> Any:
    """Elements of a dtype, as they are stored."""
    stored = STORED[dtype]
    if dtype in INTEGERS:
        info = np.iinfo(stored)
        edges = [e for e in EDGES if info.min <= e <= info.max]
        return st.sampled_from(edges) | st.integers(int(info.min), int(info.max))
    if dtype in ("bool", "bfloat16"):  # any bits
        return st.integers(0, np.iinfo(stored).max)
    width = stored.itemsize * 8
    with np.errstate(over="ignore"):
        edges = np.array([*FLOAT_EDGES, *(-f for f in FLOAT_EDGES), *EDGES], np.float64).astype(stored).tolist()
    return st.sampled_from(edges) | st.floats(width=width, allow_nan=True, allow_infinity=True)


def same(a: np.ndarray, b: np.ndarray, dtype: str) -> bool:
    """Bit for bit, except that a NaN is a NaN."""
    nan = np.isnan(as_numbers(a, dtype)) if dtype in FLOATS else np.zeros(len(a), np.bool_)
    both = np.isnan(as_numbers(b, dtype)) if dtype in FLOATS else nan
    return bool((nan == both).all() and a[~nan].tobytes() == b[~nan].tobytes())


@settings(max_examples=max(300, settings.default.max_examples))
@given(pair=st.sampled_from(PAIRS), data=st.data())
def test_values_that_fit_equal_numpys_cast_and_others_are_reported(pair, data):
    stored, served = pair
    n_rows = data.draw(st.sampled_from([1, 2, 7]))
    n = n_rows * data.draw(st.sampled_from([1, 3, 8, 40, 150]))
    values = data.draw(hnp.arrays(STORED[stored], n, elements=elements(stored)))
    misaligned = data.draw(st.integers(0, 15))
    fits = fitting(values, stored, served)
    good = np.where(fits, values, values.dtype.type(0))
    assert same(cast(good, stored, served, n_rows, misaligned), expected(good, stored, served), served)
    if fits.all():
        return
    with pytest.raises(gather.CastError, match="cast to"):
        cast(values, stored, served, n_rows, misaligned)


@pytest.mark.parametrize("stored", sorted(STORED))
def test_each_value_at_the_edge_of_a_dtype_is_cast_or_reported(stored):
    for served in (b for a, b in PAIRS if a == stored):
        for value in edges_of(stored):
            if fitting(value, stored, served).all():
                assert same(cast(value, stored, served), expected(value, stored, served), served), (value, served)
            else:
                with pytest.raises(gather.CastError, match="cast to"):
                    cast(value, stored, served)
    for served in (b for a, b in NO_PAIRS if a == stored):  # which would lose values
        with pytest.raises(ValueError, match="no cast"):
            cast(np.zeros(4, STORED[stored]), stored, served)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_every_float16_and_bfloat16_value_is_cast_correctly(stored):
    for served in {"float16", "bfloat16", "float32", "float64"} - {stored}:
        values = np.arange(65536, dtype=np.uint32).astype(np.uint16).view(STORED[stored])
        fits = fitting(values, stored, served)
        assert same(cast(values[fits], stored, served), expected(values[fits], stored, served), served)


@given(hnp.arrays(np.float32, 200, elements=elements("float32")))
def test_floats_are_rounded_as_by_torch(values):
    for served, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        good = values[fitting(values, "float32", served)]
        if good.size:
            found = torch.from_numpy(cast(good, "float32", served).view(np.int16)).view(dtype)
            assert torch.equal(found.nan_to_num(7), torch.from_numpy(good).to(dtype).nan_to_num(7))


def test_denormal_floats_are_kept_in_a_thread_that_flushes_them_to_zero():
    tiny = np.arange(1, 1024, dtype=np.uint16).view(np.float16)
    before = torch.set_flush_denormal(True)
    try:
        assert (cast(tiny, "float16", "float32") == np.arange(1, 1024, dtype=np.float32) * np.float32(2.0**-24)).all()
    finally:
        torch.set_flush_denormal(False)
    assert before in (True, False)


@given(st.data(), st.sampled_from(["int64", "float32", "bfloat16", "uint8"]), st.sampled_from([1, 5, 300, 9000]))
def test_bits_become_zero_and_one_in_any_dtype(data, served, n):
    seed, in_order = data.draw(st.integers(0, 99)), data.draw(st.booleans())
    rng = np.random.default_rng(seed)
    flags = rng.integers(0, 2, n, dtype=np.uint8)
    packed = np.packbits(flags, bitorder="little")
    row = np.arange(n, dtype=np.uint32) if in_order else rng.permutation(n).astype(np.uint32)
    out = np.zeros(n, STORED[served])
    sources = np.array([[packed.ctypes.data, 0, 0]], np.uint64)
    place = sources, np.zeros(n, np.uint32), row
    gather.gather(kind_of("bool", served, gather.BITS), 0, *place, out.view(np.uint8))
    assert as_numbers(out, served).tolist() == flags[row].tolist()


@given(st.data(), st.sampled_from([("uint16", "int64"), ("float32", "float16"), ("int8", "float64")]))
def test_rows_of_varying_length_are_cast_alone_and_in_runs(data, pair):
    stored, served = pair
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    lengths = rng.integers(0, data.draw(st.sampled_from([4, 3000])), 40)
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    values = rng.integers(0, 100, int(offsets[-1])).astype(STORED[stored])
    sources = np.array([[values.ctypes.data, offsets.ctypes.data, values.size]], np.uint64)
    in_order = data.draw(st.booleans())
    row = np.arange(40, dtype=np.uint32) if in_order else rng.integers(0, 40, 25).astype(np.uint32)
    block = np.zeros(len(row), np.uint32)
    found = gather.measure(sources, block, row)
    out = np.zeros(int(found[-1]), STORED[served])
    kind = kind_of(stored, served, gather.VAR)
    gather.gather(kind, values.itemsize, sources, block, row, out.view(np.uint8), found)
    wanted = np.concatenate([values[offsets[r] : offsets[r + 1]] for r in row.tolist()])
    assert out.tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("kind", "width", "match"),
    [
        (kind_of("uint8", "int64", gather.BITS), 0, "bits are cast from bool"),
        (kind_of("int32", "int64", gather.FIXED), 6, "6 bytes"),
        (gather.FIXED | 99 << 8 | 1 << 16, 8, "no cast from dtype number 99"),
        (kind_of("uint8", "int64", gather.FIXED), 3, "at least 24 bytes, got 8"),
    ],
)
def test_invalid_arguments_raise_errors(kind, width, match):
    data, zero = np.zeros(64, np.uint8), np.zeros(1, np.uint32)
    with pytest.raises(ValueError, match=match):
        gather.gather(kind, width, np.array([[data.ctypes.data, 0, 0]], np.uint64), zero, zero, np.zeros(8, np.uint8))
