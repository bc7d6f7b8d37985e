from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef extern from "gather.h" nogil:
    enum:
        TC_FIXED
        TC_BITS
        TC_VAR
        TC_REF
        TC_CORRUPT
        TC_MISFIT

    ctypedef struct tc_source:
        const uint8_t *values
        const int64_t *offsets
        uint64_t n_elements

    ctypedef struct tc_chunk:
        const uint8_t *base
        uint64_t n_bytes
        const uint32_t *crcs
        uint8_t *checked

    ctypedef struct tc_stream:
        uint8_t kind
        uint8_t from_dtype "from"
        uint8_t to_dtype "to"
        uint8_t on_host
        uint32_t width

    ctypedef struct tc_rows:
        const tc_source *sources
        const tc_chunk *chunks
        const uint32_t *block
        const uint32_t *row
        size_t n
        size_t n_breaks

    ctypedef struct tc_sink:
        uint8_t *values
        int64_t *offsets

    ctypedef struct tc_ref:
        uint64_t address
        uint64_t n_bytes

    ctypedef struct tc_corruption:
        size_t row
        int64_t page

    void tc_gather_init(int)
    size_t tc_count_breaks(const uint32_t *, const uint32_t *, size_t)
    int tc_check(const tc_stream *, const tc_rows *, tc_corruption *)
    int tc_measure(const tc_rows *, int64_t *)
    int tc_gather(const tc_stream *, const tc_rows *, const tc_sink *)
    void tc_copy_refs(uint8_t **, const tc_ref *, size_t)
    int64_t tc_check_chunk(const tc_chunk *)
    int tc_offsets_ok(const int64_t *, size_t, int64_t)

cdef list bytes_of_refs(const tc_ref *refs, size_t n)
cdef list str_of_buffer(const uint8_t *values, const int64_t *offsets, size_t n)
