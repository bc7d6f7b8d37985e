"""Records with a column of every kind, each of which follows from its number."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tests.support.records import SCHEMA, make_columns

import tiercache as tc

EVERY_KIND = {
    **SCHEMA,
    "half": "bfloat16",
    "vector": tc.Tensor("bfloat16", (3,)),
    "bits": tc.Tensor("bool", (3,)),
    "nothing": tc.Tensor("int16", (0,)),
    "halves": tc.Ragged("bfloat16", (None,)),
    "matrix": tc.Ragged("int16", (None, None)),
    "label": "int8?",
    "is_new": "bool?",
    "pair": tc.Tensor("int32", (2,), nullable=True),
    "note": "str?",
    "raw": "bytes?",
    "cut": tc.Ragged("float64", (2, None), nullable=True),
    "meta": "json?",
    "picture": tc.Image("png"),
}


def columns_of_every_kind(n: int) -> dict[str, Any]:
    """N records."""
    ids = np.arange(n)

    def some(values: list[Any], step: int) -> list[Any]:
        return [None if i % step == 0 else value for i, value in enumerate(values)]

    return {
        **make_columns(n),
        "half": torch.arange(n).to(torch.bfloat16),
        "vector": torch.arange(3 * n).view(n, 3).to(torch.bfloat16),
        "bits": (ids[:, None] >> np.arange(3)) % 2 == 1,
        "nothing": np.zeros((n, 0), np.int16),
        "halves": [torch.full((i % 3,), i).to(torch.bfloat16) for i in ids],
        "matrix": [np.full((i % 3, i % 4), i, np.int16) for i in ids],
        "label": some([int(i % 100) for i in ids], 4),
        "is_new": some([bool(i % 3) for i in ids], 5),
        "pair": some([np.full(2, i, np.int32) for i in ids], 8),
        "note": some([f"né {i}" for i in ids], 3),
        "raw": some([bytes([i % 256] * (i % 5)) for i in ids], 6),
        "cut": some([np.full((2, i % 3), i, np.float64) for i in ids], 7),
        "meta": some([{"i": int(i), "of": [None, "x"]} for i in ids], 9),
        "picture": [b"\x89PNG" + bytes([i % 256]) for i in ids],
    }


def is_same(one: Any, other: Any) -> bool:
    """Whether two values, records or batches are equal and of equal types."""
    if isinstance(one, dict):
        return list(one) == list(other) and all(is_same(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.flags.writeable and np.array_equal(one, other)
    return type(one) is type(other) and one == other
