"""Inference of column types from the first JSON records. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tiercache.errors import SchemaError
from tiercache.shard.schema import Ragged, UserType

_SCALARS = {bool: "bool", int: "int64", float: "float64", str: "str"}


def type_of(value: object) -> str | None:
    """Return the type of a JSON value; None for null.

    It is a scalar type, "[int64]" or "[float64]" for a list of numbers, or "json" for anything else.
    """
    if value is None:
        return None
    if isinstance(value, list):
        kinds = {type(element) for element in value}
        if kinds <= {int, float}:
            return "[float64]" if float in kinds else "[int64]"
        return "json"
    return _SCALARS.get(type(value), "json")


def join(first: str, second: str) -> str | None:
    """Return the type that holds the values of both types; None if there is none."""
    kinds = {first, second}
    if len(kinds) == 1:
        return first
    if kinds == {"int64", "float64"}:
        return "float64"
    if kinds == {"[int64]", "[float64]"}:
        return "[float64]"
    if "json" in kinds or "[int64]" in kinds or "[float64]" in kinds:
        return "json"
    return None


def infer_types(records: Iterable[Mapping[str, Any]], place: Callable[[int], str]) -> dict[str, UserType]:
    """Return the types of the columns of records, in the order in which the columns first appear.

    A column is nullable if a record has null or lacks it. Lists of numbers are Ragged, other lists and objects are
    json.

    Args:
        records: Records to inspect.
        place: Function that returns the location of record i, for messages.

    Raises:
        SchemaError: The scalars of a column have incompatible types, or a column has only nulls.
    """
    kinds: dict[str, str | None] = {}
    n_values: dict[str, int] = {}
    n_records = 0
    for index, record in enumerate(records):
        n_records += 1
        for name, value in record.items():
            kind, known = type_of(value), kinds.get(name)
            kinds[name] = kind or known
            if kind is not None:
                n_values[name] = n_values.get(name, 0) + 1
                if known is not None:
                    kinds[name] = join(known, kind)
                    if kinds[name] is None:
                        raise SchemaError(
                            f"{place(index)}: expected {known} as in earlier records, got {kind}; {say_type(name)}",
                            column=name,
                        )
    types: dict[str, UserType] = {}
    for name, kind in kinds.items():
        if kind is None:
            raise SchemaError(f"only nulls in the first {n_records} records; {say_type(name)}", column=name)
        nullable = n_values[name] < n_records
        if kind.startswith("["):
            types[name] = Ragged(kind.strip("[]"), (None,), nullable=nullable)
        else:
            types[name] = f"{kind}?" if nullable else kind
    return types


def say_type(name: str) -> str:
    """Return the advice to specify a column's type."""
    return f"specify its type, as in schema={{{name!r}: 'str?'}} or --column '{name}=str?'"
