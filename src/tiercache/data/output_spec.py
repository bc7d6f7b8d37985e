"""What a data set gives to the loader: `NativeAccess`, the records and how their columns are served.

An `OutputSpec` has layouts, fill values of nulls, decoded images, casts, tuples, and lists of records. This module
imports neither torch nor the native path, because `Dataset` uses it without a loader. apply_layouts() is the plain
counterpart of what the native path does in a slot's memory (csrc/output_layout.h), without common code.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, Final, Literal, NoReturn, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from tiercache._native import packing
from tiercache.data.records import Records
from tiercache.errors import CorruptShard, SchemaError, TierCacheError
from tiercache.images.decode_image import DecodeImage
from tiercache.shard.conversion import ConversionError, as_numpy, bfloat16_tensor, value_converter
from tiercache.shard.schema import Column, Kind, Schema
from tiercache.shard.values import Casts, ColumnValues, as_batch, as_records, served_column, served_columns

Array: TypeAlias = npt.NDArray[Any]

_NUMBERS = (Kind.SCALAR, Kind.BOOL, Kind.TENSOR, Kind.RAGGED)


def stored_fill(column: Column, fill: Any) -> Any:
    """Return a fill value in stored form: bytes, an array of the record's shape, or an Arrow array of one value.

    A single number fills a whole tensor. Raises SchemaError: the column is not nullable, or cannot hold the value.
    """
    if not column.nullable:
        message = "fill_nulls: only a nullable column takes a fill value, and this column is not nullable"
        raise SchemaError(message, column=column.name, expected="'mask'", got=repr(fill))
    plain = dataclasses.replace(column, nullable=False)
    if column.kind is Kind.TENSOR and _is_single(fill):
        plain = dataclasses.replace(plain, kind=Kind.BOOL if column.dtype == "bool" else Kind.SCALAR, shape=())
    try:
        value = value_converter(plain)(fill)
    except ConversionError as error:
        message = f"fill_nulls: the column cannot hold this fill value: {error}"
        raise SchemaError(message, column=column.name, expected=error.expected, got=error.got) from error
    if column.kind is Kind.TENSOR:
        return np.broadcast_to(np.asarray(value, column.stored), tuple(d or 0 for d in column.shape))
    return np.asarray(value, column.stored) if column.kind in _NUMBERS else value


def _is_single(fill: Any) -> bool:
    n_dimensions = getattr(fill, "ndim", None)  # arrays and tensors of no dimension have __len__ too
    return not hasattr(fill, "__len__") if n_dimensions is None else n_dimensions == 0


def stream_fills(column: Column, fill: Any) -> tuple[bytes, ...]:
    """Return the bytes of a null in each stream of the column (values, shape) but the last, which is the mask."""
    stored = stored_fill(column, fill)
    if column.kind is Kind.RAGGED:
        return np.ascontiguousarray(stored).tobytes(), np.array(stored.shape, "<i4").tobytes()
    return (np.ascontiguousarray(stored).tobytes() if column.kind in _NUMBERS else stored,)


def replace_nulls(found: ColumnValues, fill: Any) -> ColumnValues:
    """Replace the nulls in place, each by a value of its own; return the values without a mask."""
    column, values = found.column, found.values
    if found.valid is None or found.valid.all():
        return ColumnValues(column, values)
    stored = stored_fill(column, fill)
    where = np.flatnonzero(~found.valid).tolist()
    if isinstance(values, np.ndarray):
        values[where] = stored  # stored bools are 0 and 1
    elif isinstance(values, list):
        for index in where:
            values[index] = value_of(column, stored)
    else:
        values[where] = bfloat16_tensor(np.array(stored))
    return ColumnValues(column, values)


def value_of(column: Column, stored: Any) -> Any:
    """Return a stored fill value as the value of a column that is served as a list, in memory of its own."""
    if column.kind is Kind.RAGGED:
        if column.dtype == "bfloat16":
            return bfloat16_tensor(np.array(stored))
        return stored.astype(np.bool_) if column.dtype == "bool" else stored.copy()
    if column.kind is Kind.STR:
        return stored.decode()
    if column.kind is Kind.JSON:
        return json.loads(stored)
    return stored[0].as_py() if column.kind is Kind.ARROW else stored


ColumnLayout: TypeAlias = Literal["list", "padded", "nested", "buffer"]
# BOUNDARIES is the layout of `cu_seqlens` of packed rows (packing.py): the sequences of all rows, end to end. Users
# cannot choose it.
BOUNDARIES: Final = "boundaries"
ServedLayout: TypeAlias = ColumnLayout | Literal["boundaries"]
T = TypeVar("T")
COLUMN_LAYOUTS: tuple[ColumnLayout, ...] = ("list", "padded", "nested", "buffer")
MASK = "mask"


def _positive(name: str, given: Any) -> int:
    try:
        number = operator.index(given)
    except TypeError as error:
        raise TypeError(f"{name} must be a whole number, got {given!r}") from error
    if not 1 <= number < 2**63 or isinstance(given, bool):
        raise ValueError(f"{name} must be 1 or more, got {given!r}")
    return number


@dataclass(frozen=True, slots=True)
class Padded:
    """Layout of a padded column: `Dataset(url, layouts={"labels": tc.Padded(-100, multiple_of=8)})`.

    Each record of a batch lies at the start of a box that is as large as the longest record of the batch, and `value`
    fills the rest of the box. `<column>.lengths` has the length of each record in its box. "padded" is short for
    Padded(). If several dimensions of a record vary, `multiple_of` and `max_length` apply to each of them.

    Attributes:
        value: Number that fills a box after its record: one that the column can hold in its served dtype; for text and
            bytes a byte, 0 to 255.
        multiple_of: Number that divides the length of a box: the length is the next multiple of it, at least one.
        max_length: Maximum length of a record in its box, before the length of the box is rounded up. None: no limit.
        truncate: Whether a longer record is cut after `max_length`. False: a longer record raises SchemaError.

    Raises:
        ValueError, TypeError: An argument is invalid; the message names it, the expected and the given value.
    """

    value: Any = 0
    multiple_of: int = 1
    max_length: int | None = None
    truncate: bool = False

    def __post_init__(self) -> None:
        """Check the values; those of `value` depend on the column."""
        object.__setattr__(self, "multiple_of", _positive("multiple_of", self.multiple_of))
        if self.max_length is not None:
            object.__setattr__(self, "max_length", _positive("max_length", self.max_length))
        if not isinstance(self.truncate, bool):
            raise TypeError(f"truncate is True or False, got {self.truncate!r}")
        if self.truncate and self.max_length is None:
            raise ValueError("truncate=True needs a max_length, after which records are cut")

    def box_length(self, longest: int) -> int:
        """Return the length to which the records of a batch are padded, in elements.

        Args:
            longest: Number of elements of the longest record of the batch, after truncation.
        """
        return longest if self.multiple_of == 1 else -(-max(longest, 1) // self.multiple_of) * self.multiple_of

    def stored_value(self, column: Column) -> npt.NDArray[Any]:
        """Return `value` as a stored element, an array of no dimension. Raises SchemaError if it does not fit.

        Args:
            column: Column, as it is served.
        """
        if isinstance(self.value, int | float) and self.value == 0:  # bool columns take it too
            return np.zeros((), column.stored)
        dtype = column.dtype or "uint8"
        kind = Kind.BOOL if dtype == "bool" else Kind.SCALAR
        plain = dataclasses.replace(column, kind=kind, dtype=dtype, shape=(), nullable=False)
        try:
            return np.asarray(value_converter(plain)(self.value), column.stored)
        except ConversionError as error:
            message = f"Padded: the column cannot hold this value: {error}"
            raise SchemaError(message, column=column.name, expected=error.expected, got=error.got) from error


_ZERO_PADDED = Padded()
Layouts: TypeAlias = Mapping[str, ColumnLayout | Padded]

_LAYOUTS_OF_KIND: dict[Kind, tuple[ColumnLayout, ...]] = {
    Kind.RAGGED: COLUMN_LAYOUTS,
    Kind.BYTES: COLUMN_LAYOUTS,
    Kind.STR: COLUMN_LAYOUTS,
    Kind.IMAGE: COLUMN_LAYOUTS,
    Kind.JSON: ("list",),  # its values are objects; the stored text is not served
}


@dataclass(frozen=True, slots=True, eq=False)
class OutputSpec:
    """The output settings of columns that are not served in the usual way. Immutable; pickles to little more than that.

    Create it with `of`, which checks the settings.
    """

    layouts: Mapping[str, ServedLayout | Padded] = field(default_factory=dict)  # only of columns that are not lists
    nulls: Mapping[str, Any] = field(default_factory=dict)  # fill values, only of columns without a mask
    decode: Mapping[str, DecodeImage] = field(default_factory=dict)
    cast: Casts = field(default_factory=dict)  # only of columns with another stored dtype
    names: tuple[str, ...] | None = None  # of the entries of a tuple; None: dicts

    @staticmethod
    def of(
        schema: Schema,
        *,
        layouts: Layouts | None = None,
        fill_nulls: Mapping[str, Any] | None = None,
        decode: Mapping[str, DecodeImage] | None = None,
        cast: Casts | None = None,
    ) -> OutputSpec:
        """Return the user's settings, checked against `schema`, which has the served columns as they are stored."""
        for argument, given in (("layouts", layouts), ("fill_nulls", fill_nulls), ("decode", decode)):
            if given is not None and not isinstance(given, Mapping):
                raise TypeError(f"{argument} is a mapping from column names, got {type(given).__name__}")
        layouts, fill_nulls, decode = dict(layouts or {}), dict(fill_nulls or {}), dict(decode or {})
        for name in (*layouts, *fill_nulls, *decode, *(cast or {})):
            schema.index(name)
        served = served_columns(schema, cast or {})
        columns = {column.name: served.get(column.name, column) for column in schema.columns}
        for name, options in decode.items():
            _check_decode(columns[name], layouts.get(name, "list"))
            if not isinstance(options, DecodeImage):
                raise TypeError(f"decode takes a tiercache.DecodeImage for column {name!r}, got {options!r}")
        for name, layout in layouts.items():
            _check_layout(columns[name], layout)
            if _name_of(layout) == "padded" and f"{name}.lengths" in columns:
                _refuse(columns[name], f"the name {name + '.lengths'!r} is taken by a column", "another layout", layout)
        fills = {name: copy.deepcopy(fill) for name, fill in fill_nulls.items() if not is_mask(fill)}
        for name, fill in fills.items():
            stored_fill(columns[name], fill)
        casts = {name: column.dtype for name, column in served.items() if column.dtype is not None}
        return OutputSpec({name: layout for name, layout in layouts.items() if layout != "list"}, fills, decode, casts)

    def select(self, names: Sequence[str]) -> OutputSpec:
        """Return the settings of these columns."""
        return replace(
            self,
            layouts=_only(names, self.layouts),
            nulls=_only(names, self.nulls),
            decode=_only(names, self.decode),
            cast=_only(names, self.cast),
            names=None,
        )

    def without_decoding(self) -> OutputSpec:
        """Return the settings in which images to decode are buffers of their encoded bytes."""
        if not self.decode:
            return self
        buffers: dict[str, ServedLayout | Padded] = dict.fromkeys(self.decode, "buffer")
        return replace(self, layouts={**self.layouts, **buffers}, decode={})

    def column(self, stored: Column) -> Column:
        """Return a column as it is served: with another dtype if it is cast."""
        return served_column(stored, self.cast)

    def schema(self, stored: Schema) -> Schema:
        """Return the columns as they are served."""
        return Schema([self.column(column) for column in stored.columns]) if self.cast else stored

    def layout(self, column: Column) -> ServedLayout:
        """Return the layout of a column; "list" has no effect if its records do not differ in length."""
        return _name_of(self.layouts.get(column.name, "list"))

    def padding(self, column: Column) -> Padded:
        """Return how a column of the layout "padded" is padded."""
        layout = self.layouts.get(column.name)
        return layout if isinstance(layout, Padded) else _ZERO_PADDED

    def has_mask(self, column: Column) -> bool:
        """Whether a batch has the entry "<column>.valid"."""
        return column.nullable and column.name not in self.nulls


def _only(names: Sequence[str], settings: Mapping[str, T]) -> dict[str, T]:
    return {name: settings[name] for name in names if name in settings}


def is_mask(fill: object) -> bool:
    """Whether the value in fill_nulls= requests the usual mask, not a fill value."""
    return isinstance(fill, str) and fill == MASK


def varying(column: Column) -> tuple[int, ...]:
    """Return the dimensions in which records of a bytes-like or RAGGED column differ."""
    return tuple(i for i, d in enumerate(column.shape) if d is None) if column.kind is Kind.RAGGED else (0,)


def is_stack_of_rows(column: Column) -> bool:
    """Whether only the first dimension varies, so that records stored end to end form one array."""
    return varying(column) == (0,)


def _name_of(layout: ServedLayout | Padded) -> ServedLayout:
    return "padded" if isinstance(layout, Padded) else layout


def _check_layout(column: Column, given: ColumnLayout | Padded) -> None:
    allowed, layout = _LAYOUTS_OF_KIND.get(column.kind, ()), _name_of(given)
    if layout not in COLUMN_LAYOUTS:
        _refuse(column, "unknown layout", ", ".join(map(repr, allowed or COLUMN_LAYOUTS)), layout)
    if not allowed:
        message = f"layouts= applies to columns whose records differ in length, and this is {column}"
        _refuse(column, message, "none", layout)
    if layout not in allowed:
        _refuse(column, f"this layout is not available for {column}", ", ".join(map(repr, allowed)), layout)
    if layout == "nested" and not is_stack_of_rows(column):
        why = "a jagged nested tensor can vary in one dimension only, the first after the batch's"
        _refuse(column, f"{column}: {why}", "'list', 'padded', 'buffer'", layout)
    if isinstance(given, Padded):
        given.stored_value(column)


def _check_decode(column: Column, layout: object) -> None:
    if column.kind not in (Kind.IMAGE, Kind.BYTES):
        expected = "a column of tiercache.Image or of bytes"
        _refuse(column, f"only images are decoded, and this is {column}", expected, str(column))
    if layout != "list":
        _refuse(
            column,
            "DecodeImage sets the layout of decoded images: remove layouts= or decode= for this column",
            "'list'",
            layout,
        )


def _refuse(column: Column, message: str, expected: str, got: object) -> NoReturn:
    raise SchemaError(
        f"{message} (takes {expected}, got {got!r})", column=column.name, expected=expected, got=repr(got)
    )


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """n values of different lengths, end to end: value i is `values[offsets[i]:offsets[i + 1]]`.

    `buffer[i]` returns that value without a copy; a negative i counts from the end. The members are torch tensors (from
    loaders and `tiercache.collate`) or NumPy arrays (from `dataset[[...]]`). A buffer moves between devices and pins as
    a tensor does, so torch's `pin_memory` accepts it in a batch. The caller owns the memory.

    Attributes:
        values: uint8[n_bytes] for bytes, text (UTF-8) and images. For a ragged column its elements: [n_rows, ...] if
            only the first dimension varies, else flat.
        offsets: int64[n + 1], rising from 0, counted in rows of `values`.
        shapes: int32[n, n_dims], the shape of each value, if a dimension other than the first varies; else None.
    """

    values: Any
    offsets: Any
    shapes: Any = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Any:
        n = len(self)
        at = index + n if index < 0 else index
        if not 0 <= at < n:
            raise IndexError(f"value {index} of a buffer of {n}")
        value = self.values[int(self.offsets[at]) : int(self.offsets[at + 1])]
        return value if self.shapes is None else value.reshape(self.shapes[at].tolist())

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def to(self, *args: Any, **kwargs: Any) -> Buffer:
        """Return the buffer with its tensors on another device. See `torch.Tensor.to`.

        Args:
            args: Arguments of `torch.Tensor.to`. A dtype applies to `values` only.
            kwargs: Keyword arguments of `torch.Tensor.to`.

        Raises:
            AttributeError: The members are NumPy arrays.
        """
        values = self.values.to(*args, **kwargs)
        place = {"device": values.device, "non_blocking": bool(kwargs.get("non_blocking", False))}
        shapes = None if self.shapes is None else self.shapes.to(**place)
        return Buffer(values, self.offsets.to(**place), shapes)

    def pin_memory(self, device: Any = None) -> Buffer:
        """Return the buffer in pinned memory. See `torch.Tensor.pin_memory`.

        Args:
            device: Device of the pinned memory. None: the current accelerator.

        Raises:
            AttributeError: The members are NumPy arrays.
        """
        args = () if device is None else (device,)
        shapes = None if self.shapes is None else self.shapes.pin_memory(*args)
        return Buffer(self.values.pin_memory(*args), self.offsets.pin_memory(*args), shapes)


# Kinds whose nulls are None in a batch; other kinds have a zero or an empty array, and a mask.
_SHOWS_NULLS = (Kind.BYTES, Kind.STR, Kind.IMAGE, Kind.JSON, Kind.ARROW)


def tuple_columns(names: Sequence[str], schema: Schema, output_spec: OutputSpec) -> tuple[str, ...]:
    """Return the columns that a tuple of these names needs, in order."""
    if not names:
        raise ValueError("as_tuple() needs the name of one column or more")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"as_tuple() takes names of columns, got {name!r}")
    found: dict[str, Column] = {}
    for name in names:
        column = schema.columns[schema.index(_column_of(name, schema))]
        if name != column.name and name not in _companions(column, output_spec):
            kinds = "'<column>.valid' is of a nullable column served with its mask, '<column>.lengths' of a padded one"
            raise SchemaError(f"there is no {name!r}: {kinds}", column=column.name, expected=kinds, got=name)
        found[column.name] = column
    for column in found.values():
        visible = (
            column.kind in _SHOWS_NULLS
            and output_spec.layout(column) == "list"
            and column.name not in output_spec.decode
        )
        if output_spec.has_mask(column) and not visible and f"{column.name}.valid" not in names:
            way = f"name {column.name + '.valid'!r} too, or give the data set fill_nulls={{{column.name!r}: ...}}"
            raise SchemaError(f"its nulls would be zeros in a tuple: {way}", column=column.name, expected=way, got="")
    return tuple(found)


def as_columns(batch: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    """Return a batch's entries by name as a list, as torch's default_collate makes of records that are tuples."""
    return [batch[name] for name in names]


def record_tuple(record: Mapping[str, Any], names: Sequence[str], schema: Schema) -> tuple[Any, ...]:
    """Return a record's values by name; masks are np.bool_, lengths int64 or int64[n_varying]."""
    return tuple([record[name] if name in record else _companion(record, name, schema) for name in names])


def _column_of(name: str, schema: Schema) -> str:
    if name in schema.names:
        return name
    return name.removesuffix(".valid").removesuffix(".lengths")


def _companions(column: Column, output_spec: OutputSpec) -> list[str]:
    names = [f"{column.name}.valid"] if output_spec.has_mask(column) else []
    return [*names, f"{column.name}.lengths"] if output_spec.layout(column) == "padded" else names


def _companion(record: Mapping[str, Any], name: str, schema: Schema) -> Any:
    column = schema.columns[schema.index(_column_of(name, schema))]
    value = record[column.name]
    if name.endswith(".valid"):
        return np.bool_(value is not None)
    if column.kind is not Kind.RAGGED:
        return np.int64(len(value.encode() if isinstance(value, str) else value or b""))
    dims = varying(column)
    lengths = np.array([0 if value is None else value.shape[d] for d in dims], np.int64)
    return lengths[0] if len(dims) == 1 else lengths


RecordNumber: TypeAlias = Callable[[int], int]
"""Function of an index among the records that were read that returns the record's number, for errors."""


def apply_layouts(
    columns: Sequence[ColumnValues], output_spec: OutputSpec, number: RecordNumber | None = None
) -> dict[str, Any]:
    """Return the batch by column: array, list, Buffer or nested tensor.

    It also has the lengths of padded columns and the masks of nullable ones. Raises SchemaError: a nested tensor is
    requested, and torch is not installed; or a record is longer than its column's `max_length`.
    """
    if not output_spec.layouts:
        return as_batch(columns)
    batch: dict[str, Any] = {}
    for found in columns:
        name, layout = found.column.name, output_spec.layout(found.column)
        if layout == "list":
            batch[name] = found.values
        elif layout == BOUNDARIES:
            batch[name], batch["max_seqlen"] = joined_boundaries(found.values)
        elif layout == "padded":
            padding = output_spec.padding(found.column)
            error = length_error(found, padding, number)
            if error is not None:
                raise error
            batch[name], batch[f"{name}.lengths"] = _padded(found.column, _runs(found), padding)
        elif layout == "buffer":
            batch[name] = _buffer(found.column, _runs(found))
        else:
            batch[name] = _nested(found.column, _buffer(found.column, _runs(found)))
        if found.valid is not None:
            batch[f"{name}.valid"] = found.valid
    return batch


def joined_boundaries(rows: Sequence[npt.NDArray[np.int32]]) -> tuple[npt.NDArray[np.int32], int]:
    """Return `cu_seqlens` and `max_seqlen` of a batch of packed rows, given the boundaries of each row."""
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return packing.join_boundaries(np.concatenate([np.empty(0, np.int32), *rows]), offsets)


def _runs(found: ColumnValues) -> list[Array]:
    """Return each record's elements as an array of the stored dtype; a null has no elements."""
    column = found.column
    if column.kind is Kind.RAGGED:
        none = np.zeros([d or 0 for d in column.shape], column.stored)
        return [none if value is None else _stored(column, value) for value in found.values]
    encoded = (value.encode() if isinstance(value, str) else value or b"" for value in found.values)
    return [np.frombuffer(value, np.uint8) for value in encoded]


def _stored(column: Column, value: Any) -> Array:
    read = as_numpy(value)  # bfloat16 tensors as their bits
    array = value if read is None else read[0]
    return np.asarray(array.view(column.stored))


def _typed(column: Column, stored: Array) -> Any:
    if column.dtype == "bool":
        return stored.view(np.bool_)
    if column.dtype != "bfloat16":
        return stored
    return bfloat16_tensor(stored)


def _shapes(column: Column, runs: Sequence[Array]) -> npt.NDArray[np.int64]:
    n_dims = max(len(column.shape), 1)
    return np.array([run.shape for run in runs], np.int64).reshape(len(runs), n_dims)


def length_error(found: ColumnValues, padding: Padded, number: RecordNumber | None = None) -> SchemaError | None:
    """Return the error of the first record that is longer than max_length; None if there is none, or it may be cut."""
    limit = padding.max_length
    if limit is None or padding.truncate:
        return None
    for index, run in enumerate(_runs(found)):
        longest = max(run.shape[dimension] for dimension in varying(found.column))
        if longest > limit:
            return SchemaError(
                f"the record's length is {longest}, and max_length is {limit}: raise it, or set truncate=True",
                column=found.column.name,
                record=None if number is None else number(index),
                expected=f"a length of at most {limit}",
                got=longest,
            )
    return None


def _padded(column: Column, runs: Sequence[Array], padding: Padded = _ZERO_PADDED) -> tuple[Any, npt.NDArray[np.int64]]:
    """Return (array [n, longest, ...], padded; lengths, int64[n] or int64[n, n_varying])."""
    vary = list(varying(column))
    if padding.truncate:
        kept = slice(padding.max_length)
        cut = tuple(kept if dimension in vary else slice(None) for dimension in range(max(len(column.shape), 1)))
        runs = [run[cut] for run in runs]
    shapes = _shapes(column, runs)
    dims = [d or 0 for d in column.shape] or [0]
    for dimension in vary:
        dims[dimension] = padding.box_length(int(shapes[:, dimension].max(initial=0)))
    out = np.full((len(runs), *dims), padding.stored_value(column), column.stored)
    for index, run in enumerate(runs):
        place: tuple[int | slice, ...] = (index, *(slice(n) for n in run.shape))
        out[place] = run
    lengths = np.ascontiguousarray(shapes[:, vary])
    return _typed(column, out), lengths[:, 0] if len(vary) == 1 else lengths


def _buffer(column: Column, runs: Sequence[Array]) -> Buffer:
    shapes, rows = _shapes(column, runs), is_stack_of_rows(column)
    inner = tuple(d or 0 for d in column.shape[1:]) if rows else ()
    flat = runs if rows else [run.reshape(-1) for run in runs]
    values = np.concatenate([np.zeros((0, *inner), column.stored), *flat])
    offsets = np.zeros(len(runs) + 1, np.int64)
    np.cumsum(shapes[:, 0] if rows else shapes.prod(axis=1), out=offsets[1:])
    return Buffer(_typed(column, values), offsets, None if rows else shapes.astype(np.int32))


def _nested(column: Column, buffer: Buffer) -> Any:
    try:
        torch = import_module("torch")
    except ModuleNotFoundError as error:
        message = "the layout 'nested' is a torch tensor, and torch is not installed; 'buffer' is of NumPy arrays"
        raise SchemaError(message, column=column.name, expected="torch", got="no torch") from error
    values = torch.as_tensor(buffer.values)
    return torch.nested.nested_tensor_from_jagged(values, torch.from_numpy(buffer.offsets))


Record = dict[str, Any]


def served_records(columns: Sequence[ColumnValues], output_spec: OutputSpec) -> list[Any]:
    """Return each record of some columns as the data set serves it: a dict, or a tuple if the settings have names."""
    records = as_records(columns)
    if output_spec.names is None:
        return records
    schema = Schema([found.column for found in columns])
    return [record_tuple(record, output_spec.names, schema) for record in records]


class ReadRecords(Sequence[Any]):
    """Records that were read together; `columns` holds the same rows by column.

    `Dataset.__getitems__` returns it to torch's fetcher. `tiercache.collate` uses `columns`, so the records are made
    only for other collate functions, at the first access. One thread at a time uses it. as_gathered: No record was
    accessed, so none can have been changed.
    """

    def __init__(
        self, columns: Sequence[ColumnValues], n_records: int, output_spec: OutputSpec, number: RecordNumber
    ) -> None:
        self.columns, self.output_spec, self.number = columns, output_spec, number
        self.as_gathered = True
        self._n_records = n_records
        self._records: list[Any] = []

    def __len__(self) -> int:
        return self._n_records

    def __getitem__(self, index: Any) -> Any:
        if self.as_gathered:
            self.as_gathered = False
            self._records = served_records(self.columns, self.output_spec)
        return self._records[index]


@dataclass(frozen=True, slots=True)
class NativeAccess:
    """What a tiercache data set gives to the loader, by its method `__tiercache__`."""

    source: Records
    output_spec: OutputSpec
    transform: Callable[[Record], Any] | None
    batch_transform: Callable[[Any], Any] | None
    overrides_access: bool  # whether the data set's class overrides how records are read

    @property
    def is_plain(self) -> bool:
        """Whether records are served as stored: no transform, and no subclass that overrides record access."""
        return self.transform is None and not self.overrides_access


@runtime_checkable
class NativeDataset(Protocol):
    """A data set that the loader reads by its native path: `tiercache.Dataset`."""

    def __len__(self) -> int: ...

    def __tiercache__(self) -> NativeAccess:
        """Return what the loader reads."""


def native_access(dataset: object) -> NativeAccess | None:
    """Return the access to a tiercache data set; None for any other data set."""
    return dataset.__tiercache__() if isinstance(dataset, NativeDataset) else None


def record_number(source: Records, shard: int, block: int, row: int) -> int:
    """Return the number, in stored order, of the record in a row of a block of a shard. May read a footer."""
    before = source.block_sizes([shard])[0].records[:block].sum() + source.shard_records[:shard].sum()
    return int(before) + row


def image_decode_error(source: Records, column: str, record: int, reason: str) -> CorruptShard:
    """Return the error of an image that cannot be decoded: url, block, column, record and the decoder's message."""
    ends = np.cumsum(source.shard_records)
    shard = int(np.searchsorted(ends, record, side="right"))
    within = record - int(ends[shard] - source.shard_records[shard])
    block_ends = np.cumsum(source.block_sizes([shard])[0].records)
    block = int(np.searchsorted(block_ends, within, side="right"))
    try:
        url = source.load_blocks(shard, [block]).url
    except TierCacheError:  # The shard can no longer be read; the image's error is the one to report.
        url = source.url
    message = f"record {record}: the image cannot be decoded: {reason}"
    return CorruptShard(message, url=url, block=block, column=column, record=record)
