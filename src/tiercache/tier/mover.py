"""The mover: one run for a scheduler. The package's docstring lists the steps of a move, and the races between them.

run_once() finishes interrupted deletions and copies, plans, makes the moves, and makes the deletions that are due. No
process stays resident. Two runs at once do not conflict: the second one fails and names the process that has the lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pyarrow as pa

from tiercache import config
from tiercache.crash_points import crash_point
from tiercache.tier.context import ApplyResult, MoveContext, StoppedMove, track_ruled
from tiercache.tier.deletions import deletion_facts_of, run_due_deletions
from tiercache.tier.inventory import Inventory, take_inventory
from tiercache.tier.journal import TierCatalog
from tiercache.tier.lock import TierLock
from tiercache.tier.moves import ByteProgress, MoveExecutor, MoveJob, apply_plan, withdraw_copy
from tiercache.tier.plans import Plan, make_plan
from tiercache.tier.policy import decide_now
from tiercache.tier.recall import RULE
from tiercache.tier.rules import RuleFile
from tiercache.tier.snapshot import RESTORING, Decisions
from tiercache.tier.stores import Stores, lead_readers_home, read_holds, remove_obsolete_holds, unavailable_tiers
from tiercache.tier.transfer import Transfer
from tiercache.waiting import SYSTEM_CLOCK

JOBS = 8  # objects that are copied at once


@contextmanager
def open_mover(
    file: RuleFile,
    stores: Stores,
    catalog: TierCatalog,
    *,
    clock: Callable[[], float] | None = None,
    lock: TierLock | None = None,
) -> Iterator[MoveContext]:
    """Yield the context of moves: it holds the lock of the home tier, and threads. The arguments stay the caller's.

    Raises CommitConflict if another process moves data between these tiers, on any machine.
    """
    catalog.bind({tier.name: tier.url for tier in file.tiers})
    cancel = Event()
    with ExitStack() as stack:
        lock = lock or stack.enter_context(TierLock(stores.store(file.home_tier.name)))
        lead_readers_home(stores, catalog)
        transfer = Transfer(stores, jobs=JOBS, cancel=cancel)
        stack.enter_context(transfer)
        pool = ThreadPoolExecutor(JOBS, thread_name_prefix="tiercache-mover")
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        try:
            yield MoveContext(file, stores, catalog, transfer, pool, lock, clock or time.time)
        except BaseException:
            cancel.set()  # so that running copies end soon
            raise


# Exit codes that a scheduler sees: docs/guide/command.md.
DONE, PARTLY, PENDING, UNCONFIRMED = 0, 3, 5, 7


@dataclass(frozen=True, slots=True)
class RunReport:
    """Result of a run. is_unconfirmed: Nothing of the plan was done, see plan.exceeded."""

    plan: Plan
    applied: ApplyResult = field(default_factory=ApplyResult)
    resumed: ApplyResult = field(default_factory=ApplyResult)
    deletions: ApplyResult = field(default_factory=ApplyResult)
    newly_tracked: tuple[str, ...] = ()
    unavailable: Mapping[str, str] = field(default_factory=dict)
    n_groups: int = 0
    n_restoring: int = 0
    seconds: float = 0.0
    is_unconfirmed: bool = False

    @property
    def stopped(self) -> tuple[StoppedMove, ...]:
        return self.resumed.stopped + self.applied.stopped + self.deletions.stopped

    @property
    def exit_code(self) -> int:
        """7: deletions must be confirmed. 3: moves were stopped, or a tier cannot be seen. 5: restores are running."""
        if self.is_unconfirmed:
            return UNCONFIRMED
        if self.stopped or self.unavailable:
            return PARTLY
        return PENDING if self.n_restoring else DONE

    def to_json(self) -> dict[str, Any]:
        return {
            "plan": self.plan.id,
            "rules": self.plan.rules,
            "groups": self.n_groups,
            "moves": len(self.plan.moves),
            "refused": len(self.plan.refusals),
            "done": self.applied.n_made,
            "copied_bytes": self.applied.n_bytes + self.resumed.n_bytes,
            "dropped": self.deletions.n_made,
            "dropped_bytes": self.deletions.n_bytes,
            "waiting_drops": self.deletions.waiting_drops,
            "restoring": self.n_restoring,
            "adopted": list(self.newly_tracked),
            "cost": round(self.plan.totals.cost, 6),
            "saving_month": round(self.plan.totals.saving_month, 6),
            "resumed": self.resumed.n_made,
            "stopped": [
                {"plan": one.plan, "id": one.number, "path": one.path, "reason": one.reason} for one in self.stopped
            ],
            "unseen": list(self.unavailable),
            "exceeded": [one.rule for one in self.plan.exceeded],
            "before": _holdings(self.plan, "before"),
            "after": _holdings(self.plan, "after"),
            "seconds": round(self.seconds, 3),
            "exit_code": self.exit_code,
        }


def catalog_path(file: RuleFile) -> Path:
    return config.state_folder(file.path.parent) / "tiers.sqlite"


def run_once(
    file: RuleFile,
    *,
    confirmed: bool = False,
    on_progress: ByteProgress | None = None,
    stores: Stores | None = None,
) -> RunReport:
    """Do everything that is due now. A run may be killed at any instant and run again.

    confirmed: Whether rules may delete more than their `max_delete`. Otherwise a run that would do so ends before it
    moves or deletes anything that it planned. on_progress: See ByteProgress. stores: Stay the caller's.

    Raises:
        CommitConflict: Another process moves data between these tiers.
        StoreError: A tier cannot be listed, or the store of the home tier failed.
        OSError: The catalog of this machine cannot be written.
    """
    started_s = time.monotonic()
    with ExitStack() as stack:
        stores = stack.enter_context(Stores(file)) if stores is None else stores
        urls = {tier.name: tier.url for tier in file.tiers}
        catalog = stack.enter_context(TierCatalog(catalog_path(file), urls))
        context = stack.enter_context(open_mover(file, stores, catalog))
        # First, because the plan would otherwise count a part of a group.
        finished = run_due_deletions(context, only_begun=True)
        resumed = finish_copies(context, on_progress=on_progress)
        crash_point("tier_run.finished")
        listed_s = SYSTEM_CLOCK.monotonic()
        report, inventory, decisions = _plan(file, stores, catalog, confirmed=confirmed)
        crash_point("tier_run.planned")
        if report.is_unconfirmed:
            return replace(report, resumed=resumed, deletions=finished, seconds=time.monotonic() - started_s)
        newly_tracked = track_ruled(inventory, stores)
        crash_point("tier_run.tracked")
        applied = apply_plan(context, report.plan, on_progress=on_progress)
        crash_point("tier_run.applied")
        home = stores.store(file.home_tier.name)
        remove_obsolete_holds(home, time.time(), keep=_paths_with_two_copies(inventory))
        # The listing is before this run's own moves. Without a grace period they are due already: it is made anew.
        has_grace = file.tiering.grace_s > 0
        facts = (deletion_facts_of(inventory.snapshot, decisions), listed_s) if has_grace else None
        deleted = run_due_deletions(context, facts=facts)
        report = replace(
            report,
            applied=applied,
            resumed=resumed,
            deletions=finished.followed_by(deleted),
            newly_tracked=newly_tracked,
        )
    return replace(report, seconds=time.monotonic() - started_s)


def _plan(
    file: RuleFile, stores: Stores, catalog: TierCatalog, *, confirmed: bool
) -> tuple[RunReport, Inventory, Decisions]:
    now_s = time.time()
    inventory = take_inventory(file, stores, catalog, now_s=now_s)
    snapshot = inventory.snapshot
    decisions, unavailable = decide_now(snapshot, file, stores, catalog)
    report = RunReport(
        make_plan(decisions, inventory, file, file.prices),
        unavailable=unavailable,
        n_groups=snapshot.n_groups,
        n_restoring=int(np.count_nonzero(snapshot.state == RESTORING)),
        is_unconfirmed=bool(decisions.exceeded) and not confirmed,
    )
    return report, inventory, decisions


def _paths_with_two_copies(inventory: Inventory) -> frozenset[str]:
    snapshot = inventory.snapshot
    n_copies = np.bincount(snapshot.group, minlength=snapshot.n_groups)
    return frozenset(snapshot.paths.filter(pa.array(n_copies > 1)).to_pylist())


def _holdings(plan: Plan, when: str) -> Mapping[str, Mapping[str, float]]:
    found = getattr(plan, when)
    return {
        tier: {"n_bytes": one.n_bytes, "n_objects": one.n_objects, "dollars_month": round(one.dollars_month, 6)}
        for tier, one in found.items()
    }


# -- interrupted copies ------------------------------------------------------------------------------------------------


def finish_copies(context: MoveContext, *, on_progress: ByteProgress | None = None) -> ApplyResult:
    """Finish the copies that were interrupted, or remove their parts. Raises as apply_plan().

    A run does so before it lists, ranks or plans anything. The journal has each copy from before its first byte until
    it is made. A copy is finished if it is still wanted: a recall while its hold is in force; any other move while the
    rule file is the one that asked for it, and no hold protects the group. Otherwise its parts are removed, and the
    next plan decides anew.
    """
    catalog, home = context.catalog, context.file.home_tier
    rows = [row for row in catalog.open_moves(home.url, "begun") if row.action in ("copy", "move")]
    if not rows:
        return ApplyResult()
    unavailable = unavailable_tiers(context.file, context.stores, catalog)
    holds = read_holds(context.stores.store(home.name), context.clock())
    jobs: list[MoveJob] = []
    stopped: list[StoppedMove] = []
    for row in rows:
        if reason := context.changed_tiers_reason(row):
            # Nobody can remove what lies in a tier that the rule file does not have.
            reason += f": parts of an interrupted copy may be in {row.dst_url}/{row.path}"
            catalog.write([replace(row, state="stopped", note=reason, changed_s=context.clock())])
        elif not (reason := unavailable.get(row.src, "") or unavailable.get(row.dst, "")):
            # The steps of a move check pins and sources.
            is_held = holds.of(row.path) is not None
            if is_held if row.rule == RULE else row.rules == context.file.sha256 and not is_held:
                jobs.append(MoveJob(row))
            elif not (reason := withdraw_copy(context, row)):
                note = "the interrupted copy is not wanted any more: no part of it is left"
                catalog.write([replace(row, state="stopped", note=note, changed_s=context.clock())])
        if reason:
            stopped.append(StoppedMove(row.number, reason, row.path, row.plan))
    crash_point("tier_run.withdrawn")
    made = MoveExecutor(context, on_progress).run(jobs)
    return replace(made, stopped=(*stopped, *made.stopped))
