"""Interrupted copies: a run finishes them, or removes their parts, before it lists, ranks or plans anything.

The journal has each copy from before its first byte until it is made. A copy is finished if it is still wanted: a
recall while its hold is in force; any other move while the rule file is the one that asked for it, and no hold protects
the group. Otherwise its parts are removed, and the next plan decides anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from tiercache.crash_points import crash_point
from tiercache.tier.holds import read_holds
from tiercache.tier.move.checks import ApplyResult, MoveContext, StoppedMove
from tiercache.tier.move.copies import MoveJob, withdraw_copy
from tiercache.tier.move.executor import MoveExecutor
from tiercache.tier.recall import RULE
from tiercache.tier.stores import unavailable_tiers

if TYPE_CHECKING:
    from tiercache.tier.holds import Holds
    from tiercache.tier.journal import JournalRow
    from tiercache.tier.move.checks import Progress


def finish_copies(context: MoveContext, *, on_progress: Callable[[Progress], object] | None = None) -> ApplyResult:
    """Finish the copies that were interrupted, or remove their parts. Raises as executor.apply_plan()."""
    catalog, home = context.catalog, context.file.home_tier
    rows = [row for row in catalog.open_moves(home.url, "begun") if row.action in ("copy", "move")]
    if not rows:
        return ApplyResult()
    unavailable = unavailable_tiers(context.file, context.stores, catalog)
    holds = read_holds(context.stores.store(home.name), context.clock())
    jobs: list[MoveJob] = []
    stopped: list[StoppedMove] = []
    for row in rows:
        if reason := _lost_tier_reason(context, row):
            # Nobody can remove what lies in a tier that the rule file does not have.
            catalog.write([replace(row, state="stopped", note=reason, changed_s=context.clock())])
        elif not (reason := unavailable.get(row.src, "") or unavailable.get(row.dst, "")):
            if _is_wanted(context, row, holds):
                jobs.append(MoveJob(row))
            elif not (reason := withdraw_copy(context, row)):
                note = "the interrupted copy is not wanted any more: no part of it is left"
                catalog.write([replace(row, state="stopped", note=note, changed_s=context.clock())])
        if reason:
            stopped.append(StoppedMove(row.number, reason, row.path, row.plan))
    crash_point("tier_run.withdrawn")
    made = MoveExecutor(context, on_progress, n_moves=len(jobs)).run(jobs)
    return replace(made, stopped=(*stopped, *made.stopped))


def _lost_tier_reason(context: MoveContext, row: JournalRow) -> str:
    """Return why the tiers of a move cannot be used any more: the rule file has other ones. "" if it has them."""
    urls: Mapping[str, str] = {tier.name: tier.url for tier in context.file.tiers}
    for name, url in ((row.src, row.src_url), (row.dst, row.dst_url)):
        if urls.get(name) != url:
            return (
                f"expected tier {name!r} at {url}, found {urls.get(name, 'no such tier')} in the rule file: parts of "
                f"an interrupted copy may be in {row.dst_url}/{row.path}"
            )
    return ""


def _is_wanted(context: MoveContext, row: JournalRow, holds: Holds) -> bool:
    """Return whether an interrupted copy shall be finished. The steps of a move check pins and sources."""
    return holds.of(row.path) is not None if row.rule == RULE else row.rules == context.file.sha256
