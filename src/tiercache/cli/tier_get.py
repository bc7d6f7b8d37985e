"""The verb `tiercache tier get`: brings groups back to a faster tier."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import typer
from numpy.typing import NDArray

from tiercache.cli.common import (
    PARTIAL,
    PENDING,
    DryRun,
    Output,
    Rules,
    Yes,
    argument,
    confirm,
    count,
    flag,
    option,
    parse_age,
    verb,
)
from tiercache.cli.tier import (
    OpenTiers,
    Rows,
    execute_plan,
    format_dollars,
    is_glob,
    open_tiers,
    parse_speed,
    print_moves,
    print_refusals,
    print_stopped,
    print_unavailable,
    select_paths,
    tier_path,
)
from tiercache.errors import NotFound
from tiercache.model import format_bytes
from tiercache.tier.context import ApplyResult
from tiercache.tier.deletions import run_due_deletions
from tiercache.tier.inventory import Inventory
from tiercache.tier.mover import open_mover
from tiercache.tier.recall import RecallPlan, hold_groups, plan_recall, request_restore, wait_restored
from tiercache.tier.snapshot import Snapshot
from tiercache.tier.stores import unavailable_tiers

HOLD_S = 7 * 86400.0
# A hold is written again after the copies if they took more than this part of it.
_RENEWED_AFTER = 0.01


@verb(after_ctrl_c="requested restores go on, finished copies stay; the same command continues from there")
def get(
    output: Output,
    what: Annotated[
        list[str],
        argument(
            "PATTERN...",
            "Shards, checkpoints and files to bring back: paths below the tiers' URLs, URLs or local paths in a tier "
            "(with everything below), or globs.",
        ),
    ],
    to: Annotated[
        str | None,
        option("--to", "TIER", "Tier to copy to; default: the first tier, for shards the home tier."),
    ] = None,
    hold: Annotated[
        str | None,
        option("--hold", "TIME", "How long no run moves or deletes them, e.g. 30d; default: 7d."),
    ] = None,
    wait: Annotated[bool, flag("--wait", "Wait until archived objects are restored, then copy them.")] = False,
    speed: Annotated[str, option("--speed", "SPEED", "Speed of restores: expedited, standard or bulk.")] = "standard",
    rows: Rows = 20,
    rules: Rules = None,
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Bring shards, checkpoints and files back from any tier.

    The command shows what would be copied and restored, with cost and time, and asks. It restores what an archive
    must restore, copies, verifies, and holds what it brought back: until the hold ends, no run of the mover moves or
    deletes it. The colder copy stays. Exit codes: 0 done; 3 some groups were refused or stopped; 5 restores are in
    progress: the same command continues.
    """
    with open_tiers(rules) as tiers:
        code = _Recall(output, tiers, what, to=to, hold=hold, speed=speed, rows=rows).run(wait, yes, dry_run)
    if code:
        raise typer.Exit(code)


class _Recall:
    def __init__(
        self,
        output: Output,
        tiers: OpenTiers,
        what: Sequence[str],
        *,
        to: str | None,
        hold: str | None,
        speed: str,
        rows: int,
    ) -> None:
        self._output, self._tiers, self._to, self._rows = output, tiers, to, rows
        self._what = [tier_path(tiers.file, text) for text in what]
        self._speed = parse_speed(speed)
        self._hold_s = HOLD_S if hold is None else parse_age("--hold", hold)
        self._held_until_s = 0.0

    def run(self, wait: bool, yes: bool, dry_run: bool) -> int:
        if not dry_run:
            self._finish_deletions()
        plan = self._plan()
        self._print(plan)
        n_refused = len(plan.copies.refusals)
        if dry_run:
            refused = f"; {count(n_refused, 'group')} refused" if n_refused else ""
            self._output.summary(self._facts(plan) | {"dry_run": True}, f"would recall {self._text(plan)}{refused}")
            return 0
        if not plan.is_done and not yes:
            confirm(f"Recall {self._text(plan)}?", "nothing was copied or requested")
        # Held first, so that no run of the mover takes away in the meantime what is here, or what is copied from.
        self._hold(plan.paths)
        n_left = self._restore(plan, wait)
        if plan.restore is not None and not n_left:
            plan = self._plan()  # what was restored can be copied now
            n_left = 0 if plan.restore is None else len(plan.restore.objects)
        applied = self._copy(plan)
        if self._hold_s and time.time() + self._hold_s * (1 - _RENEWED_AFTER) > self._held_until_s:
            self._hold(plan.paths)
        return self._sum_up(plan, applied, n_left, n_refused)

    def _finish_deletions(self) -> None:
        """Finish deletions that were interrupted: they would otherwise refuse the recall of what they delete."""
        tiers = self._tiers
        if tiers.catalog.open_moves(tiers.file.home_tier.url, "dropping"):
            with open_mover(tiers.file, tiers.stores, tiers.catalog) as context:
                print_stopped(self._output, run_due_deletions(context, only_begun=True).stopped)

    def _plan(self) -> RecallPlan:
        tiers = self._tiers
        inventory = tiers.read_inventory(self._output)
        unavailable = unavailable_tiers(tiers.file, tiers.stores, tiers.catalog)
        print_unavailable(self._output, tiers.file, unavailable)
        groups = select_groups(inventory, self._what)
        return plan_recall(
            inventory,
            tiers.file,
            tiers.stores,
            tiers.prices,
            groups,
            to=self._to,
            speed=self._speed,
            unavailable=unavailable,
        )

    def _print(self, plan: RecallPlan) -> None:
        most = None if self._output.as_json or not self._rows else self._rows
        print_moves(self._output, [*islice(plan.copies.moves, most)])
        texts = [
            {"restores": move.path, "from": move.src, "to": move.dst or "", "size": format_bytes(move.n_bytes)}
            for move in islice(plan.later.moves, most)
        ]
        facts = [
            {"path": move.path, "tier": move.src, "to": move.dst, "n_bytes": move.n_bytes} for move in plan.later.moves
        ]
        self._output.table("restore", facts[:most], texts)
        print_refusals(self._output, [*islice(plan.copies.refusals, most)])
        for shown in (plan.copies.moves, plan.later.moves, plan.copies.refusals):
            if most is not None and len(shown) > most:
                typer.echo(f"... and {count(len(shown) - most, 'more row')}: --rows 0 shows all")

    def _hold(self, paths: Sequence[str]) -> None:
        now_s = time.time()
        hold_groups(self._tiers.stores, paths, hold_s=self._hold_s, now_s=now_s)
        self._held_until_s = now_s + self._hold_s

    def _restore(self, plan: RecallPlan, wait: bool) -> int:
        if plan.restore is None:
            return 0
        request_restore(self._tiers.stores, plan.restore)
        deadline_s = None if wait else 0.0  # some stores restore at once
        with self._output.count_progress("restoring") as advance:
            left = wait_restored(self._tiers.stores, plan.restore, deadline_s=deadline_s, on_progress=advance)
        return len(left)

    def _copy(self, plan: RecallPlan) -> ApplyResult:
        return execute_plan(self._output, self._tiers, plan.copies) if plan.copies.moves else ApplyResult()

    # -- words ------------------------------------------------------------------------------------------------------

    def _text(self, plan: RecallPlan) -> str:
        n = len(plan.copies.moves) + len(plan.later.moves)
        there = f" ({count(len(plan.here), 'group')} there already)" if plan.here else ""
        cost = "at an unknown price" if plan.cost is None else f"for ${format_dollars(plan.cost)}"
        text = f"{count(n, 'group')}, {format_bytes(plan.n_bytes)}{there}, {cost}"
        if plan.restore is not None and plan.restore.hours is not None:
            objects = count(len(plan.restore.objects), "object")
            text += f"; {objects} to restore, up to {plan.restore.hours:g} h ({self._speed})"
        return text

    def _facts(self, plan: RecallPlan) -> dict[str, Any]:
        restore = plan.restore
        return {
            "groups": len(plan.paths),
            "here": len(plan.here),
            "n_bytes": plan.n_bytes,
            "refused": len(plan.copies.refusals),
            "restores": 0 if restore is None else len(restore.objects),
            "cost": plan.cost,
            "hours": plan.hours,
        }

    def _sum_up(self, plan: RecallPlan, applied: ApplyResult, n_left: int, n_refused: int) -> int:
        until = datetime.fromtimestamp(self._held_until_s, UTC)
        facts = self._facts(plan) | {
            "copied": applied.n_made,
            "copied_bytes": applied.n_bytes,
            "stopped": len(applied.stopped),
            "pending": n_left,
            "held_until": until.isoformat(timespec="seconds") if self._hold_s and plan.paths else None,
        }
        parts = [f"{count(applied.n_made, 'group')} recalled, {format_bytes(applied.n_bytes)} copied"]
        parts += [f"{count(len(plan.here), 'group')} there already"] if plan.here else []
        parts += [f"{len(applied.stopped):,} stopped"] if applied.stopped else []
        parts += [f"{count(n_refused, 'group')} refused"] if n_refused else []
        parts += (
            [f"{count(n_left, 'object')} being restored; the same command continues, --wait waits"] if n_left else []
        )
        if plan.paths:
            parts += [f"held until {until:%Y-%m-%dT%H:%MZ}" if self._hold_s else "not held"]
        self._output.summary(facts, "; ".join(parts))
        return PENDING if n_left else PARTIAL if applied.stopped or n_refused else 0


def select_groups(inventory: Inventory, paths: Sequence[str]) -> NDArray[np.int64]:
    """Return the numbers of the groups that paths and globs select.

    A path selects everything below it, and the group that it is a part of. Raises NotFound if one selects nothing.
    """
    snapshot = inventory.snapshot
    chosen = np.zeros(snapshot.n_groups, np.bool_)
    for text in paths:
        # A group is named by its folder: run/step-10 for run/step-10/**.
        found = select_paths(snapshot.paths, text) | select_paths(snapshot.paths, text.removesuffix("/**"))
        if not found.any() and not is_glob(text):
            found = _above(snapshot, text)
        if not found.any():
            message = f"no object has this name or matches it in the tiers {', '.join(snapshot.tiers)}"
            raise NotFound(message, url=text or "/")
        chosen |= found
    return np.flatnonzero(chosen)


def _above(snapshot: Snapshot, path: str) -> NDArray[np.bool_]:
    folders = [path[:end] for end in range(1, len(path)) if path[end] == "/"]
    found = pc.is_in(snapshot.paths, value_set=pa.array(folders, snapshot.paths.type))
    return np.asarray(found.to_numpy(zero_copy_only=False), np.bool_)
