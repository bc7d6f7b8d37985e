"""What two schemas differ in, said so that a user can act on it."""

from __future__ import annotations

from tiercache.errors import SchemaError
from tiercache.shard.types import Schema


def check_same_schema(there: Schema, given: Schema) -> None:
    """Refuse to append records of another schema.

    Raises:
        SchemaError: the first difference: a column that is missing, one too many, in another place or of another type.
    """
    if there == given:
        return
    for name in there.names:
        if name not in given.names:
            raise SchemaError("the data set has this column, what is appended has not", column=name)
    for name, column in zip(given.names, given.columns, strict=True):
        if name not in there.names:
            raise SchemaError("what is appended has this column, the data set has not", column=name)
        expected = there.columns[there.index(name)]
        if str(expected) != str(column):
            text = f"the data set has {expected}, what is appended {column}"
            raise SchemaError(text, column=name, expected=str(expected), got=str(column))
    if there.names != given.names:
        text = (
            f"the columns are in another order: the data set has {', '.join(there.names)}, not {', '.join(given.names)}"
        )
        raise SchemaError(text, expected=there.names, got=given.names)
    raise SchemaError("the columns' Arrow metadata differs from the data set's", expected=there.arrow, got=given.arrow)
