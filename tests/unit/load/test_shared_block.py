"""Objects in shared memory: what is read equals what was written, and lies in the block."""

from __future__ import annotations

import gc
import pickle
from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiercache.data.output_spec import Buffer
from tiercache.load.transform_workers import SharedBlock, read

Pair = namedtuple("Pair", ["left", "right"])
DTYPES = [torch.bool, torch.uint8, torch.int16, torch.uint16, torch.int64, torch.float16, torch.bfloat16, torch.float64]
DTYPES += [torch.complex64]


@pytest.fixture
def block():
    made = SharedBlock.create()
    yield made
    made.close()


def copy_of(block, value):
    """The value as another process reads it."""
    block.clear()
    stored = block.write(value)
    return read(block.memory, stored)


def is_in(block, tensor):
    offset = tensor.data_ptr() - block.memory.ctypes.data
    return 0 <= offset < block.memory.size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_of_any_dtype_and_shape(block, dtype):
    for shape in ((), (0,), (3, 0), (7,), (40, 3, 2)):
        tensor = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
        found = copy_of(block, tensor)
        assert (found.dtype, found.shape) == (dtype, tensor.shape)
        assert torch.equal(found, tensor)


def test_large_tensors_and_arrays_lie_in_the_block(block):
    value = {"t": torch.arange(1000), "a": [np.arange(900.0)], "b": Buffer(torch.ones(2000), torch.arange(50))}
    found = copy_of(block, value)
    assert not is_in(block, found["b"].offsets)
    assert is_in(block, found["t"])
    assert is_in(block, torch.from_numpy(found["a"][0]))
    assert is_in(block, found["b"].values)
    found["t"][3] = -1  # the reader may write
    assert found["t"][3] == -1


def test_channels_last_and_parts_of_tensors_keep_their_layout(block):
    whole = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8)
    last = whole.contiguous(memory_format=torch.channels_last)
    found = copy_of(block, [last, whole[:, :, ::2], whole[1:, :2], whole.mT])
    assert found[0].stride() == last.stride()
    for one, expected in zip(found, [last, whole[:, :, ::2], whole[1:, :2], whole.mT], strict=True):
        assert torch.equal(one, expected)


def test_subclasses_nested_tensors_and_structures_survive(block):
    nested = torch.nested.nested_tensor([torch.arange(3), torch.arange(5)], layout=torch.jagged)
    value = {
        "pair": Pair(torch.ones(300), "text"),
        "parameter": torch.nn.Parameter(torch.ones(300)),
        "nested": nested,
        "sparse": torch.eye(200).to_sparse(),
        "grad": torch.ones(300, requires_grad=True),
        "text": np.array(["a", "bc"]),
        "none": None,
    }
    found = copy_of(block, value)
    assert type(found["pair"]) is Pair
    assert torch.equal(found["pair"].left, value["pair"].left)
    assert type(found["parameter"]) is torch.nn.Parameter
    assert found["grad"].requires_grad
    assert [part.tolist() for part in found["nested"].unbind()] == [[0, 1, 2], [0, 1, 2, 3, 4]]
    assert torch.equal(found["sparse"].to_dense(), torch.eye(200))
    assert found["text"].tolist() == ["a", "bc"]
    assert found["none"] is None


def test_what_was_read_stays_valid_when_the_block_grows_and_is_closed(block):
    found = copy_of(block, torch.arange(1000))
    block.map(1 << 22)
    block.close()
    gc.collect()
    assert torch.equal(found, torch.arange(1000))


def test_a_tensor_that_was_made_in_the_block_is_not_copied(block):
    block.map(1 << 16)
    block.clear()
    inside = block.empty((100, 10), torch.float32)
    inside.fill_(3)
    found = read(block.memory, block.write({"inside": inside, "beside": torch.arange(100)}))
    assert found["inside"].data_ptr() == inside.data_ptr()
    assert torch.equal(found["inside"], torch.full((100, 10), 3.0))
    assert torch.equal(found["beside"], torch.arange(100))
    assert block.empty((1 << 20,), torch.float32) is None


def test_an_object_that_cannot_be_pickled_is_an_error(block):
    with pytest.raises((AttributeError, pickle.PicklingError)):
        block.write({"f": lambda: 1})


@given(st.lists(st.integers(0, 5000), max_size=8), st.lists(st.integers(0, 5000), max_size=8))
def test_a_block_holds_one_object_after_another(first, second):
    block = SharedBlock.create()
    for sizes in (first, second):
        value = [np.full(n, i, np.int16) if i % 2 else torch.full((n,), i) for i, n in enumerate(sizes)]
        found = copy_of(block, value)
        for one, expected in zip(found, value, strict=True):
            assert type(one) is type(expected)
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(expected))
    block.close()
