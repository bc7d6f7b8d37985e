"""Wrapper of csrc/ring.h: the ring, its plans and slots, batches built from slots, and the fast path of the iterator.

Every wait releases the GIL and handles signals.
"""

cimport cython
from cpython.buffer cimport PyBUF_C_CONTIGUOUS, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from cpython.object cimport PyObject_GenericSetAttr
from cpython.ref cimport Py_DECREF, Py_INCREF
from cpython.pycapsule cimport PyCapsule_Destructor, PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_New
from libc.errno cimport EIO
from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

import math
from collections import deque

from tiercache._native import checksum
from tiercache._native.gather import CastError, CorruptError, TooLongError
from tiercache._native.gather cimport str_of_buffer, tc_chunk, tc_gather_init, tc_ref, tc_source, tc_stream
from tiercache._native.permute cimport RowFinder, tc_row_finder

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

    enum:
        TC_OK
        TC_END
        TC_FAILED
        TC_TIMEOUT
        TC_CLOSED
        TC_NOMEM
        TC_CORRUPT
        TC_MISFIT
        TC_TOO_LONG

    ctypedef struct tc_ring_stats:
        uint64_t batches
        uint64_t gather_ns
        uint64_t wait_ns
        uint64_t waits
        uint64_t ready
        uint64_t largest

    ctypedef struct tc_lent_memory:
        uint8_t *memory
        size_t n_bytes
        void (*drop)(void *) noexcept nogil
        void *owner

    tc_ring *tc_ring_new(const tc_stream *, size_t, size_t, size_t, size_t, size_t, const tc_lent_memory *)
    int tc_ring_push(tc_ring *, const tc_plan *)
    void tc_ring_finish(tc_ring *, int)
    int tc_ring_wait_room(tc_ring *, uint64_t, uint64_t *)
    int tc_ring_take(tc_ring *, uint64_t, tc_slot **, uint64_t *)
    int tc_ring_take_ready(tc_ring *, tc_slot **, uint64_t *)
    void tc_slot_release(tc_slot *)
    void tc_ring_submit_copy(tc_slot *, tc_copy_task *)
    int tc_ring_finish_copy(tc_slot *, tc_copy_task *)
    void tc_ring_cancel_copy(tc_slot *, tc_copy_task *)
    void tc_ring_close(tc_ring *)
    void tc_ring_drop(tc_ring *)
    void tc_ring_get_stats(tc_ring *, tc_ring_stats *)
    size_t tc_live_batch_bytes()
    void tc_count_copied(ptrdiff_t)
    int tc_ring_is_consumer_far()
    uint64_t tc_ring_n_measurements()

cdef extern from "dlpack.h" nogil:
    enum:
        TC_TENSOR_DIMS

    ctypedef struct tc_row_type:
        uint8_t code
        uint8_t bits
        int n_dims
        int64_t *dims
        size_t row_bytes

    void *tc_tensor_new(tc_slot *, size_t, const tc_row_type *, size_t)
    void tc_tensor_drop(void *)

cdef extern from "slot.h" nogil:
    int tc_slot_is_small_column(const tc_slot *, size_t)
    void tc_arena_keep()
    void tc_arena_let_go()

cdef extern from "copy.h" nogil:
    int tc_copy_has_nontemporal()

cdef extern from "core_distance.h" nogil:
    void tc_distance_override(int)

cdef extern from "sigbus_guard.h" nogil:
    enum:
        TC_EIO
    void tc_guard_install()

tc_guard_install()
tc_gather_init(checksum.KERNEL_NUMBER)

SLOT_ALIGN = 64  # csrc/slot.c
END = TC_END
FAILED = TC_FAILED
CLOSED = TC_CLOSED

# Waits are divided into slices, so that Ctrl-C is handled. Compared with a slice, PyErr_CheckSignals is free.
cdef uint64_t SLICE_NS = 50_000_000
cdef const char *DLPACK = "dltensor"
cdef double LONGEST_S = 1e9  # Longest timeout: its nanoseconds must fit into 64 bits.


cdef class Plan:
    """Rows of the windows that are served together, in output order, and the objects that keep their memory alive."""

    cdef tc_plan plan
    cdef object held
    cdef const uint64_t[:, :, ::1] addresses
    cdef const uint64_t[:, :, ::1] checks
    cdef const uint64_t[::1] output_layouts
    cdef const uint32_t[::1] block
    cdef const uint32_t[::1] row
    cdef RowFinder finder

    def __init__(
        self,
        const uint64_t[:, :, ::1] addresses not None,
        const uint32_t[::1] block not None,
        const uint32_t[::1] row not None,
        held,
        const uint64_t[:, :, ::1] checks=None,
        const uint64_t[::1] output_layouts=None,
    ):
        if block.shape[0] != row.shape[0]:
            raise ValueError(f"block and row need one length, got {block.shape[0]} and {row.shape[0]}")
        self.set_sources(addresses, held, checks, output_layouts)
        self.block = block
        self.row = row
        self.plan.n_rows = row.shape[0]
        self.plan.block = &block[0] if row.shape[0] else NULL
        self.plan.row = &row[0] if row.shape[0] else NULL

    @staticmethod
    def from_finder(
        const uint64_t[:, :, ::1] addresses not None,
        run,
        held,
        const uint64_t[:, :, ::1] checks=None,
        const uint64_t[::1] output_layouts=None,
    ):
        cdef Plan self = Plan.__new__(Plan)
        cdef RowFinder finder = run[0]
        start, n_rows = run[1], run[2]
        if start < 0 or n_rows < 0 or start + n_rows > finder.n_rows or finder.n_blocks > addresses.shape[1]:
            raise ValueError(
                f"rows [{start}, {start + n_rows}) of {finder.n_rows} in {finder.n_blocks} blocks, with addresses of {addresses.shape[1]} blocks"
            )
        self.set_sources(addresses, held, checks, output_layouts)
        self.finder = finder
        self.plan.finder = &finder.finder
        self.plan.start = start
        self.plan.n_rows = n_rows
        return self

    cdef int set_sources(
        self,
        const uint64_t[:, :, ::1] addresses,
        held,
        const uint64_t[:, :, ::1] checks,
        const uint64_t[::1] output_layouts,
    ) except -1:
        if addresses.shape[2] != 3:
            raise ValueError(f"addresses need the shape [n_streams, n_blocks, 3], got {tuple(addresses.shape)[:3]}")
        if checks is not None and tuple(checks.shape)[:3] != (addresses.shape[0], addresses.shape[1], 4):
            raise ValueError(f"checks need the shape [n_streams, n_blocks, 4] of addresses, got {tuple(checks.shape)[:3]}")
        if output_layouts is not None and output_layouts.shape[0] < addresses.shape[0] * <Py_ssize_t>(sizeof(tc_output_layout) // sizeof(uint64_t)):
            raise ValueError(f"output_layouts need {sizeof(tc_output_layout) // sizeof(uint64_t)} words per stream, got {output_layouts.shape[0]} for {addresses.shape[0]} streams")
        self.addresses = addresses
        self.checks = checks
        self.output_layouts = output_layouts
        self.held = held
        self.plan.n_blocks = addresses.shape[1]
        self.plan.sources = <const tc_source *>&addresses[0, 0, 0] if addresses.shape[0] and addresses.shape[1] else NULL
        self.plan.chunks = <const tc_chunk *>&checks[0, 0, 0] if checks is not None and self.plan.sources != NULL else NULL
        self.plan.output_layouts = <const tc_output_layout *>&output_layouts[0] if output_layouts is not None and addresses.shape[0] else NULL
        return 0

    @property
    def n_rows(self):
        return self.plan.n_rows

    @property
    def held(self):
        return self.held


cdef class BytesCopy:
    """The bytes objects of a batch, made at their size and filled once by the ring's threads. CPython does not share an
    object made with NULL, except the empty one, which is not written.
    """

    cdef tc_slot *slot
    cdef tc_copy_task task
    cdef list objects

    @staticmethod
    cdef BytesCopy start(tc_slot *slot, size_t stream):
        cdef BytesCopy self = BytesCopy.__new__(BytesCopy)
        cdef const tc_ref *refs = <const tc_ref *>(slot.memory + slot.values_at[stream])
        cdef Py_ssize_t i, n = <Py_ssize_t>slot.n_rows
        self.task = tc_copy_task(refs, <char **>malloc(max(n, 1) * sizeof(char *)), n)
        if self.task.destinations == NULL:
            raise MemoryError
        self.objects = [None] * n
        for i in range(n):
            item = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>refs[i].n_bytes)
            self.objects[i] = item
            self.task.destinations[i] = PyBytes_AS_STRING(item)
        self.slot = slot
        tc_ring_submit_copy(slot, &self.task)
        return self

    def __dealloc__(self):
        if self.slot != NULL:
            tc_ring_cancel_copy(self.slot, &self.task)
        free(self.task.destinations)

    cdef list finish(self):
        cdef int status
        with nogil:
            status = tc_ring_finish_copy(self.slot, &self.task)
        if status == TC_CLOSED:
            raise RuntimeError("the batch was made before a fork; only the parent process can fill its bytes objects")
        if status != TC_OK:
            raise OSError(EIO, "a mapped file could not be read: it was truncated, or its disk failed")
        return self.objects


cdef class RowType:
    """Type of consecutive rows: DLPack's code and bits of the element type, and the shape of a row."""

    cdef tc_row_type fields

    def __init__(self, uint8_t code, uint8_t bits, shape=()):
        if len(shape) >= TC_TENSOR_DIMS or bits % 8 or min(shape, default=0) < 0:
            raise ValueError(f"expected fewer than {TC_TENSOR_DIMS} dimensions of whole bytes, got {tuple(shape)} of {bits} bits")
        self.fields.code, self.fields.bits, self.fields.n_dims = code, bits, <int>len(shape)
        # Exact: a product that wraps around would let rows outside the slot pass.
        self.fields.row_bytes = math.prod(shape, start=bits // 8)
        for i, n in enumerate(shape):
            self.fields.dims[<Py_ssize_t>i] = n


cdef void drop_unused(object capsule) noexcept:
    # A receiver that takes the tensor over renames its capsule.
    if PyCapsule_IsValid(capsule, DLPACK):
        tc_tensor_drop(PyCapsule_GetPointer(capsule, DLPACK))


cdef class Slot:
    """The memory of a batch, as a writable buffer of bytes. It returns to the ring when the last column in it is dropped."""

    cdef tc_slot *slot
    cdef readonly uint64_t first_row
    cdef dict bytes_copies  # stream -> BytesCopy; None until the first one

    def __cinit__(self):
        self.slot = NULL

    def __init__(self):
        raise TypeError("slots come from Ring.take()")

    def __dealloc__(self):
        self.bytes_copies = None  # They use the slot until they are finished or cancelled.
        if self.slot != NULL:
            tc_slot_release(self.slot)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.slot.memory, <Py_ssize_t>self.slot.capacity, 0, flags)

    @property
    def n_rows(self):
        return self.slot.n_rows

    @property
    def n_bytes(self):
        return self.slot.n_bytes

    def values_position(self, size_t stream):
        return self.slot.values_at[stream]

    def stream_position(self, size_t stream):
        return self.slot.values_at[stream], self.slot.offsets_at[stream], self.slot.n_elements[stream]

    def tensor(self, RowType row_type not None, size_t offset, size_t n_rows):
        return self.capsule(row_type, offset, n_rows)

    cdef object capsule(self, RowType row_type, size_t offset, size_t n_rows):
        cdef size_t row_bytes = row_type.fields.row_bytes, capacity = self.slot.capacity
        if offset > capacity or (row_bytes > 0 and n_rows > (capacity - offset) // row_bytes):
            raise ValueError(f"{n_rows} rows of {row_bytes} bytes at offset {offset} exceed the slot's {capacity} bytes")
        cdef void *tensor = tc_tensor_new(self.slot, offset, &row_type.fields, n_rows)
        if tensor == NULL:
            raise MemoryError("no memory for a tensor over a batch")
        try:
            return PyCapsule_New(tensor, DLPACK, <PyCapsule_Destructor>drop_unused)
        except MemoryError:
            tc_tensor_drop(tensor)
            raise

    def column(self, size_t offset, size_t n_bytes):
        cdef ColumnMemory out
        if offset > self.slot.capacity or n_bytes > self.slot.capacity - offset:
            raise ValueError(f"{n_bytes} bytes at offset {offset} exceed the slot's {self.slot.capacity} bytes")
        out = ColumnMemory.__new__(ColumnMemory)
        if tc_slot_is_small_column(self.slot, n_bytes):
            out.copy(self.slot.memory + offset, n_bytes)
        else:
            out.slot, out.memory, out.n_bytes = self, self.slot.memory + offset, n_bytes
        return out

    def start_bytes(self, size_t stream):
        if self.bytes_copies is None:
            self.bytes_copies = {}
        self.bytes_copies[stream] = BytesCopy.start(self.slot, stream)

    def bytes_list(self, size_t stream):
        if self.bytes_copies is None or stream not in self.bytes_copies:
            self.start_bytes(stream)
        return (<BytesCopy>self.bytes_copies.pop(stream)).finish()

    def str_list(self, size_t stream):
        cdef const uint8_t *values = self.slot.memory + self.slot.values_at[stream]
        return str_of_buffer(values, <const int64_t *>(self.slot.memory + self.slot.offsets_at[stream]), self.slot.n_rows)


@cython.final
@cython.freelist(32)
@cython.no_gc  # A slot refers to no column.
cdef class ColumnMemory:
    """The bytes of a column, as a writable buffer: in a slot, or a copy, which held_bytes() counts."""

    cdef Slot slot  # None: the bytes are a copy
    cdef void *block
    cdef uint8_t *memory
    cdef Py_ssize_t n_bytes

    def __cinit__(self):
        self.block = NULL

    def __init__(self, const uint8_t[::1] source not None):
        if self.memory != NULL:
            raise TypeError("the memory of a column is set once")
        self.copy(&source[0] if source.shape[0] else NULL, source.shape[0])

    cdef int copy(self, const uint8_t *source, Py_ssize_t n_bytes) except -1:
        self.block = malloc(<size_t>n_bytes + 63)  # aligned_alloc takes twice as long.
        if self.block == NULL:
            raise MemoryError(f"no memory for {n_bytes} bytes of a batch")
        self.memory = <uint8_t *>((<size_t>self.block + 63) & ~<size_t>63)  # SLOT_ALIGN
        if n_bytes:
            memcpy(self.memory, source, n_bytes)
        self.n_bytes = n_bytes
        tc_count_copied(n_bytes)
        return 0

    def __dealloc__(self):
        if self.block != NULL:
            tc_count_copied(-self.n_bytes)
            free(self.block)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.memory, self.n_bytes, 0, flags)


cdef Slot slot_of(tc_slot *slot, uint64_t first_row):
    cdef Slot out = Slot.__new__(Slot)
    out.slot = slot
    out.first_row = first_row
    return out


cdef class LentBuffer:
    """A buffer of the caller whose memory a ring uses. It is released when the ring is freed."""

    cdef Py_buffer view
    cdef bint is_held

    def __cinit__(self, memory):
        PyObject_GetBuffer(memory, &self.view, PyBUF_WRITABLE | PyBUF_C_CONTIGUOUS)
        self.is_held = True

    def __dealloc__(self):
        if self.is_held:
            PyBuffer_Release(&self.view)


cdef extern from "Python.h" nogil:
    int Py_IsInitialized()


cdef void drop_with_gil(void *owner) noexcept with gil:
    Py_DECREF(<object>owner)


cdef void drop_lent(void *owner) noexcept nogil:
    # The last tensor over the ring's memory may be dropped by a thread without the GIL, also while the process exits.
    if Py_IsInitialized():
        drop_with_gil(owner)


cdef class Ring:
    """Gathers batches ahead of one consumer, in threads without Python. The planner calls push, finish and wait_room, the consumer calls take, any thread calls close and figures, and the thread that has closed the ring
    calls forget.
    """

    cdef tc_ring *ring
    cdef object plans  # deque of (end row in the sequence, Plan), appended and retired by the planner
    cdef uint64_t pushed

    def __cinit__(self):
        self.ring = NULL

    def __init__(
        self,
        const uint32_t[:, ::1] streams not None,
        *,
        size_t batch_rows,
        size_t depth,
        size_t n_threads,
        size_t slot_bytes=0,
        memory=None,
    ):
        if streams.shape[1] != 2:
            raise ValueError(f"streams need the shape [n_streams, 2] (kind, width), got {tuple(streams.shape)}")
        if batch_rows < 1 or depth < 1 or n_threads < 1:
            raise ValueError(f"batch_rows, depth and n_threads must be 1 or more, got {batch_rows}, {depth}, {n_threads}")
        self.plans = deque()
        cdef const tc_stream *first = <const tc_stream *>&streams[0, 0] if streams.shape[0] else NULL
        cdef tc_lent_memory lent = tc_lent_memory(NULL, 0, NULL, NULL)
        cdef LentBuffer owner
        if memory is not None:
            owner = LentBuffer(memory)
            if slot_bytes == 0 or slot_bytes % SLOT_ALIGN or <size_t>owner.view.buf % SLOT_ALIGN:
                raise ValueError(f"slots in the caller's memory begin at multiples of {SLOT_ALIGN} bytes, got slots of {slot_bytes} bytes from {<size_t>owner.view.buf:#x} on")
            Py_INCREF(owner)
            lent = tc_lent_memory(<uint8_t *>owner.view.buf, <size_t>owner.view.len, drop_lent, <void *>owner)
        self.ring = tc_ring_new(first, streams.shape[0], batch_rows, depth, n_threads, slot_bytes, &lent)
        if self.ring == NULL:
            raise MemoryError(f"no memory or threads for a ring of {depth} batches of {slot_bytes} bytes")

    def __dealloc__(self):
        cdef tc_ring *ring = self.ring
        if ring != NULL:
            self.ring = NULL
            with nogil:
                tc_ring_drop(ring)

    def push(self, Plan plan not None):
        cdef int status
        self.pushed += plan.plan.n_rows
        self.plans.append((self.pushed, plan))
        status = tc_ring_push(self.ring, &plan.plan)
        if status == TC_NOMEM:
            raise MemoryError("no memory to queue a window")
        return status == TC_OK

    def finish(self, bint failed=False):
        tc_ring_finish(self.ring, TC_FAILED if failed else TC_END)

    def wait_room(self, Py_ssize_t n_plans):
        cdef uint64_t row = self.plans[len(self.plans) - n_plans - 1][0] if len(self.plans) > n_plans else 0
        cdef uint64_t retired = 0
        cdef int status
        with nogil:
            status = tc_ring_wait_room(self.ring, row, &retired)
        while self.plans and self.plans[0][0] <= retired:
            self.plans.popleft()
        return status == TC_OK

    def take(self, double timeout_s=-1.0):
        cdef tc_slot *slot = NULL
        cdef uint64_t first_row = 0, left_ns, slice_ns
        cdef int status = tc_ring_take(self.ring, 0, &slot, &first_row)
        cdef bint for_ever = timeout_s < 0
        left_ns = 0 if for_ever else <uint64_t>(min(timeout_s, LONGEST_S) * 1e9)
        while status == TC_TIMEOUT and (for_ever or left_ns > 0):
            slice_ns = SLICE_NS if for_ever or left_ns > SLICE_NS else left_ns
            with nogil:
                status = tc_ring_take(self.ring, slice_ns, &slot, &first_row)
            # With a batch in hand, signals are left to the interpreter, so that the batch is not lost.
            if status == TC_TIMEOUT:
                PyErr_CheckSignals()
            left_ns -= slice_ns if not for_ever else 0
        if status == TC_OK:
            return slot_of(slot, first_row)
        if status == TC_EIO:
            raise OSError(EIO, "a mapped file could not be read: it was truncated, or its disk failed")
        if status == TC_CORRUPT:
            raise CorruptError("a page's CRC-32C does not match, or offsets decrease or point outside the chunk")
        if status == TC_MISFIT:
            raise CastError("a value cannot be represented in the dtype that it is cast to")
        if status == TC_TOO_LONG:
            raise TooLongError("a record of a padded column is longer than max_length")
        if status == TC_NOMEM:
            raise MemoryError("no memory for a batch")
        return status

    cdef Slot take_ready(self):
        """Return the next batch; None if it is not ready or has an error, which take() raises."""
        cdef tc_slot *slot = NULL
        cdef uint64_t first_row = 0
        return slot_of(slot, first_row) if tc_ring_take_ready(self.ring, &slot, &first_row) == TC_OK else None

    def close(self):
        with nogil:
            tc_ring_close(self.ring)

    def forget(self):
        self.plans.clear()

    def figures(self):
        cdef tc_ring_stats figures
        tc_ring_get_stats(self.ring, &figures)
        return figures


cdef class ArenaKeeper:
    """While an instance lives, a ring that ends leaves its memory, up to 64 MiB, to the next ring of the same size."""

    def __cinit__(self):
        tc_arena_keep()

    def __dealloc__(self):
        tc_arena_let_go()


def held_bytes():
    return tc_live_batch_bytes()


def is_far():
    return tc_ring_is_consumer_far() != 0


def override_distance(is_far):
    tc_distance_override(-1 if is_far is None else 1 if is_far else 0)


def n_distance_measurements():
    return tc_ring_n_measurements()


def has_nontemporal_copies():
    return tc_copy_has_nontemporal() != 0


cdef class TensorEntry:
    """A tensor over a stream of rows of fixed size."""

    cdef size_t stream
    cdef RowType row_type

    def __init__(self, size_t stream, RowType row_type not None):
        self.stream, self.row_type = stream, row_type


cdef class BufferEntry:
    """Values of varying length and their offsets, as an object of `cls` with attributes values, offsets and shapes."""

    cdef size_t stream, n_inner
    cdef RowType values, offsets
    cdef object cls, make_empty

    def __init__(self, size_t stream, RowType values not None, RowType offsets not None, cls, make_empty):
        self.stream, self.values, self.offsets = stream, values, offsets
        self.cls, self.make_empty = cls, make_empty
        self.n_inner = 8 * values.fields.row_bytes // values.fields.bits
        if self.n_inner == 0:
            raise ValueError("a row of the values has no elements, so the number of rows cannot be computed")


cdef class BatchBuilder:
    """The names and makers of a batch's entries, in order."""

    cdef readonly bint is_native
    cdef list names, makers
    cdef size_t n_streams
    cdef object from_dlpack

    def __init__(self, entries, size_t n_streams, from_dlpack):
        self.names = [name for name, _ in entries]
        self.makers = [maker for _, maker in entries]
        self.n_streams = n_streams
        self.from_dlpack = from_dlpack
        self.is_native = True
        for maker in self.makers:
            if isinstance(maker, TensorEntry):
                stream = (<TensorEntry>maker).stream
            elif isinstance(maker, BufferEntry):
                stream = (<BufferEntry>maker).stream
            else:
                self.is_native = False
                continue
            if stream >= n_streams:
                raise ValueError(f"an entry has stream {stream}, but there are {n_streams} streams")

    def build(self, Slot slot not None):
        cdef dict out = {}
        cdef Py_ssize_t i
        cdef list names = self.names, makers = self.makers
        for i in range(len(names)):
            maker = makers[i]
            if type(maker) is TensorEntry:
                out[names[i]] = self.tensor(slot, <TensorEntry>maker)
            elif type(maker) is BufferEntry:
                out[names[i]] = self.buffer(slot, <BufferEntry>maker)
            else:
                out[names[i]] = maker(slot, slot.slot.n_rows)
        return out

    cdef object tensor(self, Slot slot, TensorEntry entry):
        return self.from_dlpack(slot.capsule(entry.row_type, slot.slot.values_at[entry.stream], slot.slot.n_rows))

    cdef object buffer(self, Slot slot, BufferEntry entry):
        cdef size_t stream = entry.stream, n_elements = slot.slot.n_elements[stream]
        if n_elements == 0:
            return entry.make_empty(slot, slot.slot.n_rows)
        values = self.from_dlpack(slot.capsule(entry.values, slot.slot.values_at[stream], n_elements // entry.n_inner))
        offsets = self.from_dlpack(slot.capsule(entry.offsets, slot.slot.offsets_at[stream], slot.slot.n_rows + 1))
        out = entry.cls.__new__(entry.cls)  # The __init__ of a frozen dataclass takes 0.6 us.
        PyObject_GenericSetAttr(out, "values", values)
        PyObject_GenericSetAttr(out, "offsets", offsets)
        PyObject_GenericSetAttr(out, "shapes", None)
        return out


cdef class BatchTaker:
    """Takes ready batches from a ring, and counts all batches that are taken."""

    cdef readonly uint64_t rows, samples, batches, n_bytes
    cdef Ring ring
    cdef BatchBuilder entries
    cdef object pushed, slow_if_any, lock
    cdef list waits

    def __init__(self, Ring ring not None, BatchBuilder entries not None, pushed, tuple slow_if_any, lock, list waits not None):
        self.ring, self.entries, self.lock, self.waits = ring, entries, lock, waits
        self.pushed, self.slow_if_any = pushed, slow_if_any

    def count(self, Slot slot not None):
        self.rows = slot.first_row + slot.slot.n_rows  # Not a sum: a batch that Ctrl-C interrupted was not counted.
        self.samples += slot.slot.n_rows
        self.batches += 1
        self.n_bytes += slot.slot.n_bytes
        while self.pushed and <uint64_t>self.pushed[0][0] <= self.rows:
            self.pushed.popleft()

    def take_ready(self):
        cdef Slot slot
        if not self.lock.acquire(False):
            return None
        try:
            for queue in self.slow_if_any:
                if queue:
                    return None
            slot = self.ring.take_ready()
            if slot is None:
                return None
            batch = self.entries.build(slot)
            self.count(slot)
            self.waits[0] += 1
            return batch
        finally:
            self.lock.release()


@cython.auto_pickle(False)  # The subclass defines pickling.
cdef class FastIterator:
    """The fast path of an iterator. A subclass implements the normal path: `_next()` and `_on_take_error(error)`."""

    cdef object progress, profiler, take_ready
    cdef bint is_plain

    def __init__(self, progress, profiler, bint is_plain):
        self.progress, self.profiler, self.is_plain = progress, profiler, is_plain

    def _set_fast_path(self, take_ready):
        self.take_ready = take_ready

    def _next_ready(self):
        return self.ready()

    cdef object ready(self):
        if self.take_ready is None:
            return None
        try:
            batch = self.take_ready()
            if batch is not None:
                self.progress.n_yielded += 1
            return batch
        except (KeyboardInterrupt, MemoryError, RuntimeError) as error:
            self._on_take_error(error)
            raise

    def __iter__(self):
        return self

    def __next__(self):
        if self.is_plain and not self.profiler._is_profiler_enabled:
            batch = self.ready()
            if batch is not None:
                return batch
        return self._next()
