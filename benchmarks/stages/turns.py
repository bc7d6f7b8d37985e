"""Interleaved cases of a stage, so that disturbances of the machine affect all of them alike, and their rows."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rows import spread, table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TITLES = ("case", "unit", "median", "min - max", "of the baseline")


@dataclass(frozen=True, slots=True)
class Effort:
    """Effort of a measurement. repetitions: Number of repetitions of each case. min_s: Seconds of each repetition."""

    repetitions: int
    min_s: float


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure.

    Attributes:
        stage, name: Names for the output.
        run: Function that runs it once.
        amount: Amount of the unit that one run does; a rate is amounts per second.
        unit: Unit, such as "GB/s".
        baseline: Name of the case of the same stage that it is compared with, if any.
    """

    stage: str
    name: str
    run: Callable[[], object]
    amount: float
    unit: str
    baseline: str = ""


def in_turns(cases: Sequence[Case], effort: Effort) -> list[dict[str, Any]]:
    """Return a row for each case: its rates, and the median of its rate relative to the baseline's."""
    rates: dict[str, list[float]] = {case.name: [] for case in cases}
    for case in cases:
        case.run()
    for _ in range(effort.repetitions):
        for case in cases:
            rates[case.name].append(_rate(case, effort.min_s))
    return [row_of(case.stage, case.name, case.unit, rates[case.name], rates.get(case.baseline, ())) for case in cases]


def _rate(case: Case, min_s: float) -> float:
    n, started, took_s = 0, time.perf_counter(), 0.0
    while n == 0 or took_s < min_s:
        case.run()
        n += 1
        took_s = time.perf_counter() - started
    return n * case.amount / took_s


def row_of(stage: str, name: str, unit: str, values: Sequence[float], baseline: Sequence[float] = ()) -> dict[str, Any]:
    """Return a row for the values of repetitions. baseline: Values of the baseline, one for each repetition."""
    row: dict[str, Any] = {"benchmark": "stage", "stage": stage, "case": name, "unit": unit, "value": spread(values)}
    if baseline:
        ratio = statistics.median(value / other for value, other in zip(values, baseline, strict=True))
        row["of_baseline"] = ratio
    return row


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table for each stage."""
    parts = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        lines = [_line(row) for row in rows if row["stage"] == stage]
        parts.append(f"{stage}\n\n{table(TITLES, lines)}")
    return "\n\n".join(parts)


def _line(row: dict[str, Any]) -> list[str]:
    value = row["value"]
    ratio = f"{row['of_baseline']:.2f}" if "of_baseline" in row else ""
    span = f"{_digits(value['min'])} - {_digits(value['max'])}"
    return [row["case"], row["unit"], _digits(value["median"]), span, ratio]


def _digits(value: float) -> str:
    """Format with three digits or more."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.1f}" if abs(value) >= 10 else f"{value:,.2f}"
