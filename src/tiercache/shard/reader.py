"""ShardReader: one open shard, read by blocks or by records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tiercache.model import ShardIdentity, ShardInfo
from tiercache.shard.blocks import Blocks, check_numbers
from tiercache.shard.cast import Served
from tiercache.shard.chunks import Chunks, Ids, Verify, chunk_ids
from tiercache.shard.layout import Footer
from tiercache.shard.opening import check_identity, read_footer
from tiercache.shard.pages import Pages
from tiercache.shard.records import RecordReader
from tiercache.shard.source import LocalCopy, Source
from tiercache.shard.types import Schema
from tiercache.shard.values import ColumnValues
from tiercache.store.contract import Store


class ShardReader:
    """One open shard. Thread-safe, without locks; usable in a forked child as far as its store is.

    close() gives the lease back as soon as the last read is done. Blocks that are still used keep the mapping: the copy
    is pinned until they are dropped, without a descriptor.
    """

    def __init__(
        self,
        store: Store,
        key: str,
        *,
        info: ShardInfo | None = None,
        identity: ShardIdentity | None = None,
        verify: Verify = "first",
        served: Served | None = None,
        footer: Footer | None = None,
    ) -> None:
        """Open a shard: one ranged request when info is given, two at most otherwise.

        served: columns that `take` casts; footer: this shard's, as it was read before, which saves the request where
        there is no local copy (a copy shall have its own).

        Raises:
            NotFound: no such object.
            CorruptShard: it is not a shard, is damaged, or not the one that info or identity names.
            UnsupportedFormat: a newer release wrote it.
        """
        if verify not in ("first", "always", "never"):
            raise ValueError(f"verify must be 'first', 'always' or 'never', got {verify!r}")
        self._source = Source(store, key, identity)
        self.url = self._source.url
        try:
            if footer is None or self._source.copy is not None:
                footer, _ = read_footer(self._source, info)
            self.footer = footer
            check_identity(self.footer, info, identity, self.url)
        except BaseException:
            self._source.close()
            raise
        self._chunks = Chunks(self._source, self.footer, verify)
        self._pages = Pages(self._source, self.footer, verify, self._chunks)
        self._records = RecordReader(self.footer, self.url, self._chunks, self._pages, served)
        self._kept: Blocks | None = None  # as mapped() gave it last
        self._closed = False

    @property
    def schema(self) -> Schema:
        """Its columns."""
        return self.footer.schema

    @property
    def n_records(self) -> int:
        """Records in it."""
        return self.footer.n_records

    @property
    def local(self) -> bool:
        """Whether its bytes come from a local copy (as long as that has room for them)."""
        return self._source.copy is not None

    @property
    def copy(self) -> LocalCopy | None:
        """The open local copy, as long as the reader is open."""
        return self._source.copy

    @property
    def n_descriptors(self) -> int:
        """Number of descriptors that it holds until it is closed or dropped."""
        copy = self._source.copy
        return 0 if copy is None else copy.lease.n_descriptors

    def want(self, blocks: Sequence[int], columns: Sequence[int]) -> None:
        """Start fetching these blocks to the local copy and return; nothing for stores without one."""
        self._check_open()
        self._source.want(self._chunks.ranges(self._ids(blocks, columns)))

    def load(self, blocks: Sequence[int], columns: Sequence[int], *, deadline_s: float | None = None) -> Blocks:
        """Have blocks in memory, checked and decoded.

        Local raw chunks stay in the mapping, and their pages are checked when they are first read: by whoever gathers
        (Blocks.checks), by block_values, by Blocks.array. Of a copy that is whole, blocks are chosen from what mapped()
        keeps.

        Args:
            blocks: their numbers, below footer.n_blocks.
            columns: indices in the schema, each once.
            deadline_s: seconds from now for waiting on the store.

        Raises:
            CorruptShard: damaged bytes; names block and column.
            StoreError: the store failed, or the deadline passed.
        """
        self._check_open()
        check_numbers("columns", columns, len(self.schema))
        is_kept = self._kept_of(columns) is not None or self._chunks.can_be_kept(columns)
        whole = self.mapped(columns) if is_kept else None
        return self._load(blocks, columns, deadline_s) if whole is None else whole.only(blocks)

    def stays_mapped(self, columns: Sequence[int]) -> bool:
        """Whether all blocks of these columns are read where they lie, in the mapping of a local copy."""
        self._check_open()
        if self._kept_of(columns) is not None:
            return True  # it holds the lease: what was here stays
        return self._chunks.are_mapped(self._ids(range(self.footer.n_blocks), columns))

    def mapped(self, columns: Sequence[int]) -> Blocks | None:
        """All blocks of these columns as they lie in the mapping of a local copy that has all of them.

        They are kept until other columns are asked for: found anew they took 0.4 ms a shard in each epoch, by when the
        batches have pushed all of it out of the processor's caches.

        None: there is no such copy, some chunks are not raw, or every read is to be checked.

        Raises:
            CorruptShard: the copy is shorter than it was.
        """
        self._check_open()
        kept, copy = self._kept_of(columns), self._source.copy
        if kept is not None and copy is not None:
            copy.mapped()  # a file that was cut short since is an error
            return kept
        blocks = range(self.footer.n_blocks)
        if not blocks or not self._chunks.can_stay_mapped(self._ids(blocks, columns)):
            return None
        found = self._load(blocks, columns, None)
        if not found.is_local:  # closed meanwhile
            return None
        self._kept = found
        if self._closed:  # nothing is kept then
            self._kept = None
        return found

    def take(
        self, rows: npt.ArrayLike, columns: Sequence[int], *, deadline_s: float | None = None
    ) -> list[ColumnValues]:
        """Values of single records, in the order of rows: of raw columns only the pages that hold them are read.

        Args:
            rows: int64[n], of this shard; may repeat.
            columns: indices in the schema.
            deadline_s: seconds from now for waiting on the store.

        Raises:
            IndexError: a row or column that is not there.
            CorruptShard: damaged bytes.
            StoreError: the store failed, or the deadline passed.
        """
        self._check_open()
        wanted = np.asarray(rows, np.int64).reshape(-1)
        if len(wanted) and (int(wanted.min()) < 0 or int(wanted.max()) >= self.n_records):
            raise IndexError(f"rows must be 0 to {self.n_records - 1}, got {int(wanted.min())} to {int(wanted.max())}")
        self._ids([], columns)
        return self._records.take(wanted, [int(c) for c in columns], deadline_s)

    def _kept_of(self, columns: Sequence[int]) -> Blocks | None:
        kept = self._kept
        return kept if kept is not None and kept.columns == tuple(columns) else None

    def _load(self, blocks: Sequence[int], columns: Sequence[int], deadline_s: float | None) -> Blocks:
        loaded = self._chunks.load(self._ids(blocks, columns), deadline_s)
        return Blocks(self.footer, self.url, tuple(map(int, blocks)), tuple(map(int, columns)), loaded)

    def _ids(self, blocks: Sequence[int], columns: Sequence[int]) -> Ids:
        check_numbers("blocks", blocks, self.footer.n_blocks)
        check_numbers("columns", columns, len(self.schema))
        return chunk_ids(blocks, columns, len(self.schema))

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"{self.url}: the reader is closed")

    def close(self) -> None:
        """Let go of the shard; loaded Blocks stay valid. Harmless when repeated."""
        self._closed = True
        self._kept = None
        self._source.close()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("an open shard cannot be pickled: open it again in the other process")
