"""Compares the schema of an append with that of the data set."""

from __future__ import annotations

from tiercache.errors import SchemaError
from tiercache.shard.types import Schema


def check_same_schema(there: Schema, given: Schema) -> None:
    """Check that records of the schema `given` can be appended to a data set of the schema `there`.

    Raises:
        SchemaError: The schemas differ. The message describes the first difference: a missing or an additional column,
            another type, another order, or other metadata.
    """
    if there == given:
        return
    for name in there.names:
        if name not in given.names:
            raise SchemaError("the data set has this column, the appended records do not", column=name)
    for name, column in zip(given.names, given.columns, strict=True):
        if name not in there.names:
            raise SchemaError("the appended records have this column, the data set does not", column=name)
        expected = there.columns[there.index(name)]
        if str(expected) != str(column):
            text = f"the data set has {expected}, the appended records have {column}"
            raise SchemaError(text, column=name, expected=str(expected), got=str(column))
    if there.names != given.names:
        text = (
            f"the columns are in another order: the data set has {', '.join(there.names)}, not {', '.join(given.names)}"
        )
        raise SchemaError(text, expected=there.names, got=given.names)
    raise SchemaError("the columns' Arrow metadata differs from the data set's", expected=there.arrow, got=given.arrow)
