"""Wrapper of csrc/gather.h: each function converts and holds its arguments, and makes one C call without the GIL."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.list cimport PyList_New, PyList_SET_ITEM
from cpython.ref cimport Py_INCREF
from libc.errno cimport EIO
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

import numpy as np

from tiercache._native import checksum

cdef extern from "sigbus_guard.h" nogil:
    enum:
        TC_EIO
    void tc_guard_install()
    int tc_guard_enter()
    void tc_guard_leave()

cdef extern from "cast.h" nogil:
    enum:
        TC_BOOL
    ctypedef uint64_t (*tc_caster)(const uint8_t *, uint8_t *, size_t)
    tc_caster tc_caster_of(uint32_t, uint32_t)
    size_t tc_dtype_bytes(uint32_t)
    size_t tc_cast_bytes(const tc_stream *, size_t)

cdef extern from "Python.h":
    ctypedef uint32_t Py_UCS4
    object PyUnicode_New(Py_ssize_t, Py_UCS4)
    void *PyUnicode_DATA(object)
    object PyUnicode_DecodeUTF8(const char *, Py_ssize_t, const char *)

cdef extern from "copy.h" nogil:
    void tc_copy_set_nontemporal(int)

FIXED = TC_FIXED
BITS = TC_BITS
VAR = TC_VAR
REF = TC_REF

tc_guard_install()
tc_gather_init(checksum.KERNEL_NUMBER)


class CorruptError(ValueError):
    """Stored bytes are not what was written."""


class CastError(ValueError):
    """A value cannot be represented in the dtype of the cast."""


class TooLongError(ValueError):
    """A record is longer than its output layout allows. Only rings raise it."""


cdef tc_stream stream_of(uint32_t kind, uint32_t width_bytes) except *:
    """Return the stream that the two words describe (csrc/gather.h)."""
    cdef tc_stream stream = tc_stream(kind & 0xff, (kind >> 8) & 0xff, (kind >> 16) & 0xff, 0, width_bytes)
    if kind >> 8 == 0:
        return stream
    if tc_caster_of(stream.from_dtype, stream.to_dtype) == NULL:
        raise ValueError(f"there is no cast from dtype number {stream.from_dtype} to {stream.to_dtype}")
    if stream.kind == TC_BITS and stream.from_dtype != TC_BOOL:
        raise ValueError(f"bits are cast from bool, got dtype number {stream.from_dtype}")
    if stream.kind != TC_BITS and width_bytes % tc_dtype_bytes(stream.from_dtype):
        raise ValueError(f"{width_bytes} bytes are not a whole number of elements of dtype number {stream.from_dtype}")
    return stream


cdef int guarded_check(const tc_stream *stream, const tc_rows *rows, tc_corruption *fault) noexcept nogil:
    if tc_guard_enter():
        return TC_EIO
    cdef int code = tc_check(stream, rows, fault)
    tc_guard_leave()
    return code


cdef int guarded_measure(const tc_rows *rows, int64_t *offsets) noexcept nogil:
    if tc_guard_enter():
        return TC_EIO
    cdef int code = tc_measure(rows, offsets)
    tc_guard_leave()
    return code


cdef int guarded_gather(const tc_stream *stream, const tc_rows *rows, const tc_sink *sink) noexcept nogil:
    if tc_guard_enter():
        return TC_EIO
    cdef int code = tc_gather(stream, rows, sink)
    tc_guard_leave()
    return code


cdef int64_t guarded_check_chunk(const tc_chunk *chunk) noexcept nogil:
    if tc_guard_enter():
        return TC_EIO
    cdef int64_t page = tc_check_chunk(chunk)
    tc_guard_leave()
    return page


cdef int guarded_fill(uint8_t **places, const tc_ref *refs, size_t n) noexcept nogil:
    if tc_guard_enter():
        return TC_EIO
    tc_copy_refs(places, refs, n)
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
    if code == TC_CORRUPT:
        raise CorruptError("a page's CRC-32C does not match, or offsets decrease or point outside the chunk")
    if code == TC_MISFIT:
        raise CastError("a value cannot be represented in the dtype that it is cast to")
    return 0


cdef class Rows:
    """The arguments of a call in the form of csrc/gather.h, and the arrays that own them."""

    cdef tc_rows rows
    cdef const uint64_t[:, ::1] addresses
    cdef const uint64_t[:, ::1] checks
    cdef const uint32_t[::1] block
    cdef const uint32_t[::1] row

    def __cinit__(self, addresses, checks, block, row):
        self.addresses = addresses
        self.block = block
        self.row = row
        if self.addresses.shape[1] != 3:
            raise ValueError(f"addresses need the shape [n_blocks, 3], got [{self.addresses.shape[0]}, {self.addresses.shape[1]}]")
        if self.block.shape[0] != self.row.shape[0]:
            raise ValueError(f"block and row need one length, got {self.block.shape[0]} and {self.row.shape[0]}")
        self.rows.n = self.row.shape[0]
        if checks is not None:
            self.checks = checks
            if self.checks.shape[0] != self.addresses.shape[0] or self.checks.shape[1] != 4:
                raise ValueError(f"checks need the shape [{self.addresses.shape[0]}, 4], got [{self.checks.shape[0]}, {self.checks.shape[1]}]")
            self.rows.chunks = <const tc_chunk *>&self.checks[0, 0] if self.checks.shape[0] else NULL
        if self.rows.n:
            if not self.addresses.shape[0]:
                raise ValueError("there are rows, but no blocks")
            self.rows.sources = <const tc_source *>&self.addresses[0, 0]
            self.rows.block = &self.block[0]
            self.rows.row = &self.row[0]
            self.rows.n_breaks = tc_count_breaks(self.rows.block, self.rows.row, self.rows.n)

    cdef int check_pages(self, tc_stream stream) except -1:
        """Check the pages of the rows, if there are checks."""
        cdef tc_corruption fault
        cdef int code
        if self.rows.chunks != NULL:
            with nogil:
                code = guarded_check(&stream, &self.rows, &fault)
            check(code)
        return 0

    cdef int measure(self, int64_t *offsets) except -1:
        cdef int code
        offsets[0] = 0
        with nogil:
            code = guarded_measure(&self.rows, offsets)
        return check(code)

    cdef int gather(self, tc_stream stream, tc_sink sink) except -1:
        cdef int code
        with nogil:
            code = guarded_gather(&stream, &self.rows, &sink)
        return check(code)


def measure(addresses, block, row, checks=None):
    cdef Rows rows = Rows(addresses, checks, block, row)
    cdef tc_stream stream = stream_of(TC_VAR, 0)
    out = np.zeros(rows.rows.n + 1, dtype=np.int64)
    cdef int64_t[::1] offsets = out
    rows.check_pages(stream)
    rows.measure(&offsets[0])
    return out


def gather(
    uint32_t kind,
    uint32_t width_bytes,
    addresses,
    block,
    row,
    uint8_t[::1] out not None,
    const int64_t[::1] offsets=None,
    checks=None,
):
    cdef Rows rows = Rows(addresses, checks, block, row)
    cdef size_t n = rows.rows.n
    cdef size_t need
    cdef tc_stream stream = stream_of(kind, width_bytes)
    cdef size_t out_bytes = tc_cast_bytes(&stream, width_bytes)
    cdef tc_sink sink = tc_sink(NULL, NULL)
    if stream.kind == TC_VAR:
        if offsets is None or <size_t>offsets.shape[0] != n + 1:
            raise ValueError(f"a VAR stream needs the {n + 1} offsets that measure() gave")
        need = <size_t>offsets[n] * out_bytes
        sink.offsets = <int64_t *>&offsets[0]
    elif stream.kind == TC_FIXED:
        need = n * out_bytes
    elif stream.kind == TC_BITS:
        need = n * max(tc_dtype_bytes(stream.to_dtype), <size_t>1)
    else:
        raise ValueError(f"kind must be FIXED (0), BITS (1) or VAR (2), got {kind}")
    if <size_t>out.shape[0] < need:
        raise ValueError(f"out is too short: expected at least {need} bytes, got {out.shape[0]}")
    if n == 0 or need == 0:
        return
    sink.values = &out[0]
    rows.check_pages(stream)
    rows.gather(stream, sink)


cdef list bytes_of_refs(const tc_ref *refs, size_t n):
    # Each object is made at its size and filled once. CPython does not share an object made with NULL, except the empty
    # one, which is not written.
    cdef uint8_t **places = <uint8_t **>malloc((n + 1) * sizeof(uint8_t *))
    if places == NULL:
        raise MemoryError
    cdef size_t i
    cdef int code
    cdef list out = PyList_New(<Py_ssize_t>n)
    try:
        for i in range(n):
            item = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>refs[i].n_bytes)
            places[i] = <uint8_t *>PyBytes_AS_STRING(item)
            Py_INCREF(item)
            PyList_SET_ITEM(out, <Py_ssize_t>i, item)
        with nogil:
            code = guarded_fill(places, refs, n)
        check(code)
    finally:
        free(places)
    return out


cdef bint is_ascii(const uint8_t *values, size_t n) noexcept nogil:
    # Blocks of 4 KiB are joined without a branch, so that the compiler vectorises the loop.
    cdef size_t i = 0, end
    cdef uint8_t found = 0
    while i < n and found < 128:
        end = min(i + 4096, n)
        while i < end:
            found |= values[i]
            i += 1
    return found < 128


cdef list str_of_buffer(const uint8_t *values, const int64_t *offsets, size_t n):
    # One pass over the whole text tells whether any of it must be decoded. Usually none must, and the objects are
    # filled by copying.
    cdef bint ascii
    cdef list out = PyList_New(<Py_ssize_t>n)
    cdef size_t i
    cdef Py_ssize_t length
    with nogil:
        ascii = is_ascii(values + offsets[0], <size_t>(offsets[n] - offsets[0]))
    for i in range(n):
        length = <Py_ssize_t>(offsets[i + 1] - offsets[i])
        if ascii and length > 1:  # CPython shares the str objects of one character; decoding returns the shared ones.
            item = PyUnicode_New(length, 127)
            memcpy(PyUnicode_DATA(item), values + offsets[i], <size_t>length)
        else:
            item = PyUnicode_DecodeUTF8(<const char *>values + offsets[i], length, NULL)
        Py_INCREF(item)
        PyList_SET_ITEM(out, <Py_ssize_t>i, item)
    return out


def gather_bytes(addresses, block, row, checks=None):
    cdef Rows rows = Rows(addresses, checks, block, row)
    cdef tc_stream stream = stream_of(TC_REF, 1)
    cdef tc_ref *refs = <tc_ref *>malloc((rows.rows.n + 1) * sizeof(tc_ref))
    if refs == NULL:
        raise MemoryError
    try:
        rows.check_pages(stream)
        rows.gather(stream, tc_sink(<uint8_t *>refs, NULL))
        return bytes_of_refs(refs, rows.rows.n)
    finally:
        free(refs)


def gather_str(addresses, block, row, checks=None):
    # Through a buffer: creating str objects allocates, and a SIGBUS must not jump out of an allocation.
    offsets = measure(addresses, block, row, checks)
    text = np.empty(max(int(offsets[len(row)]), 1), np.uint8)
    gather(TC_VAR, 1, addresses, block, row, text, offsets, checks)
    cdef const int64_t[::1] places = offsets
    cdef const uint8_t[::1] values = text
    return str_of_buffer(&values[0], &places[0], <size_t>places.shape[0] - 1)


def locate(uint32_t kind, uint32_t width_bytes, addresses, checks, block, row):
    cdef Rows rows = Rows(addresses, checks, block, row)
    cdef tc_stream stream = stream_of(kind, width_bytes)
    cdef tc_corruption fault
    cdef int code
    rows.rows.n_breaks = rows.rows.n  # Row by row, so that the position is exact.
    with nogil:
        code = guarded_check(&stream, &rows.rows, &fault)
    if code == TC_CORRUPT:
        return fault.row, None if fault.page < 0 else fault.page
    check(code)
    return None


def check_chunk(const uint64_t[::1] chunk not None):
    if chunk.shape[0] != 4:
        raise ValueError(f"a chunk is (base, n_bytes, crcs, checked), got {chunk.shape[0]} numbers")
    cdef int64_t page
    with nogil:
        page = guarded_check_chunk(<const tc_chunk *>&chunk[0])
    check(page)
    return None if page < 0 else page


def offsets_ok(uint64_t address, size_t n, int64_t limit):
    cdef int code
    with nogil:
        code = guarded_offsets_ok(<const int64_t *><size_t>address, n, limit)
    check(code)
    return code == 1


def set_nontemporal_copies(bint on):
    tc_copy_set_nontemporal(on)
