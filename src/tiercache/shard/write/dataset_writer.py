"""Writer: writes records as a new version of a data set."""

from __future__ import annotations

import os
import sys
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import pyarrow as pa

from tiercache.errors import SchemaError, StoreError
from tiercache.model import ShardInfo, parse_bytes
from tiercache.shard.column_types import UserType
from tiercache.shard.schema import Schema, check_same_schema
from tiercache.shard.versions.commit import (
    Commit,
    check_mode,
    data_set_exists_error,
    find_latest,
    no_data_set_error,
)
from tiercache.shard.versions.manifest import Version, VersionKind, check_writable
from tiercache.shard.write.shard_writer import ShardOptions, ShardWriter
from tiercache.store import open_store


class Writer:
    """Writer of a data set: uploads shards while records arrive, and commits once, in close().

    For one process and one thread. A background thread uploads, so a later call raises the error of a store, at the
    latest close(). Used as a context manager, the writer commits at the end of the `with` block; if an exception leaves
    the block, the writer commits nothing and deletes the shards that it has written. A killed writer needs no clean-up,
    because no version lists its shards. A writer with records that is dropped without close() or abort(), or is still
    open when the program ends, commits nothing: it prints an error line on standard error and gives a ResourceWarning.

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
        """Read the newest version at url, if any, and check mode and schema against it. Nothing is written yet.

        Args:
            url: URL or path of the data set's folder.
            schema: Mapping of column names to types, or an Arrow schema. None: the schema of the data set (append), or
                the schema that is inferred from the first record or batch.
            mode: "create" makes a new data set; "append" adds records to an existing one; "overwrite" replaces one, or
                creates it. Until an overwrite commits, readers see the old version; later they can open it by number.
            shard_size: Approximate size of a shard in stored bytes; an int or a text such as "128MiB".
            block_size: Approximate size of a block in bytes before compression; an int or a text such as "1MiB".
            compression: "auto", "none", "zstd" or "zstd:LEVEL", for all columns, or a mapping by column name.
            storage_options: Options of the store, such as credentials and the region.

        Raises:
            CommitConflict: mode is "create", and a data set exists at url.
            NotFound: mode is "append", and no data set exists at url.
            SchemaError: The schema is invalid, or differs from the schema of the data set to append to.
            UnsupportedFormat: Only a later release may write to the data set.
            ValueError: Another argument is invalid.
            StoreError: The store failed.
        """
        check_mode(mode)
        self._options = ShardOptions(parse_bytes(shard_size), parse_bytes(block_size), compression)
        self._mode = mode
        self._store = open_store(url, **(storage_options or {}))
        self._shards: ShardWriter | None = None
        self._finalizer: weakref.finalize[..., Writer] | None = None
        self._commit: Commit | None = None
        self._ended = ""
        self.version: Version | None = None
        given = None if schema is None else Schema.of(schema)
        self._store.require_conditional_put()  # here, because the commit comes hours later
        self._parent = find_latest(self._store)
        if mode == "create" and self._parent is not None:
            raise data_set_exists_error(self._store, self._parent)
        if self._parent is not None:
            check_writable(self._parent, self._store.url)
        if mode == "append":
            if self._parent is None:
                raise no_data_set_error(self._store)
            if given is not None:
                check_same_schema(self._parent.schema, given)
            given = self._parent.schema
        self._schema = given
        if given is not None:
            self._begin(ShardWriter(self._store, given, self._options))

    def _begin(self, shards: ShardWriter) -> None:
        self._shards = shards
        self._finalizer = weakref.finalize(self, _report_unclosed, self.url, shards, os.getpid())

    def _end_watch(self) -> None:
        if self._finalizer is not None:
            self._finalizer.detach()

    @property
    def url(self) -> str:
        """URL of the data set, without credentials."""
        return self._store.url

    @property
    def schema(self) -> Schema | None:
        """Schema of the data set; None until it is given or inferred."""
        return self._schema

    @property
    def n_records(self) -> int:
        """Number of records that this writer has written so far."""
        return self._shards.n_records if self._shards is not None else 0

    def write(self, record: Mapping[str, Any]) -> None:
        """Add one record.

        Args:
            record: Mapping of column names to values. A nullable column may be missing.

        Raises:
            SchemaError: A value does not fit its column. The error names the column, the record, the expected and the
                actual value; the record is not written.
            StoreError: The store failed, possibly for records written before. The caller can then only leave the
                context or call abort().
            ValueError: The writer is closed.
        """
        if self._shards is None:
            with self._starting(Schema.infer_record(record)) as shards:
                shards.write(record)
        else:
            self._shards.write(record)

    def write_batch(self, columns: Mapping[str, Any] | pa.RecordBatch | pa.Table) -> None:
        """Add several records, given by column. After an error none of them is written.

        Args:
            columns: Mapping of column names to arrays or lists of equal length, or an Arrow record batch or table.

        Raises:
            SchemaError, StoreError, ValueError: See write().
        """
        if self._shards is None:
            with self._starting(Schema.infer_columns(columns)) as shards:
                shards.write_batch(columns)
        else:
            self._shards.write_batch(columns)

    def add_shards(self, infos: Iterable[ShardInfo]) -> None:
        """Add finished shards that other processes have written with this writer's schema, in this order.

        The writer owns them from now on: it commits them, or deletes them in abort().

        Args:
            infos: Descriptions of the shards, from the processes that wrote them.

        Raises:
            ValueError: The writer has no schema yet, or is closed.
        """
        if self._shards is None:
            raise ValueError("shards can be added only to a writer with a schema")
        self._shards.add_shards(infos)

    def close(self) -> None:
        """Finish the last shard and commit. A repeated call is safe. An error before the commit aborts the writer.

        Raises:
            CommitConflict: Another writer created or changed the data set first; this writer changed nothing.
            SchemaError: No schema was given and no record was written; or an overwrite by another writer changed the
                schema of the data set to append to.
            StoreError: The store failed. If .maybe_done is true, the commit may have happened: call close() again to
                find out and to finish it.
            ValueError: The writer was aborted.
        """
        if self._ended == "closed":
            return
        self._check_open()
        self._end_watch()  # from here on, an exception says what was not committed
        if self._commit is None:
            try:
                self._commit = self._finished()
            finally:
                if self._commit is None:
                    self.abort()
        self.version = self._commit.run()
        self._ended = "closed"
        self._store.close()

    def _finished(self) -> Commit:
        if self._shards is None or self._schema is None:
            raise SchemaError("cannot create a data set: no schema was given and no record was written")
        infos, writer_id = self._shards.finish(), self._shards.writer_id
        return Commit(
            self._store, infos, schema=self._schema, mode=self._mode, parent=self._parent, writer_id=writer_id
        )

    def abort(self) -> None:
        """Commit nothing, and delete the shards that were written. On a closed or aborted writer, do nothing.

        If the commit itself failed, the shards are kept, because the commit may have happened.
        """
        if self._ended:
            return
        self._end_watch()
        self._ended = "aborted"
        # A shard that cannot be deleted now is harmless, because no version lists it.
        with suppress(StoreError):
            if self._shards is not None:
                self._shards.abort()
        self._store.close()

    def _check_open(self) -> None:
        if self._ended:
            raise ValueError(f"the writer is {self._ended}")

    @contextmanager
    def _starting(self, schema: Schema) -> Iterator[ShardWriter]:
        """Yield a shard writer for an inferred schema; drop both if the data that gave the schema cannot be written."""
        self._check_open()
        shards = ShardWriter(self._store, schema, self._options)
        self._schema = schema
        self._begin(shards)
        try:
            yield shards
        except SchemaError:
            self._end_watch()
            self._schema = self._shards = None
            raise

    def __repr__(self) -> str:
        state = self._ended or "open"
        if self.version is not None:
            state = f"committed as version {self.version.number}"
        schema = "schema not known yet" if self._schema is None else repr(self._schema)
        records = f"{self.n_records:,} record{'' if self.n_records == 1 else 's'}"
        return f"Writer({self.url!r}, mode={self._mode!r}, {state}, {records}: {schema})"

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self.abort()
        elif self._ended != "aborted":
            self.close()


def _report_unclosed(url: str, shards: ShardWriter, pid: int) -> None:
    """Report the records of a writer that nothing refers to any more, or that is open when the program ends."""
    n_records = shards.n_records + shards.n_added_records
    if not n_records or pid != os.getpid():  # a forked child has only a copy of the writer
        return
    records = "1 record" if n_records == 1 else f"{n_records:,} records"
    text = f"{url}: a Writer with {records} was not closed, so nothing was committed: use `with`, or call close()"
    if sys.stderr is not None:
        sys.stderr.write(f"tiercache: error: {text}\n")  # Python does not show a ResourceWarning by default
    warnings.warn(text, ResourceWarning, stacklevel=2)
