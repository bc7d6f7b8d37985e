"""MosaicML MDS: shards of records one after the other, each with a table of its records, as index.json lists them.

A shard is: uint32 n; uint32 offsets[n + 1] of its records in the file; its columns as JSON; the records. A record is:
uint32 size of each value whose encoding has no fixed size; the values. All numbers are little-endian. A shard may be
compressed as a whole; then it is one block.
"""

from __future__ import annotations

import json
import math
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from tiercache.errors import SchemaError
from tiercache.layouts.contract import FileBytes, FileIndex, Folder, Layout, LayoutFile, Numbers, cut_blocks, merged
from tiercache.layouts.spans import Bytes, bytes_at, take_spans, text_array
from tiercache.model import ByteRange, ObjectInfo
from tiercache.shard.conversion import ConversionError
from tiercache.shard.schema import STORED, Column, Kind, Ragged, Schema, Tensor, UserType, find_bad_shape
from tiercache.shard.shard_file import ColumnData

INDEX = "index.json"
# Streaming's names of codecs, and Arrow's.
_CODECS = MappingProxyType({"zstd": "zstd", "gz": "gzip", "bz2": "bz2", "br": "brotli", "snappy": "snappy"})
_NUMBERS = (*(f"{sign}int{8 << i}" for sign in ("", "u") for i in range(4)), "float16", "float32", "float64")
_TYPES: Mapping[str, UserType] = MappingProxyType(
    {name: name for name in (*_NUMBERS, "bytes", "str", "json")}
    | {"int": "int64", "str_int": "int64", "str_float": "float64", "str_decimal": "str"}
    | {"jpeg": "image", "png": "image"}  # the first bytes say what an image is
)
# Encodings whose dtype and number of dimensions are those of the first record.
_ARRAYS = ("ndarray", "pil")
_ARRAY_DTYPES = {8 * STORED[name].itemsize + "uif".index(STORED[name].kind): name for name in _NUMBERS}
# Modes of Pillow by dtype and number of channels; those of other modes would look the same, or have a palette.
PILLOW_MODES = {b"L": ("uint8", 1), b"LA": ("uint8", 2), b"RGB": ("uint8", 3), b"RGBA": ("uint8", 4)}
PILLOW_MODES |= {b"I;16": ("uint16", 1), b"I": ("int32", 1), b"F": ("float32", 1)}
MOST_BYTES = 1 << 32  # offsets have 32 bits


@dataclass(frozen=True, slots=True)
class Encoding:
    """A column's encoding: its name, the dtype and the shape that it fixes, and bytes of a value if they are fixed."""

    name: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    n_bytes: int | None = None

    def __str__(self) -> str:
        fixed = [",".join(map(str, self.shape))] if self.shape else []
        return ":".join([self.name, *([self.dtype] if self.dtype else []), *fixed])

    @staticmethod
    def of(text: str) -> Encoding:
        """Return the encoding that an index names. Raises ValueError."""
        name, *arguments = text.split(":")
        if name in _NUMBERS or name == "int":
            return Encoding(name, n_bytes=STORED[str(_TYPES[name])].itemsize)
        if name == "jpeg":  # with its quality
            return Encoding(name)
        if name != "ndarray" or not arguments:
            return Encoding(text)
        dtype, *shapes = arguments
        if dtype not in _NUMBERS or len(shapes) > 1:
            raise ValueError(f"no such encoding: {text!r}")
        if not shapes:
            return Encoding(name, dtype)
        shape = tuple(map(int, shapes[0].split(",")))
        return Encoding(name, dtype, shape, math.prod(shape) * STORED[dtype].itemsize)


def encoding_of(column: Column) -> Encoding | None:
    """Return the encoding of a column's values when they are written; None: MDS has none that fits.

    Nulls exist only in JSON, so nullable numbers and text are JSON. bfloat16 is widened, and an array of bool has
    uint8. An image of another encoding than PNG is declared as jpeg: readers look at its first bytes.
    """
    dtype = {"bfloat16": "float32", "bool": "uint8"}.get(column.dtype or "", column.dtype or "")
    if column.kind is Kind.TENSOR:
        shape = ",".join(str(dimension) for dimension in column.shape)
        return Encoding.of(f"ndarray:{dtype}:{shape}") if column.n_elements else None
    if column.kind is Kind.RAGGED:
        return Encoding.of(f"ndarray:{dtype}")
    if column.kind is Kind.IMAGE:
        return Encoding.of("png" if column.encoding == "png" else "jpeg")
    if column.kind is Kind.BYTES:
        return Encoding.of("bytes")
    if column.nullable or column.kind not in (Kind.SCALAR, Kind.STR):
        return Encoding.of("json")
    return Encoding.of(dtype or "str")


def array_head(shape: Sequence[int]) -> bytes:
    """Return the bytes before the elements of an array whose encoding does not fix its shape."""
    width = next(width for width in range(4) if max(shape) < 1 << (8 << width))
    return bytes([len(shape) << 2 | width]) + np.array(shape, f"<u{1 << width}").tobytes()


@dataclass(frozen=True, slots=True)
class _Shard:
    """A shard as index.json describes it. codec: Arrow's name of its compression; None: it is not compressed."""

    info: ObjectInfo
    n_records: int
    raw_bytes: int
    codec: str | None
    columns: Mapping[str, Encoding]


class MdsLayout(Layout):
    name = "MDS"

    def __init__(self, schema: Schema, files: Sequence[LayoutFile], encodings: Mapping[str, Encoding]) -> None:
        super().__init__(schema, files)
        self._encodings = dict(encodings)

    @classmethod
    def find(cls, folder: Folder) -> MdsLayout | None:
        """Return the data set that index.json describes.

        The type of an array without a fixed dtype or shape is that of the first record, with dimensions that vary.
        """
        shards = _find_shards(folder)
        if shards is None:
            return None
        if not shards:
            raise SchemaError(f"{folder.url}: {INDEX} lists no records")
        raw = {shard.info.key: shard for shard in shards if shard.codec is None}
        made = folder.index("mds", [one.info for one in raw.values()], lambda info, data: _index(raw[info.key], data))
        indexes = dict(zip(raw, made, strict=True))
        files = []
        for shard in shards:
            index = indexes.get(shard.info.key) or _index_compressed(shard)
            if int(index.n_records.sum()) != shard.n_records:
                raise _other_count(folder.open(shard.info), int(index.n_records.sum()), shard.n_records)
            files.append(LayoutFile(shard.info, index))
        columns = shards[0].columns
        first: Mapping[str, tuple[Bytes, Numbers, Numbers]] = {}
        if any(one.name in _ARRAYS and not one.shape for one in columns.values()):
            first = _values(files[0], folder.open(files[0].info), 0, columns)
        types = {name: _type_of(name, encoding, first.get(name)) for name, encoding in columns.items()}
        return cls(Schema.of(types), files, columns)

    def ranges(self, file: LayoutFile, blocks: Sequence[int], _columns: Sequence[str]) -> list[ByteRange]:
        return merged([one for block in blocks for one in _ranges(file, block, self._encodings)])

    def read(self, file: LayoutFile, data: FileBytes, block: int, columns: Sequence[str]) -> Mapping[str, Any]:
        values = _values(file, data, block, self._encodings)
        found = {}
        for name in columns:
            column = self.schema.columns[self.schema.index(name)]
            try:
                found[name] = _decode(self._encodings[name], column, *values[name])
            except ConversionError as error:
                message = f"expected {error.expected}, got {error.got}"
                raise SchemaError(f"{data.url}, block {block}, record {error.index}: {message}", column=name) from error
            except (ValueError, pa.ArrowException) as error:
                raise data.damaged(f"column {name!r} is not {self._encodings[name].name}: {error}", block) from error
        return found


def _find_shards(folder: Folder) -> list[_Shard] | None:
    """Return the shards that index.json lists, without empty ones; None if it is no index of MosaicML."""
    objects = {info.key: info for info in folder.objects}
    below = [key for key in objects if posixpath.basename(key) == INDEX]
    if INDEX not in objects:
        if below and _entries(folder, objects[below[0]]) is not None:
            names = [posixpath.dirname(key) for key in below]
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise SchemaError(
                f"{folder.url} has no {INDEX}, but folders below it have: {', '.join(names[:5])}{more}. Open one of "
                f"them, such as {folder.url.rstrip('/')}/{names[0]}, or several with tiercache.concat"
            )
        return None
    entries = _entries(folder, objects[INDEX])
    if entries is None:
        return None
    shards: list[_Shard] = []
    for number, entry in enumerate(entries):
        try:
            shard = _shard(entry, objects, folder)
            if shards and shard.columns != shards[0].columns:
                raise ValueError(f"its columns differ from those of {shards[0].info.key}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            text = f"has no {error}" if isinstance(error, KeyError) else str(error)
            raise SchemaError(f"{folder.url.rstrip('/')}/{INDEX}, shard {number}: {text}") from error
        if shard.n_records:
            shards.append(shard)
    return shards


def _entries(folder: Folder, info: ObjectInfo) -> list[Any] | None:
    data = folder.open(info)
    try:
        found = json.loads(bytes(data.read_one(0, data.n_bytes)))
    except (ValueError, RecursionError):
        return None
    entries = found.get("shards") if isinstance(found, dict) and "version" in found else None
    return entries if isinstance(entries, list) else None


def _shard(entry: dict[str, Any], objects: Mapping[str, ObjectInfo], folder: Folder) -> _Shard:
    """Return a shard. Raises KeyError, TypeError, AttributeError, ValueError, and CorruptShard for a file's size."""
    if (entry["format"], entry["version"]) != ("mds", 2):
        raise ValueError(
            f"its format is {entry['format']} {entry['version']}, and tiercache reads only mds 2 of MosaicML's; write "
            "it again with MDSWriter, or its records with tiercache.pack"
        )
    raw, zipped, compression = entry["raw_data"], entry["zip_data"], entry["compression"]
    is_raw = posixpath.normpath(raw["basename"]) in objects or not zipped
    stated = raw if is_raw else zipped
    info = objects.get(posixpath.normpath(stated["basename"]))
    if info is None:
        raise ValueError(f"its file {stated['basename']} is missing; copy the whole folder")
    if info.n_bytes != stated["bytes"]:
        raise folder.open(info).damaged(f"has {info.n_bytes} bytes, and {INDEX} says {stated['bytes']}")
    codec = None if is_raw else _CODECS.get(compression.split(":")[0])
    if not is_raw and codec is None:
        raise ValueError(f"its compression {compression!r} is unknown; it can be {', '.join(_CODECS)}")
    columns = {}
    for name, text, size in zip(entry["column_names"], entry["column_encodings"], entry["column_sizes"], strict=True):
        columns[name] = Encoding.of(text)
        if columns[name].n_bytes != size:
            raise ValueError(f"the values of column {name!r}, {text}, cannot have {size} bytes")
    n_records, raw_bytes = int(entry["samples"]), int(raw["bytes"])
    if n_records < 0 or not 8 + 4 * n_records <= raw_bytes < MOST_BYTES:
        raise ValueError(f"{n_records} records cannot have {raw_bytes} bytes")
    return _Shard(info, n_records, raw_bytes, codec, columns)


def _index(shard: _Shard, data: FileBytes) -> FileIndex:
    """Return the blocks of a shard that is not compressed, from its table of records."""
    table = np.frombuffer(data.read_one(0, 8 + 4 * shard.n_records), "<u4").astype(np.int64)
    if table[0] != shard.n_records:
        raise _other_count(data, int(table[0]), shard.n_records)
    bounds = _checked_bounds(data, table[1:], data.n_bytes)
    sizes = np.diff(bounds)
    record_bytes = _fixed_bytes(shard.columns)
    if record_bytes is not None and (sizes != record_bytes).any():
        raise data.damaged(f"record {int(np.argmax(sizes != record_bytes))} does not have {record_bytes} bytes")
    first = cut_blocks(sizes, shard.n_records)
    starts = bounds[first]
    return FileIndex(np.diff(first), np.diff(starts), {"first": first, "starts": starts})


def _index_compressed(shard: _Shard) -> FileIndex:
    counts = np.array([shard.n_records], np.int64), np.array([shard.raw_bytes], np.int64)
    return FileIndex(*counts, {"codec": np.array(shard.codec)})


def _other_count(data: FileBytes, found: int, stated: int) -> Exception:
    return data.damaged(f"has {found} records, and {INDEX} says {stated}")


def _checked_bounds(data: FileBytes, bounds: Numbers, end: int, block: int | None = None) -> Numbers:
    if bounds[0] < 4 * len(bounds) + 4 or bounds[-1] != end or (np.diff(bounds) < 0).any():
        raise data.damaged("its table of records is damaged: an offset is too small or too large", block)
    return bounds


def _fixed_bytes(columns: Mapping[str, Encoding]) -> int | None:
    """Return the bytes of each record; None if they vary."""
    sizes = [encoding.n_bytes for encoding in columns.values()]
    return None if None in sizes else sum(size or 0 for size in sizes)


def _ranges(file: LayoutFile, block: int, columns: Mapping[str, Encoding]) -> list[ByteRange]:
    """Return the ranges of a block's part of the table, which records of one size do not need, and of its records."""
    parts = file.index.parts
    if "codec" in parts:
        return [ByteRange(0, file.info.n_bytes)]
    first, end = parts["first"][block : block + 2].tolist()
    records = ByteRange(*parts["starts"][block : block + 2].tolist())
    table = [ByteRange(4 + 4 * first, 8 + 4 * end)] if _fixed_bytes(columns) is None else []
    return [*table, records]


def _values(
    file: LayoutFile, data: FileBytes, block: int, columns: Mapping[str, Encoding]
) -> dict[str, tuple[Bytes, Numbers, Numbers]]:
    """Return memory, and start and end of each value in it, by column. Raises CorruptShard."""
    *tables, stored = data.read(_ranges(file, block, columns))
    memory = np.frombuffer(stored, np.uint8)
    n_records = int(file.index.n_records[block])
    if "codec" in file.index.parts:
        memory = _decompressed(data, memory, str(file.index.parts["codec"]), int(file.index.raw_bytes[block]))
        bounds = memory[: 8 + 4 * n_records].view("<u4").astype(np.int64)
        if bounds[0] != n_records:
            raise _other_count(data, int(bounds[0]), n_records)
        bounds = _checked_bounds(data, bounds[1:], len(memory), block)
    elif tables:
        start = int(file.index.parts["starts"][block])
        bounds = np.frombuffer(tables[0], "<u4").astype(np.int64)
        bounds = _checked_bounds(data, bounds, start + len(memory), block) - start
    else:
        bounds = np.arange(n_records + 1) * (len(memory) // n_records)
    try:
        return _split(memory, bounds[:-1], bounds[1:], columns)
    except ValueError as error:
        raise data.damaged(str(error), block) from error


def _split(
    memory: Bytes, starts: Numbers, ends: Numbers, columns: Mapping[str, Encoding]
) -> dict[str, tuple[Bytes, Numbers, Numbers]]:
    n_sizes = sum(not encoding.n_bytes for encoding in columns.values())
    sizes = bytes_at(memory, starts, ends, 4 * n_sizes).view("<u4").astype(np.int64)
    at, found, varying = starts + 4 * n_sizes, {}, iter(sizes.T)
    for name, encoding in columns.items():
        end = at + (encoding.n_bytes or next(varying))
        found[name] = memory, at, end
        at = end
    if not np.array_equal(at, ends):
        wrong = int(np.argmax(at != ends))
        raise ValueError(
            f"record {wrong} has {ends[wrong] - starts[wrong]} bytes, and its values {at[wrong] - starts[wrong]}"
        )
    return found


def _decompressed(data: FileBytes, stored: Bytes, codec: str, n_bytes: int) -> Bytes:
    """Return the content of a compressed shard, after n_bytes + 1 bytes at most."""
    try:
        if codec == "snappy":  # it has no form that Arrow reads as a stream, and states its size at the front
            size, shift = 0, 0
            for byte in stored[:5].tolist():
                size |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    break
            content = pa.Codec(codec).decompress(pa.py_buffer(stored), n_bytes) if size == n_bytes else b""
        else:
            with pa.CompressedInputStream(pa.BufferReader(pa.py_buffer(stored)), codec) as stream:
                content = stream.read_buffer(n_bytes + 1)
    except (OSError, pa.ArrowException) as error:
        raise data.damaged(f"cannot be decompressed: {error}") from error
    if len(content) != n_bytes:
        raise data.damaged(f"does not have {n_bytes} bytes after decompression, as {INDEX} says")
    return np.frombuffer(content, np.uint8)


def _type_of(name: str, encoding: Encoding, first: tuple[Bytes, Numbers, Numbers] | None) -> UserType:
    """Return the type of a column. first: Values of the first block, for arrays whose encoding says too little."""
    if encoding.name == "ndarray" and encoding.shape:
        return Tensor(encoding.dtype, encoding.shape)
    if encoding.name in _ARRAYS and first is not None:
        memory, starts, ends = first
        dtype, shape, *_ = _array_heads(encoding, None, memory, starts[:1], ends[:1])
        return Ragged(dtype, shape)
    if encoding.name in _TYPES:
        return _TYPES[encoding.name]
    reason = f"tiercache does not know this encoding; it knows {', '.join(_TYPES)}, ndarray and pil"
    if encoding.name == "pkl":
        reason = "a pickled value runs code when it is read, so tiercache does not read it; write it as json or bytes"
    raise SchemaError(f"its encoding in MDS is {encoding.name}: {reason}", column=name)


def _decode(encoding: Encoding, column: Column, memory: Bytes, starts: Numbers, ends: Numbers) -> Any:
    """Return the values of a column. Raises ConversionError, ValueError and ArrowException."""
    if encoding.name in _ARRAYS and not encoding.shape:
        return _ragged(encoding, column, memory, starts, ends)
    if encoding.name.startswith("str"):
        text = text_array(memory, starts, ends)
        return text if column.kind is Kind.STR else text.cast(column.storage_type)
    values, offsets = take_spans(memory, starts, ends)
    if encoding.n_bytes is None:
        return ColumnData(len(starts), values, offsets)
    return ColumnData(len(starts), values.view(column.stored).reshape(len(starts), column.n_elements))


def _ragged(encoding: Encoding, column: Column, memory: Bytes, starts: Numbers, ends: Numbers) -> ColumnData:
    dtype, _, shapes, at = _array_heads(encoding, column, memory, starts, ends)
    values, offsets = take_spans(memory, at, ends)
    width = STORED[dtype].itemsize
    if (offsets % width).any() or (shapes >= 1 << 31).any():
        raise ValueError("an array has a part of an element, or too many of them")
    wrong = find_bad_shape(column, shapes, np.diff(offsets) // width)
    if wrong is not None:
        raise ValueError(f"array {wrong} has another number of elements than its shape {shapes[wrong].tolist()}")
    return ColumnData(len(starts), values.view(column.stored), offsets // width, shapes.astype("<i4"))


def _array_heads(
    encoding: Encoding, column: Column | None, memory: Bytes, starts: Numbers, ends: Numbers
) -> tuple[str, tuple[int | None, ...], Numbers, Numbers]:
    """Return dtype and shape of a column of arrays, the shapes of the arrays [n, n_dimensions], and their starts.

    A head is: the dtype, unless the encoding fixes it; the number of dimensions and the width of their sizes in one
    byte; the sizes. column: Expected column; None: the column of the first array. Raises ConversionError for an array
    of another type, and ValueError.
    """
    if encoding.name == "pil":
        return _image_heads(column, memory, starts, ends)
    at, dtype = starts, encoding.dtype
    if not dtype:
        codes = bytes_at(memory, at, ends, 1)[:, 0]
        found = [_ARRAY_DTYPES.get(code, f"type {code}") for code in codes.tolist()]
        dtype = found[0] if column is None or column.dtype is None else column.dtype
        _check_same(column, dtype, found)
        at = at + 1
    heads = bytes_at(memory, at, ends, 1)[:, 0].astype(np.int64)
    at, counts, widths = at + 1, heads >> 2, 1 << (heads & 3)
    n_dims = int(counts[0]) if column is None else len(column.shape)
    _check_same(column, n_dims, counts.tolist())
    shapes = np.zeros((len(starts), n_dims), np.int64)
    for width in np.unique(widths).tolist():
        chosen = widths == width
        shapes[chosen] = bytes_at(memory, at[chosen], ends[chosen], width * n_dims).view(f"<u{width}")
    return dtype, (None,) * n_dims, shapes, at + widths * n_dims


def _image_heads(
    column: Column | None, memory: Bytes, starts: Numbers, ends: Numbers
) -> tuple[str, tuple[int | None, ...], Numbers, Numbers]:
    """Return the same for images of Pillow: width, height, length of the mode, mode, pixels."""
    numbers = bytes_at(memory, starts, ends, 12).view("<u4").astype(np.int64)
    at = starts + 12
    modes = [bytes(memory[a : a + min(n, 8)]) for a, n in zip(at.tolist(), numbers[:, 2].tolist(), strict=True)]
    dtype, channels = PILLOW_MODES.get(modes[0], ("", 0))
    if not dtype:
        raise ValueError(
            f"the mode {modes[0]!r} of images is not supported; those are {', '.join(map(repr, PILLOW_MODES))}"
        )
    if column is not None:
        expected = column.dtype, column.shape[2] if len(column.shape) > 2 else 1
        _check_same(column, expected, [PILLOW_MODES.get(mode, mode) for mode in modes])
        dtype, channels = str(expected[0]), int(expected[1] or 1)
    shapes = numbers[:, [1, 0]]
    if channels > 1:
        shapes = np.column_stack([shapes, np.full(len(starts), channels)])
    return dtype, (None, None, *([channels] if channels > 1 else [])), shapes, at + numbers[:, 2]


def _check_same(column: Column | None, expected: object, found: Sequence[object]) -> None:
    wrong = next((index for index, one in enumerate(found) if one != expected), None)
    if wrong is not None and column is not None:
        raise ConversionError(str(column), f"an array of {found[wrong]}, where others have {expected}", wrong)
