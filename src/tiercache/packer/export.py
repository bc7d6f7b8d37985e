"""The export of a data set to Parquet files."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tiercache.config import available_cpus
from tiercache.errors import StoreError
from tiercache.shard.reader import ShardReader
from tiercache.shard.schema import Schema
from tiercache.shard.versions import ShardTable, Version, read_shards
from tiercache.store import Store, Upload
from tiercache.store.remote import call_threads

_PART_BYTES = 16 << 20
_ROW_GROUP_BYTES = 64 << 20
_ROW_GROUP_ROWS = 1 << 20
_CODECS = ("none", "snappy", "gzip", "brotli", "lz4", "zstd")
_PART_NAME = re.compile(r"part-(\d{5,})\.parquet")


@dataclass(frozen=True)
class Export:
    """Export of one version of the data set in `source` to files in `target`, of these columns (None: all).

    jobs: files of a folder that are written in parallel, 0: one per CPU. overwrite: existing files are replaced.
    """

    source: Store
    version: Version
    target: Store
    columns: Sequence[str] | None = None
    jobs: int = 1
    overwrite: bool = False
    compression: str = "zstd"

    def __post_init__(self) -> None:
        if self.compression not in _CODECS:
            raise ValueError(f"compression must be one of {', '.join(_CODECS)}, got {self.compression!r}")

    def to_file(self, key: str, on_progress: Callable[[int], None] | None = None) -> int:
        """Write all records to one file, which appears complete. Returns their number. Raises StoreError."""
        shards = read_shards(self.source, self.version)
        return self._write(key, shards, range(len(shards)), on_progress)

    def to_folder(self, on_progress: Callable[[int], None] | None = None) -> int:
        """Write `part-00000.parquet`, ...: one file per shard. See to_file().

        Files of a longer export that is overwritten are deleted at the end: they would be read as part of this one.
        """
        shards = read_shards(self.source, self.version)
        n_files = max(1, len(shards))
        matches = filter(None, (_PART_NAME.fullmatch(info.key) for info in self.target.list()))
        stale = sorted(number[0] for number in matches if int(number[1]) >= n_files)
        if stale and not self.overwrite:
            raise StoreError(
                "the folder holds a file of another export; choose another folder, or delete them with overwrite=True",
                url=f"{self.target.url}/{stale[0]}",
            )

        def write(number: int) -> int:
            chosen = range(number, min(number + 1, len(shards)))
            return self._write(f"part-{number:05d}.parquet", shards, chosen, on_progress)

        with call_threads(self.jobs or available_cpus(), "tiercache-export") as pool:
            n_records = sum(pool.map(write, range(n_files)))
        if stale:
            self.target.delete(stale)
        return n_records

    @property
    def schema(self) -> Schema:
        schema = self.version.schema
        return schema if self.columns is None else schema.select(self.columns)

    def _write(
        self, key: str, shards: ShardTable, chosen: Sequence[int], on_progress: Callable[[int], None] | None
    ) -> int:
        schema, n_records = self.schema.arrow, 0
        with self.target.create(key) as upload:
            sink = UploadFile(upload, max(_PART_BYTES, self.target.min_part_bytes))
            with pq.ParquetWriter(sink, schema, compression=self.compression) as writer:
                for shard in chosen:
                    for table in self._row_groups(shards, shard):
                        writer.write_table(table, row_group_size=max(1, table.num_rows))
                        n_records += table.num_rows
                    if on_progress is not None:
                        on_progress(int(shards.n_bytes[shard]))
            sink.finish()
            if upload.complete(if_absent=not self.overwrite) is None:
                raise StoreError(
                    "the file already exists; choose another name, or replace it with overwrite=True",
                    url=f"{self.target.url}/{key}",
                )
        return n_records

    def _row_groups(self, shards: ShardTable, shard: int) -> Iterator[pa.Table]:
        info, names = shards.info(shard), self.schema.names
        identity = info.identity(self.version.dataset_id)
        with ShardReader(self.source, info.name, info=info, identity=identity) as reader:
            columns = [reader.schema.index(name) for name in names]
            pending: list[pa.RecordBatch] = []
            for block in range(reader.footer.n_blocks):
                loaded = reader.load_blocks([block], columns)
                arrays = [loaded.array(0, column) for column in columns]
                pending.append(pa.RecordBatch.from_arrays(arrays, schema=self.schema.arrow))
                n_bytes = sum(batch.nbytes for batch in pending)
                if n_bytes >= _ROW_GROUP_BYTES or sum(map(len, pending)) >= _ROW_GROUP_ROWS:
                    yield pa.Table.from_batches(pending)
                    pending = []
            if pending:
                yield pa.Table.from_batches(pending)


class UploadFile(io.RawIOBase):
    """File whose bytes become the parts of an upload. finish() uploads the last one, without completing the upload."""

    def __init__(self, upload: Upload, part_bytes: int) -> None:
        self._upload, self._part_bytes = upload, part_bytes
        self._pending = bytearray()
        self._n_parts = 0
        self._position = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        self._pending += data
        n_bytes = memoryview(data).nbytes
        self._position += n_bytes
        if len(self._pending) >= self._part_bytes:
            self._put()
        return n_bytes

    def _put(self) -> None:
        part, self._pending = self._pending, bytearray()
        self._upload.put_part(self._n_parts, part)
        self._n_parts += 1

    def finish(self) -> None:
        if self._pending or not self._n_parts:
            self._put()
