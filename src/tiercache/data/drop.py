"""Drop: a new version of a data set without some of its records or columns.

A shard that keeps all its records and columns belongs to the new version as it is; any other shard is written again. No
object is deleted: earlier versions keep everything.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tiercache.config import available_cpus
from tiercache.data.scan import arrow_errors_as_schema_errors, chunks_of, columns_of, evaluate, storage_table
from tiercache.errors import CommitConflict, SchemaError, StoreError
from tiercache.model import ShardInfo
from tiercache.order.window import BlockSizes
from tiercache.shard.codec import RAW
from tiercache.shard.footer import Footer
from tiercache.shard.reader import ShardReader
from tiercache.shard.schema import Schema
from tiercache.shard.versions import MAX_REBASES, Commit, Version, as_arrow, check_writable, latest, read_shards
from tiercache.shard.writer import ShardOptions, ShardWriter
from tiercache.store import Store
from tiercache.store.remote import call_threads

# What remains of a shard is written as one shard, however large it is.
_NO_LIMIT_BYTES = 1 << 62


@dataclass(frozen=True, slots=True)
class DropReport:
    """What `drop` did, or would do.

    Attributes:
        version: The new version; the newest one if nothing was dropped, or in a dry run.
        n_records: Number of records that were dropped.
        n_rewritten: Number of shards that were written again, with what is left of them.
        n_removed: Number of shards that lost all their records.
    """

    version: Version
    n_records: int
    n_rewritten: int
    n_removed: int


def drop(
    store: Store,
    where: pc.Expression | None,
    columns: Iterable[str] = (),
    *,
    jobs: int = 4,
    dry_run: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> DropReport:
    """Commit a version without the records for which a condition is true, and without these columns.

    jobs: Number of shards to process at a time; 0: one per CPU. on_progress: Function called with stored bytes that are
    processed, and those of all shards.
    Raises as Versions.drop().
    """
    if isinstance(columns, str):
        raise TypeError(f"columns= takes a list of names, got {columns!r}")
    dropped = tuple(columns)
    if where is not None and not isinstance(where, pc.Expression):
        raise TypeError(
            f"where= takes a pyarrow expression, such as pyarrow.compute.field('label') == 3, got {where!r}"
        )
    if where is None and not dropped:
        raise ValueError("nothing to drop: give a condition (where=) or names of columns (columns=)")
    store.require_conditional_put()
    base = latest(store)
    rewriting = _Rewriting(store, base, where, dropped, dry_run=dry_run)
    for _ in range(MAX_REBASES):
        check_writable(base, store.url)
        table = read_shards(store, base)
        infos = list(table.infos())
        rewriting.run(infos, jobs, on_progress)
        left = [rewriting.left[info.name] for info in infos]
        kept = [one for of_shard in left for one in of_shard]
        n_removed = sum(not one for one in left)
        n_rewritten = sum(one != [info] for one, info in zip(left, infos, strict=True)) - n_removed
        report = DropReport(base, base.n_records - sum(one.n_records for one in kept), n_rewritten, n_removed)
        if dry_run or not (dropped or report.n_records):
            return report
        commit = Commit(
            store,
            kept,
            schema=rewriting.schema,
            mode="overwrite",
            kind="drop",
            parent=base,
            writer_id=rewriting.writer_id,
        )
        try:
            return replace(report, version=commit.run())
        except CommitConflict:
            newest = latest(store)
        if (newest.dataset_id, newest.schema_bytes) != (base.dataset_id, base.schema_bytes):
            raise CommitConflict(
                f"version {newest.number} ({newest.kind}), which was committed meanwhile, has other columns; nothing "
                "was dropped: inspect that version, and drop again",
                url=store.url,
                number=newest.number,
            )
        base = newest
    raise CommitConflict(f"lost {MAX_REBASES} races against other writers; try again later", url=store.url)


class _Rewriting:
    """Writer of the records that remain of each shard, as shards of the new version. Threads process different shards.

    left: Shards of the new version that have what remains of a shard, by the name of that shard.
    """

    def __init__(
        self, store: Store, base: Version, where: pc.Expression | None, dropped: Sequence[str], *, dry_run: bool
    ) -> None:
        schema = base.schema
        for name in dropped:
            schema.index(name)
        names = [name for name in schema.names if name not in dropped]
        if not names:
            raise SchemaError("a data set needs at least one column, and all would be dropped")
        self.schema = schema.select(names)
        self.writer_id = secrets.token_hex(8)
        self.left: dict[str, list[ShardInfo]] = {}
        self._written: list[str] = []
        self._store, self._dataset_id, self._stored, self._dry_run = store, base.dataset_id, schema, dry_run
        self._where = where
        # Arrow needs some column to know the number of records, also for a constant.
        self._keys = [] if where is None else (columns_of(schema, where) or names[:1])

    def run(self, infos: Sequence[ShardInfo], jobs: int, on_progress: Callable[[int, int], None] | None) -> None:
        """Process the shards that were not processed before. After an error, what was written is deleted."""
        first = len(self.left)
        new = [info for info in infos if info.name not in self.left]
        total_bytes = sum(info.n_bytes for info in infos)
        done_bytes = total_bytes - sum(info.n_bytes for info in new)
        try:
            with call_threads(jobs or available_cpus(), "tiercache-drop") as pool:
                found = pool.map(self._left_of, count(first), new)
                for info, left in zip(new, found, strict=True):
                    self.left[info.name] = left
                    done_bytes += info.n_bytes
                    if on_progress is not None:
                        on_progress(done_bytes, total_bytes)
        except BaseException:
            with suppress(StoreError):  # the first error must stay visible; gc removes what remains
                self._store.delete(self._written)
            raise

    def _left_of(self, number: int, info: ShardInfo) -> list[ShardInfo]:
        """Return what is left of a shard, after writing it. number: That of the new shard."""
        identity = info.identity(self._dataset_id)
        with ShardReader(self._store, info.name, info=info, identity=identity) as reader:
            keep = self._kept(reader)
            if not keep.any():
                return []
            if keep.all() and len(self.schema) == len(self._stored):
                return [info]
            if self._dry_run:
                return [replace(info, n_records=int(keep.sum()), shard_id="")]
            options = _options_of(reader.footer, self.schema)
            with ShardWriter(self._store, self.schema, options, writer_id=f"{self.writer_id}-{number:06d}") as writer:
                for batch in self._batches(reader, keep):
                    writer.write_batch(batch)
                found = writer.finish()
        self._written += [one.name for one in found]
        return found

    def _kept(self, reader: ShardReader) -> NDArray[np.bool_]:
        """Return whether each record is kept. A null condition keeps its record."""
        keep = np.ones(reader.n_records, np.bool_)
        if self._where is None:
            return keep
        start = 0
        for _, arrays in _load(reader, self._keys, reader.footer.block_records):
            with arrow_errors_as_schema_errors(self._stored, self._where):
                flags = evaluate(storage_table(self._keys, arrays), self._where)
            keep[start : start + len(flags)] = ~flags
            start += len(flags)
        return keep

    def _batches(self, reader: ShardReader, keep: NDArray[np.bool_]) -> Iterator[pa.RecordBatch]:
        first = reader.footer.block_first
        n_before = np.concatenate([[0], np.cumsum(keep)])
        for blocks, found in _load(reader, self.schema.names, np.diff(n_before[first])):
            for block, arrays in zip(blocks, found, strict=True):
                rows = as_arrow(np.flatnonzero(keep[first[block] : first[block + 1]]))
                taken = arrays if len(rows) == len(arrays[0]) else [array.take(rows) for array in arrays]
                yield pa.RecordBatch.from_arrays(taken, schema=self.schema.arrow)


def _load(
    reader: ShardReader, names: Sequence[str], n_records: NDArray[Any]
) -> Iterator[tuple[list[int], list[list[pa.Array]]]]:
    """Yield the numbers of some blocks, and of each its columns with these names. n_records: 0 for blocks to skip."""
    columns = [reader.schema.index(name) for name in names]
    raw_bytes = reader.footer.block_raw_bytes.astype(np.int64)
    for blocks in chunks_of(BlockSizes(n_records.astype(np.int64), raw_bytes)):
        loaded = reader.load_blocks(blocks.tolist(), columns)
        yield blocks.tolist(), [[loaded.array(i, column) for column in columns] for i in range(len(blocks))]


def _options_of(footer: Footer, schema: Schema) -> ShardOptions:
    """Return options with which a shard has blocks of about the same size, and no column is newly compressed."""
    sizes = sorted(footer.block_raw_bytes.tolist())
    compressed = (footer.chunks["codec"] != RAW).any(axis=0)
    compression = {name: "auto" if compressed[footer.schema.index(name)] else "none" for name in schema.names}
    return ShardOptions(_NO_LIMIT_BYTES, max(sizes[len(sizes) // 2], 1), compression)
