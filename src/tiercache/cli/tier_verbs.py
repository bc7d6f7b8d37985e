"""The verbs below `tiercache tier` except check, and the verb restore."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from tiercache.cli.options import DryRun, Json, Quiet, Verbose, Yes
from tiercache.cli.output import FAILED, PARTIAL, PENDING, Output, count, printable, report_errors
from tiercache.cli.tier_check import check
from tiercache.cli.tiers import (
    OpenTiers,
    Rules,
    base_folder,
    format_dollars,
    format_duration,
    is_glob,
    open_tiers,
    print_holdings,
    print_losses,
    print_metric_gaps,
    print_unavailable,
    read_rules,
    select_paths,
    tier_path,
)
from tiercache.errors import NotFound
from tiercache.model import ObjectInfo, format_bytes
from tiercache.prices import SPEEDS, Prices, Speed
from tiercache.tier import restore as restoring
from tiercache.tier.costs import Sizes, month_dollars
from tiercache.tier.inventory.listing import keys_of
from tiercache.tier.model import KINDS, READABLE, SHARD, Move, Plan, Refusal, Snapshot
from tiercache.tier.move.mover import ApplyResult, Mover, RunReport, StoppedMove, run_once
from tiercache.tier.move.placement_updates import track_planned
from tiercache.tier.move.transfer import Transfer
from tiercache.tier.plan.plan import make_plan, read_plan, write_plan
from tiercache.tier.plan.policy import decide
from tiercache.tier.plan.tables import paths_of, total_moves, totals_by_route
from tiercache.tier.restore import RestorePlan
from tiercache.tier.stores import state_of

Limit = Annotated[
    int, typer.Option("--limit", "-n", min=0, metavar="N", help="Number of moves and of refusals to show; 0: all.")
]


def plan(
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write the plan to FILE, for `tiercache tier apply FILE`."),
    ] = None,
    limit: Limit = 20,
    rules: Rules = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,  # noqa: ARG001 - report_errors() reads it
) -> None:
    """Show what would be moved, why, and what it costs and saves.

    Nothing is moved. Moves that are refused are shown too. With --json, all moves and refusals are printed, whatever
    --limit says.
    """
    output = Output(as_json, quiet)
    with open_tiers(rules) as tiers:
        made = plan_tiers(output, tiers)
        note = tiers.unpriced_note()
    if out is not None:
        write_plan(made, out)
    print_plan(output, made, limit)
    written = f"; written to {out}" if out is not None else ""
    output.summary(plan_facts(made) | {"out": None if out is None else str(out)}, f"{plan_text(made)}{written}{note}")


def plan_tiers(output: Output, tiers: OpenTiers) -> Plan:
    """Return a plan of what is in the tiers now."""
    inventory = tiers.read_inventory(output)
    unseen = tiers.unavailable_tiers()
    limits = tiers.capacities()
    decisions = decide(inventory.snapshot, tiers.file, tiers.prices, capacity_bytes=limits, missing=unseen)
    made = make_plan(decisions, inventory, tiers.file, tiers.prices)
    print_unavailable(output, tiers.file, unseen)
    tiers.print_missing_metrics(output, inventory)
    tiers.print_untracked(output, inventory, paths_of(made.moves, SHARD))
    return made


def print_plan(output: Output, made: Plan, limit: int) -> None:
    """Print sums by rule, the moves, the refusals, and what each tier holds before and after."""
    most = None if output.as_json or limit == 0 else limit
    if most is not None and len(made.moves) > most:
        _print_sums(output, made.moves)
    _print_moves(output, made.moves[:most])
    _say_more(len(made.moves), most, "move")
    _print_refusals(output, made.refusals[:most])
    _say_more(len(made.refusals), most, "refusal")
    print_holdings(output, [tier.name for tier in made.tiers], made.before, made.after)


def _print_sums(output: Output, moves: Sequence[Move]) -> None:
    """Print the moves of each rule between two tiers, summed, for people only."""
    texts = [
        {
            "rule": rule,
            "does": action,
            "from": src,
            "to": dst or "",
            "moves": f"{n:,}",
            "size": format_bytes(of.n_bytes),
        }
        | {"cost": format_dollars(of.once), "saves/month": format_dollars(of.saving_month)}
        for (rule, action, src, dst), (n, of) in totals_by_route(moves).items()
    ]
    output.table("sum", texts, texts)


def _print_moves(output: Output, moves: Sequence[Move]) -> None:
    texts = [
        {"does": move.action, "path": move.path, "from": move.src, "to": move.dst or ""}
        | {"size": format_bytes(move.n_bytes), "cost": format_dollars(move.money.once)}
        | {"saves/month": format_dollars(move.money.saving_month), "back in": _days(move.money.break_even_days)}
        | {"why": f"{move.rule}: {move.reason}"}
        for move in moves
    ]
    output.table("move", [move_facts(move) for move in moves], texts)


def _days(days: float | None) -> str:
    if days is None:
        return ""
    return format_duration(days * 86400.0) if days > 0 else "at once"


def _print_refusals(output: Output, refusals: Sequence[Refusal]) -> None:
    texts = [
        {"refused": one.action, "path": one.path, "from": one.src, "to": one.dst or ""}
        | {"size": format_bytes(one.n_bytes), "why": f"{one.rule}: {one.reason}"}
        for one in refusals
    ]
    output.table("refused", [refusal_facts(one) for one in refusals], texts)


def _say_more(n_all: int, most: int | None, noun: str) -> None:
    if most is not None and n_all > most:
        typer.echo(f"... and {count(n_all - most, noun)} more: --limit 0 shows all")


def move_facts(move: Move) -> dict[str, Any]:
    """Return a move for JSON output: as in the plan file, without its objects."""
    return {
        "id": move.number,
        "path": move.path,
        "kind": move.kind,
        "action": move.action,
        "src": move.src,
        "dst": move.dst,
        "rule": move.rule,
        "reason": move.reason,
        "n_objects": len(move.objects),
        "n_bytes": move.n_bytes,
        "cost": move.money.once,
        "saving_month": move.money.saving_month,
        "break_even_days": move.money.break_even_days,
        "seconds": move.seconds,
    }


def refusal_facts(one: Refusal) -> dict[str, Any]:
    """Return a refusal for JSON output."""
    names = ("path", "kind", "action", "src", "dst", "rule", "reason", "n_bytes")
    return {name: getattr(one, name) for name in names}


def plan_facts(made: Plan) -> dict[str, Any]:
    """Return the summary of a plan for JSON output."""
    of = total_moves(made.moves)
    return {
        "plan": made.id,
        "n_moves": len(made.moves),
        "n_refused": len(made.refusals),
        "n_bytes": of.n_bytes,
        "cost": of.once,
        "saving_month": of.saving_month,
    }


def plan_text(made: Plan) -> str:
    """Return the summary of a plan for people."""
    facts = plan_facts(made)
    text = f"{count(facts['n_moves'], 'move')}, {format_bytes(facts['n_bytes'])}"
    text += f", costs ${format_dollars(facts['cost'])}, saves ${format_dollars(facts['saving_month'])} a month"
    return text + (f"; {count(facts['n_refused'], 'move')} refused" if facts["n_refused"] else "")


def apply(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan file that `tiercache tier plan --out` wrote.")],
    limit: Limit = 20,
    rules: Rules = None,
    yes: Yes = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,  # noqa: ARG001 - report_errors() reads it
) -> None:
    """Make the moves of a stored plan, and no others.

    A move whose objects or tiers have changed since is stopped. Data sets whose shards the plan moves or refuses are
    tracked from then on: machines report which shards they use. The sources of the moves are deleted later, by
    `tiercache tier run --once` after the grace period. Without --rules, the rule file is the one that the plan was made
    with.
    """
    output = Output(as_json, quiet)
    stored = read_plan(plan)
    if dry_run:
        print_plan(output, stored, limit)
        output.summary({**plan_facts(stored), "dry_run": True}, f"would make {plan_text(stored)}")
        return
    with open_tiers(rules or Path(stored.rules)) as tiers:
        if tiers.file.sha256 != stored.rules_sha256:
            text = f"{tiers.file.path} has changed since the plan was made; moves of tiers that differ are stopped"
            output.event("note", {"text": text}, f"note: {text}")
        if stored.moves and not yes:
            confirm(f"Make {plan_text(stored)}{_deletions(stored)}?", "nothing was moved")
        adopted = track_planned(stored, tiers.stores)
        applied = execute_plan(output, tiers, stored)
    text = _apply_text(stored, applied, tiers.file.tiering.grace_s) + tracked_text(adopted)
    output.summary(_apply_facts(stored, applied) | {"adopted": list(adopted)}, text)
    if applied.stopped:
        raise typer.Exit(PARTIAL)


def execute_plan(output: Output, tiers: OpenTiers, plan: Plan) -> ApplyResult:
    """Make a plan's moves with a progress bar, and print the moves that were stopped, with the reason."""
    cancel, tiering = Event(), tiers.file.tiering
    with (
        Transfer(tiers.stores, jobs=tiering.jobs, rate_bytes_s=tiering.rate_bytes_s, cancel=cancel) as transfer,
        output.byte_progress("moving") as advance,
    ):
        mover = Mover(tiers.file, tiers.stores, tiers.catalog, transfer, cancel=cancel)
        applied = mover.apply(plan, on_progress=lambda p: advance(p.done_bytes, p.n_bytes))
    print_stopped(output, applied.stopped)
    return applied


def print_stopped(output: Output, stopped: Sequence[StoppedMove]) -> None:
    """Print the moves that were not made, with the reason."""
    for one in stopped:
        facts = {"plan": one.plan, "id": one.number, "path": one.path, "reason": one.reason}
        output.event("stopped", facts, printable(f"stopped: {one.path}: {one.reason}"))


def tracked_text(adopted: Sequence[str]) -> str:
    """Return the end of a summary, which counts data sets that are tracked from now on."""
    return f"; {count(len(adopted), 'data set')} tracked from now on" if adopted else ""


def confirm(question: str, otherwise: str) -> None:
    """Ask at the terminal whether to continue, and exit if not. Raises ValueError if standard input is no terminal."""
    if not sys.stdin.isatty():
        raise ValueError("cannot ask for confirmation, because standard input is not a terminal; give --yes")
    if not typer.confirm(question, err=True):
        typer.echo(f"tiercache: {otherwise}", err=True)
        raise typer.Exit(FAILED)


def _deletions(plan: Plan) -> str:
    n = sum(move.action == "delete" for move in plan.moves)
    return f", including {count(n, 'permanent deletion')}" if n else ""


def _apply_facts(plan: Plan, applied: ApplyResult) -> dict[str, Any]:
    return {
        "plan": plan.id,
        "n_moves": len(plan.moves),
        "done": applied.done,
        "stopped": len(applied.stopped),
        "waiting_drops": applied.waiting_drops,
        "n_bytes": applied.n_bytes,
    }


def _apply_text(plan: Plan, applied: ApplyResult, grace_s: float) -> str:
    text = f"{applied.done:,} of {count(len(plan.moves), 'move')} done, {format_bytes(applied.n_bytes)} copied"
    if applied.waiting_drops:
        text += (
            f"; {count(applied.waiting_drops, 'deletion')} due after the grace period ({format_duration(grace_s)}), "
            "by `tier run --once`"
        )
    return text + (f"; {len(applied.stopped):,} stopped" if applied.stopped else "")


def run(
    once: Annotated[bool, typer.Option("--once", help="Required: run once, and do not stay resident.")] = False,
    limit: Limit = 20,
    rules: Rules = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,  # noqa: ARG001 - report_errors() reads it
) -> None:
    """Plan and make all moves that are due; for schedulers.

    It finishes interrupted moves, plans, moves, and deletes sources after the grace period. It is for cron, Airflow or
    Kubernetes, and asks no questions. With --json, the last line is the summary. Exit codes: 0 done; 1 failed; 3 some
    moves were stopped (the others are done), an object is lost, or a tier cannot be seen (e.g. a disk that is not
    mounted); 5 restores are in progress.
    """
    if not once:
        raise ValueError("give --once: tiercache does not stay resident, a scheduler such as cron repeats the command")
    output = Output(as_json, quiet)
    file = read_rules(rules)
    with output.byte_progress("moving") as advance:
        report = run_once(file, dry_run=dry_run, on_progress=lambda p: advance(p.done_bytes, p.n_bytes))
    print_unavailable(output, file, report.unseen)
    print_metric_gaps(output, report.gaps)
    if dry_run:
        print_plan(output, report.plan, limit)
    else:
        print_stopped(output, report.stopped)
    print_losses(output, report.losses)
    if not dry_run and not as_json:
        print_holdings(output, [tier.name for tier in report.plan.tiers], report.plan.before, report.plan.after)
    output.summary(report.to_json(), _run_text(report))
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _run_text(report: RunReport) -> str:
    """Return the summary for people."""
    if report.dry_run:
        return f"would make {plan_text(report.plan)}; {count(report.settled.waiting_drops, 'deletion')} waiting"
    applied, settled = report.applied, report.settled
    text = f"{applied.done:,} of {count(len(report.plan.moves), 'move')} done, {format_bytes(applied.n_bytes)} copied"
    text += f"; {count(settled.done, 'deletion')} made, {format_bytes(settled.n_bytes)}"
    parts = [
        (settled.proof_bytes, f"{format_bytes(settled.proof_bytes)} of copies read back first"),
        (settled.waiting_drops, f"{count(settled.waiting_drops, 'deletion')} waiting for grace"),
        (len(report.stopped), f"{len(report.stopped):,} stopped"),
        (len(report.losses), f"{count(len(report.losses), 'object')} lost"),
        (len(report.unseen), f"{count(len(report.unseen), 'tier')} not seen"),
        (len(report.plan.refusals), f"{len(report.plan.refusals):,} refused"),
        (report.n_restoring, f"{count(report.n_restoring, 'copy', 'copies')} being restored"),
    ]
    return "; ".join([text, *(words for n, words in parts if n)]) + tracked_text(report.adopted)


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


def restore(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="WHAT...",
            help="Objects to restore: URLs or paths in a tier (with all objects below), or globs over paths. "
            "Arguments after a URL may be names below that URL.",
        ),
    ],
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until all objects are restored, then copy them to the home tier.")
    ] = False,
    speed: Annotated[
        str, typer.Option("--speed", metavar="SPEED", help="Speed of the restore: expedited, standard or bulk.")
    ] = "standard",
    days: Annotated[
        int | None,
        typer.Option(
            "--days", min=1, metavar="N", help="Restore temporarily, for N days, without copying to the home tier."
        ),
    ] = None,
    rules: Rules = None,
    yes: Yes = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,  # noqa: ARG001 - report_errors() reads it
) -> None:
    """Restore archived objects and copy them to the home tier.

    The command shows cost and duration, asks, and requests the restores. The exit code is 5 while restores are in
    progress; the same command then shows their progress and continues. The archived copies stay until a rule deletes
    them.
    """
    output = Output(as_json, quiet)
    manner = _RestoreOptions(wait, yes, dry_run)
    with open_tiers(rules) as tiers:
        keys = _archived_keys(tiers, _paths(tiers, what))
        plan = restoring.plan_restore(tiers.file, tiers.stores, keys, tiers.prices, speed=_speed(speed), days=days)
        code = _restore(output, tiers, plan, manner)
    if code:
        raise typer.Exit(code)


@dataclass(frozen=True, slots=True)
class _RestoreOptions:
    wait: bool
    yes: bool
    dry_run: bool


def _speed(text: str) -> Speed:
    for speed in SPEEDS:
        if speed == text:
            return speed
    raise ValueError(f"--speed: {text!r} is not one of {', '.join(SPEEDS)}")


def _paths(tiers: OpenTiers, what: Sequence[str]) -> list[str]:
    """Return the paths and globs, relative to the tiers' URLs. A name that follows a URL is relative to that URL."""
    first = tier_path(tiers.file, what[0])
    is_place = first != what[0].strip("/")
    found = [first]
    for text in what[1:]:
        path = tier_path(tiers.file, text)
        is_name = is_place and path == text.strip("/")
        found.append(f"{first}/{path}".strip("/") if is_name else path)
    return found[1:] if is_place and len(found) > 1 else found


def _archived_keys(tiers: OpenTiers, wanted: Sequence[str]) -> list[str]:
    """Return the keys of the selected objects whose every copy must be restored before it can be read.

    The listings of the tiers tell the states, so no request per object is needed. Raises NotFound if nothing matches an
    argument.
    """
    here: set[str] = set()
    cold: set[str] = set()
    for text in wanted:
        found = [info for tier in tiers.file.tiers for info in _meant(tiers, tier.name, text)]
        if not found:
            names = ", ".join(tier.name for tier in tiers.file.tiers)
            raise NotFound(f"no object has this name or matches it in the tiers {names}", url=text or "/")
        here.update(info.key for info in found if state_of(info) == READABLE)
        cold.update(info.key for info in found if state_of(info) != READABLE)
    return sorted(cold - here)


def _meant(tiers: OpenTiers, tier: str, text: str) -> list[ObjectInfo]:
    """Return the objects of a tier that a path or glob selects."""
    listed = list(tiers.stores.listing(tier, base_folder(text)))
    is_meant = select_paths(keys_of(listed), [text])
    found = [listed[i] for i in np.flatnonzero(is_meant)]
    if text and not found and not is_glob(text):
        with suppress(NotFound):
            found.append(tiers.stores.head(tier, text))
    return found


def _restore(output: Output, tiers: OpenTiers, plan: RestorePlan, manner: _RestoreOptions) -> int:
    """Carry out the plan as far as possible now; return the exit code."""
    for one in plan.objects:
        output.event("object", {"key": one.key, "tier": one.tier, "n_bytes": one.n_bytes, "state": STATES[one.state]})
    if not plan.objects:
        output.summary(_restore_facts(plan), "nothing to restore: all objects can be read")
        return 0
    if manner.dry_run:
        output.summary(_restore_facts(plan) | {"dry_run": True}, f"would restore {_restore_text(plan)}")
        return 0
    if plan.asked and not manner.yes:
        confirm(f"Restore {_restore_text(plan)}?", "nothing was requested")
    asked = restoring.request_restore(tiers.stores, plan)
    n_left = asked.started + asked.running
    if n_left:
        deadline_s = None if manner.wait else 0.0  # some stores restore at once
        with output.count_progress("restoring") as advance:
            n_left = len(restoring.wait_restored(tiers.stores, plan, deadline_s=deadline_s, on_progress=advance))
    facts = _restore_facts(plan) | {"started": asked.started, "running": asked.running, "pending": n_left}
    if n_left:
        text = f"{count(n_left, 'object')} being restored{_hours(plan)}; give --wait to wait and to copy them home"
        output.summary(facts, text)
        return PENDING
    if plan.days is not None:
        output.summary(facts, f"{count(len(plan.objects), 'object')} can be read for {count(plan.days, 'day')}")
        return 0
    return _promote(output, tiers, plan, facts)


def _promote(output: Output, tiers: OpenTiers, plan: RestorePlan, facts: dict[str, Any]) -> int:
    """Copy the restored objects to the home tier; return the exit code."""
    moves = restoring.plan_copy_home(tiers.file, plan, made_s=time.time(), known=tiers.catalog.checksums)
    applied = execute_plan(output, tiers, moves)
    stopped = len(applied.stopped)
    text = f"{count(len(plan.objects), 'object')}, {format_bytes(plan.n_bytes)}, restored to {tiers.file.home.name}"
    text += f"; {count(stopped, 'move')} of {len(moves.moves)} stopped" if stopped else ""
    output.summary(facts | {"copied": applied.done, "stopped": stopped}, text)
    return PARTIAL if stopped else 0


def _restore_facts(plan: RestorePlan) -> dict[str, Any]:
    return {
        "objects": len(plan.objects),
        "n_bytes": plan.n_bytes,
        "here": len(plan.readable_keys),
        "cost": plan.cost,
        "hours": plan.hours,
        "speed": plan.speed,
        "days": plan.days,
        "command": plan.command,
    }


def _restore_text(plan: RestorePlan) -> str:
    cost = "at an unknown price" if plan.cost is None else f"for ${format_dollars(plan.cost)}"
    return f"{count(len(plan.objects), 'object')}, {format_bytes(plan.n_bytes)}, {cost}{_hours(plan)}"


def _hours(plan: RestorePlan) -> str:
    return "" if plan.hours is None else f", up to {plan.hours:g} h ({plan.speed})"


tier = typer.Typer(help="Move shards, checkpoints and files between tiers, by rules.", no_args_is_help=True)

_AGAIN = "nothing was changed; run the same command again"
_GOES_ON = "finished moves stay, nothing was lost; the same command continues from there"
# Each verb, and the advice that follows Ctrl-C.
_VERBS: tuple[tuple[Callable[..., None], str], ...] = (
    (check, _AGAIN),
    (plan, _AGAIN),
    (apply, _GOES_ON),
    (run, _GOES_ON),
    (ls, _AGAIN),
)
for _verb, _how_to_go_on in _VERBS:
    tier.command()(report_errors(_verb, how_to_go_on=_how_to_go_on))
