"""The verb restore: requests restores of archived objects, reports their progress, and copies restored objects home."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import typer

from tiercache.cli.failures import PARTIAL, PENDING
from tiercache.cli.options import DryRun, Json, Quiet, Verbose, Yes
from tiercache.cli.output import Output, count
from tiercache.cli.tier_apply import confirm, execute_plan
from tiercache.cli.tier_opening import OpenTiers, Rules, base_folder, is_glob, open_tiers, select_paths, tier_path
from tiercache.cli.tier_texts import format_dollars
from tiercache.errors import NotFound
from tiercache.model import ObjectInfo, format_bytes
from tiercache.store.archive import SPEEDS, Speed
from tiercache.tier import restore as restoring
from tiercache.tier.inventory.listing import keys_of
from tiercache.tier.model import READABLE
from tiercache.tier.restore import RestorePlan
from tiercache.tier.stores import state_of

STATES = ("here", "archived", "restoring", "restored")


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
