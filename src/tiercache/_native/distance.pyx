"""Wrapper of csrc/core_distance.h for its tests; the ring has a measurement of its own."""

from libc.stdlib cimport free
from libc.string cimport memset

cdef extern from "stdlib.h" nogil:
    void *aligned_alloc(size_t, size_t)

cdef extern from "core_distance.h" nogil:
    ctypedef struct tc_distance:
        pass

    void tc_distance_request(tc_distance *)
    void tc_distance_write(tc_distance *)
    void tc_distance_measure(tc_distance *)
    void tc_distance_add(tc_distance *, int)
    int tc_distance_is_far(const tc_distance *)
    int tc_distance_step(const tc_distance *)


cdef class Distance:
    cdef tc_distance *distance

    def __cinit__(self):
        self.distance = <tc_distance *>aligned_alloc(4096, sizeof(tc_distance))
        if self.distance == NULL:
            raise MemoryError
        memset(self.distance, 0, sizeof(tc_distance))

    def __dealloc__(self):
        free(self.distance)

    def ask(self):
        tc_distance_request(self.distance)

    def mark(self):
        tc_distance_write(self.distance)

    def look(self):
        tc_distance_measure(self.distance)

    def learn(self, bint is_far):
        tc_distance_add(self.distance, is_far)

    @property
    def step(self):
        return tc_distance_step(self.distance)

    @property
    def is_far(self):
        return tc_distance_is_far(self.distance) != 0
