"""What a batch is made of beyond what is stored: forms of columns, fills of nulls, decoded pictures."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn, TypeAlias, TypeVar

from tiercache.errors import SchemaError
from tiercache.images.options import DecodeImage
from tiercache.load.fills import stored_fill
from tiercache.shard.cast import Casts, served_column, served_columns
from tiercache.shard.types import Column, Kind, Schema

Form: TypeAlias = Literal["list", "padded", "nested", "buffer"]
T = TypeVar("T")
FORMS: tuple[Form, ...] = ("list", "padded", "nested", "buffer")
MASK = "mask"

_FORMS_OF: dict[Kind, tuple[Form, ...]] = {
    Kind.RAGGED: FORMS,
    Kind.BYTES: FORMS,
    Kind.STR: FORMS,
    Kind.IMAGE: FORMS,
    Kind.JSON: ("list",),  # its values are objects; the text that they are stored as is nobody's
}


@dataclass(frozen=True, slots=True, eq=False)
class Serving:
    """How columns are served where it is not the usual way. Immutable; pickles to little more than what was given.

    Make it with `of`, which checks it.

    forms: only columns that are not lists; nulls: column -> fill value, only columns without a mask; decode: column ->
    how its pictures are decoded; cast: column -> dtype, only where another is stored; names: of a batch's entries,
    where records and batches are tuples of them.
    """

    forms: Mapping[str, Form] = field(default_factory=dict)
    nulls: Mapping[str, Any] = field(default_factory=dict)
    decode: Mapping[str, DecodeImage] = field(default_factory=dict)
    cast: Casts = field(default_factory=dict)
    names: tuple[str, ...] | None = None

    @staticmethod
    def of(
        schema: Schema,
        *,
        forms: Mapping[str, Form] | None = None,
        nulls: Mapping[str, Any] | None = None,
        decode: Mapping[str, DecodeImage] | None = None,
        cast: Casts | None = None,
    ) -> Serving:
        """What the user asks for, checked against the columns that are served, of which `schema` says what is stored.

        Raises:
            SchemaError: no such column, or not for a column of that kind; names the column, what it takes and what was
                given.
            TypeError: not a mapping; a decoder that is no DecodeImage.
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
        return Serving({name: form for name, form in forms.items() if form != "list"}, fills, decode, casts)

    def select(self, names: Sequence[str]) -> Serving:
        """What of it is about these columns."""
        return replace(
            self,
            forms=_only(names, self.forms),
            nulls=_only(names, self.nulls),
            decode=_only(names, self.decode),
            cast=_only(names, self.cast),
            names=None,
        )

    def column(self, stored: Column) -> Column:
        """A column as it is served: of another dtype where it is cast."""
        return served_column(stored, self.cast)

    def schema(self, stored: Schema) -> Schema:
        """The columns as they are served."""
        return Schema([self.column(column) for column in stored.columns]) if self.cast else stored

    def form(self, column: Column) -> Form:
        """The form of a column of any kind; "list" says nothing where records do not differ in length."""
        return self.forms.get(column.name, "list")

    def has_mask(self, column: Column) -> bool:
        """Whether a batch has a "<column>.valid"."""
        return column.nullable and column.name not in self.nulls


def _only(names: Sequence[str], asked: Mapping[str, T]) -> dict[str, T]:
    return {name: asked[name] for name in names if name in asked}


def is_mask(fill: object) -> bool:
    """Whether nulls= asks for the usual mask, and not for a fill value."""
    return isinstance(fill, str) and fill == MASK


def varying(column: Column) -> tuple[int, ...]:
    """Which dimensions of a record of a column of bytes or of a RAGGED one differ between records."""
    return tuple(i for i, d in enumerate(column.shape) if d is None) if column.kind is Kind.RAGGED else (0,)


def is_stack_of_rows(column: Column) -> bool:
    """Whether only the first dimension varies, so that records laid end to end are an array themselves."""
    return varying(column) == (0,)


def _check_form(column: Column, form: object) -> None:
    allowed = _FORMS_OF.get(column.kind, ())
    if form not in FORMS:
        _refuse(column, "no such form", ", ".join(map(repr, allowed or FORMS)), form)
    if not allowed:
        _refuse(column, f"forms are for columns whose records differ in length, and this is {column}", "none", form)
    if form not in allowed:
        _refuse(column, f"{column} has no such form", ", ".join(map(repr, allowed)), form)
    if form == "nested" and not is_stack_of_rows(column):
        why = "a jagged nested tensor can vary in one dimension only, the first after the batch's"
        _refuse(column, f"{column}: {why}", "'list', 'padded', 'buffer'", form)


def _check_decode(column: Column, form: object) -> None:
    if column.kind not in (Kind.IMAGE, Kind.BYTES):
        expected = "a column of tiercache.Image or of bytes"
        _refuse(column, f"only pictures are decoded, and this is {column}", expected, str(column))
    if form != "list":
        _refuse(
            column, "decoded pictures have the form that DecodeImage says; leave out one of the two", "'list'", form
        )


def _refuse(column: Column, message: str, expected: str, got: object) -> NoReturn:
    raise SchemaError(
        f"{message} (takes {expected}, got {got!r})", column=column.name, expected=expected, got=repr(got)
    )
