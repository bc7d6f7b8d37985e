# cython: freethreading_compatible = True
"""Builder of a block's memory from single records. Common values are stored directly; the caller converts others.

This module is the exception to "one call per block, never one per record", because users pass one record per call. It
also joins lists of bytes and text.
"""

from cpython.buffer cimport PyBUF_FORMAT, PyBUF_STRIDES, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_CheckExact
from cpython.float cimport PyFloat_AsDouble, PyFloat_CheckExact
from cpython.long cimport PyLong_CheckExact
from cpython.unicode cimport PyUnicode_CheckExact
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset

import numpy as np

cdef extern from "Python.h":
    bint PyUnicode_IS_COMPACT_ASCII(object text)
    void *PyUnicode_DATA(object text)
    Py_ssize_t PyUnicode_GET_LENGTH(object text)
    int64_t PyLong_AsLongLongAndOverflow(object number, int *overflow) except? -1
    object PyDict_GetItemWithError(object mapping, object key)

cdef enum:
    _NONE = 0
    _ARRAYS = 1
    _INTEGERS = 2
    _FLOATS = 3
    _BOOLS = 4
    _BYTES = 5
    _TEXT = 6
    _NEEDS_CONVERSION = 0
    _ADDED = 1
    _EXCEEDS_BLOCK = 2
    _MAX_DIMENSIONS = 32
# Names of block_builder.pyi.
NONE, ARRAYS, INTEGERS, FLOATS, BOOLS, BYTES, TEXT = _NONE, _ARRAYS, _INTEGERS, _FLOATS, _BOOLS, _BYTES, _TEXT
NEEDS_CONVERSION, ADDED, EXCEEDS_BLOCK = _NEEDS_CONVERSION, _ADDED, _EXCEEDS_BLOCK

# Initial capacity of a column: FIRST_ROWS rows, or fewer if they are long.
cdef size_t FIRST_ROWS = 64
cdef size_t FIRST_BYTES = 64 << 10
cdef object _array = np.ndarray

cdef struct _ColumnMemory:
    uint8_t *values
    int64_t *offsets
    int32_t *shapes
    uint8_t *valid
    size_t rows, n_bytes


cdef class _ColumnBuilder:
    """The rows of one column. `values` holds rows of row_bytes or, if varying, one run of elements that offsets divide.

    Used only by BlockBuilder. A row that was started and not counted is overwritten by the next one.
    """

    cdef object name, scalar_type, dtype, shape
    cdef int fast_kind, n_dimensions
    cdef bint nullable, varying, nulls
    cdef char format
    cdef Py_ssize_t dimensions[_MAX_DIMENSIONS]
    cdef size_t item_bytes, row_bytes, counted_bytes
    cdef int64_t low, high
    cdef double limit
    # Addresses of the rows, and the numpy arrays that own them: values, offsets, shapes, valid, and values in their
    # dtype.
    cdef _ColumnMemory memory, next_memory
    cdef tuple arrays, next_arrays

    def __cinit__(self, spec):
        cdef int i
        self.name, self.dtype, self.shape, self.scalar_type = spec.name, spec.dtype, spec.shape, spec.scalar_type
        self.fast_kind, self.nullable, self.varying = spec.fast_kind, spec.nullable, spec.varying
        self.format = ord(spec.format) if len(spec.format) == 1 else 0
        self.low, self.high, self.limit = spec.low, spec.high, spec.limit
        self.n_dimensions = len(spec.shape)
        if self.n_dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"a record has at most {_MAX_DIMENSIONS} dimensions, got {self.n_dimensions}")
        self.item_bytes = self.row_bytes = self.dtype.itemsize
        for i in range(self.n_dimensions):
            self.dimensions[i] = -1 if self.shape[i] is None else self.shape[i]
            self.row_bytes *= 0 if self.varying else self.dimensions[i]
        self.counted_bytes = 8 + 4 * <size_t>self.n_dimensions if self.varying else max(self.row_bytes, <size_t>1)
        self.prepare(0, 0)  # A column of long rows that only receives whole batches takes no memory.
        self.adopt(0, 0)

    cdef int prepare(self, size_t rows, size_t n_bytes) except -1:
        """Allocate memory of this capacity for adopt(). If it fails (no memory, Ctrl-C), nothing has changed."""
        cdef _ColumnMemory memory
        if not self.varying:
            n_bytes = rows * self.row_bytes
        values, valid = np.empty(n_bytes, np.uint8), np.empty(rows, np.bool_)
        offsets = shapes = typed = None
        memory = _ColumnMemory(<uint8_t *><uintptr_t>values.ctypes.data, NULL, NULL, <uint8_t *><uintptr_t>valid.ctypes.data, rows, n_bytes)
        if self.varying:
            offsets, shapes = np.empty(rows + 1, np.int64), np.empty((rows, self.n_dimensions), np.int32)
            memory.offsets = <int64_t *><uintptr_t>offsets.ctypes.data
            memory.offsets[0] = 0
            memory.shapes = <int32_t *><uintptr_t>shapes.ctypes.data
        else:
            typed = values.view(self.dtype).reshape((rows, *self.shape))
        self.next_arrays = (values, offsets, shapes, valid, typed)
        self.next_memory = memory
        return 0

    cdef void adopt(self, size_t first, size_t kept) noexcept:
        """Continue in the prepared memory, with copies of the rows [first, first + kept) and of a started row."""
        cdef _ColumnMemory old = self.memory
        cdef _ColumnMemory new = self.next_memory
        cdef size_t n_copied = min(kept + 1, old.rows - first, new.rows)
        cdef int64_t start
        cdef size_t i
        if n_copied:
            memcpy(new.valid, old.valid + first, n_copied)
        if n_copied and self.varying:
            memcpy(new.shapes, old.shapes + first * self.n_dimensions, 4 * n_copied * self.n_dimensions)
        if kept and self.varying:
            start = old.offsets[first]
            for i in range(1, kept + 1):
                new.offsets[i] = old.offsets[first + i] - start
            memcpy(new.values, old.values + start * self.item_bytes, new.offsets[kept] * self.item_bytes)
        elif kept:
            memcpy(new.values, old.values + first * self.row_bytes, kept * self.row_bytes)
        self.memory, self.arrays, self.next_arrays = new, self.next_arrays, None

    cdef size_t bytes_of(self, size_t first, size_t kept) noexcept:
        """Return the size in bytes of the runs of these rows."""
        return (self.memory.offsets[first + kept] - self.memory.offsets[first]) * self.item_bytes if self.varying else 0

    cdef int reserve(self, size_t row, size_t n_bytes) except -1:
        """Make memory for row number `row`, with a run of n_bytes if varying."""
        cdef size_t rows = self.memory.rows
        cdef size_t wanted = 0
        if row >= rows:
            rows = max(2 * row, min(FIRST_ROWS, FIRST_BYTES // max(self.row_bytes, <size_t>1)), <size_t>1)
        if self.varying:
            wanted = self.bytes_of(0, row) + n_bytes
            wanted = self.memory.n_bytes if wanted <= self.memory.n_bytes else wanted + wanted // 2
        if rows > self.memory.rows or wanted > self.memory.n_bytes:
            self.prepare(rows, wanted)
            self.adopt(0, row)
        return 0

    cdef int put_run(self, size_t row, const void *data, size_t n_bytes) except -1:
        cdef size_t start = self.memory.offsets[row] * self.item_bytes
        if start + n_bytes > self.memory.n_bytes:
            self.reserve(row, n_bytes)
        memcpy(self.memory.values + start, data, n_bytes)
        self.memory.offsets[row + 1] = (start + n_bytes) // self.item_bytes
        return 1

    cdef void put_null(self, size_t row) noexcept:
        cdef int i
        self.memory.valid[row] = 0
        if not self.varying:
            memset(self.memory.values + row * self.row_bytes, 0, self.row_bytes)
            return
        self.memory.offsets[row + 1] = self.memory.offsets[row]
        for i in range(self.n_dimensions):
            self.memory.shapes[row * self.n_dimensions + i] = max(self.dimensions[i], 0)

    cdef bint put_fast(self, size_t row, object value) except -1:
        """Put a value that needs no conversion. Return False if the value needs conversion."""
        if row >= self.memory.rows:
            self.reserve(row, 0)
        self.memory.valid[row] = 1
        if value is None:
            if not self.nullable or self.fast_kind == _NONE:  # In JSON, None is a value.
                return False
            self.put_null(row)
            return True
        if self.fast_kind == _ARRAYS:
            return isinstance(value, _array) and self.put_array(row, value)
        if self.fast_kind == _INTEGERS:
            return self.put_integer(row, value)
        if self.fast_kind == _FLOATS:
            return self.put_float(row, value)
        if self.fast_kind == _BYTES:
            return PyBytes_CheckExact(value) and self.put_run(row, PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value))
        if self.fast_kind == _TEXT:
            return (PyUnicode_CheckExact(value) and PyUnicode_IS_COMPACT_ASCII(value)
                    and self.put_run(row, PyUnicode_DATA(value), PyUnicode_GET_LENGTH(value)))
        if self.fast_kind == _BOOLS and (value is True or value is False):
            self.memory.values[row] = value is True
            return True
        return False

    cdef bint put_array(self, size_t row, object array) except -1:
        cdef Py_buffer view
        cdef Py_ssize_t step, length
        cdef int i
        cdef bint fits
        PyObject_GetBuffer(array, &view, PyBUF_FORMAT | PyBUF_STRIDES)
        try:
            fits = view.ndim == self.n_dimensions and view.format[0] == self.format and view.format[1] == 0
            step = self.item_bytes
            for i in range(self.n_dimensions - 1, -1, -1):
                if not fits:
                    return False
                length = view.shape[i]
                fits = self.dimensions[i] == length or (self.dimensions[i] < 0 and length <= 0x7fffffff)
                fits = fits and (view.strides[i] == step or length <= 1)
                step *= length
            if not fits:
                return False
            if not self.varying:
                memcpy(self.memory.values + row * self.row_bytes, view.buf, self.row_bytes)
                return True
            for i in range(self.n_dimensions):
                self.memory.shapes[row * self.n_dimensions + i] = <int32_t>view.shape[i]
            return self.put_run(row, view.buf, view.len)
        finally:
            PyBuffer_Release(&view)

    cdef tuple first_rows(self, size_t n):
        """Return the first n rows, in the memory that adopt() leaves to them."""
        values, offsets, shapes, valid, typed = self.arrays
        valid = valid[:n] if self.nullable else None
        return (values, offsets[:n + 1], shapes[:n], valid) if self.varying else (typed[:n], None, None, valid)

    cdef bint put_integer(self, size_t row, object value) except -1:
        cdef int overflow = 0
        cdef int64_t number
        if not PyLong_CheckExact(value):
            if type(value) is not self.scalar_type:
                return False
            value = value.item()
        number = PyLong_AsLongLongAndOverflow(value, &overflow)
        if overflow or number < self.low or number > self.high:
            return False
        if self.item_bytes == 8:
            (<int64_t *>self.memory.values)[row] = number
        elif self.item_bytes == 4:
            (<int32_t *>self.memory.values)[row] = <int32_t>number
        elif self.item_bytes == 2:
            (<int16_t *>self.memory.values)[row] = <int16_t>number
        else:
            (<int8_t *>self.memory.values)[row] = <int8_t>number
        return True

    cdef bint put_float(self, size_t row, object value) except -1:
        cdef double number
        if not PyFloat_CheckExact(value) and type(value) is not self.scalar_type:
            return False
        number = PyFloat_AsDouble(value)
        if not -self.limit <= number <= self.limit:  # Also excludes infinity and NaN, whose bits must be kept.
            return False
        if self.item_bytes == 8:
            (<double *>self.memory.values)[row] = number
        else:
            (<float *>self.memory.values)[row] = <float>number
        return True


cdef class BlockBuilder:
    cdef tuple columns
    cdef list varying
    cdef size_t fixed_bytes, block_bytes
    cdef readonly size_t n_records, n_bytes, last_bytes
    cdef public size_t limit_bytes

    def __cinit__(self, specs, size_t limit_bytes):
        self.columns = tuple(_ColumnBuilder(spec) for spec in specs)
        self.varying = [column for column in self.columns if (<_ColumnBuilder>column).varying]
        self.fixed_bytes = sum((<_ColumnBuilder>column).counted_bytes for column in self.columns)
        self.limit_bytes = self.block_bytes = limit_bytes

    def add(self, record) -> int:
        if not PyDict_CheckExact(record) or len(<dict>record) != len(self.columns):
            return _NEEDS_CONVERSION
        if self._fill(<dict>record, 0) != len(self.columns):
            return _NEEDS_CONVERSION
        return self.commit()

    cdef Py_ssize_t _fill(self, dict record, Py_ssize_t start) except -1:
        cdef _ColumnBuilder column
        cdef Py_ssize_t i
        for i in range(start, len(self.columns)):
            column = <_ColumnBuilder>self.columns[i]
            # The record itself is the marker for a missing name: no record contains itself.
            value = record.get(column.name, record)
            if value is record or not column.put_fast(self.n_records, value):
                return i
        return len(self.columns)

    def fill(self, dict record not None, Py_ssize_t start) -> int:
        if not 0 <= start <= len(self.columns):
            raise IndexError(f"column {start} of {len(self.columns)}")
        return self._fill(record, start)

    def put(self, Py_ssize_t index, value, shape=()) -> None:
        cdef _ColumnBuilder column
        cdef const uint8_t[::1] run
        cdef size_t row = self.n_records
        cdef int i
        if not 0 <= index < len(self.columns):
            raise IndexError(f"column {index} of {len(self.columns)}")
        column = <_ColumnBuilder>self.columns[index]
        column.reserve(row, 0)
        column.memory.valid[row] = value is not None
        if value is None:
            column.put_null(row)
        elif not column.varying:
            column.arrays[4][row] = value
        else:
            if len(shape) != column.n_dimensions:
                raise ValueError(f"expected {column.n_dimensions} dimensions, got {shape}")
            run = value
            column.put_run(row, &run[0] if run.shape[0] else NULL, run.shape[0])
            for i in range(column.n_dimensions):
                column.memory.shapes[row * column.n_dimensions + i] = shape[i]

    def commit(self, size_t extra_bytes=0) -> int:
        cdef size_t row = self.n_records
        cdef size_t n_bytes = self.fixed_bytes + extra_bytes
        cdef _ColumnBuilder column
        for rows in self.varying:
            column = <_ColumnBuilder>rows
            n_bytes += (column.memory.offsets[row + 1] - column.memory.offsets[row]) * column.item_bytes
        self.last_bytes = n_bytes
        self.n_bytes += n_bytes
        self.n_records += 1
        return _EXCEEDS_BLOCK if self.n_bytes > self.limit_bytes else _ADDED

    def take(self, size_t n) -> list:
        cdef _ColumnBuilder column
        cdef size_t left, wanted
        if self.n_records < n or n + 1 < self.n_records:
            raise ValueError(f"expected n to be all {self.n_records} records or all but the last, got {n}")
        left = self.n_records - n
        for rows in self.columns:  # First everything that can fail.
            column = <_ColumnBuilder>rows
            # One long record must not make the memory of every later block as long.
            wanted = max(min(column.memory.n_bytes, 2 * self.block_bytes), column.bytes_of(n, left))
            column.prepare(column.memory.rows, wanted)
        taken = [(<_ColumnBuilder>rows).first_rows(n) for rows in self.columns]
        for rows in self.columns:
            (<_ColumnBuilder>rows).adopt(n, left)
        self.n_records = left
        self.n_bytes = self.last_bytes if left else 0
        return taken


def join(values, bint text, bint nullable) -> tuple | None:
    cdef tuple items = tuple(values)  # A copy that no other thread can change between the two passes.
    cdef Py_ssize_t n = len(items)
    cdef Py_ssize_t i
    cdef int64_t total = 0
    cdef bint nulls = False
    offsets_array, valid_array = np.empty(n + 1, np.int64), np.empty(n, np.uint8)
    cdef int64_t[::1] offsets = offsets_array
    cdef uint8_t[::1] valid = valid_array
    cdef uint8_t[::1] run
    offsets[0] = 0
    for i in range(n):
        value = items[i]
        valid[i] = value is not None
        if value is None:
            if not nullable:
                return None
            nulls = True
        elif not text:
            if not PyBytes_CheckExact(value):
                return None
            total += PyBytes_GET_SIZE(value)
        elif PyUnicode_CheckExact(value) and PyUnicode_IS_COMPACT_ASCII(value):
            total += PyUnicode_GET_LENGTH(value)
        else:
            return None
        offsets[i + 1] = total
    joined = np.empty(total, np.uint8)
    run = joined
    for i in range(n):
        if offsets[i + 1] > offsets[i]:
            value = items[i]
            memcpy(&run[offsets[i]], PyUnicode_DATA(value) if text else PyBytes_AS_STRING(value), offsets[i + 1] - offsets[i])
    return joined, offsets_array, valid_array.view(np.bool_) if nulls else None
