"""Requirements and results of a run: `python -m peers.verdict ROWS`; `--into FOLDER` writes requirements.md.

Each line compares medians of one run: tiercache's with another contender's, for the same workload, order and layout.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peers.catalogue import PEERS, PICTURE_FORMS, manner
from peers.report import fewer, machine, read, table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Row = dict[str, Any]

OURS = "tiercache"
READS = ("every", "first")
TITLES = ("what", "required", "measured", "touched only", "figures", "")
NOT_MEASURED = "not measured"
NAN = float("nan")

Case = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Required:
    """Minimum ratio of tiercache's rate to another contender's rate."""

    workload: str
    shuffle: str
    form: str
    against: str
    ratio: float

    @property
    def case(self) -> Case:
        """The case that is run."""
        return self.workload, self.shuffle, self.form


PICTURES = ("", *PICTURE_FORMS)
TABLE = (
    Required("tokens", "full", "", "c_floor", 1.3),
    Required("tokens", "none", "", "c_floor", 0.6),
    Required("bytes", "full", "list", "numpy_memmap", 1.2),
    Required("bytes", "full", "buffer", "c_floor", 0.9),
    Required("tensors", "full", "", "c_floor", 1.0),
    Required("rows", "full", "buffer", "c_floor", 0.5),
    Required("rows", "full", "list", "numpy_memmap", 1.3),
    *(Required("rows", "none", form, "numpy_memmap", 1.3) for form in ("list", "buffer")),
    *(Required("rows", "none", form, "lance_arrow", 1.7) for form in ("list", "buffer")),
    *(Required("images", shuffle, form, "decoder_alone", 0.9) for form in PICTURES for shuffle in ("none", "full")),
    *(Required("images", shuffle, form, "beton", 2.0) for form in PICTURES for shuffle in ("none", "full")),
    *(Required("augmented", "full", form, "transforms_alone", 0.9) for form in PICTURES),
)


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure of tiercache compared with the library that is best at it.

    Attributes:
        required: Requirement in words.
        figure: Name of the figure in a row.
        scale, unit: Scale and unit of the output.
        at_least, at_most: Bounds of the ratio to the best library. With at_least, more is better.
    """

    required: str
    figure: str
    scale: float
    unit: str
    at_least: float = 0.0
    at_most: float = float("inf")

    @property
    def is_required(self) -> bool:
        """Whether it has bounds; otherwise it is only shown."""
        return self.at_least > 0.0 or self.at_most < float("inf")

    def of(self, row: Row) -> float:
        """Return the figure of a row."""
        if self.figure == "own_bytes":
            return row["peak_private_bytes"]["median"] - row["idle_private_bytes"]["median"]
        return row[self.figure]["median"]


RATE = Measure("ahead of every library", "samples_per_s.every", 1e-3, "k samples/s", at_least=1.0)
MEASURES = (
    RATE,
    Measure("CPU seconds per million: the least", "cpu_s_per_million.every", 1.0, "s", at_most=1.0),
    Measure("peak private memory: 1.5 x the least", "peak_private_bytes", 1e-6, "MB", at_most=1.5),
    Measure("(for information) without what imports take", "own_bytes", 1e-6, "MB"),
)
PACK_RATIO = 2.0


@dataclass(frozen=True, slots=True)
class Line:
    """One requirement and the result of the rows. met: None if the rows have no result."""

    what: str
    required: str
    measured: str = ""
    touched: str = ""
    figures: str = NOT_MEASURED
    met: bool | None = None

    def cells(self) -> list[str]:
        """Return the cells of the table."""
        said = {None: "-", True: "met", False: "NOT MET"}[self.met]
        return [self.what, self.required, self.measured, self.touched, self.figures, said]


def verdict(rows: Sequence[Row]) -> list[Line]:
    """Return the lines of all requirements. rows: Rows of one run."""
    loads = {(row["peer"], *_case(row)): row for row in rows if row["benchmark"] == "load" and "missing" not in row}
    lines = [_ratio(required, loads) for required in TABLE]
    for (peer, *case), ours in loads.items():
        if peer == OURS and ours["shuffle"] != "default":
            libraries = [row for row in loads.values() if _is_beside(row, (case[0], case[1], case[2]))]
            lines += [_beside(measure, ours, libraries) for measure in MEASURES if libraries]
    return [*lines, _packing(rows)]


def _case(row: Row) -> Case:
    return row["workload"]["name"], row["shuffle"], row["form"]


def _named(case: Case) -> str:
    workload, shuffle, form = case
    order = {"none": "in the stored order", "full": "shuffled"}[shuffle]
    return ", ".join(filter(None, (workload, order, manner(form))))


def _is_beside(row: Row, case: Case) -> bool:
    """Return whether a library did the same, or the nearest that it supports: its own shuffle."""
    workload, shuffle, form = _case(row)
    same_order = shuffle == case[1] or (shuffle == "default" and case[1] == "full")
    return row["peer"] != OURS and not PEERS[row["peer"]].baseline and same_order and (workload, form) == case[::2]


def _ratio(required: Required, loads: dict[tuple[str, ...], Row]) -> Line:
    ours, other = (loads.get((peer, *required.case)) for peer in (OURS, required.against))
    what, asked = _named(required.case), f"{required.ratio:g} x {PEERS[required.against].title}"
    if ours is None or other is None:
        return Line(what, asked)
    every, first = ([row[f"samples_per_s.{read}"]["median"] / 1e3 for row in (ours, other)] for read in READS)
    ratio, figures = every[0] / every[1], f"{every[0]:,.1f} / {every[1]:,.1f} k samples/s"
    return Line(what, asked, f"{ratio:.2f}", f"{first[0] / first[1]:.2f}", figures, ratio >= required.ratio)


def _beside(measure: Measure, ours: Row, libraries: Iterable[Row]) -> Line:
    best = (max if measure.at_least else min)(libraries, key=measure.of)
    mine, its = measure.of(ours), measure.of(best)
    ratio = mine / its if its else NAN
    name = ", ".join(filter(None, (best["title"], fewer(best))))
    figures = f"{mine * measure.scale:,.2f} / {its * measure.scale:,.2f} {measure.unit} ({name})"
    met = measure.at_least <= ratio <= measure.at_most if measure.is_required else None
    return Line(_named(_case(ours)), measure.required, f"{ratio:.2f}", "", figures, met)


def _packing(rows: Iterable[Row]) -> Line:
    """Return the line of packing tokens record by record, compared with the fastest library, which may batch."""
    packed = [row for row in rows if row["benchmark"] == "pack" and row["workload"]["name"] == "tokens"]
    ours = next((row.get("one_by_one_records_per_s") for row in packed if row["peer"] == OURS), None)
    rates = {
        row["title"]: row.get("one_by_one_records_per_s", row["records_per_s"])
        for row in packed
        if "records_per_s" in row and row["peer"] != OURS and _writes(row["peer"])
    }
    what, asked = "tokens, packed one by one", f"{PACK_RATIO:g} x the fastest library"
    if ours is None or not rates:
        return Line(what, asked)
    best = max(rates, key=rates.__getitem__)
    ratio, figures = ours / rates[best], f"{ours / 1e3:,.1f} / {rates[best] / 1e3:,.1f} k records/s ({best})"
    return Line(what, asked, f"{ratio:.2f}", "", figures, ratio >= PACK_RATIO)


def _writes(peer: str) -> bool:
    return PEERS[peer].packs and not PEERS[peer].baseline


def markdown(rows: Sequence[Row]) -> str:
    """Return the requirements as a table, and the machine."""
    lines = verdict(rows)
    n_met, n_measured = sum(line.met is True for line in lines), sum(line.met is not None for line in lines)
    summary = f"{n_met} of {n_measured} requirements that were measured are met."
    return f"{machine(rows[0])}\n\n{summary}\n\n{table(TITLES, [line.cells() for line in lines])}\n"


def main() -> None:
    """Print the table, or write it into a folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("rows", type=Path, help="File peers.jsonl.")
    parser.add_argument("--into", type=Path, help="Folder for requirements.md.")
    given = parser.parse_args()
    text = markdown(read(given.rows))
    if given.into:
        (given.into / "requirements.md").write_text(f"# Requirements and results\n\n{text}")
    else:
        print(text)


if __name__ == "__main__":
    main()
