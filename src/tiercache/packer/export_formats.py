"""Formats of files to which data sets are exported: a writer of one file for each."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt
from numpy.typing import NDArray

from tiercache.errors import SchemaError
from tiercache.layouts.mds import MOST_BYTES, Encoding, array_head, encoding_of
from tiercache.layouts.webdataset import KEY, check_key, ending_of
from tiercache.shard.conversion import widen_bfloat16
from tiercache.shard.schema import Column, Kind, Schema

_RAW = (Kind.IMAGE, Kind.BYTES, Kind.STR, Kind.JSON)


class FileWriter(ABC):
    """Writer of one file in a format.

    Attributes:
        codecs: Names of the compressions of this format, the default first.
        group_bytes: Records are passed to write() in tables of about this size.
        file_bytes: Size at which a file ends, and the next one begins.
    """

    codecs: ClassVar[tuple[str, ...]] = ("none",)
    group_bytes: ClassVar[int] = 1 << 20
    file_bytes: ClassVar[int] = 1 << 62

    def __init__(self, sink: Any, schema: Schema, codec: str, first_record: int) -> None:
        """Begin a file. sink: Writable binary file. first_record: Number of the first record in the data set."""
        self.sink, self.schema, self.codec, self.n_records = sink, schema, codec, first_record

    @classmethod
    @abstractmethod
    def check(cls, schema: Schema) -> None:
        """Raise SchemaError if the format cannot have these columns."""

    @abstractmethod
    def write(self, table: pa.Table) -> None:
        """Write records. Raises SchemaError for a value that the format cannot have."""

    def finish(self) -> dict[str, Any]:
        """Write the end of the file. Returns what an index of the files says about this one."""
        return {}

    def columns_of(self, table: pa.Table) -> list[pa.Array]:
        return [_one_array(column) for column in table.columns]


class ParquetFile(FileWriter):
    codecs = ("zstd", "none", "snappy", "gzip", "brotli", "lz4")
    group_bytes = 64 << 20

    def __init__(self, sink: Any, schema: Schema, codec: str, first_record: int) -> None:
        super().__init__(sink, schema, codec, first_record)
        self._writer = pq.ParquetWriter(
            sink,
            schema.arrow,
            compression=codec,
            use_compliant_nested_type=False,  # names of inner fields stay
        )

    @classmethod
    def check(cls, schema: Schema) -> None:
        for column in schema.columns:
            if column.kind is Kind.TENSOR and not column.n_elements:
                raise _no_type(column, "Parquet", "arrow has all types")

    def write(self, table: pa.Table) -> None:
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))

    def finish(self) -> dict[str, Any]:
        self._writer.close()
        return {}


class ArrowFile(FileWriter):
    codecs = ("none", "lz4", "zstd")

    def __init__(self, sink: Any, schema: Schema, codec: str, first_record: int) -> None:
        super().__init__(sink, schema, codec, first_record)
        options = pa.ipc.IpcWriteOptions(compression=None if codec == "none" else codec)
        self._writer = pa.ipc.new_file(sink, schema.arrow, options=options)

    @classmethod
    def check(cls, schema: Schema) -> None:
        pass

    def write(self, table: pa.Table) -> None:
        self._writer.write_batch(pa.RecordBatch.from_arrays(self.columns_of(table), schema=self.schema.arrow))

    def finish(self) -> dict[str, Any]:
        self._writer.close()
        return {}


class JsonLinesFile(FileWriter):
    @classmethod
    def check(cls, schema: Schema) -> None:
        for column in schema.columns:
            if column.kind in (Kind.IMAGE, Kind.BYTES) or not _fits_json(column):
                raise _no_type(column, "JSON", "parquet and arrow have all types, webdataset and mds have bytes")

    def write(self, table: pa.Table) -> None:
        columns = []
        for column, array in zip(self.schema.columns, self.columns_of(table), strict=True):
            values = _json_values(column, array)
            if len(column.shape) > 1:
                for i, value in enumerate(arrays_of(column, array)):
                    if value is not None and 0 in value.shape[:-1]:
                        what = f"record {self.n_records + i} has an array of the shape {value.shape}"
                        raise SchemaError(f"{what}, which lists in JSON do not tell; {_OTHERS}", column=column.name)
            columns.append(values)
        for row in zip(*columns, strict=True):
            record = dict(zip(self.schema.names, row, strict=True))
            try:
                line = json.dumps(record, ensure_ascii=False).encode()
            except UnicodeEncodeError:  # JSON may have half of a surrogate pair
                line = json.dumps(record).encode()
            self.sink.write(line + b"\n")
        self.n_records += table.num_rows


class WebDatasetFile(FileWriter):
    def __init__(self, sink: Any, schema: Schema, codec: str, first_record: int) -> None:
        super().__init__(sink, schema, codec, first_record)
        self._endings = [None if column.name == KEY else ending_of(column) for column in schema.columns]
        self._tar = tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20)  # noqa: SIM115
        self._last_key = ""

    @classmethod
    def check(cls, schema: Schema) -> None:
        endings: dict[str, str] = {}
        for column in schema.columns:
            if column.name == KEY and (column.kind is not Kind.STR or column.nullable):
                raise SchemaError(f"the keys of samples are str, and this is {column}", column=KEY)
            if not _fits_json(column):
                raise _no_type(column, "a tar", "parquet and arrow have all types")
            ending = ending_of(column)
            if "/" in ending or ending in endings:
                reason = "its name has a /" if "/" in ending else f"its files have the ending of {endings[ending]!r}"
                raise SchemaError(f"samples of a tar cannot have this column: {reason}", column=column.name)
            endings[ending] = column.name
        if list(endings.values()) in ([], [KEY]):
            raise SchemaError("a sample of a tar has one file for each column: choose a column besides the key")

    def write(self, table: pa.Table) -> None:
        arrays = self.columns_of(table)
        contents = [_file_contents(*pair) for pair in zip(self.schema.columns, arrays, strict=True)]
        for row in zip(*contents, strict=True):
            key, n_files = f"{self.n_records:09d}", 0
            if None in self._endings:
                key = row[self._endings.index(None)].decode()
                try:
                    check_key(key)
                    if key == self._last_key:
                        raise ValueError(f"{key!r} is also the key of the record before it")
                except ValueError as error:
                    message = f"record {self.n_records}: {error}; without this column, the keys are numbers"
                    raise SchemaError(message, column=KEY) from None
                self._last_key = key
            for ending, content in zip(self._endings, row, strict=True):
                if ending is not None and content is not None:
                    info = tarfile.TarInfo(f"{key}.{ending}")
                    info.size, info.mode = len(content), 0o444
                    self._tar.addfile(info, io.BytesIO(content))
                    n_files += 1
            if not n_files:
                raise SchemaError(
                    f"record {self.n_records} has only nulls, and a tar has no sample without a file: leave it out "
                    "with filter(), or choose more columns"
                )
            self.n_records += 1
            self._tar.members = []  # type: ignore[attr-defined]  # it would keep all of them

    def finish(self) -> dict[str, Any]:
        self._tar.close()
        return {}


class MdsFile(FileWriter):
    """The content of a shard is in memory until finish(), because the table of its records comes first."""

    file_bytes = 64 << 20

    def __init__(self, sink: Any, schema: Schema, codec: str, first_record: int) -> None:
        super().__init__(sink, schema, codec, first_record)
        self._encodings = [_encoding_of(column) for column in schema.columns]
        self._records: list[bytes] = []

    @classmethod
    def check(cls, schema: Schema) -> None:
        for column in schema.columns:
            _encoding_of(column)

    def write(self, table: pa.Table) -> None:
        contents = []
        for column, encoding, array in zip(self.schema.columns, self._encodings, self.columns_of(table), strict=True):
            values = list(_mds_values(column, encoding, array))
            if None in values:
                what = f"record {self.n_records + values.index(None)} has a null, and MDS has nulls only in JSON"
                advice = "leave such records out with filter(), or export to another format, which all have nulls"
                raise SchemaError(f"{what}: {advice}", column=column.name)
            contents.append(values)
        varying = [values for values, one in zip(contents, self._encodings, strict=True) if one.n_bytes is None]
        sizes = np.array([[len(value or b"") for value in values] for values in varying], "<u4").T.tobytes()
        width = 4 * len(varying)
        for i, record in enumerate(zip(*contents, strict=True)):
            self._records.append(b"".join((sizes[i * width : (i + 1) * width], *record)))
        self.n_records += table.num_rows

    def finish(self) -> dict[str, Any]:
        """Write the shard. Returns its entry of index.json, but for its name."""
        entry: dict[str, Any] = {
            "version": 2,
            "format": "mds",
            "compression": None,
            "hashes": ["sha256"],
            "size_limit": self.file_bytes,
            "column_names": list(self.schema.names),
            "column_encodings": list(map(str, self._encodings)),
            "column_sizes": [encoding.n_bytes for encoding in self._encodings],
        }
        described = json.dumps(entry, sort_keys=True).encode()
        n = len(self._records)
        bounds = 8 + 4 * n + len(described) + np.cumsum([0, *map(len, self._records)], dtype=np.int64)
        if bounds[-1] >= MOST_BYTES:
            raise SchemaError(f"{n} records have {bounds[-1]} bytes, and a shard of MDS has less than 4 GiB")
        hashed = hashlib.sha256()
        for part in (np.array([n, *bounds], "<u4").tobytes(), described, *self._records):
            hashed.update(part)
            self.sink.write(part)
        hashes = {"sha256": hashed.hexdigest()}
        return entry | {"samples": n, "raw_data": {"bytes": int(bounds[-1]), "hashes": hashes}, "zip_data": None}


@dataclass(frozen=True, slots=True)
class Format:
    """suffixes: Ends of the names of its files; files of an export to a folder have the first one."""

    suffixes: tuple[str, ...]
    writer: type[FileWriter]


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "parquet": Format((".parquet",), ParquetFile),
        "arrow": Format((".arrow", ".feather", ".ipc"), ArrowFile),
        "webdataset": Format((".tar",), WebDatasetFile),
        "mds": Format((".mds",), MdsFile),
        "jsonl": Format((".jsonl", ".ndjson"), JsonLinesFile),
    }
)
_OTHERS = "export it to another format"


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _no_type(column: Column, what: str, others: str) -> SchemaError:
    return SchemaError(
        f"{what} has no {column}; {others}; or leave the column out (columns=, --columns)", column=column.name
    )


def _encoding_of(column: Column) -> Encoding:
    encoding = encoding_of(column)
    if encoding is None or not _fits_json(column):
        raise _no_type(column, "MDS", "parquet and arrow have all types")
    return encoding


def _fits_json(column: Column) -> bool:
    return column.kind is not Kind.ARROW or _is_plain(column.arrow.type)


def _is_plain(arrow_type: pa.DataType) -> bool:
    """Return whether the Python objects of an Arrow type are those of JSON."""
    if pt.is_map(arrow_type):
        return False
    if pt.is_nested(arrow_type):
        return all(_is_plain(arrow_type.field(i).type) for i in range(arrow_type.num_fields))
    is_number = pt.is_integer(arrow_type) or pt.is_boolean(arrow_type)
    is_number |= pt.is_float32(arrow_type) or pt.is_float64(arrow_type)
    return bool(is_number) or pt.is_string(arrow_type) or pt.is_large_string(arrow_type) or pt.is_null(arrow_type)


def _storage(array: pa.Array) -> pa.Array:
    return array.storage if isinstance(array, pa.ExtensionArray) else array


def _elements(column: Column, flat: pa.Array) -> NDArray[Any]:
    """Return the numbers of a primitive array, whatever lies under its nulls; bfloat16 as float32, bool as bool."""
    memory = flat.buffers()[1]
    stored = np.frombuffer(memory, column.stored) if memory is not None else np.zeros(0, column.stored)
    stored = stored[flat.offset : flat.offset + len(flat)]
    if column.dtype == "bfloat16":
        return widen_bfloat16(stored)
    return stored.view(np.bool_) if column.dtype == "bool" else stored


def _or_none(values: Sequence[Any], array: pa.Array) -> Sequence[Any]:
    if not array.null_count:
        return values
    return [value if valid else None for value, valid in zip(values, array.is_valid().to_pylist(), strict=True)]


def arrays_of(column: Column, array: pa.Array) -> Sequence[NDArray[Any] | None]:
    """Return the arrays of a column of tensors or ragged arrays, in stored form; bfloat16 is widened to float32."""
    storage, n = _storage(array), len(array)
    if column.kind is Kind.TENSOR:
        size = column.n_elements
        values = _elements(column, storage.values.slice(storage.offset * size, n * size))
        return _or_none(list(values.reshape(n, *column.shape)), storage)
    data, shapes = storage.field("data"), storage.field("shape")
    n_dims = len(column.shape)
    sizes = _int32(shapes.values.slice(shapes.offset * n_dims, n * n_dims)).reshape(n, n_dims).tolist()
    offsets, values = data.offsets.to_numpy().tolist(), _elements(column, data.values)
    valid = storage.is_valid().to_pylist() if storage.null_count else [True] * n
    return [values[offsets[i] : offsets[i + 1]].reshape(sizes[i]) if valid[i] else None for i in range(n)]


def _int32(array: pa.Array) -> NDArray[Any]:
    memory = array.buffers()[1]
    return np.zeros(0, "<i4") if memory is None else np.frombuffer(memory, "<i4")[array.offset :][: len(array)]


def _json_values(column: Column, array: pa.Array) -> Sequence[Any]:
    if column.kind is Kind.JSON:
        return [None if text is None else json.loads(text) for text in array.to_pylist()]
    if column.kind is Kind.SCALAR:
        return _or_none(_elements(column, _storage(array)).tolist(), array)
    if column.shape:
        return [None if value is None else value.tolist() for value in arrays_of(column, array)]
    values: list[Any] = array.to_pylist()
    return values


def _raw_values(_: Column, array: pa.Array) -> Sequence[bytes | None]:
    values: list[bytes | None] = _storage(array).cast(pa.large_binary()).to_pylist()
    return values


def _json_texts(column: Column, array: pa.Array) -> Sequence[bytes]:
    return [json.dumps(value).encode() for value in _json_values(column, array)]


def _file_contents(column: Column, array: pa.Array) -> Sequence[bytes | None]:
    """Return the contents of the files of a column of a tar; None: the sample has none."""
    if column.kind in _RAW:
        return _raw_values(column, array)
    if column.shape:
        return [None if value is None else _npy(value) for value in arrays_of(column, array)]
    return _or_none(_json_texts(column, array), array)


def _npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _mds_values(column: Column, encoding: Encoding, array: pa.Array) -> Sequence[bytes | None]:
    if column.kind is Kind.JSON and not array.null_count:
        return _raw_values(column, array)
    if encoding.name == "json":
        return _json_texts(column, array)
    if column.kind in _RAW:
        return _raw_values(column, array)
    if encoding.n_bytes is None:
        return [None if one is None else array_head(one.shape) + one.tobytes() for one in arrays_of(column, array)]
    if column.kind is Kind.TENSOR:
        return [None if one is None else one.tobytes() for one in arrays_of(column, array)]
    memory, width = _elements(column, _storage(array)).tobytes(), encoding.n_bytes
    return [memory[start : start + width] for start in range(0, len(memory), width)]
