"""Markdown tables of the cache benchmarks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

# Requirement: allowed share of fetched bytes above the bound.
ALLOWED = {"1 - f": 0.03, "MIN": 0.05}
NAMES = {"mosaic": "MosaicML Streaming", "lit": "LitData"}
Row = dict[str, Any]


def show(rows: Sequence[Row]) -> str:
    """Return the table of each part that has rows."""
    parts: dict[str, tuple[str, Callable[[Row], str]]] = {
        "one": ("one node, one rank", lambda row: f"{row['f']:g}"),
        "two": ("one node, two ranks", lambda row: f"{row['f']:g}"),
        "nodes": ("nodes with a cache of f each, shards dealt anew", lambda row: f"{row['nodes']} nodes, {row['f']:g}"),
        "jobs": ("two jobs, one a mixture", lambda row: f"{row['f']:g}"),
        "peers": ("other libraries, one rank", lambda row: f"{row['f']:g}"),
    }
    texts = []
    for part, (title, where) in parts.items():
        own = [row for row in rows if row["part"] == part]
        if own:
            texts.append(f"### Bytes per epoch: {title}\n\n{table(own, where)}")
    return "\n\n".join(texts)


def table(rows: Iterable[Row], where: Callable[[Row], str]) -> str:
    """Return a Markdown table: fetched bytes as a share of the data set, and the bound."""
    titles = ("policy", "cache f", "fetched", "bound", "above it", "required", "s/epoch", "remark")
    lines = [titles, (":--", *["--:"] * 6, ":--"), *(line(row, where(row)) for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def line(row: Row, where: str) -> tuple[str, ...]:
    """Return the cells of a row."""
    name = NAMES.get(row["policy"], row["policy"])
    if "missing" in row:
        return name, where, "", "", "", "", "", row["missing"]
    above = row["share"] / row["bound"] - 1
    allowed = ALLOWED.get(row["bound_of"]) if row["policy"] == "plan" else None
    verdict = "" if allowed is None else f"{allowed:.0%}: {'met' if above <= allowed else 'NOT MET'}"
    bound = f"{row['bound']:.3f} ({row['bound_of']})"
    return (
        name,
        where,
        f"{row['share']:.3f}",
        bound,
        f"{above:+.1%}",
        verdict,
        f"{row['wall_s']:.1f}",
        row.get("note", ""),
    )
