"""Plots of the rows, in an environment with matplotlib: `python -m peers.plots ROWS [--into FOLDER]`, or `--plots`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.pyplot as plt

from peers.catalogue import PEERS, manner
from peers.report import fewer, read

if TYPE_CHECKING:
    from collections.abc import Sequence

    Row = dict[str, Any]

ORDERS = {"none": "in the stored order", "full": "shuffled"}
OURS, LIBRARY, BASELINE = "#c2410c", "#64748b", "#cbd5e1"
BAR_INCHES, PANEL_INCHES = 0.27, 5.6


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw a picture per workload with a panel per order and layout: medians with the slowest and fastest run."""
    mpl.use("agg")
    # Text stays text: a tenth of the size, and accessible to screen readers.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "tiercache", "font.size": 9})
    folder.mkdir(parents=True, exist_ok=True)
    shown = [row for row in rows if row["benchmark"] == "load" and "missing" not in row]
    return [
        picture([row for row in shown if row["workload"]["name"] == name], name, folder)
        for name in dict.fromkeys(row["workload"]["name"] for row in shown)
    ]


def picture(rows: Sequence[Row], name: str, folder: Path) -> Path:
    """Draw the picture of a workload as SVG."""
    forms = list(dict.fromkeys(row["form"] for row in rows))
    panels = [[chosen(rows, order, form) for order in ORDERS] for form in forms]
    n_bars = sum(max(len(panel) for panel in line) for line in panels)
    size = (PANEL_INCHES * len(ORDERS), BAR_INCHES * n_bars + 0.8 * len(forms) + 0.3)
    heights = [max(len(panel) for panel in line) + 1 for line in panels]
    figure, grid = plt.subplots(
        len(forms), len(ORDERS), figsize=size, layout="constrained", squeeze=False, height_ratios=heights
    )
    for form, line, axes_of_form in zip(forms, panels, grid, strict=True):
        for order, panel, axes in zip(ORDERS.values(), line, axes_of_form, strict=True):
            bars(axes, panel)
            axes.set_title(", ".join(filter(None, (name, order, manner(form)))), loc="left")
    path = folder / f"benchmarks-{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def chosen(rows: Sequence[Row], shuffle: str, form: str) -> list[Row]:
    """Return the rows of a panel, slowest first; a library without a full shuffle is shown with its own shuffle."""
    of_form = [row for row in rows if row["form"] == form]
    found = [row for row in of_form if row["shuffle"] == shuffle]
    if shuffle == "full":
        able = {row["peer"] for row in found}
        found += [row for row in of_form if row["shuffle"] == "default" and row["peer"] not in able]
    return sorted(found, key=lambda row: row["samples_per_s.every"]["median"])


def bars(axes: Any, rows: Sequence[Row]) -> None:
    """Draw bars of thousands of samples per second, each with its figure."""
    rates = [{name: rate / 1e3 for name, rate in row["samples_per_s.every"].items()} for row in rows]
    medians = [rate["median"] for rate in rates]
    spans = [[rate["median"] - rate["min"] for rate in rates], [rate["max"] - rate["median"] for rate in rates]]
    own = {"default": "its own shuffle"}
    names = [", ".join(filter(None, (row["title"], own.get(row["shuffle"]), fewer(row)))) for row in rows]
    drawn = axes.barh(names, medians, xerr=spans, color=[colour(row["peer"]) for row in rows], ecolor="#334155")
    axes.bar_label(drawn, [f"{median:,.3g}" if median < 100 else f"{median:,.0f}" for median in medians], padding=4)
    axes.set_xlabel("k samples/s, every byte read")
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)


def colour(peer: str) -> str:
    """Return the colour of a contender's kind."""
    return OURS if peer == "tiercache" else BASELINE if PEERS[peer].baseline else LIBRARY


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("rows", type=Path, help="File peers.jsonl.")
    parser.add_argument("--into", type=Path, help="Folder for the plots. Default: folder of the rows.")
    given = parser.parse_args()
    for path in draw(read(given.rows), given.into or given.rows.parent):
        print(path)
