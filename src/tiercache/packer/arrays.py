"""NumPy files as a source of a packing: the first axis of an array numbers the records.

Each array of an .npz archive is a column; an .npy file has one column, or those of its structured type. Only rows that
are packed next are in memory.
"""

from __future__ import annotations

import io
import math
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
from numpy.lib import format as npy

from tiercache.errors import SchemaError
from tiercache.packer.files import BadRecord, Files, InputBatch, InputSplit, SourceFile, describe_start, record_location
from tiercache.shard.schema import STORED, Schema, Tensor, UserType
from tiercache.store.remote import call_threads

ARRAY_SUFFIXES = (".npy", ".npz")
ARRAY_COLUMN = "array"
_SPLIT_BYTES = 64 << 20
_PARALLEL_HEADERS = 16
_SUFFIX = ".npy"


@dataclass(frozen=True)
class _Array:
    """Facts of the header of an array. start: Offset of the first element in the .npy file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    is_fortran: bool
    start: int

    @property
    def n_records(self) -> int:
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])


@dataclass(frozen=True)
class ArrayFiles:
    """NumPy files with the same columns, a files.RecordSource.

    A split is a range of records of an .npy file, or a whole .npz archive, which is read from its beginning.
    """

    files: Files
    schema: Schema
    splits: tuple[InputSplit, ...]

    def read(self, split: InputSplit, batch_bytes: int) -> Iterator[InputBatch]:
        path = self.files.location(split.path)
        step = max(1, min(batch_bytes * (split.end - split.start) // max(split.n_bytes, 1), split.end - split.start))
        done = split.start
        try:
            with _opened_arrays(self.files, split.path) as arrays:
                readers = [(name, _rows(file, array, split, step)) for name, (file, array) in arrays.items()]
                while done < split.end:
                    stop = min(done + step, split.end)
                    columns: dict[str, Any] = {}
                    for name, rows in readers:
                        columns |= _columns(name, next(rows))
                    chosen = {name: columns[name] for name in self.schema.names}
                    n_bytes = split.n_bytes * (stop - done) // (split.end - split.start)
                    yield InputBatch(chosen, stop - done, n_bytes, partial(record_location, path, done))
                    done = stop
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            yield InputBatch({}, 0, 0, str, [BadRecord(f"{path}, from record {done} on", f"not readable: {error}")])


def find_arrays(files: Files, found: Sequence[SourceFile], given: Mapping[str, UserType]) -> ArrayFiles:
    """Return NumPy files with the types of their arrays. given: types of some columns.

    Raises SchemaError for a file that is damaged, has arrays of objects, or other columns than the first file.
    """
    with call_threads(_PARALLEL_HEADERS, "tiercache-header") as pool:
        inspected = list(pool.map(partial(_inspect, files), found))
    splits: list[InputSplit] = []
    first = files.location(found[0].path)
    types = inspected[0][0]
    for file, (others, n_records, row_bytes) in zip(found, inspected, strict=True):
        if others != types:
            differ = [name for name in types | others if types.get(name) != others.get(name)]
            shown = ", ".join(
                f"{name}: {others.get(name, 'none')} instead of {types.get(name, 'none')}" for name in differ
            )
            message = f"{files.location(file.path)}: its arrays differ from those of {first}: {shown}"
            raise SchemaError(message, column=differ[0])
        is_archive = file.path.lower().endswith(".npz")
        step = n_records if is_archive else max(1, _SPLIT_BYTES // max(row_bytes, 1))
        for start in range(0, n_records, max(step, 1)):
            end = min(start + step, n_records)
            splits.append(InputSplit(file.path, start, end, (end - start) * row_bytes))
    if new := [name for name in given if name not in types]:
        raise SchemaError(f"{first}: no such column; there are {', '.join(types)}", column=new[0])
    return ArrayFiles(files, Schema.of({name: given.get(name, type_) for name, type_ in types.items()}), tuple(splits))


def _inspect(files: Files, file: SourceFile) -> tuple[dict[str, UserType], int, int]:
    """Return the types of the columns of a file, the number of records and the bytes of a record."""
    path = files.location(file.path)
    try:
        with _opened_arrays(files, file.path) as arrays:
            found = {name: array for name, (_, array) in arrays.items()}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        start = describe_start(files, file.path)
        raise SchemaError(f"{path}: not a readable NumPy file: {error}; {start}") from error
    if not found:
        raise SchemaError(f"{path}: the archive has no arrays")
    types: dict[str, UserType] = {}
    for name, array in found.items():
        if not array.shape:
            raise SchemaError(
                f"{path}: expected an array whose first axis numbers the records, got a single value", column=name
            )
        for column, type_ in _types(path, name, array).items():
            if column in types:
                raise SchemaError(f"{path}: two arrays have a column of this name", column=column)
            types[column] = type_
    counts = {name: array.n_records for name, array in found.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {n:,}" for name, n in counts.items())
        raise SchemaError(f"{path}: the first axis numbers the records, so its length must be equal, got {listed}")
    (first,) = list(found.values())[:1]
    if not file.path.lower().endswith(".npz") and file.n_bytes < first.start + first.n_records * first.row_bytes:
        expected = first.start + first.n_records * first.row_bytes
        raise SchemaError(f"{path}: cut off: expected {expected:,} bytes for its header, got {file.n_bytes:,}")
    return types, first.n_records, sum(array.row_bytes for array in found.values())


def _types(path: str, name: str, array: _Array) -> dict[str, UserType]:
    """Return the types of the columns of an array: one, or a column for each field of a structured type."""
    dtype = array.dtype
    if dtype.names is not None:
        found: dict[str, UserType] = {}
        for field_name in dtype.names:
            inner, shape = dtype[field_name].base, dtype[field_name].shape
            found[field_name] = _type(path, field_name, inner, (*array.shape[1:], *shape))
        return found
    return {name: _type(path, name, dtype, array.shape[1:])}


def _type(path: str, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> UserType:
    native = dtype.newbyteorder("=")
    if native.name in STORED:
        return Tensor(native.name, shape) if shape else native.name
    if dtype.kind in "US" and not shape:
        return "str" if dtype.kind == "U" else "bytes"
    if dtype.kind in "mM" and not shape:
        try:
            return cast("pa.DataType", pa.from_numpy_dtype(native))
        except pa.ArrowNotImplementedError:
            pass
    if dtype.hasobject:
        message = f"{path}: an array of objects, which only pickle reads; files are not unpickled, since that runs code"
        raise SchemaError(message, column=name)
    shown = f"{dtype}{list(shape)}" if shape else str(dtype)
    raise SchemaError(
        f"{path}: values of the type {shown} cannot be packed; convert them, or pack a function", column=name
    )


@contextmanager
def _opened_arrays(files: Files, path: str) -> Iterator[dict[str, tuple[IO[bytes], _Array]]]:
    """Open the arrays of a file. Each is at its first element. Raises ValueError, BadZipFile."""
    with ExitStack() as stack:
        file = stack.enter_context(files.open(path))
        if not path.lower().endswith(".npz"):
            yield {ARRAY_COLUMN: (file, _header(file))}
            return
        archive = stack.enter_context(zipfile.ZipFile(file))
        arrays = {}
        for name in archive.namelist():
            member: IO[bytes] = stack.enter_context(archive.open(name))
            array = _header(member)
            if array.is_fortran and len(array.shape) > 1:  # its rows lie everywhere in it
                spooled = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(member, spooled, 1 << 20)
                member, array = spooled, _Array(array.dtype, array.shape, True, 0)
            arrays[name.removesuffix(_SUFFIX)] = (member, array)
        yield arrays


def _header(file: IO[bytes]) -> _Array:
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"version {version} of the format is not known")
    if version == (1, 0):
        shape, is_fortran, dtype = npy.read_array_header_1_0(file)
    else:
        shape, is_fortran, dtype = npy.read_array_header_2_0(file)
    return _Array(dtype, shape, is_fortran, file.tell())


def _rows(file: IO[bytes], array: _Array, split: InputSplit, step: int) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the rows of a split, `step` at a time."""
    if array.is_fortran and len(array.shape) > 1:
        yield from _fortran_rows(file, array, split, step)
        return
    if split.start:
        file.seek(array.start + split.start * array.row_bytes)
    for start in range(split.start, split.end, step):
        n = min(step, split.end - start)
        data = file.read(n * array.row_bytes)
        if len(data) < n * array.row_bytes:
            raise EOFError("the file ends before the array does")
        yield np.ndarray((n, *array.shape[1:]), array.dtype, data)


def _fortran_rows(file: IO[bytes], array: _Array, split: InputSplit, step: int) -> Iterator[np.ndarray[Any, Any]]:
    """Yield rows of an array whose columns are stored one after the other. A split is read as a whole."""
    n, n_columns, item = split.end - split.start, math.prod(array.shape[1:]), array.dtype.itemsize
    # Unbuffered: each read is a run of a column, and the file's own buffer would read much more.
    raw = file.raw if isinstance(file, io.BufferedReader) else file
    band = np.empty((n_columns, n), array.dtype)
    for column in range(n_columns):
        raw.seek(array.start + (column * array.n_records + split.start) * item)
        left = memoryview(band[column].view(np.uint8) if n else b"")
        while left:
            part = raw.read(len(left))
            if not part:
                raise EOFError("the file ends before the array does")
            left[: len(part)] = part
            left = left[len(part) :]
    rows = band.reshape(*array.shape[:0:-1], n).T
    for start in range(0, n, step):
        yield np.ascontiguousarray(rows[start : start + step])


def _columns(name: str, rows: np.ndarray[Any, Any]) -> dict[str, Any]:
    names = rows.dtype.names
    parts = {name: rows} if names is None else {field: rows[field] for field in names}
    return {column: part.astype(part.dtype.newbyteorder("="), copy=False) for column, part in parts.items()}
