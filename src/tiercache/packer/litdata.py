"""Data sets of LitData as a source of a packing: the records of chunks, by the index of their folder.

A chunk has the number of its records, their offsets and the records; a record has the sizes of its leaves and the
leaves. The index states how each leaf is stored, and the tree of which they are the leaves. Records that are dicts of
plain values are a table instead: LitData 0.2.76 writes an Arrow IPC file at the end of a chunk, and no leaves.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
import zstandard

from tiercache.errors import SchemaError
from tiercache.layouts.mds import PILLOW_MODES
from tiercache.packer.files import (
    INDEX_FILE,
    BadRecord,
    Files,
    InputBatch,
    InputSplit,
    SourceFile,
    read_bytes,
    record_location,
)
from tiercache.packer.tables import say_type
from tiercache.shard.conversion import infer_records
from tiercache.shard.schema import Image, Schema, UserType

_SAMPLE_RECORDS, _SAMPLE_BYTES = 100, 16 << 20
_BATCH_RECORDS = 4096
_FRAMES = struct.Struct("<8sHHIII")  # magic, version, flags, records, records of a frame, frames
_FRAME = struct.Struct("<IIQII")  # first record, records, offset, compressed bytes, bytes
_FRAMES_MAGIC = b"LDFZ01\0\0"
_TABLE = struct.Struct("<I8s")  # at the end of a chunk: bytes of the Arrow IPC file before it, magic
_TABLE_MAGIC = b"LDARW01\0"
_COMPLEX = "complex"
# By the number that LitData gives a type of torch or NumPy; some have several.
_TORCH_TYPES: tuple[str, ...] = ("f4", "f4", "f8", "f8", *(_COMPLEX,) * 4, "f2", "f2", "bfloat16")
_TORCH_TYPES += ("u1", "i1", "i2", "i2", "i4", "i4", "i8", "i8", "?", "u2")
_NUMPY_TYPES = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", _COMPLEX, _COMPLEX, "?")
_DICTS = ("builtins.dict", "collections.OrderedDict")
_LISTS = ("builtins.list", "builtins.tuple")
_REMEDY = "pack it by module:callable, which returns litdata.StreamingDataset"


@dataclass(frozen=True)
class LitDataChunks:
    """Chunks of a data set of LitData, a files.RecordSource. A split is a chunk.

    formats: How the leaves are stored, in LitData's terms; leaves: their columns. is_tokens: Whether a record is a bare
    array, as that of LitData's TokensLoader. compression: Unit that zstd compresses, "chunk", "batch" or "sample"; "":
    none.
    """

    files: Files
    schema: Schema
    splits: tuple[InputSplit, ...]
    formats: tuple[str, ...]
    leaves: tuple[str, ...]
    is_tokens: bool
    compression: str

    def read(self, split: InputSplit, batch_bytes: int) -> Iterator[InputBatch]:
        path = self.files.location(split.path)
        rows: list[dict[str, Any]] = []
        numbers: list[int] = []
        bad: list[BadRecord] = []
        number = n_bytes = 0

        def batch() -> InputBatch:
            columns = {name: [row[name] for row in rows] for name in self.schema.names}
            places = tuple(numbers)
            return InputBatch(columns, len(rows), n_bytes, lambda i: f"{path}, record {places[i]}", bad)

        try:
            for data in self.items(split):
                try:
                    rows.append(self.record(data))
                    numbers.append(number)
                except ValueError as error:
                    bad.append(BadRecord(f"{path}, record {number}", str(error), data))
                number, n_bytes = number + 1, n_bytes + len(data)
                if n_bytes >= batch_bytes or len(rows) == _BATCH_RECORDS:
                    yield batch()
                    rows, numbers, bad, n_bytes = [], [], [], 0
        except (ValueError, zstandard.ZstdError) as error:
            bad.append(BadRecord(f"{path}, from record {number} on", f"damaged chunk: {error}"))
        if rows or bad:
            yield batch()

    def items(self, split: InputSplit) -> Iterator[bytes]:
        """Yield the bytes of the records of a chunk. Raises ValueError and ZstdError."""
        with self.files.open(split.path) as file:
            if self.compression == "batch":
                yield from _framed(file, split.end)
            elif self.compression == "chunk":
                unpacked = zstandard.ZstdDecompressor().stream_reader(file)
                yield from _items(io.BufferedReader(cast("io.RawIOBase", unpacked), 1 << 20), split.end)
            else:
                items = _items(file, split.end)
                yield from map(_unpacked, items) if self.compression == "sample" else items

    def record(self, data: bytes) -> dict[str, Any]:
        """Return the leaves of a record by column. Raises ValueError."""
        parts = [data] if self.is_tokens else self._parts(data)
        decoded = zip(self.leaves, self.formats, parts, strict=True)
        return {name: _decode(name, format_name, part) for name, format_name, part in decoded}

    def _parts(self, data: bytes) -> list[bytes]:
        n = len(self.formats)
        if len(data) < 4 * n:
            raise ValueError(f"expected the sizes of {n} leaves, got {len(data)} bytes")
        bounds = list(accumulate(struct.unpack_from(f"<{n}I", data), initial=4 * n))
        if bounds[-1] != len(data):
            raise ValueError(f"its leaves have {bounds[-1]:,} bytes, and the record {len(data):,}")
        return [data[start:end] for start, end in pairwise(bounds)]


@dataclass(frozen=True)
class LitDataTables:
    """Chunks of a data set of LitData with tables, a files.RecordSource. A split is a chunk.

    column_names: Names of all columns.
    """

    files: Files
    schema: Schema
    splits: tuple[InputSplit, ...]
    column_names: tuple[str, ...]

    def read(self, split: InputSplit, batch_bytes: int) -> Iterator[InputBatch]:
        path = self.files.location(split.path)
        number = 0
        try:
            table = _table_at_end(self.files, split.path)
            if table is None or len(table) != split.end:
                found = "no table" if table is None else f"{len(table):,}"
                raise ValueError(f"expected a table of {split.end:,} records, got {found}")
            if new := set(table.column_names) - set(self.column_names):
                raise ValueError(f"the first chunk has no column {min(new)!r}; {say_type(min(new))}")
            step = max(1, batch_bytes * len(table) // max(table.nbytes, 1))
            for batch in table.to_batches(max_chunksize=step):
                n = len(batch)
                there = {name: batch[name] for name in table.column_names}
                columns = {name: there[name] if name in there else pa.nulls(n) for name in self.schema.names}
                yield InputBatch(columns, n, split.n_bytes * n // len(table), partial(record_location, path, number))
                number += n
        except (ValueError, OSError) as error:  # pa.ArrowInvalid is a ValueError
            location = f"{path}, from record {number} on"
            yield InputBatch({}, 0, 0, str, [BadRecord(location, f"damaged chunk: {error}")])


def _table_at_end(files: Files, path: str) -> pa.Table | None:
    """Return the table at the end of a chunk; None if there is none. Raises pa.ArrowInvalid."""
    with files.open(path) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(size - _TABLE.size, 0))
        end = file.read()
        if len(end) < _TABLE.size or (found := _TABLE.unpack(end))[1] != _TABLE_MAGIC:
            return None
        file.seek(max(size - _TABLE.size - found[0], 0))
        return pa.ipc.open_file(pa.py_buffer(_exactly(file, found[0]))).read_all()


def _find_tables(
    files: Files, splits: tuple[InputSplit, ...], first: pa.Table, given: Mapping[str, UserType]
) -> LitDataTables:
    """Return chunks with tables. A column is nullable if the first chunk has a null in it."""
    columns = zip(first.schema, first.columns, strict=True)
    types: dict[str, UserType] = {field.name: field.with_nullable(column.null_count > 0) for field, column in columns}
    types |= given
    if unknown := [field.name for field in first.schema if types[field.name] == pa.field(field.name, pa.null())]:
        message = f"{files.location(splits[0].path)}: only null in its records; {say_type(unknown[0])}"
        raise SchemaError(message, column=unknown[0])
    return LitDataTables(files, Schema.of(types), splits, tuple(types))


def find_litdata(
    files: Files, found: Sequence[SourceFile], given: Mapping[str, UserType]
) -> LitDataChunks | LitDataTables:
    """Return the chunks that the index of a folder lists; the first 100 records give the shapes of arrays.

    given: types of some columns. Raises SchemaError: there are several indexes, chunks are missing, or leaves are
    stored in a way that cannot be read without running code, or without LitData.
    """
    indexes = [file.path for file in found if file.path.rpartition("/")[2] == INDEX_FILE]
    if len(indexes) != 1:
        listed = ", ".join(indexes) or "none"
        raise SchemaError(f"{files.location('')}: expected the {INDEX_FILE} of one data set of LitData, got {listed}")
    location = files.location(indexes[0])
    with files.open(indexes[0]) as opened:
        text = opened.read()
    try:
        index = json.loads(text)
        chunks = [(str(c["filename"]), int(c["chunk_size"]), int(c["chunk_bytes"])) for c in index["chunks"]]
        config: dict[str, Any] = dict(index["config"])
        formats = tuple(str(one) for one in config["data_format"])
        is_tokens = config.get("item_loader") == "TokensLoader"
        leaves = _leaves(config.get("data_spec"), "tokens" if is_tokens else "value")
    except (ValueError, TypeError, KeyError, IndexError) as error:
        what = f"{type(error).__name__}: {error}"
        raise SchemaError(f"{location}: not an index of LitData that tiercache can read: {what}; {_REMEDY}") from error
    if config.get("encryption"):
        raise SchemaError(f"{location}: the data set is encrypted; {_REMEDY}")
    if config.get("item_loader") not in (None, "PyTreeLoader", "TokensLoader"):
        raise SchemaError(f"{location}: its chunks are for LitData's {config['item_loader']}; {_REMEDY}")
    compression = str(config.get("compression") or "")
    if compression and compression.partition(":")[0] != "zstd":
        raise SchemaError(f"{location}: expected the compression zstd, got {compression!r}; {_REMEDY}")
    folder = indexes[0].removesuffix(INDEX_FILE)
    sizes = {file.path: file.n_bytes for file in found}
    if missing := [name for name, _, _ in chunks if folder + name not in sizes]:
        raise SchemaError(f"{location}: it lists {len(chunks):,} chunks, of which {missing[0]!r} does not exist")
    if not chunks:
        raise SchemaError(f"{location}: it lists no chunks, so there are no records")
    splits = tuple(InputSplit(folder + name, 0, n, n_bytes) for name, n, n_bytes in chunks)
    try:
        table = _table_at_end(files, splits[0].path)
    except (ValueError, OSError) as error:
        raise SchemaError(f"{files.location(splits[0].path)}: damaged chunk: {error}") from error
    if table is not None:
        return _find_tables(files, splits, table, given)
    if len(leaves) != len(formats) or len(set(leaves)) != len(leaves) or (is_tokens and len(leaves) != 1):
        raise SchemaError(f"{location}: expected a column for each of the leaves {formats}, got {leaves}; {_REMEDY}")
    for name, format_name in zip(leaves, formats, strict=True):
        _check_format(location, name, format_name)
    level = str(config.get("compression_level") or "chunk") if compression else ""
    source = LitDataChunks(files, Schema.of({}), splits, formats, leaves, is_tokens, level)
    return _with_types(source, given)


def _with_types(source: LitDataChunks, given: Mapping[str, UserType]) -> LitDataChunks:
    sample: list[dict[str, Any]] = []
    first = source.splits[0]
    n_bytes = 0
    location = source.files.location(first.path)
    try:
        for data in source.items(first):
            sample.append(source.record(data))
            n_bytes += len(data)
            if len(sample) == _SAMPLE_RECORDS or n_bytes >= _SAMPLE_BYTES:
                break
    except (ValueError, zstandard.ZstdError) as error:
        raise SchemaError(f"{location}, record {len(sample)}: {error}") from error
    if new := [name for name in given if name not in source.leaves]:
        raise SchemaError(f"{location}: no such column; there are {', '.join(source.leaves)}", column=new[0])
    types: dict[str, UserType] = {}
    for name, format_name in zip(source.leaves, source.formats, strict=True):
        stated = given.get(name, _STATED.get(format_name.partition(":")[0]))
        if stated is None:
            stated = infer_records([{name: row[name]} for row in sample]).arrow.field(name)
        types[name] = stated
    return replace(source, schema=Schema.of(types))


def _leaves(spec: str | None, alone: str) -> tuple[str, ...]:
    """Return the names of the leaves of a tree: keys and indices, joined with dots. Raises ValueError, KeyError."""
    if spec is None:
        return (alone,)
    version, tree = json.loads(spec)
    if version != 1:
        raise ValueError(f"its data_spec has the version {version}")
    return tuple(".".join(path) or alone for path in _paths(tree))


def _paths(tree: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    children = tree["children_spec"]
    if tree["type"] is None:
        yield ()
        return
    if tree["type"] in _DICTS:
        keys = [str(key) for key in json.loads(tree["context"])]
    elif tree["type"] in _LISTS:
        keys = [str(i) for i in range(len(children))]
    else:
        raise ValueError(f"its records have a {tree['type']}")
    for key, child in zip(keys, children, strict=True):
        for path in _paths(child):
            yield (key, *path)


def _items(file: IO[bytes], n_expected: int) -> Iterator[bytes]:
    n = _numbers(file, 1)[0]
    if n != n_expected:
        raise ValueError(f"expected {n_expected:,} records as in the index, got {n:,}")
    offsets = _numbers(file, n + 1)
    if offsets[0] != 4 * (n + 2) or any(end < start for start, end in pairwise(offsets)):
        raise ValueError("the offsets of its records do not rise")
    for start, end in pairwise(offsets):
        yield _exactly(file, end - start)


def _numbers(file: IO[bytes], n: int) -> list[int]:
    return cast("list[int]", np.frombuffer(_exactly(file, 4 * n), "<u4").tolist())


def _exactly(file: IO[bytes], n_bytes: int) -> bytes:
    data = read_bytes(file, n_bytes)
    if len(data) < n_bytes:
        raise ValueError(f"the chunk ends early: expected {n_bytes:,} bytes, got {len(data):,}")
    return data


def _framed(file: IO[bytes], n_expected: int) -> Iterator[bytes]:
    """Yield the records of a chunk in which batches of records are compressed."""
    magic, version, _, n, _, n_frames = _FRAMES.unpack(_exactly(file, _FRAMES.size))
    if (magic, version, n) != (_FRAMES_MAGIC, 1, n_expected):
        raise ValueError(f"expected frames of {n_expected:,} records, got {magic!r}, version {version}, {n:,} records")
    offsets = _numbers(file, n + 1)
    table = _exactly(file, _FRAME.size * n_frames)
    for first, n_items, at, packed_bytes, n_bytes in _FRAME.iter_unpack(table):
        file.seek(at)
        data = _unpacked(_exactly(file, packed_bytes))
        bounds = offsets[first : first + n_items + 1]
        if len(data) != n_bytes or len(bounds) != n_items + 1 or bounds[-1] - bounds[0] != n_bytes:
            raise ValueError("a frame has another size than the table says")
        for start, end in pairwise(bounds):
            yield data[start - bounds[0] : end - bounds[0]]


def _unpacked(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(data)


def _no_header(kinds: Sequence[str], kind: str, data: bytes) -> np.ndarray[Any, Any]:
    return np.frombuffer(data, _dtype(kinds, int(kind)))


def _tensor(_: str, data: bytes) -> np.ndarray[Any, Any]:
    return _array(data, ">", _TORCH_TYPES)


def _numpy(_: str, data: bytes) -> np.ndarray[Any, Any]:
    return _array(data, "<", _NUMPY_TYPES)


def _array(data: bytes, order: str, kinds: Sequence[str]) -> np.ndarray[Any, Any]:
    kind, rank = struct.unpack_from(f"{order}2I", data)
    if rank > len(data) // 4:
        raise ValueError(f"an array with {rank:,} dimensions")
    shape = struct.unpack_from(f"{order}{rank}I", data, 8)
    return np.frombuffer(data, _dtype(kinds, kind), offset=8 + 4 * rank).reshape(shape)


def _dtype(kinds: Sequence[str], number: int) -> np.dtype[Any]:
    if number >= len(kinds) or kinds[number] in (_COMPLEX, "bfloat16"):
        what = f"got {kinds[number]}" if number < len(kinds) else f"LitData's type {number}"
        raise ValueError(f"expected elements that are real numbers or bool, {what}")
    return np.dtype(kinds[number]).newbyteorder("<")


def _pil(_: str, data: bytes) -> np.ndarray[Any, Any]:
    width, height, n = struct.unpack_from("<3I", data)
    mode = data[12 : 12 + n]
    if mode not in PILLOW_MODES:
        raise ValueError(
            f"the mode {mode!r} of images is not supported; those are {', '.join(map(repr, PILLOW_MODES))}"
        )
    dtype, channels = PILLOW_MODES[mode]
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<"), offset=12 + n).reshape(shape)


def _jpeg_array(_: str, data: bytes) -> list[bytes]:
    (n,) = struct.unpack_from("<I", data)
    if n > len(data) // 4:
        raise ValueError(f"a list of {n:,} images")
    bounds = list(accumulate(struct.unpack_from(f"<{n}I", data, 4), initial=4 + 4 * n))
    if bounds[-1] != len(data):
        raise ValueError("the sizes of its images do not add up")
    return [data[start:end] for start, end in pairwise(bounds)]


def _bytes(_: str, data: bytes) -> bytes:
    return data


# By the name of the format, without what follows ":". The functions take that part, and the bytes.
_DECODERS: Mapping[str, Callable[[str, bytes], Any]] = {
    "int": lambda _, data: struct.unpack("<q", data)[0],
    "float": lambda _, data: struct.unpack("<d", data)[0],
    "bool": lambda _, data: data != b"\0",
    "str": lambda _, data: data.decode(),
    "text": lambda _, data: data.decode(),
    "tensor": _tensor,
    "no_header_tensor": partial(_no_header, _TORCH_TYPES),
    "numpy": _numpy,
    "no_header_numpy": partial(_no_header, _NUMPY_TYPES),
    "pil": _pil,
    "jpeg_array": _jpeg_array,
    **dict.fromkeys(("bytes", "jpeg", "image", "file", "video", "tifffile", "tiff"), _bytes),
}
_STATED: Mapping[str, UserType] = {
    "int": "int64",
    "float": "float64",
    "bool": "bool",
    "str": "str",
    "text": "str",
    "jpeg": Image("jpeg"),
    "image": Image(),
    "tifffile": Image(),
    "tiff": Image(),
    "jpeg_array": "list<bytes>",
    **dict.fromkeys(("bytes", "file", "video"), "bytes"),
}


def _check_format(location: str, name: str, format_name: str) -> None:
    if format_name.partition(":")[0] in _DECODERS:
        return
    if "pickle" in format_name:
        reason = "pickled values, which are not unpickled, since that runs code"
    else:
        reason = f"values that LitData stores as {format_name!r}; tiercache reads {', '.join(_DECODERS)}"
    raise SchemaError(f"{location}: {reason}; {_REMEDY}", column=name)


def _decode(name: str, format_name: str, data: bytes) -> Any:
    kind, _, argument = format_name.partition(":")
    try:
        return _DECODERS[kind](argument, data)
    except (ValueError, struct.error) as error:
        raise ValueError(f"the leaf {name!r} is no {format_name}: {error}") from error
