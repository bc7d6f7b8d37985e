"""Further columns of the records of a data set, written as a data set beside it: `Dataset.add_columns`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tiercache.data.opened_version import OpenedVersion
from tiercache.shard.write.dataset_writer import Writer

if TYPE_CHECKING:
    from tiercache.data.records import Records


def write_columns(
    dataset: Any,
    source: Records,
    columns: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]],
    *,
    url: Any,
    batch_size: int,
    **writing: Any,
) -> tuple[Any, dict[str, Any]]:
    """Write columns as `Dataset.add_columns` says. Returns their URL, and the arguments that open the written version.

    source: Records of the data set. writing: Arguments of `Writer`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    n = len(dataset)
    if not callable(columns):
        _check(columns, n, "columns")
    batches = (_batch_of(columns, dataset, start, min(start + batch_size, n)) for start in range(0, n, batch_size))
    first = next(batches, None)
    if first is None:
        raise ValueError("there are no records to add columns to")
    taken = [name for name in first if name in source.stored_schema.names]
    if taken:
        raise ValueError(f"the data set has a column {taken[0]!r} already: give the new column another name")
    options: dict[str, Any] = {}
    if url is None:
        version = source.leaves[0]
        if source.node is not None or not isinstance(version, OpenedVersion):
            raise ValueError("the columns of a view, a joined, zipped or packed data set need a URL: give url=")
        odd = [name for name in first if not re.fullmatch(r"\w[\w.-]*", name)]
        if odd:
            raise ValueError(
                f"the column name {odd[0]!r} cannot be a part of the URL, which takes letters, digits, '_', '.' "
                "and '-': give url="
            )
        url = f"{version.location.url.rstrip('/')}.columns/{'+'.join(first)}"
        options = {"storage_options": version.location.storage_options}
    with Writer(url, mode="overwrite", **writing, **options) as writer:
        writer.write_batch(first)
        for batch in batches:
            writer.write_batch(batch)
    made = writer.version
    return url, {"version": None if made is None else made.number, **options}


def _batch_of(columns: Any, dataset: Any, start: int, stop: int) -> Mapping[str, Any]:
    """Return the new columns of records [start, stop). Raises as _check()."""
    if not callable(columns):
        return {name: values[start:stop] for name, values in columns.items()}
    found = columns(dataset[start:stop])
    return _check(found, stop - start, f"what the function returned for records {start:,} to {stop - 1:,}")


def _check(columns: Any, n: int, what: str) -> Mapping[str, Any]:
    """Return the columns. Raises TypeError if they are no mapping to values, ValueError for other than n values."""
    expected = f"a mapping from the new columns' names to an array or list of {n:,} values each"
    if not isinstance(columns, Mapping) or not columns:
        raise TypeError(f"{what} must be {expected}, got {columns!r}")
    for name, values in columns.items():
        if not hasattr(values, "__len__"):
            raise TypeError(f"{what} must be {expected}, and column {name!r} is {values!r}")
        if len(values) != n:
            raise ValueError(f"{what} has {len(values):,} values of column {name!r} for {n:,} records")
    return columns
