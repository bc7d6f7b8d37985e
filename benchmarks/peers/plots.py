"""Draws the rows, in an environment with matplotlib: `python -m peers.plots ROWS`, or `--plots` of the comparison."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from collections.abc import Sequence


def draw(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """A picture for each workload, order and form: bars of samples/s, with the slowest and the fastest repetition."""
    mpl.use("agg")
    shown = [row for row in rows if row["benchmark"] == "load" and "missing" not in row]
    for name, shuffle, form in dict.fromkeys((r["workload"]["name"], r["shuffle"], r["form"]) for r in shown):
        chosen = [r for r in shown if (r["workload"]["name"], r["shuffle"], r["form"]) == (name, shuffle, form)]
        chosen.sort(key=lambda row: row["samples_per_s.every"]["median"])
        rates = [row["samples_per_s.every"] for row in chosen]
        figure, axes = plt.subplots(figsize=(8, 0.4 * len(chosen) + 1.2), layout="constrained")
        medians = [rate["median"] for rate in rates]
        spans = [[rate["median"] - rate["min"] for rate in rates], [rate["max"] - rate["median"] for rate in rates]]
        axes.barh([row["title"] for row in chosen], medians, xerr=spans)
        axes.set_xlabel("samples/s, every byte read")
        axes.set_title(", ".join(filter(None, (name, f"shuffle {shuffle}", form))))
        figure.savefig(folder / f"{'-'.join(filter(None, (name, shuffle, form)))}.svg")
        plt.close(figure)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    draw([json.loads(line) for line in path.read_text().splitlines()], path.parent)
