"""The verb tier plan: what would be moved, why, and what it costs and saves. Nothing is moved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tiercache.cli.options import Json, Quiet, Verbose
from tiercache.cli.output import Output, count
from tiercache.cli.tier_opening import OpenTiers, Rules, open_tiers, print_unavailable
from tiercache.cli.tier_texts import format_dollars, format_duration, print_holdings
from tiercache.model import format_bytes
from tiercache.tier.model import SHARD, Move, Plan, Refusal
from tiercache.tier.plan.plan import make_plan, write_plan
from tiercache.tier.plan.policy import decide
from tiercache.tier.plan.tables import paths_of, total_moves, totals_by_route

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
