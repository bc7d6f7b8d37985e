"""The mover, which makes the moves of a plan. No data is lost, whatever interrupts the mover and whatever else runs.

A move from src to dst has these steps. Each step is journaled before the next one, and each is harmless when repeated::

    1. begin     the journal records the move and the expected state of every object; it cancels earlier moves of the
       path
    2. copy      copies the objects that dst lacks, and last the one that makes the group complete; verifies each copy
    3. record    the catalog of this machine records the verified copies in src and dst, by size, ETag and CRC-32C
    4. look      checks src again: an object that changed during the copy is not what dst has
    5. place     commits the placement, which tells every reader where the objects are from now on
    6. wait      waits for the grace period: readers that do not know the new placement yet still read src
    7. re-check  dst is complete and as it was verified; src is as it was copied; nobody reads src; no pin
                 protects it; the placement leads to dst; src and dst are two locations; files in dst are read from disk
    8. drop      deletes from src, first the object that makes the group complete, then the rest
    9. done

What can happen between two steps:

    1-2  The process is killed: a row stays open and does no harm. Applying the same plan again continues; a move of the
         path in another plan replaces the row.
    2-3  The process is killed: copies exist that the catalog does not know. They are compared with src, and are not
         copied again.
    2-6  The process is killed after a lost copy was made again: the row was reset before the catalog knew the new copy,
         so the grace period starts again.
    3-4  src is replaced: step 4 sees another ETag and stops. The copy in dst stays, verified as what it is. A later
         move from src overwrites it only while it is as it was made, and only if the group consists of that one object.
    4-5  src is replaced in this instant: readers are led to the old object. Step 7 notices and reverts the placement.
    5-6  The process is killed: readers know the placement, but no deletion waits. Applying the same plan again starts
         the grace period; another plan asks for a drop.
    6-7  The copy in dst is lost, damaged, or restored and moved by somebody: step 7 compares, and stops. No store
         reports that a file has rotted; only reading the file shows it.
    6-7  Another process with another journal moves the object back: its placement leads to src, and step 7 reads that.
    7-8  src is replaced: the mover checks src again after all slow checks, and the delete request to S3 names the ETag.
         Other stores have no such request: the time that the announcement takes remains as a window.
    7-8  Somebody removes the copy in dst: the mover checks dst again, as it does src. A copy that is removed while the
         deletion of the other one is announced and made is lost with it: no store deletes one object only if another
         object exists.
    7-8  The object is pinned: the mover reads the rule file again after all slow checks. From tier_drop.decided on,
         while one batch of deletions is announced and made, a pin is too late for that batch; it protects the rest.
    7-8  The lock was lost while this process slept: the mover checks the lock after everything that step 7 checks,
         directly before the deletion. lock.py describes a process that sleeps just after that check.
    8-8  The process is killed between deletions: the row says "dropping", and the rest is deleted when dst is confirmed
         once more.
    any  The catalog is lost or old: what it does not know is verified again, or stops the move; what it says is
         compared with the stores by ETag. The worst request of an old journal is a drop that step 7 refuses.
    any  The answer of a store is lost: a copy exists or not, deletions are repeated, the placement is read back.
    any  The clock jumps: the grace period gets shorter or longer. Only the convenience of readers depends on it.

A `drop` is a move whose copy was made earlier: nothing is copied, but the copy must be verified. A `delete` removes
last copies: it waits too, and is made only if a new plan still asks for it. A `reclass` into a class from
which objects must be restored before they can be read is announced and waits; a `reclass` into any other class is made
at once.

run_once() is one run for a scheduler: it finishes interrupted deletions, plans, makes the moves and settles the
deletions that are due. No process stays resident. Two runs at once do not conflict: the second one fails and names the
process that holds the lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np

from tiercache import config
from tiercache.catalog.tiers import TierCatalog
from tiercache.crash_points import crash_point
from tiercache.prices import prices_if_known
from tiercache.tier.findings import Loss, MetricGap, find_losses, metric_gaps
from tiercache.tier.inventory.groups import Inventory, take_inventory
from tiercache.tier.model import RESTORING, Decisions, Plan
from tiercache.tier.move.checks import ApplyResult, MoveContext, Progress, StoppedMove
from tiercache.tier.move.deletions import deletion_guard_of, settle
from tiercache.tier.move.executor import apply_plan
from tiercache.tier.move.lock import TierLock
from tiercache.tier.move.placement_updates import track_ruled
from tiercache.tier.move.transfer import Transfer
from tiercache.tier.plan.plan import make_plan
from tiercache.tier.plan.policy import decide
from tiercache.tier.stores import Stores, unavailable_tiers
from tiercache.waiting import SYSTEM_CLOCK

if TYPE_CHECKING:
    from tiercache.tier.rules import RuleFile


@contextmanager
def open_mover(
    file: RuleFile,
    stores: Stores,
    catalog: TierCatalog,
    *,
    clock: Callable[[], float] | None = None,
    lock: TierLock | None = None,
) -> Iterator[MoveContext]:
    """Yield the context for apply_plan() and settle(): it holds the lock of the home tier, and threads.

    One mover works at a time, on all machines. The caller keeps the ownership of the arguments. clock: Returns seconds
    since the epoch. lock: Lock that the caller already holds.

    Raises:
        CommitConflict: Another process moves data between these tiers.
        StoreError: The store of the home tier failed.
    """
    catalog.bind({tier.name: tier.url for tier in file.tiers})
    tiering, cancel = file.tiering, Event()
    with ExitStack() as stack:
        lock = lock or stack.enter_context(TierLock(stores.store(file.home.name)))
        transfer = Transfer(stores, jobs=tiering.jobs, rate_bytes_s=tiering.rate_bytes_s, cancel=cancel)
        stack.enter_context(transfer)
        pool = ThreadPoolExecutor(tiering.jobs, thread_name_prefix="tiercache-mover")
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        try:
            yield MoveContext(file, stores, catalog, transfer, pool, lock, clock or time.time)
        except BaseException:
            cancel.set()  # so that running copies end soon
            raise


# Exit codes that a scheduler sees: docs/reference/tiers.md.
DONE, PARTLY, PENDING = 0, 3, 5


@dataclass(frozen=True, slots=True)
class RunReport:
    """Result of a run.

    Attributes:
        plan: Plan that the run made and, unless dry_run, applied.
        applied: Result of applying the plan.
        settled: Deletions whose grace period was over, and those that an earlier run had left unfinished.
        adopted: Folders of data sets whose use is tracked from now on.
        unseen: Tiers whose copies cannot be seen now (for example a disk that is not mounted), with reasons; see
            stores.unavailable_tiers().
        gaps: Metrics that keep rules need and that are missing for some checkpoint runs.
        losses: Objects that should exist and of which no tier has a copy.
        n_groups: Number of groups (shards, checkpoints, files) in all tiers.
        n_restoring: Number of copies whose restore is in progress.
        seconds: Duration of the run, in seconds.
        dry_run: Whether the run only listed and planned, and changed nothing.
    """

    plan: Plan
    applied: ApplyResult = field(default_factory=ApplyResult)
    settled: ApplyResult = field(default_factory=ApplyResult)
    adopted: tuple[str, ...] = ()
    unseen: Mapping[str, str] = field(default_factory=dict)
    gaps: tuple[MetricGap, ...] = ()
    losses: tuple[Loss, ...] = ()
    n_groups: int = 0
    n_restoring: int = 0
    seconds: float = 0.0
    dry_run: bool = False

    @property
    def stopped(self) -> tuple[StoppedMove, ...]:
        """All moves that were not made, with reasons."""
        return self.applied.stopped + self.settled.stopped

    @property
    def exit_code(self) -> int:
        """Exit code of the command.

        3: moves were stopped, objects are lost or a tier cannot be seen. 5: restores are in progress. Otherwise 0.
        """
        if self.stopped or self.losses or self.unseen:
            return PARTLY
        return PENDING if self.n_restoring else DONE

    def to_json(self) -> dict[str, Any]:
        """Return the report as one flat JSON object; only `stopped`, `before` and `after` are nested."""
        return {
            "plan": self.plan.id,
            "rules": self.plan.rules,
            "dry_run": self.dry_run,
            "groups": self.n_groups,
            "moves": len(self.plan.moves),
            "refused": len(self.plan.refusals),
            "done": self.applied.done,
            "copied_bytes": self.applied.n_bytes,
            "dropped": self.settled.done,
            "dropped_bytes": self.settled.n_bytes,
            "proof_bytes": self.settled.proof_bytes,
            "waiting_drops": self.settled.waiting_drops,
            "restoring": self.n_restoring,
            "adopted": list(self.adopted),
            "cost": round(self.plan.totals.cost, 6),
            "saving_month": round(self.plan.totals.saving_month, 6),
            "stopped": [
                {"plan": one.plan, "id": one.number, "path": one.path, "reason": one.reason} for one in self.stopped
            ],
            "lost": [one.path for one in self.losses],
            "unseen": list(self.unseen),
            "before": _holdings(self.plan, "before"),
            "after": _holdings(self.plan, "after"),
            "seconds": round(self.seconds, 3),
            "exit_code": self.exit_code,
        }


def catalog_path(file: RuleFile) -> Path:
    """Return the path of this machine's tier catalog for a rule file."""
    return (file.tiering.state_dir or config.state_folder(file.path.parent)) / "tiers.sqlite"


def run_once(
    file: RuleFile,
    *,
    dry_run: bool = False,
    on_progress: Callable[[Progress], object] | None = None,
    stores: Stores | None = None,
) -> RunReport:
    """Do everything that is due now. A run may be killed at any instant and run again.

    Args:
        file: Rule file.
        dry_run: Whether to list and plan only, and change nothing.
        on_progress: Function that receives the progress of the plan, then that of reading copies back; called from
            several threads.
        stores: Stores of the file's tiers, which stay the caller's. None: the run opens and closes them.

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
        if dry_run:
            report, _, _ = _plan(file, stores, catalog)
            waiting = len(catalog.open_moves(file.home.url, "waiting", "dropping"))
            report = replace(report, settled=ApplyResult(waiting_drops=waiting), dry_run=True)
        else:
            context = stack.enter_context(open_mover(file, stores, catalog))
            # First, because the plan would otherwise count half of a copy.
            finished = settle(context, only_begun=True)
            crash_point("tier_run.finished")
            listed_s = SYSTEM_CLOCK.monotonic()
            report, inventory, decisions = _plan(file, stores, catalog)
            crash_point("tier_run.planned")
            adopted = track_ruled(inventory, stores)
            crash_point("tier_run.adopted")
            applied = apply_plan(context, report.plan, on_progress=on_progress)
            crash_point("tier_run.applied")
            # The listing is before this run's own moves. Without a grace period they are due already: it is made anew.
            has_grace = file.tiering.grace_s > 0
            guard = (deletion_guard_of(inventory.snapshot, decisions), listed_s) if has_grace else None
            settled = settle(context, guard=guard, on_progress=on_progress)
            report = replace(report, applied=applied, settled=finished.followed_by(settled), adopted=adopted)
    return replace(report, seconds=time.monotonic() - started_s)


def _plan(file: RuleFile, stores: Stores, catalog: TierCatalog) -> tuple[RunReport, Inventory, Decisions]:
    """Return a report of the plan that is due now, with the inventory and the decisions behind it."""
    prices = [prices_if_known(tier) for tier in file.tiers]
    now_s = time.time()
    inventory = take_inventory(file, stores, catalog, now_s=now_s)
    unseen = unavailable_tiers(file, stores, catalog)
    capacity = [stores.capacity(tier.name) for tier in file.tiers]
    snapshot = inventory.snapshot
    decisions = decide(snapshot, file, prices, capacity_bytes=capacity, missing=unseen)
    report = RunReport(
        make_plan(decisions, inventory, file, prices),
        unseen=unseen,
        gaps=metric_gaps(snapshot, file, inventory.facts["in_files"])[0],
        losses=find_losses(inventory, file, stores, catalog, now_s=now_s),
        n_groups=snapshot.n_groups,
        n_restoring=int(np.count_nonzero(snapshot.state == RESTORING)),
    )
    return report, inventory, decisions


def _holdings(plan: Plan, when: str) -> Mapping[str, Mapping[str, float]]:
    found = getattr(plan, when)
    return {
        tier: {"n_bytes": one.n_bytes, "n_objects": one.n_objects, "dollars_month": round(one.dollars_month, 6)}
        for tier, one in found.items()
    }
