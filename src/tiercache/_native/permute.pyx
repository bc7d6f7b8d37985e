"""Keyed permutations of [0, n), and the location of rows in a permuted run of blocks (wrapper of csrc/permute.h)."""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc


# Below this count, releasing the GIL costs more than the work (about 10 us).
cdef size_t GIL_DROP_INDICES = 1024
MAX_N = int(TC_PERMUTE_MAX_N)


cdef int prepare(tc_permutation *p, key, n) except -1:
    cdef uint64_t low, high
    if not 1 <= n <= MAX_N:
        raise ValueError(f"a permutation needs 1 <= n <= 2**63, got {n}")
    if isinstance(key, bytes):
        if len(key) != 16:
            raise ValueError(f"a key has 16 bytes, got {len(key)}")
        low = int.from_bytes(key[:8], "little")
        high = int.from_bytes(key[8:], "little")
    else:
        low, high = key
    tc_permute_init(p, low, high, n)
    return 0


cdef int check_range(start, size_t m, n) except -1:
    if start < 0 or start + m > n:
        raise ValueError(f"positions [{start}, {start + m}) are not inside [0, {n})")
    return 0


def permute(key, n, start, uint64_t[::1] out not None):
    """Fill out with the records at positions start, start + 1, ... of the permutation of [0, n). Releases the GIL.

    Args:
        key: 16 bytes, or (low, high), two 64-bit words (the bytes read as two little-endian words).
        n: Number of records, 1 to 2**63.
        start: First position.
        out: Writable, contiguous uint64[m], owned by the caller and not kept; start + m <= n.

    Raises:
        ValueError: n, the length of the key or the positions are out of range.
    """
    cdef tc_permutation p
    cdef size_t m = out.shape[0]
    prepare(&p, key, n)
    check_range(start, m, n)
    if m == 0:
        return
    cdef uint64_t first = start
    cdef uint64_t *to = &out[0]
    if m < GIL_DROP_INDICES:
        tc_permute_fill(&p, first, m, to)
        return
    with nogil:
        tc_permute_fill(&p, first, m, to)


def permute_at(key, n, const int64_t[::1] positions not None, int64_t[::1] out not None):
    """Fill out with the records at some positions of the permutation of [0, n). Releases the GIL.

    Args:
        key, n: See `permute`.
        positions: int64[m], contiguous, each 0 <= position < n, in any order.
        out: Writable, contiguous int64[m], owned by the caller and not kept; it may be `positions` itself.

    Raises:
        ValueError: n, the length of the key or a position is out of range, or the lengths differ.
    """
    cdef tc_permutation p
    cdef size_t i, m = out.shape[0]
    cdef uint64_t least_bad
    prepare(&p, key, n)
    if positions.shape[0] != out.shape[0]:
        raise ValueError(f"positions and out need one length, got {positions.shape[0]} and {out.shape[0]}")
    least_bad = n
    for i in range(m):
        if <uint64_t>positions[i] >= least_bad:
            raise ValueError(f"position {positions[i]} is not inside [0, {n})")
    with nogil:
        for i in range(m):
            out[i] = <int64_t>tc_permute_one(&p, <uint64_t>positions[i])


def permute_one(key, n, position):
    """Return the record at one position of the permutation of [0, n). Raises ValueError as `permute` does."""
    cdef tc_permutation p
    prepare(&p, key, n)
    check_range(position, 1, n)
    return int(tc_permute_one(&p, position))


def invert_one(key, n, record):
    """Return the position of one record in the permutation of [0, n). Raises ValueError as `permute` does."""
    cdef tc_permutation p
    prepare(&p, key, n)
    check_range(record, 1, n)
    return int(tc_permute_invert(&p, record))


cdef class RowFinder:
    """Maps positions of an output order to (block, row in the block), permuted by a key or in stored order.

    Immutable and without locks: any thread may call it.
    """

    def __cinit__(self, const int64_t[::1] first not None, key, const uint32_t[::1] row_start=None):
        cdef size_t k, i
        if first.shape[0] < 2 or first[0] != 0 or first[first.shape[0] - 1] < 1 or first.shape[0] > 0xFFFFFFFF:
            raise ValueError("first must be the cumulative rows of one block or more, from 0, with one row or more")
        k = first.shape[0] - 1
        if row_start is not None and <size_t>row_start.shape[0] != k:
            raise ValueError(f"row_start needs a number for each of {k} blocks, got {row_start.shape[0]}")
        self.first = <int64_t *>malloc((k + 1) * sizeof(int64_t))
        if self.first == NULL:
            raise MemoryError()
        for i in range(k + 1):
            self.first[i] = first[i]
            if i and (self.first[i] < self.first[i - 1] or self.first[i] - self.first[i - 1] > 0xFFFFFFFF):
                raise ValueError(f"block {i - 1} has {first[i] - first[i - 1]} rows; a block has 0 to 2**32 - 1")
        self.n_rows = first[k]
        self.n_blocks = <Py_ssize_t>k
        self.finder.shift = tc_row_finder_shift(self.first[k], k)
        self.hints = <uint32_t *>malloc(tc_row_finder_n_hints(self.first[k], self.finder.shift) * sizeof(uint32_t))
        if self.hints == NULL:
            raise MemoryError()
        self.finder.first = self.first
        self.finder.hints = self.hints
        tc_row_finder_fill_hints(self.first, k, self.finder.shift, self.hints)
        if row_start is not None:
            self.row_start = <uint32_t *>malloc(k * sizeof(uint32_t))
            if self.row_start == NULL:
                raise MemoryError()
            for i in range(k):
                self.row_start[i] = row_start[i]
            self.finder.row_start = self.row_start
        if key is not None:
            prepare(&self.permutation, key, self.n_rows)
            self.finder.permutation = &self.permutation

    def __dealloc__(self):
        free(self.first)
        free(self.hints)
        free(self.row_start)

    def find(self, start, uint32_t[::1] block not None, uint32_t[::1] row not None):
        """Fill block and row with the locations of positions start, start + 1, ... Releases the GIL for long runs.

        Args:
            start: First position.
            block, row: Writable, contiguous uint32[m] of equal length, owned by the caller and not kept.

        Raises:
            ValueError: A position is outside the blocks, or the lengths differ.
        """
        cdef size_t m = block.shape[0]
        if row.shape[0] != block.shape[0]:
            raise ValueError(f"block and row must have one length, got {m} and {row.shape[0]}")
        check_range(start, m, self.n_rows)
        if m == 0:
            return
        cdef uint64_t begin = start
        cdef uint32_t *to_block = &block[0]
        cdef uint32_t *to_row = &row[0]
        if m < GIL_DROP_INDICES:
            tc_find_rows(&self.finder, begin, m, to_block, to_row)
            return
        with nogil:
            tc_find_rows(&self.finder, begin, m, to_block, to_row)
