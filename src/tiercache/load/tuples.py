"""Records as tuples, and batches as lists of columns, for `for image, label in loader`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tiercache.errors import SchemaError
from tiercache.load.serving import varying
from tiercache.shard.schema import Column, Kind

if TYPE_CHECKING:
    from tiercache.load.serving import OutputSpec
    from tiercache.shard.schema import Schema

# Kinds whose nulls are None in a batch; other kinds have a zero or an empty array, and a mask.
_SHOWS_NULLS = (Kind.BYTES, Kind.STR, Kind.IMAGE, Kind.JSON, Kind.ARROW)


def tuple_columns(names: Sequence[str], schema: Schema, serving: OutputSpec) -> tuple[str, ...]:
    """Return the columns that a tuple of these names needs, in order.

    Args:
        names: Names of columns; "<column>.valid" for the mask of a nullable column, "<column>.lengths" for the lengths
            of a padded column.
        schema: Served columns.
        serving: How the columns are served.

    Raises:
        SchemaError: A column, mask or lengths entry does not exist; or the nulls of a nullable column would be
            invisible.
        TypeError: A name is not a str.
        ValueError: There are no names.
    """
    if not names:
        raise ValueError("as_tuple() needs the name of one column or more")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"as_tuple() takes names of columns, got {name!r}")
    found: dict[str, Column] = {}
    for name in names:
        column = schema.columns[schema.index(_column_of(name, schema))]
        if name != column.name and name not in _companions(column, serving):
            kinds = "'<column>.valid' is of a nullable column served with its mask, '<column>.lengths' of a padded one"
            raise SchemaError(f"there is no {name!r}: {kinds}", column=column.name, expected=kinds, got=name)
        found[column.name] = column
    for column in found.values():
        visible = column.kind in _SHOWS_NULLS and serving.layout(column) == "list" and column.name not in serving.decode
        if serving.has_mask(column) and not visible and f"{column.name}.valid" not in names:
            way = f"name {column.name + '.valid'!r} too, or give the data set nulls={{{column.name!r}: ...}}"
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


def _companions(column: Column, serving: OutputSpec) -> list[str]:
    names = [f"{column.name}.valid"] if serving.has_mask(column) else []
    return [*names, f"{column.name}.lengths"] if serving.layout(column) == "padded" else names


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
