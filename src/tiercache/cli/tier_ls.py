"""The verb tier ls: objects, their tiers and states, their last use and their cost."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from tiercache.cli.options import Json, Quiet, Verbose
from tiercache.cli.output import Output, count
from tiercache.cli.tier_opening import Rules, open_tiers, print_unavailable, select_paths, tier_path
from tiercache.cli.tier_texts import format_dollars, format_duration
from tiercache.errors import NotFound
from tiercache.model import format_bytes
from tiercache.prices import Prices
from tiercache.tier.costs import Sizes, month_dollars
from tiercache.tier.model import KINDS, READABLE, Snapshot

_DIGITS = re.compile(r"([0-9]+)")
STATES = ("here", "archived", "restoring", "restored")


def ls(
    path: Annotated[
        str | None,
        typer.Argument(metavar="[PATH]", help="Folder below the tiers' URLs, URL in a tier, or glob; default: all."),
    ] = None,
    rules: Rules = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,  # noqa: ARG001 - report_errors() reads it
) -> None:
    """List shards, checkpoints and files with their tiers and costs.

    Each line shows the states of the copies, the last use and the dollars per month.
    """
    output = Output(as_json, quiet)
    with open_tiers(rules) as tiers:
        wanted = "" if path is None else tier_path(tiers.file, path)
        inventory = tiers.read_inventory(output)
        print_unavailable(output, tiers.file, tiers.unavailable_tiers())
        tiers.print_pending_moves(output)
        snapshot = inventory.snapshot
        note = tiers.unpriced_note()
    found = np.flatnonzero(select_paths(snapshot.paths, [wanted])).tolist()
    if path is not None and not found:
        raise NotFound(f"no object has this name or matches it in the tiers {', '.join(snapshot.tiers)}", url=wanted)
    month = monthly(snapshot, tiers.prices)
    first = np.searchsorted(snapshot.group, np.arange(snapshot.n_groups + 1))
    groups = sorted(found, key=lambda group: _natural(snapshot.paths[group].as_py()))
    rows = [_row(snapshot, g, range(first[g], first[g + 1]), month) for g in groups]
    output.table("group", rows, [_row_text(row, snapshot.now_s) for row in rows])
    _print_ls_summary(output, rows, snapshot.tiers, note)


def _natural(path: str) -> list[tuple[int, str]]:
    """Return a sort key that orders numbers in paths by value: step-9 before step-10."""
    return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(_DIGITS.split(path))]


def monthly(snapshot: Snapshot, prices: Sequence[Prices | None]) -> NDArray[np.float64]:
    """Return the dollars per month of each copy, float64[n_copies]; 0 if its tier has no prices."""
    found = np.zeros(snapshot.n_copies)
    for tier, price in enumerate(prices):
        copies = np.flatnonzero(snapshot.tier == tier)
        if price is not None:
            found[copies] = month_dollars(price, Sizes.of(snapshot, copies))
    return found


def _row(snapshot: Snapshot, group: int, copies: Sequence[int], month: NDArray[np.float64]) -> dict[str, Any]:
    """Return a group for JSON output."""
    last_use_s = float(snapshot.last_use_s[group])
    return {
        "path": snapshot.paths[group].as_py(),
        "kind": KINDS[snapshot.kind[group]],
        "complete": bool(snapshot.complete[group]),
        "copies": [_copy(snapshot, copy, month) for copy in copies],
        "n_bytes": max((int(snapshot.n_bytes[copy]) for copy in copies), default=0),
        "created": _time(float(snapshot.created_s[group])),
        "last_use": _time(last_use_s),
        "last_use_s": last_use_s,
        "uses": int(snapshot.uses[group]),
        "in_use": bool(snapshot.in_use[group]),
        "unreported": bool(snapshot.unreported[group]),
        "dollars_month": round(sum(float(month[copy]) for copy in copies), 9),
    }


def _copy(snapshot: Snapshot, copy: int, month: NDArray[np.float64]) -> dict[str, Any]:
    return {
        "tier": snapshot.tiers[snapshot.tier[copy]],
        "state": STATES[snapshot.state[copy]],
        "storage_class": snapshot.classes[snapshot.storage_class[copy]] or None,
        "n_objects": int(snapshot.n_objects[copy]),
        "n_bytes": int(snapshot.n_bytes[copy]),
        "whole": bool(snapshot.whole[copy]),
        "verified": bool(snapshot.verified[copy]),
        "dollars_month": round(float(month[copy]), 9),
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _row_text(row: Mapping[str, Any], now_s: float) -> dict[str, str]:
    """Return a row of _row() for people."""
    used = "now" if row["in_use"] else f"{format_duration(now_s - row['last_use_s'])} ago"
    return {
        "path": row["path"],
        "kind": row["kind"] if row["complete"] else f"{row['kind']} (not complete)",
        "size": format_bytes(row["n_bytes"]),
        "where": ", ".join(_where(copy) for copy in row["copies"]),
        "last use": used + (" or later" if row["unreported"] else ""),
        "uses": f"{row['uses']:,}",
        "$/month": format_dollars(row["dollars_month"]),
    }


def _where(copy: Mapping[str, Any]) -> str:
    notes = [] if copy["state"] == STATES[READABLE] else [copy["state"]]
    notes += [] if copy["whole"] else ["in part"]
    return f"{copy['tier']} ({', '.join(notes)})" if notes else str(copy["tier"])


def _print_ls_summary(output: Output, rows: Sequence[Mapping[str, Any]], tiers: Sequence[str], note: str) -> None:
    held = {name: [0, 0.0] for name in tiers}
    for copy in (copy for row in rows for copy in row["copies"]):
        held[copy["tier"]][0] += copy["n_bytes"]
        held[copy["tier"]][1] += copy["dollars_month"]
    month = sum(amount for _, amount in held.values())
    by_tier = {name: {"n_bytes": n_bytes, "dollars_month": round(d, 6)} for name, (n_bytes, d) in held.items()}
    shown = ", ".join(f"{format_bytes(n_bytes)} in {name}" for name, (n_bytes, _) in held.items())
    facts = {"groups": len(rows), "tiers": by_tier, "dollars_month": round(month, 6)}
    output.summary(facts, f"{count(len(rows), 'group')}: {shown}; ${format_dollars(month)} a month{note}")
