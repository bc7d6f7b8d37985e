"""The safetensors format: headers of new files, and the distribution of tensors over files.

A file is the size of the header (u64, little-endian), the header (JSON, padded with spaces) and the values without
gaps: https://github.com/huggingface/safetensors. Headers are padded so that the values begin at a page: files are
written with direct I/O and mapped. Tensors are sorted by the size of their items, so that each of them is aligned.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PAGE_BYTES = 4096
# Files of a state, unless there are fewer tensors: smaller ones cost requests, larger ones are few parallel streams.
MIN_FILE_BYTES = 64 << 20
MAX_FILE_BYTES = 1 << 30
_MOST_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_METADATA = "__metadata__"
_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ"), 1),
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, type and shape of a tensor in a file.

    Attributes:
        name: Name of the tensor.
        dtype: Type by the name of safetensors.
        shape: Sizes of the dimensions.
        n_bytes: Size of the values.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A safetensors file without its values.

    Attributes:
        header: First bytes of the file, of whole pages.
        offsets: Position of the first byte of each tensor in the file, by name; ascending and without gaps.
        n_bytes: Size of the file.
    """

    header: bytes
    offsets: Mapping[str, int]
    n_bytes: int


def lay_out_file(tensors: Iterable[TensorSpec]) -> FileLayout:
    """Return the layout of a file that contains these tensors; equal tensors in the same order give equal layouts."""
    ordered = sorted(tensors, key=lambda one: -_ITEM_BYTES[one.dtype])
    starts, position = dict[str, int](), 0
    for one in ordered:
        starts[one.name] = position
        position += one.n_bytes
    entries = {
        one.name: {
            "dtype": one.dtype,
            "shape": list(one.shape),
            "data_offsets": [starts[one.name], starts[one.name] + one.n_bytes],
        }
        for one in ordered
    }
    text = json.dumps({_METADATA: {"format": "pt"}, **entries}, separators=(",", ":"), ensure_ascii=True).encode(
        "ascii"
    )
    padded_bytes = -(-(8 + len(text)) // PAGE_BYTES) * PAGE_BYTES
    header = (padded_bytes - 8).to_bytes(8, "little") + text.ljust(padded_bytes - 8, b" ")
    return FileLayout(header, {name: padded_bytes + start for name, start in starts.items()}, padded_bytes + position)


def distribute(tensors: Sequence[TensorSpec], n_streams: int) -> list[list[TensorSpec]]:
    """Return the tensors of each file: files of similar size, each of whole tensors.

    Args:
        tensors: Tensors of a state.
        n_streams: Number of files that are written in parallel; there are as many if they are not too small.
    """
    total_bytes = sum(one.n_bytes for one in tensors)
    n_files = max(1, math.ceil(total_bytes / MAX_FILE_BYTES), min(n_streams, total_bytes // MIN_FILE_BYTES))
    files: list[list[TensorSpec]] = [[] for _ in range(n_files)]
    sizes = [0] * n_files
    for one in sorted(tensors, key=lambda one: -one.n_bytes):
        smallest = min(range(n_files), key=sizes.__getitem__)
        files[smallest].append(one)
        sizes[smallest] += one.n_bytes
    return [file for file in files if file]


def header_bytes(start: bytes) -> int:
    """Return the size of a file's header, including the 8 bytes of its size, from the file's first 8 bytes.

    Raises:
        ValueError: It is not a safetensors file.
    """
    stated = int.from_bytes(start[:8], "little")
    if len(start) < 8 or not 2 <= stated <= _MOST_HEADER_BYTES:
        raise ValueError(f"not a safetensors file: a header of {stated} bytes")
    return 8 + stated


def parse_header(header: bytes, n_bytes: int) -> dict[str, tuple[TensorSpec, int]]:
    """Return each tensor of a file and its position in the file, by name.

    Args:
        header: First bytes of the file, as many as header_bytes() says.
        n_bytes: Size of the file.

    Raises:
        ValueError: It is not a valid safetensors file.
    """
    try:
        body = json.loads(header[8:])
        found = {name: _spec_of(name, entry, len(header)) for name, entry in body.items() if name != _METADATA}
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a safetensors file: {error!r}") from error
    end = len(header)
    for spec, offset in sorted(found.values(), key=lambda one: (one[1], one[0].n_bytes)):
        if offset != end:
            raise ValueError(f"tensor {spec.name!r} begins at byte {offset}, not at the end of the one before ({end})")
        end += spec.n_bytes
    if end != n_bytes:
        raise ValueError(f"the header describes {end} bytes, the file has {n_bytes}")
    return found


def _spec_of(name: str, entry: Mapping[str, Any], base: int) -> tuple[TensorSpec, int]:
    (start, end), shape, item_bytes = entry["data_offsets"], tuple(entry["shape"]), _ITEM_BYTES.get(entry["dtype"])
    if not all(type(one) is int and one >= 0 for one in (start, end, *shape)):
        raise ValueError(f"tensor {name!r} has impossible sizes")
    if end < start or (item_bytes is not None and math.prod(shape) * item_bytes != end - start):
        raise ValueError(f"tensor {name!r} of shape {shape} and type {entry['dtype']} cannot have {end - start} bytes")
    return TensorSpec(name, str(entry["dtype"]), shape, end - start), base + start
