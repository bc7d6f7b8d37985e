# cython: freethreading_compatible = True
"""Resize (csrc/resize.h), colour jitter and conversion by tables (csrc/pixels.h) of a decoded picture."""

from libc.math cimport isfinite
from libc.stddef cimport ptrdiff_t, size_t
from libc.stdint cimport uint8_t, uintptr_t
from libc.stdlib cimport free, malloc

cdef extern from "pixels.h" nogil:
    enum:
        TC_BRIGHTNESS
        TC_CONTRAST
        TC_SATURATION
    double TC_MAX_FACTOR
    void tc_adjust(uint8_t *planes, size_t n, int kind, double factor)
    void tc_look_up(const uint8_t *source, int is_planar, const void *tables, size_t width, void *to, int to_planar, size_t n)

cdef extern from "resize.h" nogil:
    ctypedef struct tc_axis:
        double start
        double length
        double half_width
        size_t first
        size_t stop
        size_t n_out
    size_t tc_resize_bytes(const tc_axis *rows, const tc_axis *columns)
    void tc_resize(const uint8_t *source, ptrdiff_t row_bytes, const tc_axis *rows, const tc_axis *columns, uint8_t *to, void *scratch)

BRIGHTNESS = TC_BRIGHTNESS
CONTRAST = TC_CONTRAST
SATURATION = TC_SATURATION
MAX_FACTOR = TC_MAX_FACTOR


def adjust(uint8_t[:, ::1] planes not None, steps not None):
    cdef int kinds[3]
    cdef double factors[3]
    cdef int n_steps = 0, i
    if planes.shape[0] != 3 or len(steps) > 3:
        raise ValueError(f"expected planes of shape [3, n] and at most 3 steps, got {planes.shape[0]} planes and {len(steps)} steps")
    for kind, factor in steps:
        kinds[n_steps], factors[n_steps] = kind, factor
        if not TC_BRIGHTNESS <= kinds[n_steps] <= TC_SATURATION or not 0.0 <= factors[n_steps] <= TC_MAX_FACTOR:
            raise ValueError(f"expected a kind of adjustment and a factor from 0 to {TC_MAX_FACTOR}, got {kind} and {factor}")
        n_steps += 1
    if n_steps == 0 or planes.shape[1] == 0:
        return
    with nogil:
        for i in range(n_steps):
            tc_adjust(&planes[0, 0], planes.shape[1], kinds[i], factors[i])


def look_up(const uint8_t[::1] values not None, bint is_planar, const uint8_t[:, ::1] tables not None, uint8_t[::1] out not None, bint to_planar):
    cdef size_t n = values.shape[0] // 3, width = tables.shape[1] // 256
    if tables.shape[0] != 3 or tables.shape[1] % 256 or width not in (2, 4):
        raise ValueError(f"expected three tables of 256 elements of 2 or 4 bytes, got {tables.shape[0]} of {tables.shape[1]} bytes")
    if values.shape[0] % 3 or out.shape[0] != values.shape[0] * <Py_ssize_t>width:
        raise ValueError(f"expected {width} bytes for each of 3 * n values, got {out.shape[0]} bytes for {values.shape[0]} values")
    if n == 0:
        return
    if (<uintptr_t>&tables[0, 0] | <uintptr_t>&out[0]) % width:
        raise ValueError("expected tables and out to be aligned to their elements")
    with nogil:
        tc_look_up(&values[0], is_planar, &tables[0, 0], width, &out[0], to_planar, n)


cdef tc_axis axis_of(object given, Py_ssize_t n_pixels, Py_ssize_t n_out) except *:
    cdef tc_axis axis
    cdef Py_ssize_t first, stop
    axis.start, axis.length, axis.half_width, first, stop = given
    if not (isfinite(axis.start) and 0 < axis.length <= n_pixels and 0.5 <= axis.half_width <= n_pixels + 2.0 and -1.0 <= axis.start <= n_pixels):
        raise ValueError(f"expected a box of the {n_pixels} pixels and a filter of half a pixel or more, got {given}")
    if not 0 <= first < stop <= n_pixels:
        raise ValueError(f"expected a range of the {n_pixels} pixels, got {given}")
    axis.first, axis.stop, axis.n_out = first, stop, n_out
    return axis


def resize(const uint8_t[:, :, :] picture not None, rows not None, columns not None, uint8_t[:, :, ::1] out not None):
    cdef tc_axis vertical, horizontal
    cdef void *scratch
    if picture.shape[2] != 3 or out.shape[2] != 3 or picture.strides[2] != 1 or picture.strides[1] != 3:
        raise ValueError("expected pictures of three channels, contiguous in each row")
    if out.shape[0] == 0 or out.shape[1] == 0:
        return
    vertical = axis_of(rows, picture.shape[0], out.shape[0])
    horizontal = axis_of(columns, picture.shape[1], out.shape[1])
    scratch = malloc(tc_resize_bytes(&vertical, &horizontal))
    if scratch == NULL:
        raise MemoryError()
    with nogil:
        tc_resize(&picture[0, 0, 0], picture.strides[0], &vertical, &horizontal, &out[0, 0, 0], scratch)
        free(scratch)
