"""ShardReader: an open shard, read by blocks or by single records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tiercache.model import ShardIdentity, ShardInfo
from tiercache.shard.conversion import ServedColumns
from tiercache.shard.format.layout import Footer
from tiercache.shard.read.blocks import Blocks, check_indices
from tiercache.shard.read.chunks import Chunks, Ids, Verify, chunk_ids
from tiercache.shard.read.source import ByteSource, LocalCopy, check_identity, read_footer
from tiercache.shard.read.values import ColumnValues, block_values
from tiercache.shard.schema import Schema
from tiercache.store.contract import Store


class ShardReader:
    """An open shard. Thread-safe without locks; usable in a forked child process if its store is.

    After close(), the end of the last read releases the lease. Blocks that are still in use keep the mapping, which
    pins the local copy without a file descriptor until they are dropped.
    """

    def __init__(
        self,
        store: Store,
        key: str,
        *,
        info: ShardInfo | None = None,
        identity: ShardIdentity | None = None,
        verify: Verify = "first",
        served: ServedColumns | None = None,
        footer: Footer | None = None,
    ) -> None:
        """Open a shard: one ranged request if info is given, at most two otherwise.

        verify: When checksums of a local copy are compared: at the "first" read of a page, "always", or "never".
        served: Columns that take() casts. footer: Footer that was read earlier; saves the request if there is no local
        copy, whose own footer must be checked.

        Raises NotFound, UnsupportedFormat, and CorruptShard if it is not the shard that info or identity describes.
        """
        if verify not in ("first", "always", "never"):
            raise ValueError(f"verify must be 'first', 'always' or 'never', got {verify!r}")
        self._verify = verify
        self._source = ByteSource(store, key, identity)
        self.url = self._source.url
        try:
            if footer is None or self._source.local_copy is not None:
                footer, _ = read_footer(self._source, info)
            self.footer = footer
            check_identity(self.footer, info, identity, self.url)
        except BaseException:
            self._source.close()
            raise
        self._chunks = Chunks(self._source, self.footer, verify)
        self._served = served or {}
        self._prefetched: frozenset[int] = frozenset()  # columns that need no further call of prefetch_columns()
        self._kept: Blocks | None = None  # the last result of mapped_blocks()
        self._closed = False

    @property
    def schema(self) -> Schema:
        """Schema of the shard."""
        return self.footer.schema

    @property
    def n_records(self) -> int:
        """Number of records of the shard."""
        return self.footer.n_records

    @property
    def local_copy(self) -> LocalCopy | None:
        """The local copy; None if there is none or the reader is closed."""
        return self._source.local_copy

    @property
    def n_descriptors(self) -> int:
        """Number of file descriptors that the reader holds until it is closed or dropped."""
        copy = self._source.local_copy
        return 0 if copy is None else copy.lease.n_descriptors

    def load(self, blocks: Sequence[int], columns: Sequence[int]) -> Blocks:
        """Load some blocks and columns, by their numbers, into memory, checked and decoded.

        Raw chunks of a local copy stay in the mapping. Their pages are checked when they are first read: by the caller
        of the gather (Blocks.pending_checks), by block_values, or by Blocks.array.

        Raises CorruptShard, which names block and column, and StoreError.
        """
        self._check_open()
        check_indices("columns", columns, len(self.schema))
        is_kept = self._kept_of(columns) is not None or self._chunks.can_keep_blocks(columns)
        whole = self.mapped_blocks(columns) if is_kept else None
        return self._load(blocks, columns) if whole is None else whole.select(blocks)

    def is_mapped(self, columns: Sequence[int]) -> bool:
        """Return whether all blocks of these columns are read in place, in the mapping of a local copy."""
        self._check_open()
        if self._kept_of(columns) is not None:
            return True  # the kept blocks hold the lease, so the copy cannot disappear
        return self._chunks.are_mapped(self._ids(range(self.footer.n_blocks), columns))

    def mapped_blocks(self, columns: Sequence[int]) -> Blocks | None:
        """Return all blocks of these columns in the mapping of a local copy; None if they are not all mapped.

        The result is kept until a call with other columns: computing it again costs 0.4 ms per shard and epoch. Raises
        CorruptShard if the file of the copy has been truncated.
        """
        self._check_open()
        kept, copy = self._kept_of(columns), self._source.local_copy
        if kept is not None and copy is not None:
            copy.map_file()  # raises if the file has been truncated
            return kept
        blocks = range(self.footer.n_blocks)
        if not blocks or self._verify == "always" or not self._chunks.are_mapped(self._ids(blocks, columns)):
            return None
        found = self._load(blocks, columns)
        if not found.is_cached:  # another thread closed the reader
            return None
        self._kept = found
        if self._closed:  # close() may have run before the assignment
            self._kept = None
        return found

    def take(self, rows: npt.ArrayLike, columns: Sequence[int]) -> list[ColumnValues]:
        """Return the values of single records, in the order of rows. Of a raw column, only the needed pages are read.

        Raises IndexError for a row or column that does not exist, and as load().
        """
        self._check_open()
        numbers = np.asarray(rows, np.int64).reshape(-1)
        if len(numbers) and (int(numbers.min()) < 0 or int(numbers.max()) >= self.n_records):
            raise IndexError(
                f"rows must be 0 to {self.n_records - 1}, got {int(numbers.min())} to {int(numbers.max())}"
            )
        self._ids([], columns)
        requested = list(dict.fromkeys(map(int, columns)))
        if not self._prefetched.issuperset(requested) and self._chunks.prefetch_columns(requested):
            self._prefetched = self._prefetched.union(requested)
        of_row = np.searchsorted(self.footer.block_first, numbers.astype(np.uint64), side="right") - 1
        row = numbers - self.footer.block_first[of_row].astype(np.int64)
        blocks, position = np.unique(of_row, return_inverse=True)
        position = position.reshape(-1)
        whole = [c for c in requested if self._chunks.loads_whole(blocks, c)]
        found: dict[int, ColumnValues] = {}
        for chosen in (whole, [c for c in requested if c not in whole]):
            if not chosen:
                continue
            if chosen is whole:
                loaded = self._chunks.load(chunk_ids(blocks, chosen, len(self.schema)))
            else:
                loaded = self._chunks.load_rows(blocks, chosen, position, row)
            loaded_blocks = Blocks(self.footer, self.url, tuple(blocks.tolist()), tuple(chosen), loaded)
            places = position.astype(np.uint32), row.astype(np.uint32)
            found |= zip(chosen, block_values(loaded_blocks, chosen, *places, self._served), strict=True)
        return [found[int(c)] for c in columns]

    def _kept_of(self, columns: Sequence[int]) -> Blocks | None:
        kept = self._kept
        return kept if kept is not None and kept.columns == tuple(columns) else None

    def _load(self, blocks: Sequence[int], columns: Sequence[int]) -> Blocks:
        loaded = self._chunks.load(self._ids(blocks, columns))
        return Blocks(self.footer, self.url, tuple(map(int, blocks)), tuple(map(int, columns)), loaded)

    def _ids(self, blocks: Sequence[int], columns: Sequence[int]) -> Ids:
        check_indices("blocks", blocks, self.footer.n_blocks)
        check_indices("columns", columns, len(self.schema))
        return chunk_ids(blocks, columns, len(self.schema))

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"{self.url}: the reader is closed")

    def close(self) -> None:
        """Release the shard. Loaded Blocks stay valid. A repeated call does nothing."""
        self._closed = True
        self._kept = None
        self._source.close()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("an open shard cannot be pickled: open it again in the other process")
