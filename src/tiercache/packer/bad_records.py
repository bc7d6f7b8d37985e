"""Writing of batches in which some records are bad: what is done about them, and the report of all of them."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, Protocol, TypeAlias, get_args

import pyarrow as pa

from tiercache.errors import SchemaError
from tiercache.packer.files import BadRecord, InputBatch
from tiercache.store import Store, Upload, UploadFile

OnError: TypeAlias = Literal["stop", "skip", "dead-letter"]
ON_ERROR: tuple[OnError, ...] = get_args(OnError)
_PART_BYTES = 8 << 20

_Columns: TypeAlias = Mapping[str, Sequence[Any]] | pa.RecordBatch


class BatchWriter(Protocol):
    """What write_batch() needs of a ShardWriter."""

    n_records: int

    def write(self, record: Mapping[str, Any]) -> None: ...

    def write_batch(self, columns: _Columns) -> None: ...


def write_batch(writer: BatchWriter, batch: InputBatch, add_bad: Callable[[BadRecord], None]) -> None:
    """Write the records of a batch that fit the schema, and pass the others, and its bad records, to add_bad."""
    for one in batch.bad:
        add_bad(one)
    if isinstance(batch.columns, list):
        for number, record in enumerate(batch.columns):
            try:
                writer.write(record)
            except SchemaError as error:
                add_bad(BadRecord(batch.location(number), _reason(error), dict(record), error.column))
        return
    start, step = 0, batch.n_records
    while start < batch.n_records:
        end = min(start + step, batch.n_records)
        index = _try_to_write(writer, _slice(batch.columns, start, end), batch, start, add_bad)
        # After a bad record the steps grow from 1 again, so a batch of bad records alone takes linear time.
        start, step = (end, step * 2) if index is None else (index + 1, 1)


def _try_to_write(
    writer: BatchWriter, columns: _Columns, batch: InputBatch, start: int, add_bad: Callable[[BadRecord], None]
) -> int | None:
    """Write columns, which begin with record `start` of a batch; or those before the first bad record: its number."""
    n_before = writer.n_records
    try:
        writer.write_batch(columns)
    except SchemaError as error:
        if error.record is None:  # the whole batch does not fit, for example because a column is missing
            raise
        index = error.record - n_before
        if index:
            writer.write_batch(_slice(columns, 0, index))
        add_bad(BadRecord(batch.location(start + index), _reason(error), _record(columns, index), error.column))
        return start + index
    return None


def _reason(error: SchemaError) -> str:
    return error.message.removeprefix(f"column {error.column!r}, ").removeprefix(f"record {error.record}: ")


def _slice(columns: _Columns, start: int, end: int) -> _Columns:
    if isinstance(columns, pa.RecordBatch):
        return columns.slice(start, end - start)
    return {name: values[start:end] for name, values in columns.items()}


def _record(columns: _Columns, index: int) -> dict[str, Any]:
    if isinstance(columns, pa.RecordBatch):
        return dict(columns.slice(index, 1).to_pylist()[0])
    return {name: values[index] for name, values in columns.items()}


class BadRecordLog:
    """What is done about the bad records of a task: the first one is raised, or each becomes a line of an object.

    The object appears when close() has returned; without a bad record there is none. A context manager: leaving the
    block without close() drops the lines.
    """

    def __init__(self, store: Store, key: str, on_error: OnError) -> None:
        self._store, self._key, self._on_error = store, key, on_error
        self._stack = ExitStack()
        self._upload: Upload | None = None
        self._file: UploadFile | None = None

    def __enter__(self) -> BadRecordLog:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, bad: BadRecord) -> None:
        """Add a line. Raises SchemaError for on_error="stop"."""
        if self._on_error == "stop":
            raise SchemaError(f"{bad.location}: {bad.reason}", column=bad.column)
        if self._file is None:
            self._upload = self._stack.enter_context(self._store.create(self._key))
            self._file = UploadFile(self._upload, max(_PART_BYTES, self._store.min_part_bytes))
        self._file.write(_line(bad, with_content=self._on_error == "dead-letter"))

    def close(self) -> None:
        """Complete the object, if there is a line."""
        if self._file is not None and self._upload is not None:
            self._file.finish()
            self._upload.complete()


def _line(bad: BadRecord, *, with_content: bool) -> bytes:
    line = {"location": bad.location, "reason": bad.reason}
    if bad.column is not None:
        line["column"] = bad.column
    if with_content:
        line["content"] = bad.content
    return json.dumps(line, default=_plain, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def _plain(value: Any) -> Any:
    """Return a value that JSON has no form for: text if its bytes are text, else {"base64": ...}."""
    if isinstance(value, bytes | bytearray | memoryview):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(value).decode()}
    return value.tolist() if hasattr(value, "tolist") else str(value)


def report_url(url: str | os.PathLike[str], report: str | os.PathLike[str] | None) -> str:
    """Return the URL of the report of a packing: beside the data set, unless it is stated."""
    return os.fspath(report) if report is not None else f"{os.fspath(url).rstrip('/')}.bad.jsonl"


def write_report(store: Store, key: str, parts: Iterable[bytes]) -> int:
    """Write the lines of all tasks as one object, which is replaced, and return their number."""
    n_lines = 0
    with store.create(key) as upload:
        file = UploadFile(upload, max(_PART_BYTES, store.min_part_bytes))
        for part in parts:
            n_lines += part.count(b"\n")
            file.write(part)
        file.finish()
        upload.complete()
    return n_lines
