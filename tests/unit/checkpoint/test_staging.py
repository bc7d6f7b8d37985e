"""The copy of a state to host memory, and the reuse of that memory."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load
from tests.support.fake_device import FakeDevice

from tiercache.checkpoint.format import PAGE_BYTES
from tiercache.checkpoint.staging import HostMemory, StagedState
from tiercache.checkpoint.state_tree import encode_state

DEVICE = torch.device("privateuseone")


class StagingDevice(FakeDevice):
    """The fake device as staging sees one."""

    def copy(self, destination, source):
        super().copy(destination, source, self.current_stream())

    def wait(self):
        self.record(self.current_stream()).synchronize()


def staged(state, memory=None, **options):
    """A state whose copy has ended."""
    made = StagedState(encode_state(state), memory or HostMemory(), **{"n_streams": 4} | options)
    made.copy()
    return made


def tensors_in(state):
    """All tensors of the staged files by their names in the state, as the real package reads them."""
    found = {}
    for file in state.files:
        data = load(b"".join(file.pieces))
        assert data.keys() == file.specs.keys()
        found |= data
    return found


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def addresses(state):
    return {np.frombuffer(piece, np.uint8).ctypes.data for file in state.files for piece in file.pieces}


@st.composite
def some_tensor(draw):
    shape = draw(st.lists(st.integers(0, 40), max_size=3))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64, torch.int64]))
    tensor = (torch.arange(int(np.prod(shape))) % 97).to(dtype).reshape(shape)
    if draw(st.booleans()) and tensor.ndim > 1:
        tensor = tensor.transpose(0, -1)
    if draw(st.booleans()) and tensor.ndim:
        tensor = tensor[::2]
    return tensor.conj() if draw(st.booleans()) and dtype is torch.complex64 else tensor


@given(st.dictionaries(st.text("abc", min_size=1), some_tensor(), max_size=6), st.integers(1, 3))
def test_tensors_of_any_type_and_strides_are_copied_across_slabs(state, n_pages):
    found = tensors_in(staged(state, HostMemory(n_pages * PAGE_BYTES)))
    assert found.keys() == state.keys()
    assert all(same(found[name], tensor.resolve_conj()) for name, tensor in state.items())


def test_arrays_of_numpy_are_copied():
    found = tensors_in(staged({"x": np.arange(12.0).reshape(3, 4).T, "y": np.array(3)}))
    assert torch.equal(found["x"], torch.arange(12.0, dtype=torch.float64).reshape(3, 4).T)
    assert found["y"].item() == 3


def test_pieces_but_the_last_are_whole_pages_that_begin_at_a_page():
    state = staged({"x": torch.ones(9000), "y": torch.ones(3, dtype=torch.int8)}, HostMemory(3 * PAGE_BYTES))
    for file in state.files:
        assert all(np.frombuffer(piece, np.uint8).ctypes.data % PAGE_BYTES == 0 for piece in file.pieces)
        assert all(piece.nbytes % PAGE_BYTES == 0 for piece in file.pieces[:-1])
        assert sum(piece.nbytes for piece in file.pieces) == file.layout.n_bytes


def test_memory_is_used_again_once_it_is_released():
    memory = HostMemory(4 * PAGE_BYTES)
    first = staged({"x": torch.ones(20_000)}, memory)
    second = staged({"x": torch.zeros(20_000)}, memory)
    assert not addresses(first) & addresses(second)
    used = addresses(first)
    first.release()
    first.release()
    third = staged({"x": torch.full((20_000,), 3.0)}, memory)
    assert addresses(third) == used
    assert same(tensors_in(second)["x"], torch.zeros(20_000))
    assert same(tensors_in(third)["x"], torch.full((20_000,), 3.0))


def on_device(device, values):
    """A tensor in the memory of the fake device."""
    memory = device.allocate(values.nbytes)
    device.run_all()
    device.raw(memory)[...] = values.reshape(-1).view(torch.uint8).numpy()
    return memory.view(values.dtype).view(values.shape)


def fake(device, *tensors):
    """A function that knows which tensors are on the device."""
    there = {tensor.data_ptr() for tensor in tensors}
    return lambda tensor: device if tensor.data_ptr() in there else None


def test_tensors_of_a_device_are_there_when_staging_returns():
    device = StagingDevice(DEVICE)
    tensor = on_device(device, torch.arange(5000.0))
    state = staged({"x": tensor, "cpu": torch.ones(3)}, HostMemory(2 * PAGE_BYTES), device_of=fake(device, tensor))
    device.raw(tensor)[...] = 0
    device.run_all()
    found = tensors_in(state)
    assert same(found["x"], torch.arange(5000.0))
    assert same(found["cpu"], torch.ones(3))


def test_the_memory_for_a_device_is_pinned_once_and_used_again():
    device, memory = StagingDevice(DEVICE), HostMemory(4 * PAGE_BYTES)
    tensor = on_device(device, torch.arange(3000.0))
    for _ in range(3):
        state = staged({"x": tensor}, memory, device_of=fake(device, tensor))
        assert all(
            device.is_pinned(torch.frombuffer(piece, dtype=torch.uint8)) for f in state.files for piece in f.pieces
        )
        state.release()
    assert device.pinned_bytes == [4 * PAGE_BYTES]


def test_plain_memory_is_not_used_for_a_device():
    device, memory = StagingDevice(DEVICE), HostMemory(4 * PAGE_BYTES)
    staged({"x": torch.ones(3)}, memory).release()
    tensor = on_device(device, torch.ones(3))
    staged({"x": tensor}, memory, device_of=fake(device, tensor))
    assert device.pinned_bytes == [4 * PAGE_BYTES]


class FailingDevice(StagingDevice):
    def copy(self, destination, source):
        raise RuntimeError("device-side assert")


def test_the_memory_of_a_copy_that_fails_is_used_again():
    device, memory = FailingDevice(DEVICE), HostMemory(4 * PAGE_BYTES)
    tensor = on_device(device, torch.ones(3))
    for _ in range(2):
        state = StagedState(encode_state({"x": tensor}), memory, n_streams=4, device_of=fake(device, tensor))
        with pytest.raises(RuntimeError, match="device-side assert"):
            state.copy()
        state.release()
    assert len(device.pinned_bytes) == 1


@pytest.mark.gpu
def test_a_state_on_a_gpu_is_staged_in_pinned_memory():
    tensor = torch.arange(1000.0, device="cuda").reshape(10, 100).T
    memory = HostMemory()
    state = staged({"x": tensor, "y": torch.ones(2)}, memory)
    piece = torch.frombuffer(state.files[0].pieces[0], dtype=torch.uint8)
    assert piece.is_pinned()
    tensor.zero_()
    assert same(tensors_in(state)["x"], torch.arange(1000.0).reshape(10, 100).T)
