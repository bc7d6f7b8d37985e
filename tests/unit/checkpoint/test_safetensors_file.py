"""Headers of safetensors files, compared with the real package."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from tiercache.checkpoint.format import (
    MAX_FILE_BYTES,
    MIN_FILE_BYTES,
    PAGE_BYTES,
    TensorSpec,
    distribute,
    header_bytes,
    lay_out_file,
    parse_header,
)
from tiercache.checkpoint.state_tree import DTYPES, encode_state

MIB = 1 << 20


def specs_of(tensors):
    sources = encode_state(tensors).tensors
    return [TensorSpec(name, one.dtype, one.shape, one.n_bytes) for name, one in sources.items()]


def file_of(tensors):
    """The bytes of a file with these tensors."""
    layout = lay_out_file(specs_of(tensors))
    data = bytearray(layout.n_bytes)
    data[: len(layout.header)] = layout.header
    for name, offset in layout.offsets.items():
        flat = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy()
        data[offset : offset + flat.size] = flat.tobytes()
    return bytes(data)


def every_type():
    """A tensor of each type, so that a wrong order would leave some of them unaligned."""
    made = {dtype: torch.arange(3).to(getattr(torch, name)) for dtype, name in DTYPES.items()}
    return dict(sorted(made.items())) | {"empty": torch.ones(0, 3), "scalar": torch.tensor(7.0), "ä/ü.": torch.ones(2)}


def test_the_real_package_reads_our_files():
    tensors = every_type()
    found = load(file_of(tensors))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_we_read_the_files_of_the_real_package():
    data = save(every_type(), {"format": "pt"})
    found = parse_header(data[: header_bytes(data[:8])], len(data))
    for name, tensor in every_type().items():
        spec, offset = found[name]
        assert (spec.shape, DTYPES[spec.dtype]) == (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        assert data[offset : offset + spec.n_bytes] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_values_begin_at_a_page_and_every_tensor_is_aligned():
    tensors = every_type()
    layout = lay_out_file(specs_of(tensors))
    assert len(layout.header) % PAGE_BYTES == 0
    assert min(layout.offsets.values()) == len(layout.header)
    assert all(offset % tensors[name].itemsize == 0 for name, offset in layout.offsets.items())


def test_a_header_longer_than_a_page_is_whole_pages():
    tensors = {f"a long name of a tensor {number:060d}": torch.ones(1) for number in range(200)}
    assert len(lay_out_file(specs_of(tensors)).header) > PAGE_BYTES
    assert load(file_of(tensors)).keys() == tensors.keys()


@given(st.data())
def test_a_changed_header_is_refused_or_describes_tensors_inside_the_file(data):
    text = bytearray(file_of({"a": torch.ones(3), "b": torch.ones(2, dtype=torch.int8)}))
    at = data.draw(st.integers(0, 200))
    text[at] = data.draw(st.integers(0, 255))
    try:
        found = parse_header(bytes(text[: header_bytes(bytes(text[:8]))]), len(text))
    except ValueError:
        return
    assert all(offset + spec.n_bytes <= len(text) for spec, offset in found.values())


@pytest.mark.parametrize("start", [b"", b"1234567", b"\0" * 8, b"\xff" * 8])
def test_a_file_that_is_no_safetensors_file_is_refused(start):
    with pytest.raises(ValueError, match="not a safetensors file"):
        header_bytes(start)


def test_a_large_state_is_as_many_files_as_there_are_streams_and_none_is_much_larger():
    specs = [TensorSpec(str(n), "U8", (16 * MIB,), 16 * MIB) for n in range(64)]
    files = distribute(specs, 8)
    assert [sum(one.n_bytes for one in file) for file in files] == [128 * MIB] * 8
    assert sorted((one.name for file in files for one in file), key=int) == [one.name for one in specs]


def test_files_have_a_least_and_a_largest_size():
    assert (
        len(distribute([TensorSpec(str(n), "U8", (MIB,), MIB) for n in range(130)], 8)) == 130 * MIB // MIN_FILE_BYTES
    )
    n_files = 24
    large = [TensorSpec(str(n), "U8", (MAX_FILE_BYTES,), MAX_FILE_BYTES) for n in range(n_files)]
    assert len(distribute(large, 8)) == n_files
