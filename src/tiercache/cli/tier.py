"""The verbs of `tiercache tier`, except get; and what other verbs about tiers share: open tiers, paths, formatting."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import typer
from numpy.typing import NDArray

from tiercache import config
from tiercache.cli.common import (
    FAILED,
    PARTIAL,
    UNCONFIRMED,
    DryRun,
    Output,
    Rules,
    Yes,
    argument,
    confirm,
    count,
    flag,
    format_duration,
    option,
    printable,
    verb,
)
from tiercache.errors import NotFound, StoreError
from tiercache.model import format_bytes
from tiercache.prices import (
    SPEEDS,
    Prices,
    Speed,
    break_even_days,
    month_dollars,
    price_notes,
    price_table,
)
from tiercache.store import redact
from tiercache.store.access import ParsedUrl
from tiercache.tier.context import ApplyResult, StoppedMove, track_planned
from tiercache.tier.findings import RuleWarning, refuse_shared_folders, rule_warnings
from tiercache.tier.inventory import Inventory, take_inventory
from tiercache.tier.journal import TierCatalog
from tiercache.tier.mover import RunReport, catalog_path, open_mover, run_once
from tiercache.tier.moves import apply_plan
from tiercache.tier.plans import HEAD, Move, Plan, Refusal, TierTotals, make_plan, read_plan, write_plan
from tiercache.tier.policy import decide_now, largest_copies, rules_of, span
from tiercache.tier.rules import Rule, RuleFile, Tier, load_rule_file
from tiercache.tier.snapshot import KINDS, READABLE, SHARD, STANDARD, ExceededLimit, Snapshot
from tiercache.tier.stores import Stores, missing_folder_message, unavailable_tiers
from tiercache.tier.text_columns import first_match


def format_dollars(amount: float) -> str:
    digits = 2 if amount == 0 or abs(amount) >= 0.01 else 1 - math.floor(math.log10(abs(amount)))
    return f"{amount:,.{digits}f}" if digits <= 6 and amount else "0.00"


def format_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


STATE_NAMES = ("here", "archived", "restoring", "restored")
"""Names of the states of copies, by the number of the state in a snapshot."""


def format_copy(copy: Mapping[str, Any]) -> str:
    """Return where a copy is, for people: "archive (restoring, in part)". copy: Its facts in JSON output."""
    notes = [] if copy["state"] == STATE_NAMES[READABLE] else [copy["state"]]
    notes += [] if copy["whole"] else ["in part"]
    return f"{copy['tier']} ({', '.join(notes)})" if notes else str(copy["tier"])


def print_holdings(
    output: Output, tiers: Sequence[str], before: Mapping[str, TierTotals], after: Mapping[str, TierTotals]
) -> None:
    rows: list[dict[str, Any]] = []
    texts: list[dict[str, str]] = []
    for name in tiers:
        totals = {"before": before.get(name, TierTotals()), "after": after.get(name, TierTotals())}
        facts = {when: asdict(of) | {"dollars_month": round(of.dollars_month, 6)} for when, of in totals.items()}
        rows.append({"tier": name} | facts)
        text = {"tier": name}
        for when, of in totals.items():
            then = "" if when == "before" else " then"
            text |= {f"objects{then}": f"{of.n_objects:,}", f"bytes{then}": format_bytes(of.n_bytes)}
            text[f"$/month{then}"] = format_dollars(of.dollars_month)
        texts.append(text)
    output.table("tier", rows, texts)


_HERE = ("./", "../")
_SIGNS = "*?"


@dataclass(frozen=True, slots=True)
class OpenTiers:
    file: RuleFile  # the rule file
    stores: Stores  # stores of the tiers
    catalog: TierCatalog  # catalog of this machine
    prices: tuple[Prices | None, ...]  # prices of each tier; None: no prices are known

    def read_inventory(self, output: Output) -> Inventory:
        # All keys exist from the start, because threads set their values.
        listed = {tier.name: 0 for tier in self.file.tiers}

        with output.count_progress("listing") as advance:

            def progress(tier: str, n_objects: int) -> None:
                listed[tier] = n_objects
                n_all = sum(listed.values())
                advance(n_all, n_all)

            return take_inventory(self.file, self.stores, self.catalog, now_s=time.time(), on_progress=progress)

    def print_untracked(self, output: Output, inventory: Inventory, paths: pa.Array) -> None:
        for found in inventory.facts.get("datasets", ()):
            if not found.is_tracked and not found.problem and pc.any(pc.starts_with(paths, found.folder)).as_py():
                folder = found.folder.rstrip("/") or "/"
                from_then = "machines report it after the first `tier apply` or `tier run --once`"
                text = f"{folder}: its use is not tracked yet; {from_then}"
                output.event("uncounted", {"data_set": folder}, f"note: {text}")

    def unpriced_note(self) -> str:
        names = [tier.name for tier, prices in zip(self.file.tiers, self.prices, strict=True) if prices is None]
        return f"; dollars exclude {', '.join(names)}, which has no prices" if names else ""


def print_rule_warnings(output: Output, found: Iterable[RuleWarning]) -> None:
    for one in found:
        level = "note" if one.kind == "unmatched" else "warning"
        output.event("rule_warning", asdict(one), printable(f"{level}: {one.text}"))


def print_unavailable(output: Output, file: RuleFile, unavailable: Mapping[str, str]) -> None:
    for tier, reason in unavailable.items():
        text = f"tiers.{tier} cannot be seen: {reason}"
        output.event("unseen", {"tier": tier, "reason": reason}, printable(f"warning: {text}"))
    print_notes(
        output, filter(None, (missing_folder_message(tier) for tier in file.tiers if tier.name not in unavailable))
    )


def print_notes(output: Output, notes: Iterable[str]) -> None:
    for note in notes:
        output.event("doubt", {"text": note}, f"note: {note}")


@contextmanager
def open_tiers(rules: Path | None) -> Iterator[OpenTiers]:
    file = load_rule_file(rules)
    urls = {tier.name: tier.url for tier in file.tiers}
    with Stores(file) as stores, TierCatalog(catalog_path(file), urls) as catalog:
        yield OpenTiers(file, stores, catalog, file.prices)


def tier_path(file: RuleFile, text: str) -> str:
    """Return the path below the tiers' URLs that an argument names; "" is a whole tier.

    text: URL or local path in a tier; the name of a tier and a path below its URL ("hot/checkpoints/run7"); or a path
    below the tiers' URLs. A local path is absolute, or begins with "~/", "./" or "../". Raises ValueError if the URL or
    absolute path is in no tier.
    """
    location = ParsedUrl.parse(os.path.abspath(text) if text.startswith(_HERE) else text)  # noqa: PTH100 - keeps links
    if not location.scheme and not Path(location.path).is_absolute():
        return split_tier(file, text)[1]
    whole = _whole(location)
    for tier in file.tiers:
        root = _whole(ParsedUrl.parse(tier.url))
        if whole == root:
            return ""
        if whole.startswith(root.rstrip("/") + "/"):
            return whole.removeprefix(root.rstrip("/") + "/")
    known = ", ".join(ParsedUrl.parse(tier.url).shown for tier in file.tiers)
    raise ValueError(f"{location.shown}: not in any tier of {file.path}: {known}")


def split_tier(file: RuleFile, text: str) -> tuple[str | None, str]:
    """Return the tier that an argument names first, and the path below it: "hot/a/b" is ("hot", "a/b").

    (None, path) for an argument that begins with no tier's name.
    """
    name, _, rest = text.strip("/").partition("/")
    is_tier = "://" not in text and name in [tier.name for tier in file.tiers]
    return (name, rest) if is_tier and not text.startswith("/") else (None, text.strip("/"))


def _whole(location: ParsedUrl) -> str:
    return location.full.rstrip("/") if location.scheme else os.path.normpath(location.path)


def is_glob(text: str) -> bool:
    return any(sign in text for sign in _SIGNS)


def base_folder(text: str) -> str:
    if not is_glob(text):
        return text
    first = min(text.index(sign) for sign in _SIGNS if sign in text)
    return text[:first].rpartition("/")[0]


def select_paths(paths: pa.Array, text: str) -> NDArray[np.bool_]:
    """Return which paths a glob, or a path with everything below it, selects; "" selects all. bool[n]."""
    if is_glob(text):
        return first_match(paths, [((text,), ())]) >= 0
    if not text:
        return np.ones(len(paths), np.bool_)
    hits = pc.or_(pc.equal(paths, text), pc.starts_with(paths, f"{text}/"))
    return np.asarray(hits.to_numpy(zero_copy_only=False), np.bool_)


Rows = Annotated[int, option("--rows -n", "N", "Number of moves and of refusals to show; 0: all.", min=0)]


@verb(after_ctrl_c="nothing was changed; run the same command again")
def plan(
    output: Output,
    out: Annotated[
        Path | None,
        option("--out", "FILE", "Write the plan to FILE, for `tiercache tier apply FILE`."),
    ] = None,
    rows: Rows = 20,
    rules: Rules = None,
) -> None:
    """Show what would be moved, why, and what it costs and saves.

    Nothing is moved. Moves that are refused are shown too. "back in" is the time after which a move has saved its cost;
    it is empty if that never happens. With --json, all moves and refusals are printed, whatever --rows says.
    """
    with open_tiers(rules) as tiers:
        made = plan_tiers(output, tiers)
        note = tiers.unpriced_note()
    if out is not None:
        write_plan(made, out)
    print_plan(output, made, rows)
    written = f"; written to {out}" if out is not None else ""
    output.summary(plan_facts(made) | {"out": None if out is None else str(out)}, f"{plan_text(made)}{written}{note}")


def plan_tiers(output: Output, tiers: OpenTiers) -> Plan:
    inventory = tiers.read_inventory(output)
    file, snapshot = tiers.file, inventory.snapshot
    decisions, unavailable = decide_now(snapshot, file, tiers.stores, tiers.catalog)
    made = make_plan(decisions, inventory, file, tiers.prices)
    print_unavailable(output, file, unavailable)
    print_rule_warnings(output, rule_warnings(file, snapshot))
    _print_incomplete(output, inventory.facts)
    moved = decisions.moves.group
    tiers.print_untracked(output, inventory, snapshot.paths.take(pa.array(moved[snapshot.kind[moved] == SHARD])))
    return made


def print_plan(output: Output, made: Plan, max_rows: int) -> None:
    """Print the moves, the refusals, and what each tier holds before and after. max_rows: 0: all."""
    most = None if output.as_json or max_rows == 0 else max_rows
    print_moves(output, [*islice(made.moves, most)])
    _say_more(len(made.moves), most, "move")
    print_refusals(output, [*islice(made.refusals, most)])
    _say_more(len(made.refusals), most, "refusal")
    print_holdings(output, [tier.name for tier in made.tiers], made.before, made.after)
    for one in made.exceeded:
        text = f"{one.text}: `tier run --once` and `tier apply` do nothing of the plan without --yes"
        output.event("exceeded", asdict(one), f"warning: {text}")


def _print_exceeded(output: Output, exceeded: Sequence[ExceededLimit]) -> None:
    for one in exceeded:
        text = f"{one.text}: nothing of the plan was done; look at `tiercache tier plan`, and give --yes if it is right"
        output.event("exceeded", asdict(one), f"STOPPED: {text}")


def print_moves(output: Output, moves: Sequence[Move]) -> None:
    texts = [
        {"does": move.action, "path": move.path, "from": move.src, "to": move.dst or ""}
        | {"size": format_bytes(move.n_bytes), "cost": format_dollars(move.cost)}
        | {"saves/month": format_dollars(move.saving_month), "back in": _back_in(move)}
        | {"why": f"{move.rule}: {move.reason}"}
        for move in moves
    ]
    output.table("move", [move_facts(move) for move in moves], texts)


def _back_in(move: Move) -> str:
    days = break_even_days(np.array([move.cost]), np.array([move.saving_month]))[0]
    return "" if np.isinf(days) else format_duration(days * 86400.0) if days > 0 else "at once"


def print_refusals(output: Output, refusals: Sequence[Refusal]) -> None:
    texts = [
        {"refused": one.action, "path": one.path, "from": one.src, "to": one.dst or ""}
        | {"size": format_bytes(one.n_bytes), "why": f"{one.rule}: {one.reason}"}
        for one in refusals
    ]
    output.table("refused", [asdict(one) for one in refusals], texts)


def _say_more(n_all: int, most: int | None, noun: str) -> None:
    if most is not None and n_all > most:
        typer.echo(f"... and {count(n_all - most, noun)} more: --rows 0 shows all")


def move_facts(move: Move) -> dict[str, Any]:
    figures = {"n_bytes": move.n_bytes, "cost": move.cost, "saving_month": move.saving_month}
    head = {name: getattr(move, name) for name in HEAD}
    return {"id": move.number, **head, "n_objects": len(move.objects), **figures}


def plan_facts(made: Plan) -> dict[str, Any]:
    numbers = {"plan": made.id, "n_moves": len(made.moves), "n_refused": len(made.refusals)}
    return numbers | asdict(made.totals)


def plan_text(made: Plan) -> str:
    facts = plan_facts(made)
    text = f"{count(facts['n_moves'], 'move')}, {format_bytes(facts['n_bytes'])}"
    saving = facts["saving_month"]
    change = f"saves {_sum_of_dollars(saving)}" if saving >= 0 else f"then costs {_sum_of_dollars(-saving)} more"
    text += f", costs {_sum_of_dollars(facts['cost'])} once, {change} a month"
    return text + (f"; {count(facts['n_refused'], 'move')} refused" if facts["n_refused"] else "")


def _sum_of_dollars(amount: float) -> str:
    return "less than $0.01" if 0 < amount < 0.01 else f"${amount:,.2f}"


@verb(after_ctrl_c="finished moves stay, nothing was lost; the same command continues from there")
def apply(
    output: Output,
    plan: Annotated[Path, argument("PLAN", "Plan file that `tiercache tier plan --out` wrote.")],
    rows: Rows = 20,
    rules: Rules = None,
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Make the moves of a stored plan, and no others.

    A move whose objects or tiers have changed since is stopped. Without --yes, a plan that deletes more than a rule may
    (max_delete) ends with exit code 7 before anything is done. Data sets whose shards the plan moves or refuses are
    tracked from then on: machines report which shards they use. The sources of the moves are deleted later, by
    `tiercache tier run --once` after the grace period. Without --rules, the rule file is the one that the plan was made
    with.
    """
    stored = read_plan(plan)
    if dry_run:
        print_plan(output, stored, rows)
        output.summary({**plan_facts(stored), "dry_run": True}, f"would make {plan_text(stored)}")
        return
    if stored.exceeded and not yes:
        _print_exceeded(output, stored.exceeded)
        output.summary(plan_facts(stored) | {"done": 0}, f"nothing of the plan was done: {plan_text(stored)}")
        raise typer.Exit(UNCONFIRMED)
    with open_tiers(rules or Path(stored.rules)) as tiers:
        if tiers.file.sha256 != stored.rules_sha256:
            text = f"{tiers.file.path} has changed since the plan was made; moves of tiers that differ are stopped"
            output.event("note", {"text": text}, f"note: {text}")
        if stored.moves and not yes:
            n_deletions = sum(move.action == "delete" for move in stored.moves)
            deletions = f", including {count(n_deletions, 'permanent deletion')}" if n_deletions else ""
            confirm(f"Make {plan_text(stored)}{deletions}?", "nothing was moved")
        newly_tracked = track_planned(stored, tiers.stores)
        applied = execute_plan(output, tiers, stored)
    text = _apply_text(stored, applied, tiers.file.tiering.grace_s) + tracked_text(newly_tracked)
    output.summary(_apply_facts(stored, applied) | {"adopted": list(newly_tracked)}, text)
    if applied.stopped:
        raise typer.Exit(PARTIAL)


def execute_plan(output: Output, tiers: OpenTiers, plan: Plan) -> ApplyResult:
    with output.byte_progress("moving") as advance, open_mover(tiers.file, tiers.stores, tiers.catalog) as context:
        applied = apply_plan(context, plan, on_progress=advance)
    print_stopped(output, applied.stopped)
    return applied


def print_stopped(output: Output, stopped: Sequence[StoppedMove]) -> None:
    for one in stopped:
        facts = {"plan": one.plan, "id": one.number, "path": one.path, "reason": one.reason}
        output.event("stopped", facts, printable(f"stopped: {one.path}: {one.reason}"))


def tracked_text(newly_tracked: Sequence[str]) -> str:
    return f"; {count(len(newly_tracked), 'data set')} tracked from now on" if newly_tracked else ""


def _apply_facts(plan: Plan, applied: ApplyResult) -> dict[str, Any]:
    return {
        "plan": plan.id,
        "n_moves": len(plan.moves),
        "done": applied.n_made,
        "stopped": len(applied.stopped),
        "waiting_drops": applied.waiting_drops,
        "n_bytes": applied.n_bytes,
    }


def _apply_text(plan: Plan, applied: ApplyResult, grace_s: float) -> str:
    text = f"{applied.n_made:,} of {count(len(plan.moves), 'move')} done, {format_bytes(applied.n_bytes)} copied"
    if applied.waiting_drops:
        text += (
            f"; {count(applied.waiting_drops, 'deletion')} due after the grace period ({format_duration(grace_s)}), "
            "by `tier run --once`"
        )
    return text + (f"; {len(applied.stopped):,} stopped" if applied.stopped else "")


@verb(after_ctrl_c="finished moves stay, nothing was lost; the same command continues from there")
def run(
    output: Output,
    once: Annotated[bool, flag("--once", "Required: run once, and do not stay resident.")] = False,
    rules: Rules = None,
    yes: Annotated[
        bool, flag("--yes -y", "Make the deletions of this run also if a rule deletes more than its max_delete.")
    ] = False,
) -> None:
    """Plan and make all moves that are due; for schedulers.

    It finishes interrupted moves, plans, moves, and deletes sources after the grace period. It is for cron, Airflow or
    Kubernetes, and asks no questions. With --json, the last line is the summary. Exit codes: 0 done; 1 failed; 3 some
    moves were stopped (the others are done), or a tier cannot be seen (e.g. a disk that is not mounted); 5 restores are
    in progress; 7 nothing of the plan was done, because a rule would delete more for good than its max_delete (half of
    the bytes that it matches): look at `tier plan`, and give --yes if it is right.
    """
    if not once:
        raise ValueError("give --once: tiercache does not stay resident, a scheduler such as cron repeats the command")
    file = load_rule_file(rules)
    with output.byte_progress("moving") as advance:
        report = run_once(file, confirmed=yes, on_progress=advance)
    print_unavailable(output, file, report.unavailable)
    print_stopped(output, report.stopped)
    if report.is_unconfirmed:
        _print_exceeded(output, report.plan.exceeded)
    elif not output.as_json:
        print_holdings(output, [tier.name for tier in report.plan.tiers], report.plan.before, report.plan.after)
    output.summary(report.to_json(), _run_text(report))
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _run_text(report: RunReport) -> str:
    if report.is_unconfirmed:
        return f"nothing of the plan was done: {plan_text(report.plan)}; deletions must be confirmed with --yes"
    applied, settled = report.applied, report.deletions
    text = f"{applied.n_made:,} of {count(len(report.plan.moves), 'move')} done, {format_bytes(applied.n_bytes)} copied"
    text += f"; {count(settled.n_made, 'deletion')} made, {format_bytes(settled.n_bytes)}"
    parts = [
        (settled.waiting_drops, f"{count(settled.waiting_drops, 'deletion')} waiting for grace"),
        (len(report.stopped), f"{len(report.stopped):,} stopped"),
        (report.resumed.n_made, f"{count(report.resumed.n_made, 'interrupted copy', 'interrupted copies')} finished"),
        (len(report.unavailable), f"{count(len(report.unavailable), 'tier')} not seen"),
        (len(report.plan.refusals), f"{len(report.plan.refusals):,} refused"),
        (report.n_restoring, f"{count(report.n_restoring, 'copy', 'copies')} being restored"),
    ]
    return "; ".join([text, *(words for n, words in parts if n)]) + tracked_text(report.newly_tracked)


_DIGITS = re.compile(r"([0-9]+)")


@verb(after_ctrl_c="nothing was changed; run the same command again")
def ls(
    output: Output,
    path: Annotated[
        str | None,
        argument("[PATH]", "Folder below the tiers' URLs, URL in a tier, or glob; default: all."),
    ] = None,
    rules: Rules = None,
) -> None:
    """List shards, checkpoints and files with their tiers and costs.

    Each line shows the states of the copies, the last use and the dollars per month.
    """
    with open_tiers(rules) as tiers:
        selected = "" if path is None else tier_path(tiers.file, path)
        tier = None if path is None else split_tier(tiers.file, path)[0]
        inventory = tiers.read_inventory(output)
        print_unavailable(output, tiers.file, unavailable_tiers(tiers.file, tiers.stores, tiers.catalog))
        snapshot = inventory.snapshot
        note = tiers.unpriced_note()
    is_selected = select_paths(snapshot.paths, selected)
    if tier is not None:
        is_selected &= np.isin(
            np.arange(snapshot.n_groups), snapshot.group[snapshot.tier == snapshot.tiers.index(tier)]
        )
    found = np.flatnonzero(is_selected).tolist()
    if path is not None and not found:
        raise NotFound(f"no object has this name or matches it in the tiers {', '.join(snapshot.tiers)}", url=selected)
    month = monthly(snapshot, tiers.prices)
    first = np.searchsorted(snapshot.group, np.arange(snapshot.n_groups + 1))
    groups = sorted(found, key=lambda group: _natural(snapshot.paths[group].as_py()))
    rows = [_row(snapshot, g, range(first[g], first[g + 1]), month) for g in groups]
    output.table("group", rows, [_row_text(row, snapshot.now_s) for row in rows])
    _print_ls_summary(output, rows, snapshot.tiers, note)


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(_DIGITS.split(path))]


def monthly(snapshot: Snapshot, prices: Sequence[Prices | None]) -> NDArray[np.float64]:
    found = np.zeros(snapshot.n_copies)
    for tier, price in enumerate(prices):
        copies = np.flatnonzero(snapshot.tier == tier)
        if price is not None:
            found[copies] = month_dollars(price, snapshot.sizes(copies))
    return found


def _row(snapshot: Snapshot, group: int, copies: Sequence[int], month: NDArray[np.float64]) -> dict[str, Any]:
    last_use_s = float(snapshot.last_use_s[group])
    return {
        "path": snapshot.paths[group].as_py(),
        "kind": KINDS[snapshot.kind[group]],
        "complete": bool(snapshot.complete[group]),
        "copies": [_copy(snapshot, copy, month) for copy in copies],
        "n_bytes": max((int(snapshot.n_bytes[copy]) for copy in copies), default=0),
        "created": format_time(float(snapshot.created_s[group])),
        "last_use": format_time(last_use_s),
        "last_use_s": last_use_s,
        "in_use": bool(snapshot.in_use[group]),
        "unreported": bool(snapshot.unreported[group]),
        "held": snapshot.held.get(group),
        "dollars_month": round(sum(float(month[copy]) for copy in copies), 9),
    }


def _copy(snapshot: Snapshot, copy: int, month: NDArray[np.float64]) -> dict[str, Any]:
    storage_class = snapshot.classes[snapshot.storage_class[copy]] or None
    return copy_facts(snapshot, copy) | {
        "storage_class": storage_class,
        "dollars_month": round(float(month[copy]), 9),
    }


def copy_facts(snapshot: Snapshot, copy: int) -> dict[str, Any]:
    return {
        "tier": snapshot.tiers[snapshot.tier[copy]],
        "state": STATE_NAMES[snapshot.state[copy]],
        "n_objects": int(snapshot.n_objects[copy]),
        "n_bytes": int(snapshot.n_bytes[copy]),
        "whole": bool(snapshot.whole[copy]),
        "verified": bool(snapshot.verified[copy]),
    }


def _row_text(row: Mapping[str, Any], now_s: float) -> dict[str, str]:
    used = "now" if row["in_use"] else f"{format_duration(now_s - row['last_use_s'])} ago"
    return {
        "path": row["path"],
        "kind": row["kind"] if row["complete"] else f"{row['kind']} (not complete)",
        "size": format_bytes(row["n_bytes"]),
        "where": ", ".join(format_copy(copy) for copy in row["copies"]),
        "last use": used + (" or later" if row["unreported"] else ""),
        "$/month": format_dollars(row["dollars_month"]),
    }


def _print_ls_summary(output: Output, rows: Sequence[Mapping[str, Any]], tiers: Sequence[str], note: str) -> None:
    totals = {name: [0, 0.0] for name in tiers}
    for copy in (copy for row in rows for copy in row["copies"]):
        totals[copy["tier"]][0] += copy["n_bytes"]
        totals[copy["tier"]][1] += copy["dollars_month"]
    month = sum(amount for _, amount in totals.values())
    by_tier = {name: {"n_bytes": n_bytes, "dollars_month": round(d, 9)} for name, (n_bytes, d) in totals.items()}
    shown = ", ".join(f"{format_bytes(n_bytes)} in {name}" for name, (n_bytes, _) in totals.items())
    facts = {"groups": len(rows), "tiers": by_tier, "dollars_month": round(month, 9)}
    output.summary(facts, f"{count(len(rows), 'group')}: {shown}; ${format_dollars(month)} a month{note}")


def parse_speed(text: str) -> Speed:
    for speed in SPEEDS:
        if speed == text:
            return speed
    raise ValueError(f"--speed: {text!r} is not one of {', '.join(SPEEDS)}")


_NO_RULE = "(no rule)"
# Facts of an inventory, and why no plan touches the objects that they count.
_LEFT_ALONE = {
    "orphans": "shards that no version of their data set contains",
    "missing": "shards that a version contains but no tier has: a rule deleted them, or they are elsewhere",
    "unfinished": "still being written",
    "no_keys": "names that are not valid keys",
    "conflicts": "in conflict, because two tiers have different objects under the name",
    "differing": "different copies in two tiers",
}
_SHOWN = 3
_UNAVAILABLE = "cannot be seen"


@verb(after_ctrl_c="nothing was changed; run the same command again")
def check(
    output: Output,
    rules: Rules = None,
    prices: Annotated[bool, flag("--prices", "Print only the built-in price table.")] = False,
) -> None:
    """Check the rule file and its tiers, and print what rules match.

    Nothing is changed. The exit code is 1 if a tier cannot be reached or its copies cannot be seen (e.g. a disk that is
    not mounted).
    """
    if prices:
        print_prices(output)
    else:
        with open_tiers(rules) as tiers:
            _check(output, tiers)


def _check(output: Output, tiers: OpenTiers) -> None:
    file = tiers.file
    refuse_shared_folders(file)
    reached = {tier.name: _reached(tiers, tier) for tier in file.tiers}
    failed = {name for name, answer in reached.items() if answer != "yes"}
    unavailable = unavailable_tiers(file, tiers.stores, tiers.catalog, but=failed)
    _print_tiers(output, file, reached | dict.fromkeys(unavailable, _UNAVAILABLE))
    print_unavailable(output, file, unavailable)
    if not failed:
        inventory = tiers.read_inventory(output)
        _print_rules(output, file, inventory)
        _print_left_alone(output, inventory.facts)
        print_rule_warnings(output, rule_warnings(file, inventory.snapshot))
        folders = [found.folder for found in inventory.facts["datasets"]]
        tiers.print_untracked(output, inventory, pa.array(folders, pa.large_string()))
    n_unreached = len(failed) + len(unavailable)
    _sum_up(output, file, n_unreached)
    if n_unreached:
        raise typer.Exit(FAILED)


def _reached(tiers: OpenTiers, tier: Tier) -> str:
    """Return "yes", or why the tier cannot be reached. A listing needs the same permission as everything else."""
    if tier.is_local and (path := Path(ParsedUrl.parse(tier.url).path)).exists() and not path.is_dir():
        return f"{path}: not a folder"
    try:
        next(iter(tiers.stores.listing(tier.name)), None)
    except (StoreError, ValueError, OSError) as error:
        return " ".join(str(error).split())
    return "yes"


def _print_tiers(output: Output, file: RuleFile, reached: dict[str, str]) -> None:
    rows: list[dict[str, Any]] = []
    texts: list[dict[str, str]] = []
    for tier in file.tiers:
        prices = tier.prices if isinstance(tier.prices, str) else "own" if tier.prices else None
        shown = {"tier": tier.name, "url": redact(tier.url)}
        facts = {"storage_class": tier.storage_class, "capacity": tier.capacity, "prices": prices}
        answer = reached[tier.name]
        rows.append({**shown, **facts, "home": tier is file.home_tier, "reached": answer == "yes", "answer": answer})
        words = {"home": "yes" if tier is file.home_tier else "", "class": tier.storage_class or ""}
        words |= {"capacity": tier.capacity or "", "prices": prices or ""}
        texts.append({**shown, **words, "reached": answer})
    output.table("tier", rows, texts)


def _print_rules(output: Output, file: RuleFile, inventory: Inventory) -> None:
    snapshot = inventory.snapshot
    matched, sizes = rules_of(snapshot, file), largest_copies(snapshot)
    rows: list[dict[str, Any]] = []
    texts: list[dict[str, str]] = []
    for number, name in [*enumerate(rule.name for rule in file.rules), (-1, _NO_RULE)]:
        mine = matched == number
        kinds = {f"{kind}s": int(np.count_nonzero(mine & (snapshot.kind == i))) for i, kind in enumerate(KINDS)}
        n_bytes = int(sizes[mine].sum())
        does = _does(file.rules[number], file.tiering.grace_s) if number >= 0 else "stays where it is"
        rows.append({"rule": name, "does": does, **kinds, "n_bytes": n_bytes})
        counts = {kind: f"{n:,}" for kind, n in kinds.items()}
        texts.append({"rule": name, **counts, "size": format_bytes(n_bytes), "does": does})
    output.table("rule", rows, texts)


def _print_left_alone(output: Output, facts: Mapping[str, Any]) -> None:
    for name, what in _LEFT_ALONE.items():
        n, names = facts.get(name, (0, ()))
        if n:
            shown = ", ".join(names[:_SHOWN]) + (", ..." if n > _SHOWN else "")
            text = f"{count(n, 'object')} left alone, {what}: {shown}"
            output.event("left_alone", {"why": name, "objects": n, "names": list(names)}, f"note: {text}")
    _print_incomplete(output, facts)
    for found in facts.get("datasets", ()):
        if found.problem:
            output.event("data_set", {"folder": found.folder, "problem": found.problem}, f"note: {found.problem}")


def _print_incomplete(output: Output, facts: Mapping[str, Any]) -> None:
    for lack, n in facts.get("incomplete", {}).items():
        names = facts["incomplete_names"][lack]
        shown = ", ".join(names[:_SHOWN]) + (", ..." if n > _SHOWN else "")
        text = f"{count(n, 'checkpoint')} incomplete and left alone, lacking {lack}: {shown}"
        output.event("incomplete", {"without": lack, "checkpoints": n, "names": list(names)}, f"note: {text}")


def _does(rule: Rule, grace_s: float) -> str:
    parts = []
    if rule.to is not None:
        when = [("not used for", rule.idle_s), ("written before", rule.after_s)]
        parts.append(", ".join([f"to {rule.to}", *(f"{words} {span(s)}" for words, s in when if s)]))
    if rule.keep:
        parts.append(f"keeps some in {', '.join(rule.keep)}")
    if rule.then is not None:
        parts.append(f"then {rule.then}")
    if rule.delete_after_s is not None:
        grace = f", and {span(grace_s)} of grace" if grace_s > 0 else ""
        parts.append(f"deletes {span(rule.delete_after_s)} after the last write{grace}")
    return ", ".join(parts) or "stays where it is"


def _setting_notes(file: RuleFile) -> Iterator[str]:
    for tier in file.tiers:
        if tier.prices is None and not tier.is_local:
            yield f"tiers.{tier.name} has no prices, so plans contain no dollars for it"
        if isinstance(tier.prices, str) and tier.prices.startswith("aws:"):
            priced, written = tier.prices.rpartition(":")[2], tier.storage_class or STANDARD
            if priced != written and not tier.is_local:
                yield f"tiers.{tier.name} writes storage class {written}, but has the prices of {priced}"


def _sum_up(output: Output, file: RuleFile, n_unreached: int) -> None:
    print_notes(output, _setting_notes(file))
    facts = {
        "rules_file": str(file.path),
        "tiers": len(file.tiers),
        "rules": len(file.rules),
        "pins": len(file.pins),
        "not_reached": n_unreached,
    }
    text = f"{count(len(file.tiers), 'tier')}, {count(len(file.rules), 'rule')}, {count(len(file.pins), 'pin')}"
    unreached = f"; {count(n_unreached, 'tier')} not reached" if n_unreached else ""
    output.summary(facts, f"{file.path}: {text}{unreached}")


def print_prices(output: Output) -> None:
    dated, table = price_table()
    rows = [asdict(prices) for prices in table.values()]
    names = ("store_gb_month", "put_1000", "get_1000", "transition_1000", "retrieve_gb", "egress_gb", "min_days")
    texts = [
        {"prices": row["name"], **{name: f"{row[name]:.5f}".rstrip("0").rstrip(".") for name in names}}
        | {
            "min_bytes": f"{row['min_bytes']:,}",
            "overhead": f"{row['overhead_bytes'] + row['standard_overhead_bytes']:,}",
        }
        | {"restore": ", ".join(f"{speed} {p['hours']:g} h ${p['gb']:g}/GB" for speed, p in row["restore"].items())}
        for row in rows
    ]
    output.table("prices", rows, texts)
    for note in price_notes():
        output.event("note", {"text": note}, note)
    output.summary(
        {"dated": dated, "prices": len(rows)},
        f"prices as of {dated}, in dollars; price tables in a rule file override them",
    )


@verb(after_ctrl_c="nothing was changed; run the same command again")
def init(
    output: Output,
    folder: Annotated[str, argument("FOLDER", "Folder or URL: the first tier of the rule file.")],
    out: Annotated[
        Path | None, option("--out", "FILE", "File to write; default: tiercache.toml in this folder.")
    ] = None,
) -> None:
    """Write a first rule file with comments, with a folder or URL as its first tier.

    Nothing is moved, and no existing file is overwritten. Read the file, change it, and run `tiercache tier check`.
    """
    target = (Path(config.FILE_NAME) if out is None else out).absolute()
    is_local = "://" not in folder
    url = os.path.abspath(Path(folder).expanduser()) if is_local else folder  # noqa: PTH100 - keeps the user's links
    text = files("tiercache").joinpath("tier/first_rules.toml").read_text(encoding="utf-8")
    if not is_local:  # a bucket is the standard tier itself
        text = re.sub(r"# \[tiers\.standard\]\n(?:# .*\n)+\n|# keep_standard.*\n", "", text).replace("hot", "standard")
    text = text.replace('"FOLDER"', json.dumps(url, ensure_ascii=False))
    with target.open("x", encoding="utf-8") as file:
        file.write(text)
    load_rule_file(target)
    output.summary({"file": str(target)}, f"{target}: read it, change it, then run `tiercache tier check`")
