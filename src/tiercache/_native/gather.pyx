"""Python face of csrc/gather.h: convert, hold, one C call with the GIL dropped."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EIO
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

import numpy as np

cdef extern from "guard.h" nogil:
    enum:
        TC_EIO
    void tc_guard_install()
    int tc_guard_enter()
    void tc_guard_leave()

cdef extern from "Python.h":
    object PyUnicode_DecodeUTF8(const char *, Py_ssize_t, const char *)

FIXED = TC_FIXED
BITS = TC_BITS
VAR = TC_VAR

tc_guard_install()


cdef int64_t guarded_measure(const tc_source *sources, const uint32_t *block, const uint32_t *row, size_t n, int64_t *offsets) noexcept nogil:
    if tc_guard_enter():
        return TC_EIO
    cdef int64_t n_elements = tc_measure(sources, block, row, n, offsets)
    tc_guard_leave()
    return n_elements


cdef int guarded_gather(
    const tc_stream *stream, const tc_source *sources, const uint32_t *block, const uint32_t *row, size_t n, const tc_sink *sink
) noexcept nogil:
    if tc_guard_enter():
        return TC_EIO
    tc_gather(stream, sources, block, row, n, sink)
    tc_guard_leave()
    return 0


cdef int guarded_copy(uint8_t *out, const uint8_t *source, size_t n) noexcept nogil:
    if tc_guard_enter():
        return TC_EIO
    memcpy(out, source, n)
    tc_guard_leave()
    return 0


cdef int guarded_fill(char **objects, const tc_ref *refs, size_t n) noexcept nogil:
    cdef size_t i
    if tc_guard_enter():
        return TC_EIO
    for i in range(n):
        memcpy(objects[i], <const void *><size_t>refs[i].address, refs[i].n_bytes)
    tc_guard_leave()
    return 0


cdef int guarded_offsets_ok(const int64_t *offsets, size_t n, int64_t limit) noexcept nogil:
    if tc_guard_enter():
        return TC_EIO
    cdef int ok = tc_offsets_ok(offsets, n, limit)
    tc_guard_leave()
    return ok


cdef int check(int64_t code) except -1:
    if code == TC_EIO:
        raise OSError(EIO, "a mapped file could not be read: it was truncated, or its disk failed")
    return 0


cdef int check_rows(const uint64_t[:, ::1] addresses, const uint32_t[::1] block, const uint32_t[::1] row) except -1:
    if addresses.shape[1] != 2:
        raise ValueError(f"addresses need the shape [n_blocks, 2], got [{addresses.shape[0]}, {addresses.shape[1]}]")
    if block.shape[0] != row.shape[0]:
        raise ValueError(f"block and row need one length, got {block.shape[0]} and {row.shape[0]}")
    return 0


def measure(const uint64_t[:, ::1] addresses not None, const uint32_t[::1] block not None, const uint32_t[::1] row not None):
    check_rows(addresses, block, row)
    out = np.zeros(row.shape[0] + 1, dtype=np.int64)
    cdef int64_t[::1] offsets = out
    cdef size_t n = row.shape[0]
    cdef int64_t code = 0
    if n:
        with nogil:
            code = guarded_measure(<const tc_source *>&addresses[0, 0], &block[0], &row[0], n, &offsets[0])
        check(code)
    return out


def gather(
    uint32_t kind,
    uint32_t width_bytes,
    const uint64_t[:, ::1] addresses not None,
    const uint32_t[::1] block not None,
    const uint32_t[::1] row not None,
    uint8_t[::1] out not None,
    const int64_t[::1] offsets=None,
):
    check_rows(addresses, block, row)
    cdef size_t n = row.shape[0]
    cdef size_t need
    cdef tc_stream stream = tc_stream(kind, width_bytes)
    cdef tc_sink sink = tc_sink(NULL, NULL)
    if kind == TC_VAR:
        if offsets is None or <size_t>offsets.shape[0] != n + 1:
            raise ValueError(f"a VAR stream needs the {n + 1} offsets that measure() gave")
        need = <size_t>offsets[n] * width_bytes
        sink.offsets = <int64_t *>&offsets[0]
    elif kind == TC_FIXED:
        need = n * width_bytes
    elif kind == TC_BITS:
        need = n
    else:
        raise ValueError(f"kind must be FIXED (0), BITS (1) or VAR (2), got {kind}")
    if <size_t>out.shape[0] < need:
        raise ValueError(f"out is too short: expected at least {need} bytes, got {out.shape[0]}")
    if n == 0 or need == 0:
        return
    sink.values = &out[0]
    cdef int code
    with nogil:
        code = guarded_gather(&stream, <const tc_source *>&addresses[0, 0], &block[0], &row[0], n, &sink)
    check(code)


cdef list bytes_of_refs(const tc_ref *refs, size_t n):
    # Objects are made at their size and filled once. CPython shares no object that is made with NULL save the empty one, which is not written.
    cdef char **objects = <char **>malloc(max(n, 1) * sizeof(char *))
    if objects == NULL:
        raise MemoryError
    cdef size_t i
    cdef int code
    cdef list out = [None] * n
    try:
        for i in range(n):
            item = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>refs[i].n_bytes)
            out[i] = item
            objects[i] = PyBytes_AS_STRING(item)
        with nogil:
            code = guarded_fill(objects, refs, n)
        check(code)
    finally:
        free(objects)
    return out


cdef list str_of_refs(const tc_ref *refs, size_t n):
    # Through a buffer: the decoder allocates, and a fault must not jump out of an allocation.
    cdef size_t i, total = 0
    cdef int code
    for i in range(n):
        total += refs[i].n_bytes
    cdef char *text = <char *>malloc(max(total, 1))
    cdef char **places = <char **>malloc(max(n, 1) * sizeof(char *))
    cdef list out = [None] * n
    try:
        if text == NULL or places == NULL:
            raise MemoryError
        total = 0
        for i in range(n):
            places[i] = text + total
            total += refs[i].n_bytes
        with nogil:
            code = guarded_fill(places, refs, n)
        check(code)
        for i in range(n):
            out[i] = PyUnicode_DecodeUTF8(places[i], <Py_ssize_t>refs[i].n_bytes, NULL)
    finally:
        free(text)
        free(places)
    return out


cdef list objects_of_rows(addresses, block, row, bint as_str):
    cdef const uint64_t[:, ::1] sources = addresses
    cdef const uint32_t[::1] blocks = block
    cdef const uint32_t[::1] rows = row
    check_rows(sources, blocks, rows)
    cdef size_t n = rows.shape[0]
    if n == 0:
        return []
    cdef tc_stream stream = tc_stream(TC_REF, 1)
    cdef tc_ref *refs = <tc_ref *>malloc(n * sizeof(tc_ref))
    if refs == NULL:
        raise MemoryError
    cdef tc_sink sink = tc_sink(<uint8_t *>refs, NULL)
    cdef int code
    try:
        with nogil:
            code = guarded_gather(&stream, <const tc_source *>&sources[0, 0], &blocks[0], &rows[0], n, &sink)
        check(code)
        return str_of_refs(refs, n) if as_str else bytes_of_refs(refs, n)
    finally:
        free(refs)


def gather_bytes(addresses, block, row):
    return objects_of_rows(addresses, block, row, False)


def gather_str(addresses, block, row):
    return objects_of_rows(addresses, block, row, True)


def offsets_ok(uint64_t address, size_t n, int64_t limit):
    cdef int code
    with nogil:
        code = guarded_offsets_ok(<const int64_t *><size_t>address, n, limit)
    check(code)
    return code == 1


def copy_guarded(uint64_t address, uint8_t[::1] out not None):
    cdef size_t n = out.shape[0]
    cdef int code = 0
    if n:
        with nogil:
            code = guarded_copy(&out[0], <const uint8_t *><size_t>address, n)
    check(code)
