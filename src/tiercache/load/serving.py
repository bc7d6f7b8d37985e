"""How columns are served: their layouts, fill values of nulls, decoded images and casts."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn, TypeAlias, TypeVar

from tiercache.errors import SchemaError
from tiercache.images.options import DecodeImage
from tiercache.load.fills import stored_fill
from tiercache.shard.conversion import Casts, served_column, served_columns
from tiercache.shard.schema import Column, Kind, Schema

ColumnLayout: TypeAlias = Literal["list", "padded", "nested", "buffer"]
T = TypeVar("T")
COLUMN_LAYOUTS: tuple[ColumnLayout, ...] = ("list", "padded", "nested", "buffer")
MASK = "mask"

_FORMS_OF: dict[Kind, tuple[ColumnLayout, ...]] = {
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

    Attributes:
        forms: Column -> layout, only for columns that are not lists.
        nulls: Column -> fill value, only for columns without a mask.
        decode: Column -> how its images are decoded.
        cast: Column -> dtype, only for columns with another stored dtype.
        names: Names of the entries of a tuple, if records and batches are tuples; else None.
    """

    layouts: Mapping[str, ColumnLayout] = field(default_factory=dict)
    nulls: Mapping[str, Any] = field(default_factory=dict)
    decode: Mapping[str, DecodeImage] = field(default_factory=dict)
    cast: Casts = field(default_factory=dict)
    names: tuple[str, ...] | None = None

    @staticmethod
    def of(
        schema: Schema,
        *,
        forms: Mapping[str, ColumnLayout] | None = None,
        nulls: Mapping[str, Any] | None = None,
        decode: Mapping[str, DecodeImage] | None = None,
        cast: Casts | None = None,
    ) -> OutputSpec:
        """Return the user's settings, checked against `schema`, which has the served columns as they are stored.

        Raises:
            SchemaError: A column does not exist, or is of a kind that the setting does not apply to; names the column,
                what it takes and what was given.
            TypeError: An argument is not a mapping; a decoder is not a DecodeImage.
        """
        for argument, given in (("forms", forms), ("nulls", nulls), ("decode", decode)):
            if given is not None and not isinstance(given, Mapping):
                raise TypeError(f"{argument} is a mapping from column names, got {type(given).__name__}")
        forms, nulls, decode = dict(forms or {}), dict(nulls or {}), dict(decode or {})
        for name in (*forms, *nulls, *decode, *(cast or {})):
            schema.index(name)
        served = served_columns(schema, cast or {})
        columns = {column.name: served.get(column.name, column) for column in schema.columns}
        for name, options in decode.items():
            _check_decode(columns[name], forms.get(name, "list"))
            if not isinstance(options, DecodeImage):
                raise TypeError(f"decode takes a tiercache.DecodeImage for column {name!r}, got {options!r}")
        for name, form in forms.items():
            _check_form(columns[name], form)
            if form == "padded" and f"{name}.lengths" in columns:
                _refuse(columns[name], f"the name {name + '.lengths'!r} is taken by a column", "another form", form)
        fills = {name: copy.deepcopy(fill) for name, fill in nulls.items() if not is_mask(fill)}
        for name, fill in fills.items():
            stored_fill(columns[name], fill)
        casts = {name: column.dtype for name, column in served.items() if column.dtype is not None}
        return OutputSpec({name: form for name, form in forms.items() if form != "list"}, fills, decode, casts)

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

    def column(self, stored: Column) -> Column:
        """Return a column as it is served: with another dtype if it is cast."""
        return served_column(stored, self.cast)

    def schema(self, stored: Schema) -> Schema:
        """Return the columns as they are served."""
        return Schema([self.column(column) for column in stored.columns]) if self.cast else stored

    def layout(self, column: Column) -> ColumnLayout:
        """Return the layout of a column; "list" has no effect if its records do not differ in length."""
        return self.layouts.get(column.name, "list")

    def has_mask(self, column: Column) -> bool:
        """Whether a batch has the entry "<column>.valid"."""
        return column.nullable and column.name not in self.nulls


def _only(names: Sequence[str], asked: Mapping[str, T]) -> dict[str, T]:
    return {name: asked[name] for name in names if name in asked}


def is_mask(fill: object) -> bool:
    """Whether the value in nulls= requests the usual mask, not a fill value."""
    return isinstance(fill, str) and fill == MASK


def varying(column: Column) -> tuple[int, ...]:
    """Return the dimensions in which records of a bytes-like or RAGGED column differ."""
    return tuple(i for i, d in enumerate(column.shape) if d is None) if column.kind is Kind.RAGGED else (0,)


def is_stack_of_rows(column: Column) -> bool:
    """Whether only the first dimension varies, so that records stored end to end form one array."""
    return varying(column) == (0,)


def _check_form(column: Column, form: object) -> None:
    allowed = _FORMS_OF.get(column.kind, ())
    if form not in COLUMN_LAYOUTS:
        _refuse(column, "unknown form", ", ".join(map(repr, allowed or COLUMN_LAYOUTS)), form)
    if not allowed:
        _refuse(column, f"forms= applies to columns whose records differ in length, and this is {column}", "none", form)
    if form not in allowed:
        _refuse(column, f"this form is not available for {column}", ", ".join(map(repr, allowed)), form)
    if form == "nested" and not is_stack_of_rows(column):
        why = "a jagged nested tensor can vary in one dimension only, the first after the batch's"
        _refuse(column, f"{column}: {why}", "'list', 'padded', 'buffer'", form)


def _check_decode(column: Column, form: object) -> None:
    if column.kind not in (Kind.IMAGE, Kind.BYTES):
        expected = "a column of tiercache.Image or of bytes"
        _refuse(column, f"only images are decoded, and this is {column}", expected, str(column))
    if form != "list":
        _refuse(
            column,
            "DecodeImage sets the form of decoded images: remove forms= or decode= for this column",
            "'list'",
            form,
        )


def _refuse(column: Column, message: str, expected: str, got: object) -> NoReturn:
    raise SchemaError(
        f"{message} (takes {expected}, got {got!r})", column=column.name, expected=expected, got=repr(got)
    )
