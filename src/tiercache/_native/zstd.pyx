# cython: freethreading_compatible = True
"""Decoding of many zstd frames in one call without the GIL, by a libzstd that the caller has found."""

from libc.stddef cimport size_t
from libc.stdint cimport uint64_t, uintptr_t

cdef extern from "zstd_frames.h" nogil:
    ctypedef struct tc_zstd_functions:
        void *(*create)() noexcept nogil
        size_t (*destroy)(void *context) noexcept nogil
        size_t (*decode)(void *context, void *out, size_t room, const void *data, size_t n) noexcept nogil
        unsigned long long (*content_size)(const void *data, size_t n) noexcept nogil
    size_t tc_zstd_decode_frames(const tc_zstd_functions *zstd, void *context, const uint64_t *frames, const uint64_t *stored,
                                const uint64_t *out, const uint64_t *raw, size_t count)


cdef class ZstdDecoder:
    cdef tc_zstd_functions _zstd
    cdef void *_context

    def __cinit__(self, uintptr_t create, uintptr_t destroy, uintptr_t decode, uintptr_t content_size):
        self._context = NULL
        if not (create and destroy and decode and content_size):
            raise ValueError("a decoder needs the addresses of four functions of libzstd")
        self._zstd.create = <void *(*)() noexcept nogil>create
        self._zstd.destroy = <size_t (*)(void *) noexcept nogil>destroy
        self._zstd.decode = <size_t (*)(void *, void *, size_t, const void *, size_t) noexcept nogil>decode
        self._zstd.content_size = <unsigned long long (*)(const void *, size_t) noexcept nogil>content_size
        self._context = self._zstd.create()
        if self._context == NULL:
            raise MemoryError("no memory for a zstd context")

    def __dealloc__(self):
        if self._context != NULL:
            self._zstd.destroy(self._context)

    def decode(self, const uint64_t[::1] frames not None, const uint64_t[::1] stored not None,
               const uint64_t[::1] out not None, const uint64_t[::1] raw not None) -> int:
        cdef size_t count = frames.shape[0]
        if stored.shape[0] != frames.shape[0] or out.shape[0] != frames.shape[0] or raw.shape[0] != frames.shape[0]:
            raise ValueError("frames, stored, out and raw must be of one length")
        if count == 0:
            return 0
        cdef size_t n_decoded
        with nogil:
            n_decoded = tc_zstd_decode_frames(&self._zstd, self._context, &frames[0], &stored[0], &out[0], &raw[0], count)
        return n_decoded
