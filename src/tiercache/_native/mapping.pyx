"""Mappings of files without a descriptor, and whether mapped pages are in the page cache (mincore(2))."""

from cpython.buffer cimport PyBuffer_FillInfo
from cpython.exc cimport PyErr_SetFromErrno
from libc.stdint cimport uint64_t

cdef extern from "sys/mman.h" nogil:
    enum:
        PROT_READ
        MAP_SHARED
    void *MAP_FAILED
    void *mmap(void *, size_t, int, int, int, long)
    int munmap(void *, size_t)
    int mincore(void *, size_t, unsigned char *)

cdef extern from "unistd.h" nogil:
    enum:
        _SC_PAGESIZE
    long sysconf(int)

# Pages per call: the kernel locks the process's mappings during the call, and the result is on our stack.
cdef enum:
    MOST_PAGES = 4096

cdef size_t page_bytes = <size_t>sysconf(_SC_PAGESIZE)


cdef class Mapping:
    cdef void *memory
    cdef Py_ssize_t n_bytes

    def __cinit__(self, int fd, Py_ssize_t n_bytes):
        cdef void *found
        self.memory = NULL
        if n_bytes < 1:
            raise ValueError(f"a mapping has 1 byte or more, got {n_bytes}")
        with nogil:
            found = mmap(NULL, <size_t>n_bytes, PROT_READ, MAP_SHARED, fd, 0)
        if found == MAP_FAILED:
            PyErr_SetFromErrno(OSError)
        self.memory, self.n_bytes = found, n_bytes

    def __len__(self):
        return self.n_bytes

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.memory, self.n_bytes, 1, flags)

    def __dealloc__(self):
        if self.memory != NULL:
            with nogil:
                munmap(self.memory, <size_t>self.n_bytes)


cdef bint is_range_resident(uint64_t address, uint64_t n_bytes) noexcept nogil:
    cdef unsigned char pages[MOST_PAGES]
    cdef unsigned char all_pages = 1
    cdef size_t n_pages, i
    while n_bytes > 0:
        n_pages = <size_t>min((n_bytes + page_bytes - 1) // page_bytes, <uint64_t>MOST_PAGES)
        if mincore(<void *>address, n_pages * page_bytes, pages) != 0:
            return False
        for i in range(n_pages):
            all_pages &= pages[i]
        if not all_pages & 1:
            return False
        address += n_pages * page_bytes
        n_bytes -= min(n_bytes, <uint64_t>n_pages * page_bytes)
    return True


def are_resident(const uint64_t[:, ::1] ranges not None):
    cdef Py_ssize_t i
    cdef bint found = True
    if ranges.shape[1] != 2:
        raise ValueError(f"ranges need the shape [n, 2] (address, bytes), got {tuple(ranges.shape)[:2]}")
    with nogil:
        for i in range(ranges.shape[0]):
            if not is_range_resident(ranges[i, 0], ranges[i, 1]):
                found = False
                break
    return found
