"""Batches built from slots in one native call, and the fast path of the iterator for batches that are ready."""

cimport cython
from cpython.object cimport PyObject_GenericSetAttr
from libc.stdint cimport int64_t, uint64_t

from tiercache._native.ring cimport Layout, Ring, Slot


cdef class TensorEntry:
    """A tensor over a stream of rows of fixed size."""

    cdef size_t stream
    cdef Layout layout

    def __init__(self, size_t stream, Layout layout not None):
        self.stream, self.layout = stream, layout


cdef class BufferEntry:
    """Values of varying length and their offsets, as an object of `cls` with attributes values, offsets and shapes."""

    cdef size_t stream, n_inner
    cdef Layout values, offsets
    cdef object cls, make_empty

    def __init__(self, size_t stream, Layout values not None, Layout offsets not None, cls, make_empty):
        self.stream, self.values, self.offsets = stream, values, offsets
        self.cls, self.make_empty = cls, make_empty
        self.n_inner = 8 * values.layout.row_bytes // values.layout.bits
        if self.n_inner == 0:
            raise ValueError("a row of the values has no elements, so the number of rows cannot be computed")


cdef class Entries:
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

    def batch(self, Slot slot not None):
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
        return self.from_dlpack(slot.capsule(entry.layout, slot.slot.values_at[entry.stream], slot.slot.n_rows))

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


cdef class Taker:
    """Takes ready batches from a ring, and counts all batches that are taken."""

    cdef readonly uint64_t rows, samples, batches, n_bytes
    cdef Ring ring
    cdef Entries entries
    cdef object pieces, odd, lock
    cdef list waits

    def __init__(self, Ring ring not None, Entries entries not None, pieces, tuple odd, lock, list waits not None):
        self.ring, self.entries, self.pieces, self.odd = ring, entries, pieces, odd
        self.lock, self.waits = lock, waits

    def count(self, Slot slot not None):
        self.rows = slot.first_row + slot.slot.n_rows  # Not a sum: a batch that Ctrl-C interrupted was not counted.
        self.samples += slot.slot.n_rows
        self.batches += 1
        self.n_bytes += slot.slot.n_bytes
        while self.pieces and <uint64_t>self.pieces[0][0] <= self.rows:
            self.pieces.popleft()

    def take_ready(self):
        cdef Slot slot
        if not self.lock.acquire(False):
            return None
        try:
            for some in self.odd:
                if some:
                    return None
            slot = self.ring.take_ready()
            if slot is None:
                return None
            batch = self.entries.batch(slot)
            self.count(slot)
            self.waits[0] += 1
            return batch
        finally:
            self.lock.release()


@cython.auto_pickle(False)  # The subclass defines pickling.
cdef class ReadyIterator:
    """The fast path of an iterator. A subclass implements the normal path: `_next()` and `_missed(error)`."""

    cdef object progress, profiler, take_ready
    cdef int64_t n_undrawn
    cdef bint is_plain

    def __init__(self, progress, profiler, int64_t n_undrawn, bint is_plain):
        self.progress, self.profiler = progress, profiler
        self.n_undrawn, self.is_plain = n_undrawn, is_plain

    def _take_by(self, take_ready):
        self.take_ready = take_ready

    def _take_ready(self):
        return self.ready()

    cdef object ready(self):
        if self.take_ready is None or not 0 < <int64_t>self.progress.n_yielded < self.n_undrawn:
            return None
        try:
            batch = self.take_ready()
            if batch is not None:
                self.progress.n_yielded += 1
            return batch
        except (KeyboardInterrupt, MemoryError, RuntimeError) as error:
            self._missed(error)
            raise

    def __iter__(self):
        return self

    def __next__(self):
        if self.is_plain and not self.profiler._is_profiler_enabled:
            batch = self.ready()
            if batch is not None:
                return batch
        return self._next()
