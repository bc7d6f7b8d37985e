"""The gather kernels against plain numpy, over every kind of stream."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache._native import gather


def addresses(*blocks: tuple[np.ndarray, np.ndarray | None]) -> np.ndarray:
    rows = [[v.ctypes.data, 0 if o is None else o.ctypes.data, v.size] for v, o in blocks]
    return np.array(rows, np.uint64).reshape(-1, 3)


@st.composite
def places(draw, n_rows_of_blocks):
    n = draw(st.integers(0, 40))
    block = [draw(st.integers(0, len(n_rows_of_blocks) - 1)) for _ in range(n)]
    row = [draw(st.integers(0, n_rows_of_blocks[b] - 1)) for b in block]
    return np.array(block, np.uint32), np.array(row, np.uint32)


@given(st.data(), st.integers(0, 200), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_fixed_rows_equal_numpy_indexing(data, width, n_rows):
    rng = np.random.default_rng(width)
    blocks = [rng.integers(0, 256, (n, width), dtype=np.uint8) for n in n_rows]
    block, row = data.draw(places(n_rows))
    out = np.full(len(row) * width + 3, 7, np.uint8)
    gather.gather(gather.FIXED, width, addresses(*[(b, None) for b in blocks]), block, row, out)
    expected = [blocks[b][r] for b, r in zip(block, row, strict=True)]
    assert out[: len(row) * width].tobytes() == b"".join(e.tobytes() for e in expected)
    assert (out[len(row) * width :] == 7).all()


@given(st.data(), st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_bits_become_bytes_and_a_missing_buffer_means_all_valid(data, n_rows):
    rng = np.random.default_rng(len(n_rows))
    flags = [rng.integers(0, 2, n, dtype=np.uint8) for n in n_rows]
    packed = [np.packbits(f, bitorder="little") for f in flags]
    missing = data.draw(st.integers(0, len(n_rows) - 1))
    sources = addresses(*[(p, None) for p in packed])
    sources[missing] = 0
    flags[missing][:] = 1
    block, row = data.draw(places(n_rows))
    out = np.zeros(len(row), np.uint8)
    gather.gather(gather.BITS, 0, sources, block, row, out)
    assert out.tolist() == [flags[b][r] for b, r in zip(block, row, strict=True)]


@given(st.data(), st.lists(st.lists(st.binary(max_size=9), min_size=1, max_size=9), min_size=1, max_size=4))
def test_varying_rows_are_gathered_as_buffer_as_bytes_and_as_str(data, texts):
    texts = [[t.hex().encode() for t in block] for block in texts]
    values = [np.frombuffer(b"".join(block) or b"\0", np.uint8) for block in texts]
    offsets = [np.cumsum([0, *map(len, block)], dtype=np.int64) for block in texts]
    sources = addresses(*zip(values, offsets, strict=True))
    block, row = data.draw(places([len(t) for t in texts]))
    expected = [texts[b][r] for b, r in zip(block, row, strict=True)]
    found = gather.measure(sources, block, row)
    assert found.tolist() == np.cumsum([0, *map(len, expected)]).tolist()
    out = np.zeros(int(found[-1]), np.uint8)
    gather.gather(gather.VAR, 1, sources, block, row, out, found)
    assert out.tobytes() == b"".join(expected)
    assert gather.gather_bytes(sources, block, row) == expected
    assert gather.gather_str(sources, block, row) == [e.decode() for e in expected]


@st.composite
def runs(draw, n_blocks, n_rows):
    """Places that are runs of rows of many lengths, some single rows, some over the end of a block."""
    block, row = [], []
    for _ in range(draw(st.integers(0, 6))):
        first_block, first = draw(st.integers(0, n_blocks - 1)), draw(st.integers(0, n_rows - 1))
        for step in range(draw(st.sampled_from([1, 1, 2, 7, 8, 9, 33, 200]))):
            at = first_block * n_rows + first + step
            block.append(at // n_rows % n_blocks)
            row.append(at % n_rows)
    return np.array(block, np.uint32), np.array(row, np.uint32)


@given(st.data(), st.sampled_from([1, 2, 4, 8, 16, 24, 64, 128, 500]))
def test_runs_of_rows_equal_the_same_rows_one_by_one(data, width):
    rng = np.random.default_rng(width)
    n_blocks, n_rows = 3, 150
    block, row = data.draw(runs(n_blocks, n_rows))
    blocks = [rng.integers(0, 256, n_rows * width, dtype=np.uint8) for _ in range(n_blocks)]
    lengths = rng.integers(0, 9, (n_blocks, n_rows)) * (rng.random((n_blocks, n_rows)) < 0.8)
    offsets = [np.cumsum([0, *of_block], dtype=np.int64) for of_block in lengths]
    values = [rng.integers(97, 123, 4 * int(o[-1]), dtype=np.uint8) for o in offsets]
    sources = {
        gather.FIXED: addresses(*[(b, None) for b in blocks]),
        gather.BITS: addresses(*[(b, None) for b in blocks]),
        gather.VAR: addresses(*zip(values, offsets, strict=True)),
    }

    def all_of(kind, wide, b, r):
        found = gather.measure(sources[kind], b, r) if kind == gather.VAR else None
        out = np.zeros({gather.FIXED: len(r) * wide, gather.BITS: len(r)}.get(kind) or int(found[-1]) * wide, np.uint8)
        gather.gather(kind, wide, sources[kind], b, r, out, found)
        return out.tobytes()

    for kind, wide in ((gather.FIXED, width), (gather.BITS, 0), (gather.VAR, 4)):
        singly = b"".join(all_of(kind, wide, block[i : i + 1], row[i : i + 1]) for i in range(len(row)))
        assert all_of(kind, wide, block, row) == singly if len(row) else True
    ends = np.cumsum([0, *(lengths[b, r] for b, r in zip(block, row, strict=True))])
    assert gather.measure(sources[gather.VAR], block, row).tolist() == ends.tolist()


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=30), st.booleans())
def test_text_of_any_script_is_unchanged(texts, only_ascii):
    texts = [t.encode("ascii", "ignore").decode() if only_ascii else t for t in texts] + ["", "a", "\x7f"]
    encoded = [t.encode() for t in texts]
    values = np.frombuffer(b"".join(encoded), np.uint8)
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    rows = np.arange(len(texts), dtype=np.uint32)
    found = gather.gather_str(addresses((values, offsets)), np.zeros(len(texts), np.uint32), rows)
    assert found == texts
    assert [t.isascii() for t in found] == [t.isascii() for t in texts]
    assert [hash(t) for t in found] == [hash(t) for t in texts]


def test_offsets_ok_requires_offsets_that_never_decrease_and_stay_inside():
    for offsets, limit, fine in (
        ([0], 0, True),
        ([0, 1, 1, 5], 5, True),
        ([0, 1, 1, 5], 4, False),
        ([0, 2, 1, 5], 5, False),
        ([-1, 1], 5, False),
    ):
        array = np.array(offsets, np.int64)
        assert gather.offsets_ok(array.ctypes.data, len(offsets) - 1, limit) is fine


def test_invalid_arguments_raise_errors_and_nothing_is_written():
    sources = addresses((np.arange(8, dtype=np.uint8), None))
    two, three, out = np.zeros(2, np.uint32), np.zeros(3, np.uint32), np.full(8, 9, np.uint8)
    for arguments, match in (
        ((gather.FIXED, 1, sources, two, three, out), "one length"),
        ((9, 1, sources, two, two, out), "FIXED"),
        ((gather.VAR, 1, sources, two, two, out), "measure"),
        ((gather.FIXED, 2, sources, two, two, out[:3]), "expected at least 4 bytes, got 3"),
    ):
        with pytest.raises(ValueError, match=match):
            gather.gather(*arguments)
    assert (out == 9).all()
    values, offsets = np.frombuffer(b"\xff\xfe", np.uint8), np.array([0, 2], np.int64)
    with pytest.raises(UnicodeDecodeError):
        gather.gather_str(addresses((values, offsets)), two[:1], two[:1])
