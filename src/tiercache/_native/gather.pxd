from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef extern from "gather.h" nogil:
    enum:
        TC_FIXED
        TC_BITS
        TC_VAR
        TC_REF

    ctypedef struct tc_source:
        const uint8_t *values
        const int64_t *offsets

    ctypedef struct tc_stream:
        uint32_t kind
        uint32_t width

    ctypedef struct tc_sink:
        uint8_t *values
        int64_t *offsets

    ctypedef struct tc_ref:
        uint64_t address
        uint64_t n_bytes

    int64_t tc_measure(const tc_source *, const uint32_t *, const uint32_t *, size_t, int64_t *)
    void tc_gather(const tc_stream *, const tc_source *, const uint32_t *, const uint32_t *, size_t, const tc_sink *)
    int tc_offsets_ok(const int64_t *, size_t, int64_t)

cdef list bytes_of_refs(const tc_ref *refs, size_t n)
cdef list str_of_refs(const tc_ref *refs, size_t n)
