"""Packed rows equal those of a plain packer, for any documents and options."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.support.plain_packer import Plain

from tiercache._native import gather, packing
from tiercache.shard.values import DTYPE_NUMBERS

MODES = {"concatenate": packing.CONCATENATE, "best_fit": packing.BEST_FIT, "separate": packing.SEPARATE}
OUTPUTS = {
    "tokens": (packing.TOKENS, np.int64),
    "labels": (packing.LABELS, np.int64),
    "position_ids": (packing.POSITION_IDS, np.int64),
    "document_ids": (packing.DOCUMENT_IDS, np.int32),
}


def native(plain: Plain, dtype: str = "int64", **options) -> packing.Packing:
    return packing.Packing(
        plain.length,
        MODES[plain.mode],
        DTYPE_NUMBERS[dtype],
        pad=plain.pad,
        end=plain.end,
        masks_borders=plain.mask_borders,
        **options,
    )


def packed(plain: Plain, units: list[list[list[int]]], dtype: str = "int64"):
    """The units' plans, and the memory of their documents."""
    documents = [document for unit in units for document in unit]
    flat = np.array([token for document in documents for token in document], dtype)
    lengths = np.array([len(document) for document in documents], np.int64)
    addresses = (np.append(0, np.cumsum(lengths))[: len(lengths)] * flat.itemsize + flat.ctypes.data).astype(np.uint64)
    first = np.append(0, np.cumsum([len(unit) for unit in units])).astype(np.int64)
    return packing.PackedUnits(native(plain, dtype), lengths, addresses, first), flat


def rows_of(units: packing.PackedUnits, length: int, unit: np.ndarray, row: np.ndarray) -> dict[str, list]:
    """Every output of some rows."""
    found = {}
    for name, (output, dtype) in OUTPUTS.items():
        out = np.full((len(row), length), 77, dtype)
        packing.gather_rows(packing.stream_kind(output), units, unit, row, out.view(np.uint8))
        found[name] = out.tolist()
    offsets = gather.measure(units.boundaries, unit, row)
    flat = np.empty(int(offsets[-1]), np.int32)
    gather.gather(gather.VAR, 4, units.boundaries, unit, row, flat.view(np.uint8), offsets)
    counts = np.empty(len(row), np.int32)
    gather.gather(gather.FIXED, 4, units.counts, unit, row, counts.view(np.uint8))
    assert np.diff(offsets).tolist() == counts.tolist()
    found["bounds"] = [part.tolist() for part in np.split(flat, offsets[1:-1])] if len(row) else []
    return found


def check(plain: Plain, units: list[list[list[int]]], dtype: str = "int64") -> int:
    """Compare all rows with those of the plain packer, in a random order; return how many there are."""
    found, _memory = packed(plain, units, dtype)
    expected = []
    for number, documents in enumerate(units):
        rows = plain.rows(documents)
        assert found.n_rows[number] == len(rows)
        expected += [(number, i, row) for i, row in enumerate(rows)]
    order = np.random.default_rng(0).permutation(len(expected))
    chosen = [expected[i] for i in order]
    unit, row = (np.array([one[i] for one in chosen], np.uint32) for i in range(2))
    got = rows_of(found, plain.length, unit, row)
    for name, values in got.items():
        assert values == [getattr(one[2], name) for one in chosen], name
    return len(expected)


@settings(max_examples=100)
@given(
    lengths=st.lists(st.integers(0, 30), max_size=30),
    length=st.integers(1, 40),
    mode=st.sampled_from(list(MODES)),
    end=st.sampled_from([None, 999_999]),
    mask_borders=st.booleans(),
    dtype=st.sampled_from(["bool", "uint8", "int32", "int64"]),
    seed=st.integers(0, 9),
)
@example([700, 0, 1], 600, "concatenate", 999_999, False, "bool", 0)
def test_a_label_is_ignored_if_the_token_that_it_is_has_the_mask_0(
    lengths: list[int], length: int, mode: str, end: int | None, mask_borders: bool, dtype: str, seed: int
) -> None:
    """The tokens are their own numbers, so that the labels of the plain packer say which tokens they are."""
    plain = Plain(length, mode, end, 0, mask_borders)
    bounds = np.append(0, np.cumsum(lengths)).astype(np.int64)
    flat = np.arange(bounds[-1])
    mask = np.random.default_rng(seed).integers(0, 2, len(flat)).astype(dtype)
    starts = [(bounds[:-1] * values.itemsize + values.ctypes.data).astype(np.uint64) for values in (flat, mask)]
    how = native(plain, mask_dtype=DTYPE_NUMBERS[dtype])
    units = packing.PackedUnits(how, np.diff(bounds), starts[0], np.array([0, len(lengths)], np.int64), starts[1])
    rows = plain.rows([list(range(a, b)) for a, b in pairwise(bounds.tolist())])

    def expected(token: int, label: int) -> int:
        if label == packing.IGNORED:
            return label
        # The end token of a document without tokens follows another end token.
        decides = token if label == end else label
        return label if decides != end and mask[decides] else packing.IGNORED

    every = np.zeros(len(rows), np.uint32), np.arange(len(rows), dtype=np.uint32)
    labels = rows_of(units, length, *every)["labels"]
    assert labels == [[expected(*pair) for pair in zip(row.tokens, row.labels, strict=True)] for row in rows]


def test_documents_without_the_masks_that_the_packing_needs_are_refused() -> None:
    how = native(Plain(4), mask_dtype=DTYPE_NUMBERS["bool"])
    lengths, first = np.array([3], np.int64), np.array([0, 1], np.int64)
    with pytest.raises(ValueError, match="1 documents need as many masks"):
        packing.PackedUnits(how, lengths, np.array([64], np.uint64), first)


documents = st.lists(st.integers(0, 30), max_size=30).map(
    lambda lengths: [[100 * (i % 300) + j for j in range(n)] for i, n in enumerate(lengths)]
)


@settings(max_examples=100)
@given(
    units=st.lists(documents, max_size=3),
    length=st.integers(1, 40),
    mode=st.sampled_from(list(MODES)),
    end=st.sampled_from([None, 7]),
    mask_borders=st.booleans(),
    dtype=st.sampled_from(["uint16", "int32", "uint32", "int64"]),
)
@example([[[]]], 4, "best_fit", None, False, "int32")
@example([[[], []]], 4, "separate", 7, True, "int32")
def test_rows_equal_those_of_a_plain_packer(units, length, mode, end, mask_borders, dtype):
    check(Plain(length, mode, end, pad=3, mask_borders=mask_borders), units, dtype)


@pytest.mark.parametrize("mode", list(MODES))
def test_many_documents_of_a_large_row_equal_those_of_a_plain_packer(mode):
    random = np.random.default_rng(1)
    units = [[list(range(n)) for n in random.integers(0, 5000, 120)]]
    assert check(Plain(2100, mode, 9), units, "uint16") > 60


def test_best_fit_cuts_no_document_that_fits_a_row():
    random = np.random.default_rng(2)
    lengths = random.integers(1, 64, 500)
    plain = Plain(64, "best_fit")
    found, _memory = packed(plain, [[[int(i)] * int(n) for i, n in enumerate(lengths)]])
    n = int(found.n_rows[0])
    got = rows_of(found, 64, np.zeros(n, np.uint32), np.arange(n, dtype=np.uint32))
    seen = [
        token
        for row, ids in zip(got["tokens"], got["document_ids"], strict=True)
        for token in {t for t, i in zip(row, ids, strict=True) if i >= 0}
    ]
    assert sorted(seen) == list(range(500)), "a document is in two rows"
    assert n * 64 < 1.03 * lengths.sum()


def test_a_document_that_is_not_cut_and_too_long_is_named():
    for mode in ("best_fit", "separate"):
        how = native(Plain(8, mode, end=1), cuts_long=False)
        with pytest.raises(packing.TooLongError) as caught:
            packing.count_rows(how, np.array([7, 7, 8, 9], np.int64), np.array([0, 1, 4], np.int64))
        assert (caught.value.document, caught.value.n_tokens) == (2, 8)


def test_arguments_that_do_not_fit_each_other_are_refused():
    how = native(Plain(8))
    lengths = np.array([3], np.int64)
    for first in ([0], [0, 2], [1, 1], [0, 2, 1, 1]):
        with pytest.raises(ValueError, match=r"units need|bounds that rise"):
            packing.count_rows(how, lengths, np.array(first, np.int64))
    with pytest.raises(ValueError, match="tokens"):
        packing.count_rows(how, np.array([-1], np.int64), np.array([0, 1], np.int64))
    units, _memory = packed(Plain(8), [[[1, 2, 3]]])
    kind, at = packing.stream_kind(packing.TOKENS), np.zeros(1, np.uint32)
    with pytest.raises(ValueError, match="rows of 64 bytes"):
        packing.gather_rows(kind, units, at, at, np.zeros((1, 32), np.uint8))
    for unit, row in ((1, 0), (0, 1)):
        with pytest.raises(IndexError):
            packing.gather_rows(kind, units, at + np.uint32(unit), at + np.uint32(row), np.zeros((1, 64), np.uint8))
    for dtype in ("uint64", "float32"):
        with pytest.raises(ValueError, match="fit int64"):
            native(Plain(8), dtype)
    with pytest.raises(ValueError, match="an output is"):
        packing.stream_kind(4)


def test_joined_boundaries_are_those_of_the_flattened_batch():
    boundaries, offsets = np.array([0, 3, 8, 0, 8, 0, 1, 2, 8], np.int32), np.array([0, 3, 5, 9], np.int64)
    joined, longest = packing.join_boundaries(boundaries, offsets)
    assert joined.tolist() == [0, 3, 8, 16, 17, 18, 24]
    assert longest == 8
    with pytest.raises(OverflowError, match="smaller batch_size"):
        packing.join_boundaries(np.array([0, 2**30, 0, 2**30], np.int32), np.array([0, 2, 4], np.int64))
    with pytest.raises(ValueError, match="offsets from"):
        packing.join_boundaries(boundaries[:-1], offsets)
    memory = np.zeros(128, np.uint8)
    memory[:32], memory[64:100] = offsets.view(np.uint8), boundaries.view(np.uint8)
    for start, offsets_at, n in ((96, 0, 3), (64, 104, 3), (64, 0, 0), (200, 0, 1)):
        with pytest.raises(ValueError, match="exceed"):
            packing.join_in_place(memory, start, offsets_at, n)
    assert packing.join_in_place(memory, 64, 0, 3) == len(joined)
    assert memory[64 : 64 + 4 * len(joined)].view(np.int32).tolist() == joined.tolist()
