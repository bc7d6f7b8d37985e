"""Markdown tables of the rows: `python -m peers.report ROWS`; `--into FOLDER` writes peers.md and cold.md there."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peers.catalogue import COLD, PICTURE_FORMS, manner
from workloads import workload_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Row = dict[str, Any]

ORDERS = {"none": "in the stored order", "full": "shuffled"}
# Each workload has one of them.
FLOORS = ("c_floor", "decoder_alone")
OURS, COLD_FLOOR = "tiercache", "obstore_floor"
# Minimum ratio of tiercache's rate to another contender's, in a cold epoch of the same order.
COLD_REQUIRED = {"mosaic": 1.0, "lit": 1.0, "wds": 1.0, "s3_connector": 1.0, "s3fs_map": 3.0, "s3fs_bulk": 3.0}
LOAD_TITLES = (
    "contender",
    "k samples/s, every byte read",
    "min - max",
    "x floor",
    "k samples/s, touched",
    "CPU s per million",
    "peak private MB",
    "first batch ms",
    "rank correlation",
    "neighbour distance",
    "run with",
)
COLD_TITLES = (
    "contender",
    "s per epoch",
    "min - max",
    "MB/s",
    "x floor",
    "tiercache : it",
    "required",
    "first batch s",
    "CPU s",
    "MB sent",
    "rank correlation",
    "neighbour distance",
    "run with",
)
PACK_TITLES = ("contender", "k records/s", "one by one", "MB stored", "of the records' bytes")


def read(path: Path) -> list[Row]:
    """Return the rows of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def markdown(rows: Sequence[Row]) -> str:
    """Return all tables: one per workload and order, then packing, then the missing contenders with reasons."""
    parts = [machine(rows[0])]
    for name in dict.fromkeys(row["workload"]["name"] for row in rows):
        of_it = [row for row in rows if row["workload"]["name"] == name]
        workload = workload_of(of_it[0]["workload"])
        # Rows without this number are from earlier runs, in which every contender got all records.
        n_records = max(row.get("whole_records", row["workload"]["n_records"]) for row in of_it)
        parts.append(f"### {name}")
        parts.append(f"{n_records:,} records of {workload.describe()}; batches of {workload.batch_size}.")
        for shuffle, order in ORDERS.items():
            parts += cold(of_it, shuffle, order)
            for form in dict.fromkeys(row["form"] for row in of_it if row["benchmark"] == "load"):
                parts += loading(of_it, shuffle, form, order)
        packed = [row for row in of_it if row["benchmark"] == "pack" and "missing" not in row]
        if packed:
            parts += ["Packed:", table(PACK_TITLES, [pack_line(row, workload.record_bytes) for row in packed])]
        parts += missing(of_it)
    return "\n\n".join(parts) + "\n"


def machine(row: Row) -> str:
    """Return the machine and the versions of the rows."""
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    memory = f"{row['memory_bytes'] / 2**30:.0f} GiB"
    return f"{row['date']}: {row['processor']}, {row['cores']} cores, {memory}, Linux {row['kernel']}; {versions}."


def loading(rows: Sequence[Row], shuffle: str, form: str, order: str) -> list[str]:
    """Return the table of an order and layout, fastest first; shuffled ones also show each library's own shuffle."""
    chosen = [
        row
        for row in rows
        if row["benchmark"] == "load"
        and "missing" not in row
        and row["form"] == form
        and (row["shuffle"] == shuffle or (shuffle == "full" and row["shuffle"] == "default"))
    ]
    if not chosen:
        return []
    chosen.sort(key=lambda row: -row["samples_per_s.every"]["median"])
    floor = next((row["samples_per_s.every"]["median"] for row in chosen if row["peer"] in FLOORS), None)
    what = "pictures" if form in PICTURE_FORMS else "varied columns"
    title = f"{order[0].upper()}{order[1:]}" + (f", {what} {manner(form)}" if form else "")
    return [f"{title}:", table(LOAD_TITLES, [load_line(row, floor) for row in chosen])]


def cold(rows: Sequence[Row], shuffle: str, order: str) -> list[str]:
    """Return the table of an order's cold epochs, fastest first; shuffled ones also show each library's own shuffle."""
    found = [row for row in rows if row["benchmark"] == "cold" and "missing" not in row]
    chosen = [row for row in found if (row["shuffle"] == "none") == (shuffle == "none")]
    if not chosen:
        return []
    chosen.sort(key=lambda row: row["epoch_s"]["median"])
    floor = next((row for row in found if row["peer"] == COLD_FLOOR), None)
    ours = {row["shuffle"]: row for row in found if row["peer"] == OURS}
    lines = [cold_line(row, floor, ours.get(row["shuffle"])) for row in chosen]
    return [f"{order[0].upper()}{order[1:]}:", table(COLD_TITLES, lines)]


def cold_line(row: Row, floor: Row | None, ours: Row | None) -> list[str]:
    """Return the cells of one case. ours: tiercache's row with the same kind of shuffle."""
    workload, epoch_s = workload_of(row["workload"]), row["epoch_s"]
    n_bytes = (workload.record_bytes + 8) * workload.n_records
    ratio = epoch_s["median"] / ours["epoch_s"]["median"] if ours and row["peer"] != OURS else None
    least = COLD_REQUIRED.get(row["peer"])
    return [
        named(row),
        f"{epoch_s['median']:.2f}",
        f"{epoch_s['min']:.2f} - {epoch_s['max']:.2f}",
        f"{n_bytes / epoch_s['median'] / 1e6:,.0f}",
        f"{floor['epoch_s']['median'] / epoch_s['median']:.2f}" if floor else "",
        f"{ratio:.2f}" if ratio else "",
        f"{least:g} x: {'met' if ratio >= least else 'NOT MET'}" if ratio and least else "",
        f"{row['first_batch_s']['median']:.2f}",
        f"{row['cpu_s']['median']:.1f}",
        f"{row['sent_bytes']['median'] / 1e6:,.0f}" if "sent_bytes" in row else "",
        f"{row['rank_correlation']['median']:.3f}",
        f"{row['neighbour_distance']['median']:.3f}",
        row["note"],
    ]


def named(row: Row) -> str:
    """Return the name of a contender with its version."""
    return f"{row['title']} {row['version']}".strip() + (", its own shuffle" if row["shuffle"] == "default" else "")


def load_line(row: Row, floor: float | None) -> list[str]:
    """Return the cells of one case."""
    every, touched = row["samples_per_s.every"], row["samples_per_s.first"]
    return [
        named(row),
        thousands(every["median"]),
        f"{thousands(every['min'])} - {thousands(every['max'])}",
        f"{every['median'] / floor:.2f}" if floor else "",
        thousands(touched["median"]),
        f"{row['cpu_s_per_million.every']['median']:,.2f}",
        f"{row['peak_private_bytes']['median'] / 1e6:,.0f}",
        f"{row['first_batch_s']['median'] * 1e3:,.0f}",
        f"{row['rank_correlation']['median']:.3f}",
        f"{row['neighbour_distance']['median']:.3f}",
        ", ".join(filter(None, (row["note"], fewer(row), partly(row["checked_share"]["median"])))),
    ]


def fewer(row: Row) -> str:
    """Return how many records a contender got, if not all of the workload's."""
    n_records = row["workload"].get("n_records")
    return f"{n_records:,} records" if n_records != row.get("whole_records", n_records) else ""


def partly(share: float) -> str:
    """Return a note on an epoch of which only the beginning was checked, for lack of time."""
    return f"{share:.0%} of an epoch checked" if share < 1 else ""


def pack_line(row: Row, record_bytes: int) -> list[str]:
    """Return the cells of one contender's packing."""
    raw = (record_bytes + 8) * row["workload"]["n_records"]
    one_by_one = row.get("one_by_one_records_per_s")
    return [
        ", ".join(filter(None, (f"{row['title']} {row['version']}".strip(), fewer(row)))),
        thousands(row["records_per_s"]),
        thousands(one_by_one) if one_by_one else "",
        f"{row['stored_bytes'] / 1e6:,.0f}",
        f"{row['stored_bytes'] / raw:.2f}",
    ]


def missing(rows: Iterable[Row]) -> list[str]:
    """Return the contenders without figures and the reasons, each once. Data that needs no packing is not listed."""
    seen: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "missing" in row and row["benchmark"] != "pack":
            how = f"shuffle {row['shuffle']} {manner(row['form'])}".rstrip()
            seen.setdefault((row["title"], row["missing"]), []).append(how)
    lines = [f"- {title} ({'; '.join(how)}): {reason}" for (title, reason), how in seen.items()]
    return ["No figures:", "\n".join(lines)] if lines else []


def thousands(rate: float) -> str:
    """Format a rate in thousands, with three digits or more."""
    return f"{rate / 1e3:,.2f}" if rate < 1e4 else f"{rate / 1e3:,.1f}" if rate < 1e5 else f"{rate / 1e3:,.0f}"


def table(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; numbers right-aligned, the first and the last column left-aligned."""
    marks = [":--", *["--:"] * (len(titles) - 2), "--:" if titles is PACK_TITLES else ":--"]
    return "\n".join("| " + " | ".join(line) + " |" for line in (titles, marks, *lines))


def main() -> None:
    """Print the tables, or write them into a folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("rows", type=Path, help="File peers.jsonl.")
    parser.add_argument("--into", type=Path, help="Folder for peers.md and cold.md.")
    given = parser.parse_args()
    rows = read(given.rows)
    if not given.into:
        print(markdown(rows))
        return
    of_cold = [row for row in rows if row["workload"]["name"] == COLD]
    local = [row for row in rows if row not in of_cold]
    for chosen, name, title in ((local, "peers.md", "Local data"), (of_cold, "cold.md", "Cold epochs")):
        if chosen:
            text = f"# {title}: tiercache beside other libraries\n\n{markdown(chosen)}\n"
            (given.into / name).write_text(text)


if __name__ == "__main__":
    main()
