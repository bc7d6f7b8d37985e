"""Wrapper of csrc/packing.h: plans of packed rows, which own their memory, and rows gathered outside a ring."""

from libc.errno cimport EIO
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc

import numpy as np

from tiercache._native.gather cimport tc_chunk, tc_rows, tc_sink, tc_source, tc_stream

cdef extern from "packing.h" nogil:
    enum:
        TC_PACKED
        TC_TOKENS
        TC_LABELS
        TC_POSITION_IDS
        TC_DOCUMENT_IDS
        TC_N_OUTPUTS
        TC_IGNORED
        TC_CONCATENATE
        TC_BEST_FIT
        TC_SEPARATE

    ctypedef struct tc_packing:
        uint32_t length
        uint32_t mode
        uint32_t cuts_long
        uint32_t has_end
        uint32_t masks_borders
        uint32_t dtype
        uint32_t mask_dtype
        int64_t pad
        int64_t end

    ctypedef struct tc_packed_piece:
        pass

    ctypedef struct tc_packed_unit:
        const tc_packed_piece *pieces
        const uint32_t *first_piece
        const tc_packing *packing

    ctypedef struct tc_documents:
        const int64_t *lengths
        const uint64_t *addresses
        const uint64_t *masks
        size_t n

    size_t tc_pack_scratch_words(const tc_packing *, size_t)
    int64_t tc_pack(const tc_packing *, const tc_documents *, uint32_t *, tc_packed_piece *, uint32_t *)
    size_t tc_boundaries(const tc_packed_unit *, size_t, int32_t *, int64_t *, int32_t *)
    void tc_gather_packed(const tc_stream *, const tc_rows *, const tc_sink *)
    int32_t tc_join_boundaries(const int32_t *, const int64_t *, size_t, int32_t, int32_t *)

cdef extern from "cast.h" nogil:
    enum:
        TC_U64
        TC_I64
    ctypedef uint64_t (*tc_caster)(const uint8_t *, uint8_t *, size_t)
    tc_caster tc_caster_of(uint32_t, uint32_t)

cdef extern from "sigbus_guard.h" nogil:
    enum:
        TC_EIO
    void tc_guard_install()
    int tc_guard_enter()
    void tc_guard_leave()

tc_guard_install()

PACKED = TC_PACKED
TOKENS, LABELS, POSITION_IDS, DOCUMENT_IDS = TC_TOKENS, TC_LABELS, TC_POSITION_IDS, TC_DOCUMENT_IDS
CONCATENATE, BEST_FIT, SEPARATE = TC_CONCATENATE, TC_BEST_FIT, TC_SEPARATE
IGNORED = TC_IGNORED


class TooLongError(ValueError):
    """A document is longer than a row. document: Its index among the given documents; n_tokens: Its stored tokens."""

    def __init__(self, document, n_tokens):
        super().__init__(f"document {document} has {n_tokens} tokens")
        self.document = document
        self.n_tokens = n_tokens


cdef class Packing:
    """How documents are packed. Immutable."""

    cdef tc_packing packing

    def __init__(
        self,
        uint32_t length,
        uint32_t mode,
        uint32_t dtype,
        *,
        bint cuts_long=True,
        int64_t pad=0,
        end=None,
        bint masks_borders=False,
        uint32_t mask_dtype=0,
    ):
        for number in (dtype, mask_dtype or dtype):
            if number != TC_I64 and (number == TC_U64 or tc_caster_of(number, TC_I64) == NULL):
                raise ValueError(f"dtype number {number} is not of integers that fit int64")
        self.packing.mask_dtype = mask_dtype
        if not 1 <= length <= 1 << 30 or mode > TC_SEPARATE:
            raise ValueError(f"invalid packing: length {length}, mode {mode}")
        self.packing.length, self.packing.mode, self.packing.dtype, self.packing.cuts_long = length, mode, dtype, cuts_long
        self.packing.pad, self.packing.masks_borders = pad, masks_borders
        self.packing.has_end, self.packing.end = end is not None, 0 if end is None else end


cdef class _Documents:
    """The documents of some units, and scratch memory for the largest unit."""

    cdef Packing how
    cdef const int64_t[::1] lengths
    cdef const uint64_t[::1] addresses
    cdef const uint64_t[::1] masks
    cdef const int64_t[::1] first
    cdef const int64_t *lengths_at
    cdef const uint64_t *addresses_at
    cdef const uint64_t *masks_at
    cdef uint32_t *scratch

    def __cinit__(self):
        self.lengths_at, self.addresses_at, self.masks_at, self.scratch = NULL, NULL, NULL, NULL

    def __init__(self, Packing how not None, lengths, addresses, first, masks):
        self.how, self.lengths, self.addresses, self.first, self.masks = how, lengths, addresses, first, masks
        n_units = self.first.shape[0] - 1
        if n_units < 0 or self.first[0] != 0 or self.first[n_units] != self.lengths.shape[0]:
            raise ValueError(f"units need bounds from 0 to {self.lengths.shape[0]}, got {list(first)[:8]}")
        if self.addresses is not None and self.addresses.shape[0] != self.lengths.shape[0]:
            raise ValueError(f"{self.lengths.shape[0]} documents have {self.addresses.shape[0]} addresses")
        if self.addresses is not None and how.packing.mask_dtype and (self.masks is None or self.masks.shape[0] != self.lengths.shape[0]):
            raise ValueError(f"{self.lengths.shape[0]} documents need as many masks")
        if self.lengths.shape[0] and not 0 <= np.min(lengths) <= np.max(lengths) < 1 << 32:
            raise ValueError("a document has 0 to 2**32 - 1 tokens")
        if self.lengths.shape[0]:
            self.lengths_at = &self.lengths[0]
            if self.addresses is not None:
                self.addresses_at = &self.addresses[0]
            if self.masks is not None:
                self.masks_at = &self.masks[0]
        sizes = np.diff(first)
        if len(sizes) and (sizes.min() < 0 or sizes.max() >= 1 << 31):
            raise ValueError("a unit has 0 to 2**31 - 1 documents, and bounds that rise")
        self.scratch = <uint32_t *>malloc((tc_pack_scratch_words(&how.packing, <size_t>max(sizes, default=0)) + 1) * sizeof(uint32_t))
        if self.scratch == NULL:
            raise MemoryError("no memory to pack documents")

    def __dealloc__(self):
        free(self.scratch)

    cdef int64_t pack(self, size_t unit, tc_packed_piece *pieces, uint32_t *first_piece) noexcept nogil:
        cdef size_t begin = <size_t>self.first[unit], n = <size_t>self.first[unit + 1] - begin
        cdef tc_documents documents = tc_documents(NULL, NULL, NULL, n)
        if n:
            documents.lengths = self.lengths_at + begin
        if n and self.addresses_at != NULL:
            documents.addresses = self.addresses_at + begin
        if n and self.masks_at != NULL:
            documents.masks = self.masks_at + begin
        return tc_pack(&self.how.packing, &documents, self.scratch, pieces, first_piece)

    cdef object count(self):
        """Return the number of rows of each unit, int64[n_units]."""
        out = np.zeros(self.first.shape[0] - 1, np.int64)
        cdef int64_t[::1] rows = out
        cdef size_t unit, n_units = <size_t>self.first.shape[0] - 1
        cdef int64_t found = 0
        with nogil:
            for unit in range(n_units):
                found = self.pack(unit, NULL, NULL)
                if found < 0:
                    break
                rows[unit] = found
        if found < 0:
            document = self.first[unit] - 1 - found
            raise TooLongError(document, self.lengths[document])
        return out


def count_rows(how, lengths, first):
    return (<_Documents>_Documents(how, lengths, None, first, None)).count()


cdef class PackedUnits:
    """The planned rows of some units. It owns the plans, but not the stored tokens."""

    cdef readonly object n_rows
    cdef readonly object addresses
    cdef readonly object boundaries
    cdef readonly object counts
    cdef readonly size_t n_bytes
    cdef Packing how
    cdef object owners

    def __init__(self, how, lengths, addresses, first, masks=None):
        cdef _Documents documents = _Documents(how, lengths, addresses, first, masks)
        self.how = how
        self.n_rows = documents.count()
        cdef size_t n_units = <size_t>documents.first.shape[0] - 1, unit, at_piece = 0, at_row = 0, at_boundary = 0, n
        cdef size_t n_rows = <size_t>self.n_rows.sum(), n_pieces = <size_t>documents.lengths.shape[0] + n_rows
        memory = np.empty(n_pieces * sizeof(tc_packed_piece) + 8, np.uint8)
        first_pieces = np.empty(n_rows + n_units + 1, np.uint32)
        units = np.empty(n_units * sizeof(tc_packed_unit) + 8, np.uint8)
        values, offsets, counts = np.empty(n_pieces + 2 * n_rows + 1, np.int32), np.empty(n_rows + n_units + 1, np.int64), np.empty(n_rows + 1, np.int32)
        self.owners = memory, first_pieces, units, values, offsets, counts
        self.n_bytes = sum(owner.nbytes for owner in self.owners)
        self.addresses, self.boundaries, self.counts = (np.zeros((n_units, 3), np.uint64) for _ in range(3))
        cdef uint8_t[::1] memory_view = memory, unit_view = units
        cdef uint32_t[::1] piece_view = first_pieces
        cdef int32_t[::1] value_view = values, count_view = counts
        cdef int64_t[::1] offset_view = offsets
        cdef uint64_t[:, ::1] to_units = self.addresses, to_boundaries = self.boundaries, to_counts = self.counts
        cdef const int64_t[::1] rows = self.n_rows
        cdef tc_packed_piece *pieces = <tc_packed_piece *>&memory_view[0]
        cdef tc_packed_unit *planned = <tc_packed_unit *>&unit_view[0]
        with nogil:
            for unit in range(n_units):
                planned[unit] = tc_packed_unit(pieces + at_piece, &piece_view[at_row + unit], &self.how.packing)
                documents.pack(unit, pieces + at_piece, &piece_view[at_row + unit])
                n = tc_boundaries(&planned[unit], <size_t>rows[unit], &value_view[at_boundary], &offset_view[at_row + unit], &count_view[at_row])
                to_units[unit, 0], to_units[unit, 2] = <uintptr_t>&planned[unit], <uint64_t>rows[unit]
                to_boundaries[unit, 0], to_boundaries[unit, 1], to_boundaries[unit, 2] = <uintptr_t>&value_view[at_boundary], <uintptr_t>&offset_view[at_row + unit], n
                to_counts[unit, 0] = <uintptr_t>&count_view[at_row]
                at_piece += piece_view[at_row + unit + <size_t>rows[unit]]
                at_row += <size_t>rows[unit]
                at_boundary += n


def stream_kind(uint32_t output):
    if output >= TC_N_OUTPUTS:
        raise ValueError(f"an output is 0 to {TC_N_OUTPUTS - 1}, got {output}")
    return TC_PACKED | output << 8


def gather_rows(uint32_t kind, PackedUnits units not None, const uint32_t[::1] unit not None, const uint32_t[::1] row not None, uint8_t[:, ::1] out not None):
    cdef tc_stream stream = tc_stream(TC_PACKED, (kind >> 8) & 0xff, 0, 0, <uint32_t>out.shape[1])
    cdef const uint64_t[:, ::1] addresses = units.addresses
    cdef size_t n = <size_t>row.shape[0]
    n_rows = np.asarray(units.n_rows)
    need = units.how.packing.length * (4 if stream.from_dtype == TC_DOCUMENT_IDS else 8)
    if unit.shape[0] != row.shape[0] or out.shape[0] != row.shape[0] or out.shape[1] != need:
        raise ValueError(f"expected {row.shape[0]} units and rows of {need} bytes, got {unit.shape[0]} and {out.shape[0]} of {out.shape[1]}")
    if n == 0:
        return
    if np.max(unit) >= len(n_rows) or (np.asarray(row) >= n_rows[np.asarray(unit)]).any():
        raise IndexError("a unit or a row does not exist")
    cdef tc_rows rows = tc_rows(<const tc_source *>&addresses[0, 0], NULL, &unit[0], &row[0], n, n)
    cdef tc_sink sink = tc_sink(&out[0, 0], NULL)
    cdef int status
    with nogil:
        status = guarded_gather(&stream, &rows, &sink)
    if status == TC_EIO:
        raise OSError(EIO, "a mapped file could not be read: it was truncated, or its disk failed")


cdef int guarded_gather(const tc_stream *stream, const tc_rows *rows, const tc_sink *sink) noexcept nogil:
    if tc_guard_enter():
        return TC_EIO
    tc_gather_packed(stream, rows, sink)
    tc_guard_leave()
    return 0


cdef int32_t join(const int32_t *boundaries, const int64_t *offsets, size_t n, int32_t *out) except -1:
    """Join the boundaries of n > 0 rows. out: it may begin where the boundaries begin. Return the longest sequence."""
    cdef int64_t length = boundaries[offsets[1] - 1]
    if length * <int64_t>n >= <int64_t>1 << 31:
        raise OverflowError(f"cu_seqlens are int32, and {n} rows of {length} tokens are too many: use a smaller batch_size")
    return tc_join_boundaries(boundaries, offsets, n, <int32_t>length, out)


def join_boundaries(const int32_t[::1] boundaries not None, const int64_t[::1] offsets not None):
    cdef size_t n = <size_t>offsets.shape[0] - 1
    if offsets[0] != 0 or offsets[n] != boundaries.shape[0] or n > <size_t>boundaries.shape[0]:
        raise ValueError(f"{boundaries.shape[0]} boundaries of {n} rows have offsets from {offsets[0]} to {offsets[n]}")
    if n == 0:
        return np.zeros(1, np.int32), 0
    out = np.empty(boundaries.shape[0] - n + 1, np.int32)
    cdef int32_t[::1] to = out
    return out, join(&boundaries[0], &offsets[0], n, &to[0])


def join_in_place(uint8_t[::1] memory not None, size_t start, size_t offsets_at, size_t n):
    cdef size_t n_bytes = <size_t>memory.shape[0]
    if n == 0 or offsets_at > n_bytes or (n_bytes - offsets_at) // sizeof(int64_t) <= n or start > n_bytes:
        raise ValueError(f"{n} rows of boundaries at {start} and {offsets_at} exceed {n_bytes} bytes")
    cdef const int64_t *offsets = <const int64_t *>&memory[offsets_at]
    if offsets[n] < <int64_t>n or <size_t>offsets[n] > (n_bytes - start) // sizeof(int32_t):
        raise ValueError(f"{offsets[n]} boundaries at {start} exceed {n_bytes} bytes")
    cdef int32_t *boundaries = <int32_t *>&memory[start]
    join(boundaries, offsets, n, boundaries)
    return <size_t>offsets[n] - n + 1
