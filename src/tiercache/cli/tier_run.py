"""The verb tier run, for schedulers: takes the inventory, plans, moves, and deletes sources whose grace is over."""

from __future__ import annotations

from typing import Annotated

import typer

from tiercache.cli.options import DryRun, Json, Quiet, Verbose
from tiercache.cli.output import Output, count
from tiercache.cli.tier_apply import print_stopped, tracked_text
from tiercache.cli.tier_opening import Rules, print_losses, print_metric_gaps, print_unavailable, read_rules
from tiercache.cli.tier_plan import Limit, plan_text, print_plan
from tiercache.cli.tier_texts import print_holdings
from tiercache.model import format_bytes
from tiercache.tier.move.mover import RunReport, run_once


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
