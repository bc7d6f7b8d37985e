"""Ray Data: `read_dataset(url)` is a `ray.data.Dataset`, and `ds.write_datasink(DatasetSink(url))` writes one.

It is also the attribute `tiercache.ray`. `tiercache.pack(engine="ray")` packs a source by Ray's tasks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import pairwise
from typing import Any

import pyarrow as pa
import ray.data
from ray.data.block import BlockAccessor, BlockMetadata
from ray.data.datasource import Datasink, Datasource, ReadTask

from tiercache.data.dataset import Dataset
from tiercache.errors import SchemaError
from tiercache.model import ShardInfo, parse_bytes
from tiercache.shard.schema import Schema, UserType, check_same_schema
from tiercache.shard.versions import Commit, Version, VersionKind, check_mode, find_parent
from tiercache.shard.writer import ShardOptions, ShardWriter
from tiercache.store import open_store
from tiercache.store.access import absolute_url


def read_dataset(data: str | os.PathLike[str] | Dataset, *, parallelism: int = -1, **options: Any) -> ray.data.Dataset:
    """Return a data set, or data of another library that `tiercache.Dataset` reads in place, as one of Ray Data.

    Each task reads a run of records, through the cache of its machine. The values are the stored ones.

    Args:
        data: URL; or a `tiercache.Dataset`, also a view with some of its records.
        parallelism: Number of tasks; -1: Ray decides.
        options: Further arguments of `tiercache.Dataset` for a URL, such as `columns=` and `version=`.

    Raises:
        NotFound, SchemaError, ValueError: As `tiercache.Dataset`.
    """
    dataset = data if isinstance(data, Dataset) else Dataset(data, **options)
    len(dataset)  # raises NotFound here, rather than in a task
    return ray.data.read_datasource(_Source(dataset), override_num_blocks=None if parallelism < 1 else parallelism)


class _Source(Datasource):  # type: ignore[misc]  # not installed where types are checked
    def __init__(self, dataset: Dataset) -> None:
        super().__init__()
        self._dataset = dataset

    def get_name(self) -> str:
        return "tiercache"

    def estimate_inmemory_data_size(self) -> int:
        first = next(self._dataset.take(_SAMPLE_RECORDS).to_arrow(), None)
        return 0 if first is None else int(first.nbytes / len(first) * len(self._dataset))

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, **_: Any) -> list[ReadTask]:
        n = len(self._dataset)
        bounds = [n * i // parallelism for i in range(parallelism + 1)]
        n_bytes, schema = self.estimate_inmemory_data_size(), self._dataset.schema.arrow
        tasks = []
        for start, end in pairwise(bounds):
            if end > start:
                metadata = BlockMetadata(
                    num_rows=end - start, size_bytes=n_bytes * (end - start) // n, input_files=None, exec_stats=None
                )
                read = _reader(self._dataset, start, end)
                tasks.append(ReadTask(read, metadata, schema=schema, per_task_row_limit=per_task_row_limit))
        return tasks


_SAMPLE_RECORDS = 100


def _reader(dataset: Dataset, start: int, end: int) -> Callable[[], Iterator[pa.Table]]:
    def read() -> Iterator[pa.Table]:
        with closing(dataset.skip(start).take(end - start)) as part:
            for batch in part.to_arrow():
                yield pa.Table.from_batches([batch])

    return read


class DatasetSink(Datasink):  # type: ignore[misc]
    """Writes a data set of Ray Data: `ds.write_datasink(DatasetSink(url))`.

    Each task of Ray writes shards of its own; all are committed at once when the last task is done. Before that, no
    reader sees anything, and what a task wrote that died or failed is never committed.

    Args:
        url: URL of the data set, which all machines of the cluster must reach.
        schema: Types of all columns, as `tiercache.Writer(schema=)`. None: those of the Arrow schema of Ray's blocks;
            for `mode="append"`, those of the data set.
        mode: "create" for a new data set, "append" or "overwrite".
        shard_size: Target size of a shard in bytes, or a text such as "128MiB".
        block_size: Target size of a block in bytes, or a text such as "1MiB".
        compression: "auto", "none", "zstd" or "zstd:LEVEL", or a mapping from columns to these.
        storage_options: Options of the store.

    Attributes:
        version: The committed version; None before the commit.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        schema: Mapping[str, UserType] | pa.Schema | Schema | None = None,
        mode: VersionKind = "create",
        shard_size: int | str = "128MiB",
        block_size: int | str = "1MiB",
        compression: str | Mapping[str, str] = "auto",
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        check_mode(mode)
        self._url, self._mode, self._storage_options = absolute_url(url), mode, dict(storage_options or {})
        self._schema = None if schema is None else Schema.of(schema)
        self._shard_options = ShardOptions(parse_bytes(shard_size), parse_bytes(block_size), compression)
        self.version: Version | None = None
        self._parent = self._check_target()

    def _check_target(self) -> Version | None:
        with closing(open_store(self._url, **self._storage_options)) as store:
            parent = find_parent(store, self._mode)
        if self._mode == "append" and parent is not None:
            self._schema = self._schema or parent.schema
            check_same_schema(parent.schema, self._schema)
        return parent

    def get_name(self) -> str:
        return "tiercache"

    @property
    def min_bytes_per_write(self) -> int:
        """Bytes of the blocks that Ray passes to one task: those of a shard."""
        return self._shard_options.shard_bytes

    def on_write_start(self, schema: Any = None) -> None:
        """Take the types of the first blocks, if none were stated. Called by Ray before the tasks."""
        if self._schema is None and isinstance(schema, pa.Schema):
            self._schema = Schema.of(schema)

    def write(self, blocks: Iterable[Any], ctx: Any) -> tuple[int, Sequence[ShardInfo]]:
        """Write the blocks of one task of Ray as shards. Returns the number of the task, and the shards."""
        if self._schema is None:
            raise SchemaError("the types of the columns are not known before the first task: pass schema=")
        with (
            closing(open_store(self._url, **self._storage_options)) as store,
            ShardWriter(store, self._schema, self._shard_options) as writer,
        ):
            for block in blocks:
                writer.write_batch(BlockAccessor.for_block(block).to_arrow())
            return ctx.task_idx, writer.finish()

    def on_write_complete(self, write_result: Any) -> None:
        """Commit the shards of all tasks, in the order of the tasks. Called by Ray after the last one."""
        if self._schema is None:
            raise SchemaError("there is no record, so the types of the columns are not known: pass schema=")
        infos = [info for _, of_task in sorted(write_result.write_returns, key=lambda one: one[0]) for info in of_task]
        with closing(open_store(self._url, **self._storage_options)) as store:
            commit = Commit(store, infos, schema=self._schema, mode=self._mode, parent=self._parent)
            self.version = commit.run()
