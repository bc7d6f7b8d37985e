"""Values of a record, formatted for people and for JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from tiercache.model import format_bytes
from tiercache.shard.schema import Column, Kind

_TEXT_CHARACTERS = 70
_ELEMENTS = 6


def format_value(column: Column, value: Any) -> str:
    """Return one line for people: "<jpeg 12.3 KiB>" for images and bytes, first elements of arrays, long texts cut."""
    if value is None:
        return "null"
    if column.kind in (Kind.IMAGE, Kind.BYTES):
        return f"<{column.encoding or 'bytes'} {format_bytes(len(value))}>"
    if column.kind is Kind.STR:
        return shorten(json.dumps(value, ensure_ascii=False))
    if column.shape:
        array = as_numpy(value)
        first = ", ".join(str(element) for element in array.reshape(-1)[:_ELEMENTS].tolist())
        more = ", ..." if array.size > _ELEMENTS else ""
        return f"{column.dtype}{list(array.shape)} [{first}{more}]"
    if column.kind in (Kind.SCALAR, Kind.BOOL):
        number = as_numpy(value).item()
        name = f" ({column.classes[number]})" if column.classes and 0 <= number < len(column.classes) else ""
        return f"{number}{name}"
    return shorten(json.dumps(value, ensure_ascii=False, default=str))


def json_value(column: Column, value: Any) -> Any:
    """Return the value as JSON can hold it: arrays as lists, images and bytes as the text that shown() returns."""
    if value is None:
        return None
    if column.kind in (Kind.IMAGE, Kind.BYTES):
        return format_value(column, value)
    if column.shape or column.kind in (Kind.SCALAR, Kind.BOOL):
        return as_numpy(value).tolist()
    return value


def as_numpy(value: Any) -> np.ndarray[Any, Any]:
    """Return an array, a number or a torch tensor as a numpy array; bfloat16 is widened to float32."""
    if hasattr(value, "detach"):
        value = value.detach().float().numpy()
    return np.asarray(value)


def shorten(text: str) -> str:
    """Return text, shortened to 70 characters if it is longer."""
    return text if len(text) <= _TEXT_CHARACTERS else text[: _TEXT_CHARACTERS - 3] + "..."
