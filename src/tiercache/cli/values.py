"""A record's values as a person can read them, and as JSON can hold them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from tiercache.model import format_bytes
from tiercache.shard.types import Column, Kind

_TEXT_CHARACTERS = 70
_ELEMENTS = 6


def shown(column: Column, value: Any) -> str:
    """One line: pictures and bytes as "<jpeg 12.3 KiB>", arrays with their first elements, long texts cut."""
    if value is None:
        return "null"
    if column.kind in (Kind.IMAGE, Kind.BYTES):
        return f"<{column.encoding or 'bytes'} {format_bytes(len(value))}>"
    if column.kind is Kind.STR:
        return cut(json.dumps(value, ensure_ascii=False))
    if column.shape:
        array = as_numpy(value)
        first = ", ".join(str(element) for element in array.reshape(-1)[:_ELEMENTS].tolist())
        more = ", ..." if array.size > _ELEMENTS else ""
        return f"{column.dtype}{list(array.shape)} [{first}{more}]"
    if column.kind in (Kind.SCALAR, Kind.BOOL):
        number = as_numpy(value).item()
        name = f" ({column.classes[number]})" if column.classes and 0 <= number < len(column.classes) else ""
        return f"{number}{name}"
    return cut(json.dumps(value, ensure_ascii=False, default=str))


def plain(column: Column, value: Any) -> Any:
    """For JSON: arrays as lists; pictures and bytes as shown() has them, for JSON holds no bytes."""
    if value is None:
        return None
    if column.kind in (Kind.IMAGE, Kind.BYTES):
        return shown(column, value)
    if column.shape or column.kind in (Kind.SCALAR, Kind.BOOL):
        return as_numpy(value).tolist()
    return value


def as_numpy(value: Any) -> np.ndarray[Any, Any]:
    """A numpy array of a value that is one, a number, or a torch tensor (bfloat16: widened)."""
    if hasattr(value, "detach"):
        value = value.detach().float().numpy()
    return np.asarray(value)


def cut(text: str) -> str:
    """text, or its beginning if it is long."""
    return text if len(text) <= _TEXT_CHARACTERS else text[: _TEXT_CHARACTERS - 3] + "..."
