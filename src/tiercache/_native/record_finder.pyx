"""Location of records in the open mapped shards: block, row and the addresses for one gather of many records.

There is no C file: the module works on Python objects, reads no stored bytes and never releases the GIL. A search
result and the objects that it keeps alive therefore fit together, whatever tables other threads set or drop
concurrently.
"""

from cpython.ref cimport PyObject
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

import numpy as np

cdef extern from *:
    """
    #include <sys/stat.h>
    #include <time.h>

    static int64_t tc_now_ns(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
    }

    /* The file's ctime in ns; -1: it cannot be asked. */
    static int64_t tc_changed_ns(int fd) {
        struct stat status;
        if (fstat(fd, &status)) return -1;
        return (int64_t)status.st_ctim.tv_sec * 1000000000 + status.st_ctim.tv_nsec;
    }
    """
    int64_t tc_now_ns() noexcept
    int64_t tc_changed_ns(int fd) noexcept

cdef enum:
    SOURCE_WORDS = 3  # csrc/gather.h: tc_source
    CHECK_WORDS = 4  # csrc/gather.h: tc_chunk


cdef class BlockTable:
    cdef const uint64_t[::1] first
    cdef const uint64_t[:, :, ::1] addresses
    cdef const uint64_t[:, :, ::1] checks
    cdef size_t n_blocks, n_streams
    cdef bint is_checked  # Whether the table has checks.
    cdef int fd  # Descriptor of the mapped file, or -1: its ctime is not checked.
    cdef int64_t changed_ns, pause_ns, look_ns  # look_ns: Time of the next check of the ctime.
    cdef uint64_t call  # Number of the last search that found a record in this table.
    cdef object owner
    cdef tuple addresses_of, checks_of  # One entry for each stream.

    def __cinit__(self, const uint64_t[::1] first not None, addresses not None, checks, owner, file=None):
        self.first = first
        self.fd, self.changed_ns, self.pause_ns = (-1, 0, 0) if file is None else file
        self.look_ns = 0
        self.addresses = addresses
        self.n_streams, self.n_blocks = <size_t>self.addresses.shape[0], <size_t>self.addresses.shape[1]
        if self.addresses.shape[2] != SOURCE_WORDS or first.shape[0] != self.addresses.shape[1] + 1 or not self.n_blocks:
            raise ValueError(f"addresses need the shape [n_streams, {first.shape[0] - 1}, {SOURCE_WORDS}]")
        cdef size_t block
        for block in range(self.n_blocks):
            if first[0] or first[block] > first[block + 1]:  # Rows are located by these numbers and not checked again.
                raise ValueError("the first rows of blocks must start at 0 and never decrease")
        self.is_checked = checks is not None
        if self.is_checked:
            self.checks = checks
            if (self.checks.shape[0] != self.addresses.shape[0] or self.checks.shape[1] != self.addresses.shape[1]
                    or self.checks.shape[2] != CHECK_WORDS):
                raise ValueError(f"checks need the shape [n_streams, n_blocks, {CHECK_WORDS}], as the addresses have")
        self.owner = owner
        self.addresses_of = tuple(addresses)
        self.checks_of = None if checks is None else tuple(checks)

    cdef inline bint is_as_checked(self) noexcept:
        if self.fd < 0:
            return True
        cdef int64_t now_ns = tc_now_ns()
        if now_ns < self.look_ns:
            return True
        self.look_ns = now_ns + self.pause_ns
        return tc_changed_ns(self.fd) == self.changed_ns

    cdef inline size_t block_of(self, uint64_t row) noexcept:
        cdef size_t low = 0, high = self.n_blocks, middle  # first[low] <= row < first[high]
        while high - low > 1:
            middle = (low + high) >> 1
            if self.first[middle] <= row:
                low = middle
            else:
                high = middle
        return low


cdef class RecordFinder:
    cdef const int64_t[::1] first_record
    cdef size_t n_shards, n_streams
    cdef PyObject **tables  # Borrowed references, owned by `owned`.
    cdef dict owned
    cdef uint64_t call

    def __cinit__(self, const int64_t[::1] first_record not None, size_t n_streams):
        if not first_record.shape[0]:
            raise ValueError("first_record is empty; it needs one number more than there are shards")
        self.first_record = first_record
        self.n_shards = <size_t>first_record.shape[0] - 1
        self.n_streams = n_streams
        self.owned = {}
        # Untouched pages of this array take no memory: of 8 MB for a million shards, a few hundred words are used.
        self.tables = <PyObject **>calloc(self.n_shards + 1, sizeof(PyObject *))
        if self.tables == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.tables)

    def __len__(self):
        return len(self.owned)

    def __contains__(self, size_t shard):
        return shard < self.n_shards and self.tables[shard] != NULL

    def put(self, size_t shard, BlockTable table not None):
        if shard >= self.n_shards or table.n_streams != self.n_streams:
            raise ValueError(f"expected a table of {self.n_streams} streams for a shard below {self.n_shards}, got {table.n_streams} streams for shard {shard}")
        if <int64_t>table.first[table.n_blocks] != self.first_record[shard + 1] - self.first_record[shard]:
            raise ValueError(f"shard {shard}: the table has another number of records")
        old = self.owned.get(shard)  # The old table is dropped after the new one is set.
        self.owned[shard] = table
        self.tables[shard] = <PyObject *>table

    def forget(self, size_t shard):
        if shard < self.n_shards:
            self.tables[shard] = NULL
            self.owned.pop(shard, None)

    def clear(self):
        cdef size_t shard
        old, self.owned = self.owned, {}
        for shard in old:
            self.tables[shard] = NULL

    cdef inline size_t shard_of(self, int64_t record) noexcept:
        cdef size_t low = 0, high = self.n_shards, middle
        while high - low > 1:
            middle = (low + high) >> 1
            if self.first_record[middle] <= record:
                low = middle
            else:
                high = middle
        return low

    cdef int check(self, int64_t record) except -1:
        if not 0 <= record < self.first_record[self.n_shards]:
            raise IndexError(f"record {record} of a data set of {self.first_record[self.n_shards]}")
        return 0

    def find_one(self, int64_t record):
        self.check(record)
        cdef size_t shard = self.shard_of(record)
        if self.tables[shard] == NULL:
            return None
        table = <BlockTable>self.tables[shard]
        if not table.is_as_checked():
            self.forget(shard)
            return None
        cdef uint64_t within = <uint64_t>(record - self.first_record[shard])
        block, row = np.empty(1, np.uint32), np.empty(1, np.uint32)
        cdef uint32_t[::1] to_block = block
        cdef uint32_t[::1] to_row = row
        to_block[0] = <uint32_t>table.block_of(within)
        to_row[0] = <uint32_t>(within - table.first[to_block[0]])
        return table.addresses_of, table.checks_of, block, row, table

    def find(self, const int64_t[::1] records not None):
        cdef size_t n = <size_t>records.shape[0]
        block, row = np.empty(n, np.uint32), np.empty(n, np.uint32)
        cdef list kept = []
        cdef PyObject **table_of = <PyObject **>malloc((n + 1) * sizeof(PyObject *))
        if table_of == NULL:
            raise MemoryError
        try:
            if not self.look_up(records, block, row, table_of, kept):
                return None
            if len(kept) == 1:  # The gather uses the shard's own addresses: nothing is copied.
                only = <BlockTable>kept[0]
                return only.addresses_of, only.checks_of, block, row, kept
            addresses, checks = self.join(block, table_of, kept)
            return addresses, checks, np.arange(n, dtype=np.uint32), row, kept
        finally:
            free(table_of)

    cdef bint look_up(
        self, const int64_t[::1] records, uint32_t[::1] to_block, uint32_t[::1] to_row, PyObject **table_of, list kept
    ) except -1:
        """Find block, row and table of each record; `kept` keeps the tables alive. Return False if a table is missing."""
        cdef size_t n = <size_t>records.shape[0], i, shard, block
        cdef int64_t start = 0, end = 0
        cdef uint64_t within
        cdef BlockTable table = None
        self.call += 1
        # A finalizer run by the garbage collector may let another thread search, which then has a number of its own.
        cdef uint64_t call = self.call
        for i in range(n):
            if not start <= records[i] < end:
                self.check(records[i])
                shard = self.shard_of(records[i])
                if self.tables[shard] == NULL:
                    return False
                table = <BlockTable>self.tables[shard]
                start, end = self.first_record[shard], self.first_record[shard + 1]
                if table.call != call:
                    if not table.is_as_checked():
                        self.forget(shard)
                        return False
                    table.call = call
                    kept.append(table)
            within = <uint64_t>(records[i] - start)
            block = table.block_of(within)
            to_block[i] = <uint32_t>block
            to_row[i] = <uint32_t>(within - table.first[block])
            table_of[i] = <PyObject *>table
        return True

    cdef tuple join(self, const uint32_t[::1] block, PyObject **table_of, list kept):
        """Return addresses and checks as if each record were a block of its own."""
        cdef size_t n = <size_t>block.shape[0], i, s
        cdef BlockTable table
        cdef bint is_checked = False
        for table in kept:
            is_checked = is_checked or table.is_checked
        addresses = np.empty((self.n_streams, n, SOURCE_WORDS), np.uint64)
        checks = np.zeros((self.n_streams, n if is_checked else 0, CHECK_WORDS), np.uint64)
        cdef uint64_t[:, :, ::1] to_addresses = addresses
        cdef uint64_t[:, :, ::1] to_checks = checks
        for i in range(n):
            table = <BlockTable>table_of[i]
            for s in range(self.n_streams):
                memcpy(&to_addresses[s, i, 0], &table.addresses[s, block[i], 0], SOURCE_WORDS * sizeof(uint64_t))
                if table.is_checked:
                    memcpy(&to_checks[s, i, 0], &table.checks[s, block[i], 0], CHECK_WORDS * sizeof(uint64_t))
        return tuple(addresses), tuple(checks) if is_checked else None


def normalize_indices(records not None, int64_t n_records):
    cdef const int64_t[::1] given = records
    cdef size_t n = <size_t>given.shape[0], i
    cdef bint from_end = False
    for i in range(n):
        if not -n_records <= given[i] < n_records:
            raise IndexError(f"record {given[i]} of a data set of {n_records}")
        from_end = from_end or given[i] < 0
    if not from_end:
        return records
    out = np.empty(n, np.int64)
    cdef int64_t[::1] to = out
    for i in range(n):
        to[i] = given[i] + n_records if given[i] < 0 else given[i]
    return out
