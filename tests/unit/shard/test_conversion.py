"""Conversion of numbers to the dtype of a column: exact, or an error."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tiercache.shard.conversion import ConversionError, as_numpy, convert_column, fit, round_to_bfloat16, widen_bfloat16
from tiercache.shard.schema import INTEGERS, STORED, Column

INTEGER_DTYPES = st.sampled_from(sorted(INTEGERS))


@given(data=st.data(), source=INTEGER_DTYPES, target=INTEGER_DTYPES)
def test_integers_are_converted_exactly_or_the_error_names_the_first_that_does_not_fit(data, source, target):
    values = data.draw(hnp.arrays(source, st.integers(0, 5)))
    limits = np.iinfo(target)
    wrong = [i for i, value in enumerate(values.tolist()) if not limits.min <= value <= limits.max]
    if wrong:
        with pytest.raises(ConversionError) as caught:
            fit(values, source, target)
        assert (caught.value.index, caught.value.got) == (wrong[0], str(values[wrong[0]]))
    else:
        got = fit(values, source, target)
        assert got.dtype == STORED[target]
        assert got.tolist() == values.tolist()


@pytest.mark.parametrize("target", sorted(INTEGERS))
@given(data=st.data())
def test_lists_of_integers_are_converted_exactly_although_only_some_are_beyond_int64(data, target):
    limits = np.iinfo(target)
    values = data.draw(st.lists(st.sampled_from([0, 1, limits.min, limits.max]), min_size=2, max_size=2))
    found = convert_column(Column.of("x", f"{target}[2]"), [values])
    assert (found.values.dtype, found.values.reshape(2).tolist()) == (STORED[target], values)
    with pytest.raises(ConversionError):
        convert_column(Column.of("x", f"{target}[2]"), [[limits.min - 1, limits.max]])
    with pytest.raises(ConversionError):
        convert_column(Column.of("x", f"{target}[2]"), [[True, limits.max]])


@given(value=st.integers(-(2**63), 2**64 - 1), target=st.sampled_from(["float16", "float32", "float64", "bfloat16"]))
def test_an_integer_is_converted_only_to_a_float_of_equal_value(value, target):
    source = "uint64" if value > 0 else "int64"
    wanted = torch.tensor(float(value), dtype=getattr(torch, target)).item()
    exact = np.isfinite(wanted) and int(wanted) == value
    if exact:
        got = fit(np.array([value], source), source, target)
        assert (widen_bfloat16(got) if target == "bfloat16" else got)[0] == value
    else:
        with pytest.raises(ConversionError):
            fit(np.array([value], source), source, target)


@given(values=hnp.arrays(np.float32, 20, elements=st.floats(width=32)))
def test_float32_is_rounded_to_bfloat16_as_in_torch(values):
    expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    assert np.array_equal(widen_bfloat16(round_to_bfloat16(values)), expected, equal_nan=True)


@given(st.integers(0, 2**16 - 2), st.sampled_from([0, 1, -1]), st.integers(0, 24))
def test_float64_is_rounded_once(bits, side, shrink):
    """Next to the middle of two neighbours, rounding to float32 first would land on it and then go the wrong way."""
    low, high = (widen_bfloat16(np.array([b], np.uint16)).astype(np.float64)[0] for b in (bits, bits + 1))
    if not (np.isfinite(low) and np.isfinite(high)):
        return
    middle = (low + high) / 2
    value = middle + side * abs(high - low) * 2.0 ** -(10 + shrink)
    even = low if bits % 2 == 0 else high
    expected = even if value == middle else (low if abs(value - low) < abs(value - high) else high)
    assert widen_bfloat16(round_to_bfloat16(np.array([value])))[0] == expected


@pytest.mark.parametrize("target", sorted(STORED))
def test_an_array_of_the_columns_dtype_is_not_copied(target):
    array = np.zeros(3, np.bool_ if target == "bool" else STORED[target])
    assert np.shares_memory(fit(array, target, target), array)


def test_a_tensor_that_numpy_cannot_hold_is_refused():
    with pytest.raises(ConversionError, match="a dense tensor"):
        as_numpy(torch.zeros(2, 2).to_sparse())
