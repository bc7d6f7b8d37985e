"""Metrics in the names of many checkpoints: names that differ only in digits are parsed together."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tiercache.tier.alike import NameTemplates
from tiercache.tier.metrics import metrics_in_name, spans_of

# Minimum number of names of one template for which an expression is built.
_FEW = 8
_DIGITS = re.compile("[0-9]+")


def metrics_in_names(names: pa.Array, wanted: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Return the wanted metrics of each name, as metrics.metrics_in_name(): float64[n] each, NaN where there is none.

    Args:
        names: large_string, names of files or folders, without nulls.
        wanted: Names of the metrics.
    """
    found = {name: np.full(len(names), np.nan) for name in wanted}
    if not len(names):
        return found
    alike = NameTemplates.of(names)
    order = np.argsort(alike.shape, kind="stable")
    starts = np.searchsorted(alike.shape[order], np.arange(len(alike.shapes) + 1)).tolist()
    for i, template in enumerate(alike.shapes.to_pylist()):
        places = _places(template, wanted)
        if places:
            rows = order[starts[i] : starts[i + 1]]
            _read(found, rows, names.take(pa.array(rows)), (template, places))
    return found


_Place = tuple[str, tuple[int, int], tuple[int, int]]


def _places(template: str, wanted: Sequence[str]) -> list[_Place]:
    """Return where the template may have a wanted metric: the metric, and (start, end) of its name and its number."""
    spans = [(name, number, template[slice(*name)]) for name, number in spans_of(template)]
    alike = [(metric, _DIGITS.sub("0", metric)) for metric in wanted]
    return [(metric, name, number) for name, number, text in spans for metric, like in alike if like == text]


def _read(
    found: dict[str, NDArray[np.float64]], rows: NDArray[np.int64], names: pa.Array, of: tuple[str, list[_Place]]
) -> None:
    template, places = of
    # For a metric that occurs twice in a name, the last finite value counts; only the parser for one name knows that.
    if len(rows) < _FEW or len({metric for metric, _, _ in places}) < len(places):
        _one_by_one(found, rows, names)
        return
    for metric, name, number in places:
        found[metric][rows] = _values(names, template, (metric, name, number))


def _one_by_one(found: dict[str, NDArray[np.float64]], rows: NDArray[np.int64], names: pa.Array) -> None:
    for row, name in zip(rows.tolist(), names.to_pylist(), strict=True):
        for metric, value in metrics_in_name(name).items():
            if metric in found:
                found[metric][row] = value


def _values(names: pa.Array, template: str, place: _Place) -> list[float]:
    """Return the number at the template's position in each name.

    NaN: the number is not finite, or the name has another metric there.
    """
    metric, (name_start, name_end), (start, end) = place
    parts = template[:name_start], template[name_end:start], template[start:end], template[end:]
    before, between, number, after = (re.escape(part).replace("0", "[0-9]+") for part in parts)
    pattern = rf"\A{before}{re.escape(metric)}{between}(?P<value>{number}){after}\z"
    texts = pc.struct_field(pc.extract_regex(names, pattern), "value")
    values = [math.nan if text is None else float(text) for text in texts.to_pylist()]
    return [value if math.isfinite(value) else math.nan for value in values]
