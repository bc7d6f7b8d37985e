from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from tiercache._native.gather cimport tc_chunk, tc_ref, tc_source
from tiercache._native.permute cimport tc_row_finder

cdef extern from "output_layout.h" nogil:
    ctypedef struct tc_output_layout:
        pass

cdef extern from "ring.h" nogil:
    ctypedef struct tc_plan:
        const tc_source *sources
        const tc_chunk *chunks
        size_t n_blocks
        const uint32_t *block
        const uint32_t *row
        const tc_row_finder *finder
        uint64_t start
        size_t n_rows
        const tc_output_layout *output_layouts

    ctypedef struct tc_ring:
        pass

    ctypedef struct tc_copy_task:
        const tc_ref *refs
        char **destinations
        size_t n

    ctypedef struct tc_slot:
        uint8_t *memory
        size_t capacity
        size_t n_rows
        size_t n_bytes
        size_t *values_at
        size_t *offsets_at
        size_t *n_elements

cdef extern from "dlpack.h" nogil:
    ctypedef struct tc_row_layout:
        uint8_t code
        uint8_t bits
        int n_dims
        int64_t *dims
        size_t row_bytes

cdef class Layout:
    cdef tc_row_layout layout

cdef class Slot:
    cdef tc_slot *slot
    cdef readonly uint64_t first_row
    cdef dict fillings  # stream -> Filling; None until the first one

    cdef object capsule(self, Layout layout, size_t offset, size_t n_rows)

cdef class Ring:
    cdef tc_ring *ring
    cdef object plans  # deque of (end row in the sequence, Plan), appended and retired by the planner
    cdef uint64_t pushed

    cdef Slot take_ready(self)  # None if the next batch is not ready or has an error, which take() raises
