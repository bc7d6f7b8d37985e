from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef extern from "permute.h" nogil:
    ctypedef struct tc_permutation:
        uint64_t n
    ctypedef struct tc_row_finder:
        const int64_t *first
        const uint32_t *hints
        unsigned shift
        const tc_permutation *permutation
        const uint32_t *row_start
    const uint64_t TC_PERMUTE_MAX_N
    void tc_permute_init(tc_permutation *p, uint64_t key_low, uint64_t key_high, uint64_t n) noexcept
    uint64_t tc_permute_one(const tc_permutation *p, uint64_t x) noexcept
    uint64_t tc_permute_invert(const tc_permutation *p, uint64_t y) noexcept
    void tc_permute_fill(const tc_permutation *p, uint64_t start, size_t m, uint64_t *out) noexcept
    unsigned tc_row_finder_shift(uint64_t n_rows, size_t k) noexcept
    size_t tc_row_finder_n_hints(uint64_t n_rows, unsigned shift) noexcept
    void tc_row_finder_fill_hints(const int64_t *first, size_t k, unsigned shift, uint32_t *hints) noexcept
    void tc_find_rows(const tc_row_finder *finder, uint64_t start, size_t m, uint32_t *block, uint32_t *row) noexcept


cdef class RowFinder:
    cdef int64_t *first
    cdef uint32_t *hints
    cdef uint32_t *row_start
    cdef tc_row_finder finder  # refers to the three arrays above and to `permutation`
    cdef tc_permutation permutation
    cdef readonly object n_rows
    cdef readonly Py_ssize_t n_blocks
