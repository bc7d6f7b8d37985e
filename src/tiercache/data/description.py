"""How things are shown to people: batches as text, and data sets as HTML with thumbnails."""

from __future__ import annotations

import base64
import html
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tiercache.distribution import install_command
from tiercache.errors import TierCacheError
from tiercache.images.thumbnail import as_png, thumbnail
from tiercache.model import format_bytes
from tiercache.shard.schema import Kind

_N_PICTURES = 8
_SIDE = 96  # pixels of a thumbnail, which is then at most 28 KB
_NO_LIBRARY = f"(thumbnails need {install_command('images')})"


def describe(batch: Any) -> str:
    """Return a description of a batch: for each entry a line with its name, dtype, shape and bytes.

    A batch is a plain dict or list, which Python prints with all of its elements.

    Args:
        batch: Batch of a loader or of `dataset[[...]]`: a dict by column, or a list or tuple of columns.

    Raises:
        TypeError: The argument is neither a dict nor a list or tuple.
    """
    if isinstance(batch, Mapping):
        entries = [(str(name), value) for name, value in batch.items()]
    elif isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        entries = [(str(index), value) for index, value in enumerate(batch)]
    else:
        raise TypeError(f"a batch is a dict, a list or a tuple, got {type(batch).__name__}")
    width = max((len(name) for name, _ in entries), default=0)
    return "\n".join(f"{name:{width}}  {_described(value)}" for name, value in entries)


def _described(value: Any) -> str:
    """Return what a value of a batch is, in one line."""
    if getattr(value, "is_nested", False):
        return f"nested {_dtype(value)}, {value.size(0)} values, {format_bytes(value.values().nbytes)}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        device = getattr(value, "device", "cpu")
        where = "" if str(device) == "cpu" else f" on {device}"
        return f"{_dtype(value)}{list(value.shape)}, {format_bytes(value.nbytes)}{where}"
    if hasattr(value, "offsets") and hasattr(value, "values"):
        return f"buffer of {len(value)} values: {_described(value.values)}"
    if isinstance(value, list):
        return f"list of {len(value)}{_elements(value)}"
    return type(value).__name__


def _dtype(array: Any) -> str:
    return str(array.dtype).removeprefix("torch.")


def _elements(values: Sequence[Any]) -> str:
    """Return the common kind of a list's elements, and their size."""
    present = [value for value in values if value is not None]
    nulls = f", {len(values) - len(present)} null" if len(present) < len(values) else ""
    kinds = {type(value) for value in present}
    if len(kinds) != 1:
        return nulls
    first = present[0]
    if hasattr(first, "nbytes"):
        return f" arrays of {_dtype(first)}, {format_bytes(sum(value.nbytes for value in present))}{nulls}"
    size = f", {format_bytes(sum(map(len, present)))}" if isinstance(first, bytes) else ""
    return f" {type(first).__name__}{size}{nulls}"


def html_of(
    facts: Iterable[tuple[str, str]],
    columns: Iterable[tuple[str, str, str]],
    pictures: Iterable[tuple[Any, str]],
) -> str:
    """Return facts, columns and pictures as HTML that a notebook shows. All texts are escaped; nothing is loaded.

    Args:
        facts: (name, text) of each fact.
        columns: (name, type, how it is served) of each column.
        pictures: (bytes of an encoded image, or None; caption) of each picture.
    """
    head = "".join(f"<tr><th>{html.escape(n)}</th><td colspan=2>{html.escape(text)}</td></tr>" for n, text in facts)
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in row)}</tr>" for row in columns)
    return f'<div><table style="text-align:left">{head}{rows}</table>{_figures(pictures)}</div>'


def first_pictures(source: Any, names: Collection[str], decoded: Collection[str]) -> list[tuple[Any, str]]:
    """Return (encoded image, caption) of the first records; [] without a column of images, or if it is corrupt.

    Args:
        source: Records to show (`views.Records`).
        names: Names of the columns that may be shown.
        decoded: Names of the columns that are decoded as images.
    """
    columns = [column for column in source.stored_schema.columns if column.name in names]
    images = [column for column in columns if column.kind is Kind.IMAGE or column.name in decoded]
    if not images or not source.n_records:
        return []
    labels = [column for column in columns if column.classes and column.kind is Kind.SCALAR][:1]
    n = min(_N_PICTURES, source.n_records)
    try:
        pictures, *numbers = source.with_columns([column.name for column in (images[0], *labels)]).values(np.arange(n))
    except (TierCacheError, OSError):
        return []
    captions = [str(index) for index in range(n)]
    if numbers:
        known = dict(enumerate(labels[0].classes))
        captions = [known.get(int(number), str(number)) for number in numbers[0].values]
    return list(zip(pictures.values, captions, strict=True))


def _figures(pictures: Iterable[tuple[Any, str]]) -> str:
    found = []
    for data, caption in pictures:
        try:
            image = None if data is None else thumbnail(data, _SIDE)
        except ModuleNotFoundError:
            return f"<p>{html.escape(_NO_LIBRARY)}</p>"
        shown = "(null)" if data is None else "(cannot be decoded)"
        if image is not None:
            encoded = base64.b64encode(as_png(image)).decode()
            size = f'width="{image.width}" height="{image.height}"'
            shown = f'<img src="data:image/png;base64,{encoded}" {size} alt="">'
        found.append(
            f'<figure style="display:inline-block;margin:4px">{shown}'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    return "".join(found)
