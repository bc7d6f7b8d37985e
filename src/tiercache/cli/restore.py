"""The verb restore: has archived objects back, by the store's own word on how far it is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import typer

from tiercache.cli.failures import PARTLY, PENDING
from tiercache.cli.options import DryRun, Json, Quiet, Verbose, Yes
from tiercache.cli.output import Output, count
from tiercache.cli.tier_apply import ask, carry_out
from tiercache.cli.tier_opening import OpenTiers, Rules, chosen, folder_of, is_glob, opened_tiers, path_of
from tiercache.cli.tier_texts import dollars
from tiercache.errors import NotFound
from tiercache.model import ObjectInfo, format_bytes
from tiercache.store.archive import SPEEDS, Speed
from tiercache.tier import restore as restoring
from tiercache.tier.listing import keys_of
from tiercache.tier.model import HERE
from tiercache.tier.restore import RestorePlan
from tiercache.tier.stores import state_of

_STATES = ("here", "archived", "restoring", "restored")


def restore(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="WHAT...",
            help="A URL or path in a tier with all below it, or a glob over paths; after a URL, names below it.",
        ),
    ],
    wait: Annotated[bool, typer.Option("--wait", help="Wait until all can be read, and copy it home.")] = False,
    speed: Annotated[str, typer.Option("--speed", metavar="SPEED", help="expedited, standard or bulk.")] = "standard",
    days: Annotated[
        int | None, typer.Option("--days", min=1, metavar="N", help="Only temporary copies, for N days; none at home.")
    ] = None,
    rules: Rules = None,
    yes: Yes = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,  # noqa: ARG001 - read where failures are reported
) -> None:
    """Have archived objects back: say what it costs and how long it takes, ask, and copy it home when it is there.

    Ends with 5 while something is on its way; the same command again says how far it is, and goes on. The archived
    copies stay until a rule deletes them.
    """
    output = Output(as_json, quiet)
    manner = _Manner(wait, yes, dry_run)
    with opened_tiers(rules) as tiers:
        keys = _archived_keys(tiers, _paths(tiers, what))
        plan = restoring.plan_restore(tiers.file, tiers.stores, keys, tiers.prices, speed=_speed(speed), days=days)
        code = _restore(output, tiers, plan, manner)
    if code:
        raise typer.Exit(code)


@dataclass(frozen=True, slots=True)
class _Manner:
    wait: bool
    yes: bool
    dry_run: bool


def _speed(text: str) -> Speed:
    for speed in SPEEDS:
        if speed == text:
            return speed
    raise ValueError(f"--speed: no such speed: {text!r}; there are {', '.join(SPEEDS)}")


def _paths(tiers: OpenTiers, what: Sequence[str]) -> list[str]:
    """Paths and globs below the tiers' URLs. What follows a URL, and is none itself, is below it."""
    first = path_of(tiers.file, what[0])
    is_place = first != what[0].strip("/")
    found = [first]
    for text in what[1:]:
        path = path_of(tiers.file, text)
        is_name = is_place and path == text.strip("/")
        found.append(f"{first}/{path}".strip("/") if is_name else path)
    return found[1:] if is_place and len(found) > 1 else found


def _archived_keys(tiers: OpenTiers, wanted: Sequence[str]) -> list[str]:
    """Keys of the objects that are meant and lie only where they cannot be read without being restored.

    Listings say so without a question for each object. Raises NotFound for what nothing matches.
    """
    here: set[str] = set()
    cold: set[str] = set()
    for text in wanted:
        found = [info for tier in tiers.file.tiers for info in _meant(tiers, tier.name, text)]
        if not found:
            names = ", ".join(tier.name for tier in tiers.file.tiers)
            raise NotFound(f"nothing is called so or matches it in any of the tiers {names}", url=text or "/")
        here.update(info.key for info in found if state_of(info) == HERE)
        cold.update(info.key for info in found if state_of(info) != HERE)
    return sorted(cold - here)


def _meant(tiers: OpenTiers, tier: str, text: str) -> list[ObjectInfo]:
    """Objects of a tier that a path or glob means."""
    listed = list(tiers.stores.listing(tier, folder_of(text)))
    is_meant = chosen(keys_of(listed), [text])
    found = [listed[i] for i in np.flatnonzero(is_meant)]
    if text and not found and not is_glob(text):
        with suppress(NotFound):
            found.append(tiers.stores.head(tier, text))
    return found


def _restore(output: Output, tiers: OpenTiers, plan: RestorePlan, manner: _Manner) -> int:
    """Do it, or as much as can be done now; returns the exit code."""
    for one in plan.objects:
        output.event("object", {"key": one.key, "tier": one.tier, "n_bytes": one.n_bytes, "state": _STATES[one.state]})
    if not plan.objects:
        output.summary(_facts(plan), "nothing is to be restored: all of it can be read")
        return 0
    if manner.dry_run:
        output.summary(_facts(plan) | {"dry_run": True}, f"would restore {_text(plan)}")
        return 0
    if plan.asked and not manner.yes:
        ask(f"Restore {_text(plan)}?", "nothing was asked for")
    asked = restoring.request(tiers.stores, plan)
    n_left = asked.started + asked.running
    if n_left:
        deadline_s = None if manner.wait else 0.0  # some are here at once
        with output.counting("restoring") as advance:
            n_left = len(restoring.wait(tiers.stores, plan, deadline_s=deadline_s, on_progress=advance))
    facts = _facts(plan) | {"started": asked.started, "running": asked.running, "pending": n_left}
    if n_left:
        text = f"{count(n_left, 'object')} on the way{_hours(plan)}; the same command with --wait waits and copies home"
        output.summary(facts, text)
        return PENDING
    if plan.days is not None:
        output.summary(facts, f"{count(len(plan.objects), 'object')} can be read for {count(plan.days, 'day')}")
        return 0
    return _promote(output, tiers, plan, facts)


def _promote(output: Output, tiers: OpenTiers, plan: RestorePlan, facts: dict[str, Any]) -> int:
    """Copy home what was restored."""
    moves = restoring.promotion(tiers.file, plan, made_s=time.time(), known=tiers.catalog.checksums)
    applied = carry_out(output, tiers, moves)
    stopped = len(applied.stopped)
    text = f"{count(len(plan.objects), 'object')}, {format_bytes(plan.n_bytes)}, restored to {tiers.file.home.name}"
    text += f"; {count(stopped, 'move')} of {len(moves.moves)} stopped" if stopped else ""
    output.summary(facts | {"copied": applied.done, "stopped": stopped}, text)
    return PARTLY if stopped else 0


def _facts(plan: RestorePlan) -> dict[str, Any]:
    return {
        "objects": len(plan.objects),
        "n_bytes": plan.n_bytes,
        "here": len(plan.here),
        "cost": plan.cost,
        "hours": plan.hours,
        "speed": plan.speed,
        "days": plan.days,
        "command": plan.command,
    }


def _text(plan: RestorePlan) -> str:
    cost = "at a price that is not known" if plan.cost is None else f"for ${dollars(plan.cost)}"
    return f"{count(len(plan.objects), 'object')}, {format_bytes(plan.n_bytes)}, {cost}{_hours(plan)}"


def _hours(plan: RestorePlan) -> str:
    return "" if plan.hours is None else f", up to {plan.hours:g} h ({plan.speed})"
