"""Decoding of image columns of records read by index: columns of encoded bytes to columns of arrays."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tiercache.errors import SchemaError
from tiercache.images.crop import fresh_draws
from tiercache.images.decoder import DecodeError, Decoder, stored_dtype
from tiercache.shard.read.values import ColumnValues

if TYPE_CHECKING:
    from tiercache.images.options import DecodeImage

Explain = Callable[[str, int, str], Exception]
"""Function of (column, index among the records that were read, decoder's message) that returns the error to raise."""


def decode_columns(
    columns: Sequence[ColumnValues], decode: Mapping[str, DecodeImage], explain: Explain
) -> list[ColumnValues]:
    """Return the columns, with the image columns decoded.

    A decoded column is an array [n, ...], zero for a null, or a list if sizes differ. Random numbers come from torch's
    generator if torch is imported, else from numpy's global one.

    Args:
        columns: Columns of the records that were read.
        decode: Mapping from an image column to its options.
        explain: Function that returns the error for an image that cannot be decoded.

    Raises:
        Exception: The result of explain, for an image that cannot be decoded.
        SchemaError: dtype is bfloat16 and torch is not imported.
    """
    is_random = any(options.is_random for options in decode.values())
    n = len(columns[0].values) if columns else 0
    draws: Sequence[Sequence[float]] = fresh_draws(n).tolist() if is_random else [()] * n
    return [
        _decoded(found, decode[found.column.name], draws, explain) if found.column.name in decode else found
        for found in columns
    ]


def _decoded(
    found: ColumnValues, options: DecodeImage, draws: Sequence[Sequence[float]], explain: Explain
) -> ColumnValues:
    decoder, n = Decoder(options), len(found.values)
    whole = options.size is None
    out: Any = [None] * n if whole else np.zeros((n, *options.batch_shape), stored_dtype(options.dtype))
    for index, data in enumerate(found.values):
        if data is None:
            continue
        try:
            if whole:
                out[index] = _typed(decoder.decode(data, draws[index]), options, found.column.name)
            else:
                decoder.decode_into(data, draws[index], out[index])
        except DecodeError as error:
            raise explain(found.column.name, index, str(error)) from error
    return ColumnValues(found.column, out if whole else _typed(out, options, found.column.name), found.valid)


def _typed(stored: Any, options: DecodeImage, column: str) -> Any:
    """Return stored elements as elements of the dtype of the options."""
    if options.dtype != "bfloat16":
        return stored
    torch = sys.modules.get("torch")
    if torch is None:
        message = "images of dtype bfloat16 are torch tensors: import torch first (numpy has no such dtype)"
        raise SchemaError(message, column=column, expected="torch", got="no torch")
    return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
