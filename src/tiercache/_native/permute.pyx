"""Keyed permutations of [0, n), and the places of the rows of a permuted run of blocks: the face of csrc/permute.h."""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc


cdef extern from "permute.h":
    ctypedef struct tc_permutation:
        uint64_t n
    ctypedef struct tc_rows:
        const int64_t *first
        const uint32_t *hints
        unsigned shift
    const uint64_t TC_PERMUTE_MAX_N
    void tc_permute_init(tc_permutation *p, uint64_t key_low, uint64_t key_high, uint64_t n) noexcept nogil
    uint64_t tc_permute_one(const tc_permutation *p, uint64_t x) noexcept nogil
    uint64_t tc_permute_invert(const tc_permutation *p, uint64_t y) noexcept nogil
    void tc_permute_fill(const tc_permutation *p, uint64_t start, size_t m, uint64_t *out) noexcept nogil
    unsigned tc_rows_shift(uint64_t n_rows, size_t k) noexcept nogil
    size_t tc_rows_n_hints(uint64_t n_rows, unsigned shift) noexcept nogil
    void tc_rows_hint(const int64_t *first, size_t k, unsigned shift, uint32_t *hints) noexcept nogil
    void tc_rows_find(const tc_rows *rows, const tc_permutation *p, uint64_t start, size_t m,
                      uint32_t *block, uint32_t *row) noexcept nogil


# Below it the hand-over of the GIL costs more than the work (about 10 us).
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
    """Fill out with the records at positions start, start + 1, ... of the permutation of [0, n); the GIL is dropped.

    Args:
        key: 16 bytes, or (low, high) words of 64 bits (the bytes read as two little-endian words).
        n: 1 to 2**63.
        start: the first position.
        out: writable, contiguous uint64[m], owned by the caller, not kept; start + m <= n.

    Raises:
        ValueError: n, the key's length or the positions are out of range.
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


def permute_one(key, n, position):
    """The record at one position of the permutation of [0, n). Raises ValueError as `permute` does."""
    cdef tc_permutation p
    prepare(&p, key, n)
    check_range(position, 1, n)
    return int(tc_permute_one(&p, position))


def invert_one(key, n, record):
    """The position of one record in the permutation of [0, n). Raises ValueError as `permute` does."""
    cdef tc_permutation p
    prepare(&p, key, n)
    check_range(record, 1, n)
    return int(tc_permute_invert(&p, record))


cdef class RowFinder:
    """Places of the rows of a run of blocks: position -> (block, row in the block), permuted by a key or as they stand.

    Immutable and free of locks: any thread may call it.
    """

    cdef int64_t *first
    cdef uint32_t *hints
    cdef tc_rows rows
    cdef tc_permutation permutation
    cdef bint permuted
    cdef readonly object n_rows

    def __cinit__(self, const int64_t[::1] first not None, key):
        cdef size_t k, i
        if first.shape[0] < 2 or first[0] != 0 or first[first.shape[0] - 1] < 1 or first.shape[0] > 0xFFFFFFFF:
            raise ValueError("first must be the cumulative rows of one block or more, from 0, with one row or more")
        k = first.shape[0] - 1
        self.first = <int64_t *>malloc((k + 1) * sizeof(int64_t))
        if self.first == NULL:
            raise MemoryError()
        for i in range(k + 1):
            self.first[i] = first[i]
            if i and (self.first[i] < self.first[i - 1] or self.first[i] - self.first[i - 1] > 0xFFFFFFFF):
                raise ValueError(f"block {i - 1} has {first[i] - first[i - 1]} rows; a block has 0 to 2**32 - 1")
        self.n_rows = first[k]
        self.rows.shift = tc_rows_shift(self.first[k], k)
        self.hints = <uint32_t *>malloc(tc_rows_n_hints(self.first[k], self.rows.shift) * sizeof(uint32_t))
        if self.hints == NULL:
            raise MemoryError()
        self.rows.first = self.first
        self.rows.hints = self.hints
        tc_rows_hint(self.first, k, self.rows.shift, self.hints)
        self.permuted = key is not None
        if self.permuted:
            prepare(&self.permutation, key, self.n_rows)

    def __dealloc__(self):
        free(self.first)
        free(self.hints)

    def find(self, start, uint32_t[::1] block not None, uint32_t[::1] row not None):
        """Fill block and row with the places of positions start, start + 1, ...; the GIL is dropped for long runs.

        block, row: writable, contiguous uint32[m] of one length, owned by the caller, not kept.

        Raises:
            ValueError: positions outside the blocks, or arrays of different lengths.
        """
        cdef size_t m = block.shape[0]
        if row.shape[0] != block.shape[0]:
            raise ValueError(f"block and row must have one length, got {m} and {row.shape[0]}")
        check_range(start, m, self.n_rows)
        if m == 0:
            return
        cdef uint64_t begin = start
        cdef const tc_permutation *p = &self.permutation if self.permuted else NULL
        cdef uint32_t *to_block = &block[0]
        cdef uint32_t *to_row = &row[0]
        if m < GIL_DROP_INDICES:
            tc_rows_find(&self.rows, p, begin, m, to_block, to_row)
            return
        with nogil:
            tc_rows_find(&self.rows, p, begin, m, to_block, to_row)
