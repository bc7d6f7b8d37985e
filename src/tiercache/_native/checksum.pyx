# cython: freethreading_compatible = True
"""CRC-32C of buffers, of many addresses, and of the pages of a buffer. Every call runs under the SIGBUS guard.

The module reads one environment variable itself when it is imported: TIERCACHE_KERNEL (see checksum.pyi). config.py
cannot read it, because it is in the same layer, and the kernel is selected before anything is configured.
"""

import os
from errno import EIO

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t

cdef extern from "crc32c.h" nogil:
    int TC_CRC_KERNELS
    void tc_crc32c_init()
    int tc_crc32c_usable(int kernel)
    int tc_crc32c(int kernel, uint32_t seed, const uint8_t *data, size_t n, uint32_t *out)
    int tc_crc32c_many(int kernel, const uint64_t *addresses, const uint64_t *lengths, size_t count, uint32_t *out)
    int tc_crc32c_pages(int kernel, const uint8_t *data, size_t n, size_t page_bytes, uint32_t *out, uint32_t *whole)
    uint32_t tc_crc32c_combine(uint32_t crc_a, uint32_t crc_b, uint64_t n_bytes_b)
    uint32_t tc_crc32c_combine_pages(const uint32_t *sums, size_t count, size_t page_bytes, uint64_t n_bytes)

cdef extern from "crc32c.h" nogil:
    ctypedef struct tc_pieces:
        const uint64_t *addresses
        const uint64_t *lengths
        size_t count, align, page_bytes
        int kernel
    int tc_lay_out(const tc_pieces *layout, uint8_t *out, uint32_t *sums, uint32_t *whole)

# Below this size, releasing the GIL costs more than the checksum.
cdef size_t GIL_DROP_BYTES = 32 << 10
_NAMES = ("portable", "sse42", "armv8")  # Indexed by the numbers of crc32c.h.


cdef int _check(int status) except -1:
    if status < 0:
        raise OSError(EIO, "the memory could not be read: its file was truncated, or the disk failed")
    return 0


def kernels() -> tuple[str, ...]:
    return tuple(_NAMES[k] for k in range(TC_CRC_KERNELS) if tc_crc32c_usable(k))


cdef int _number(object name) except -1:
    if name not in _NAMES:
        raise ValueError(f"no checksum kernel is called {name!r}; there are {', '.join(_NAMES)}")
    cdef int number = _NAMES.index(name)
    if not tc_crc32c_usable(number):
        raise ValueError(f"checksum kernel {name!r} does not run on this machine; usable here: {', '.join(kernels())}")
    return number


cdef int _choose() except -1:
    forced = os.environ.get("TIERCACHE_KERNEL", "")
    if not forced:
        return max(_number(name) for name in kernels())
    try:
        return _number(forced)
    except ValueError as error:
        raise ImportError(f"TIERCACHE_KERNEL={forced}: {error}") from None


tc_crc32c_init()
cdef int _kernel = _choose()
KERNEL = _NAMES[_kernel]
KERNEL_NUMBER = _kernel


def crc32c(data, uint32_t seed=0, *, kernel=None) -> int:
    cdef int number = _kernel if kernel is None else _number(kernel)
    cdef uint32_t crc = 0
    cdef int status
    cdef Py_buffer view
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if <size_t>view.len < GIL_DROP_BYTES:
            status = tc_crc32c(number, seed, <const uint8_t *>view.buf, view.len, &crc)
        else:
            with nogil:
                status = tc_crc32c(number, seed, <const uint8_t *>view.buf, view.len, &crc)
    finally:
        PyBuffer_Release(&view)
    _check(status)
    return crc


def crc32c_many(const uint64_t[::1] addresses not None, const uint64_t[::1] lengths not None, uint32_t[::1] out not None, *,
                kernel=None) -> None:
    cdef int number = _kernel if kernel is None else _number(kernel)
    cdef size_t n = addresses.shape[0]
    cdef int status
    if <size_t>lengths.shape[0] != n or <size_t>out.shape[0] != n:
        raise ValueError(f"{n} addresses need as many lengths and sums, got {lengths.shape[0]} and {out.shape[0]}")
    if n == 0:
        return
    with nogil:
        status = tc_crc32c_many(number, &addresses[0], &lengths[0], n, &out[0])
    _check(status)


def crc32c_pages(uintptr_t address, size_t n_bytes, size_t page_bytes, uint32_t[::1] out not None, *, kernel=None) -> int:
    cdef int number = _kernel if kernel is None else _number(kernel)
    cdef uint32_t whole = 0
    cdef int status
    if page_bytes == 0:
        raise ValueError("page_bytes must be 1 or more")
    cdef size_t n_pages = n_bytes // page_bytes + (n_bytes % page_bytes != 0)
    if <size_t>out.shape[0] != n_pages:
        raise ValueError(f"{n_bytes} bytes are {n_pages} pages of {page_bytes} bytes, got room for {out.shape[0]} sums")
    if n_pages == 0:
        return 0
    if n_bytes < GIL_DROP_BYTES:
        status = tc_crc32c_pages(number, <const uint8_t *>address, n_bytes, page_bytes, &out[0], &whole)
    else:
        with nogil:
            status = tc_crc32c_pages(number, <const uint8_t *>address, n_bytes, page_bytes, &out[0], &whole)
    _check(status)
    return whole


def lay_out(const uint64_t[::1] addresses not None, const uint64_t[::1] lengths not None, size_t align, uint8_t[::1] out not None,
            size_t page_bytes, uint32_t[::1] sums not None) -> int:
    cdef size_t count = addresses.shape[0]
    cdef size_t room = out.shape[0]
    cdef size_t n_bytes = 0, padded, i
    cdef uint32_t whole = 0
    cdef int status
    cdef tc_pieces layout
    if page_bytes == 0 or align == 0:
        raise ValueError("page_bytes and align must be 1 or more")
    if <size_t>lengths.shape[0] != count:
        raise ValueError(f"{count} addresses need as many lengths, got {lengths.shape[0]}")
    for i in range(count):
        padded = lengths[i] + (align - lengths[i] % align) % align
        if padded < lengths[i] or padded > room - n_bytes:
            raise ValueError(f"the padded pieces are longer than the {room} bytes of out")
        n_bytes += padded
    cdef size_t n_pages = n_bytes // page_bytes + (n_bytes % page_bytes != 0)
    if n_bytes != room or <size_t>sums.shape[0] != n_pages:
        raise ValueError(f"expected {n_bytes} bytes and {n_pages} sums, got room for {room} and {sums.shape[0]}")
    if n_bytes == 0:
        return 0
    layout = tc_pieces(&addresses[0], &lengths[0], count, align, page_bytes, _kernel)
    if n_bytes < GIL_DROP_BYTES:
        status = tc_lay_out(&layout, &out[0], &sums[0], &whole)
    else:
        with nogil:
            status = tc_lay_out(&layout, &out[0], &sums[0], &whole)
    _check(status)
    return whole


def combine(uint32_t crc_a, uint32_t crc_b, uint64_t n_bytes_b) -> int:
    return tc_crc32c_combine(crc_a, crc_b, n_bytes_b)


def combine_pages(const uint32_t[::1] sums not None, size_t page_bytes, uint64_t n_bytes) -> int:
    cdef size_t count = sums.shape[0]
    if page_bytes == 0 or count != n_bytes // page_bytes + (n_bytes % page_bytes != 0):
        raise ValueError(f"{n_bytes} bytes in pages of {page_bytes} bytes, got {count} checksums")
    return tc_crc32c_combine_pages(&sums[0], count, page_bytes, n_bytes) if count else 0
