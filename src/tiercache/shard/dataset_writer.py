"""Writer: records in, a new version of a data set out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import pyarrow as pa

from tiercache.errors import SchemaError, StoreError
from tiercache.model import parse_bytes
from tiercache.shard.commit import (
    Commit,
    CommitRequest,
    check_mode,
    data_set_exists,
    find_latest,
    nothing_to_append_to,
)
from tiercache.shard.difference import check_same_schema
from tiercache.shard.spec import UserType
from tiercache.shard.types import Schema
from tiercache.shard.versions import Version, VersionKind, check_writable
from tiercache.shard.writer import ShardOptions, ShardWriter
from tiercache.store import open_store


class Writer:
    """Writes a data set: shards as records come, and one commit at the end. For one process and one thread.

    A thread of its own uploads: a store's error is raised by a later call, at the latest by close().
    As a context manager it commits when the block ends; leaving the block by an exception commits nothing and deletes
    the shards that were written. A writer that was killed needs no clean-up: no version names its shards. `version`
    is what was committed, None before.
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
        """Look at what is at url; nothing is written yet.

        Args:
            url: the data set's folder.
            schema: column names to types, or an Arrow schema. None: the data set's own (append), or that of the first
                record or batch.
            mode: "create" a data set where there is none; "append" to one; "overwrite" one (or create it): readers see
                the old version until the new one is committed, and by number for ever.
            shard_size, block_size: about, in stored and in raw bytes.
            compression: "auto", "none", "zstd" or "zstd:LEVEL", for all columns or by column.
            storage_options: for the store.

        Raises:
            CommitConflict: mode is "create" and a data set is there.
            NotFound: mode is "append" and none is.
            SchemaError: schema cannot be, or is not that of the data set to append to.
            UnsupportedFormat: only a later release may write to the data set.
            ValueError: another argument cannot be.
            StoreError: the store's.
        """
        check_mode(mode)
        self._options = ShardOptions(parse_bytes(shard_size), parse_bytes(block_size), compression)
        self._mode = mode
        self._store = open_store(url, **(storage_options or {}))
        self._shards: ShardWriter | None = None
        self._commit: Commit | None = None
        self._ended = ""
        self.version: Version | None = None
        given = None if schema is None else Schema.of(schema)
        self._parent = find_latest(self._store)
        if mode == "create" and self._parent is not None:
            raise data_set_exists(self._store, self._parent)
        if self._parent is not None:
            check_writable(self._parent, self._store.url)
        if mode == "append":
            if self._parent is None:
                raise nothing_to_append_to(self._store)
            if given is not None:
                check_same_schema(self._parent.schema, given)
            given = self._parent.schema
        self._schema = given
        if given is not None:
            self._shards = ShardWriter(self._store, given, self._options)

    @property
    def url(self) -> str:
        """The data set's URL, without credentials."""
        return self._store.url

    @property
    def schema(self) -> Schema | None:
        """The columns; None until there is a schema."""
        return self._schema

    @property
    def n_records(self) -> int:
        """Records written so far by this writer."""
        return self._shards.n_records if self._shards is not None else 0

    def write(self, record: Mapping[str, Any]) -> None:
        """Add one record: a value for each column; a nullable column may be left out.

        Raises:
            SchemaError: a value does not fit; it names column, record, expected and got, and the record is not written.
            StoreError: the store's, perhaps for records written before; after it, only leaving or abort() is possible.
            ValueError: the writer is closed.
        """
        if self._shards is None:
            with self._starting(Schema.infer_record(record)) as shards:
                shards.write(record)
        else:
            self._shards.write(record)

    def write_batch(self, columns: Mapping[str, Any] | pa.RecordBatch | pa.Table) -> None:
        """Add records by columns: arrays or lists of one length, or an Arrow batch or table; after an error, none.

        Raises:
            SchemaError, StoreError, ValueError: as write().
        """
        if self._shards is None:
            with self._starting(Schema.infer_columns(columns)) as shards:
                shards.write_batch(columns)
        else:
            self._shards.write_batch(columns)

    def close(self) -> None:
        """Finish the last shard and commit. Harmless when repeated; failing before the commit aborts.

        Raises:
            CommitConflict: somebody else created or changed the data set first; nothing was changed.
            SchemaError: there is no schema, as none was given and nothing written; or somebody else's overwrite changed
                the schema of what is appended to.
            StoreError: the store's. Where .maybe_done is true the commit may have happened: close() again settles it.
            ValueError: the writer was aborted.
        """
        if self._ended == "closed":
            return
        self._check_open()
        if self._commit is None:
            try:
                self._commit = self._finished()
            finally:
                if self._commit is None:
                    self.abort()
        self.version = self._commit.land()
        self._ended = "closed"
        self._store.close()

    def _finished(self) -> Commit:
        if self._shards is None or self._schema is None:
            raise SchemaError("nothing was written and no schema given, so there is no data set to make")
        infos = tuple(self._shards.finish())
        request = CommitRequest(infos, self._schema, self._mode, self._parent, self._shards.writer_id)
        return Commit(self._store, request)

    def abort(self) -> None:
        """Commit nothing and delete the shards that were written. Harmless when repeated, and after close().

        After a close() that failed in the commit nothing is deleted: the commit may have happened.
        """
        if self._ended:
            return
        self._ended = "aborted"
        # What cannot be deleted now is in nobody's way: no version names it, and `tiercache gc` removes it.
        with suppress(StoreError):
            if self._shards is not None:
                self._shards.abort()
        self._store.close()

    def _check_open(self) -> None:
        if self._ended:
            raise ValueError(f"the writer is {self._ended}")

    @contextmanager
    def _starting(self, schema: Schema) -> Iterator[ShardWriter]:
        """The shard writer of an inferred schema, which is kept unless what it was inferred from cannot be written."""
        self._check_open()
        shards = ShardWriter(self._store, schema, self._options)
        self._schema, self._shards = schema, shards
        try:
            yield shards
        except SchemaError:
            self._schema = self._shards = None
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self.abort()
        elif self._ended != "aborted":
            self.close()
