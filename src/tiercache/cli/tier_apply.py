"""The verb tier apply: makes exactly the moves of a stored plan."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import Annotated, Any

import typer

from tiercache.cli.failures import FAILED, PARTIAL
from tiercache.cli.options import DryRun, Json, Quiet, Verbose, Yes
from tiercache.cli.output import Output, count, printable
from tiercache.cli.tier_opening import OpenTiers, Rules, open_tiers
from tiercache.cli.tier_plan import Limit, plan_facts, plan_text, print_plan
from tiercache.cli.tier_texts import format_duration
from tiercache.model import format_bytes
from tiercache.tier.model import Plan
from tiercache.tier.move.mover import ApplyResult, Mover, StoppedMove
from tiercache.tier.move.placement_updates import track_planned
from tiercache.tier.move.transfer import Transfer
from tiercache.tier.plan.plan import read_plan


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
