"""lay_out(): pieces at their offsets, zeros between them, and the checksums of the pages."""

import mmap
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache._native.checksum import crc32c, lay_out

LENGTHS = st.lists(st.one_of(st.integers(0, 300), st.sampled_from([64, 4096, 70_000])), max_size=5)


def laid_out(pieces, align, page_bytes):
    """(memory, sums, the whole sum)."""
    lengths = np.array([len(piece) for piece in pieces], np.uint64)
    addresses = np.array([piece.ctypes.data for piece in pieces], np.uint64)
    out = np.full(sum(-(-len(piece) // align) * align for piece in pieces), 255, np.uint8)
    sums = np.zeros(-(-len(out) // page_bytes), np.uint32)
    return out, sums, lay_out(addresses, lengths, align, out, page_bytes, sums)


@given(LENGTHS, st.sampled_from([1, 8, 64]), st.sampled_from([1, 100, 4096, 65536]), st.integers(0, 9))
def test_pieces_are_aligned_and_every_page_has_its_checksum(lengths, align, page_bytes, seed):
    if page_bytes == 1:
        lengths = [length % 300 for length in lengths]
    rng = np.random.default_rng(seed)
    pieces = [rng.integers(0, 256, length, np.uint8) for length in lengths]
    out, sums, whole = laid_out(pieces, align, page_bytes)
    expected = b"".join(piece.tobytes().ljust(-(-len(piece) // align) * align, b"\0") for piece in pieces)
    assert out.tobytes() == expected
    assert sums.tolist() == [crc32c(expected[i : i + page_bytes]) for i in range(0, len(expected), page_bytes)]
    assert whole == crc32c(expected)


@pytest.mark.parametrize(
    ("lengths", "align", "room", "page_bytes", "n_sums"),
    [
        ([10], 0, 64, 64, 1),
        ([10], 64, 64, 0, 1),
        ([10, 10], 64, 64, 64, 1),
        ([10], 64, 128, 64, 2),
        ([10], 64, 63, 64, 1),
        ([10], 64, 64, 64, 2),
        ([2**64 - 1], 64, 64, 64, 1),
        ([2**63, 2**63], 64, 64, 64, 1),
    ],
)
def test_mismatched_lengths_raise_an_error(lengths, align, room, page_bytes, n_sums):
    piece, out = np.zeros(10, np.uint8), np.zeros(room, np.uint8)
    addresses = np.full(len(lengths), piece.ctypes.data, np.uint64)
    with pytest.raises(ValueError, match=r"longer|expected|align"):
        lay_out(addresses, np.array(lengths, np.uint64), align, out, page_bytes, np.zeros(n_sums, np.uint32))
    with pytest.raises(ValueError, match="need as many"):
        lay_out(addresses[:0], np.array(lengths, np.uint64), 64, out, 64, np.zeros(n_sums, np.uint32))


def test_a_truncated_mapping_raises_an_error(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * mmap.PAGESIZE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        piece = np.frombuffer(mapping, np.uint8)
        os.truncate(path, mmap.PAGESIZE)
        with pytest.raises(OSError, match="could not be read"):
            laid_out([piece], 64, 4096)
        del piece
