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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
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
from tiercache.tier.move.deletions import DeferredDeletions, DeletionGuard, deletion_guard_of, take_deletion_guard
from tiercache.tier.move.executor import PlanExecutor
from tiercache.tier.move.lock import TierLock
from tiercache.tier.move.placement_updates import track_ruled
from tiercache.tier.move.transfer import Transfer
from tiercache.tier.plan.plan import make_plan
from tiercache.tier.plan.policy import decide
from tiercache.tier.stores import Stores, unavailable_tiers
from tiercache.waiting import SYSTEM_CLOCK

if TYPE_CHECKING:
    from tiercache.tier.rules import RuleFile


__all__ = ["ApplyResult", "Mover", "Progress", "StoppedMove"]


class Mover:
    """Applies plans of a rule file, and settles the deletions that wait for their grace period.

    One mover runs at a time, on all machines: it holds the lock of the home tier. Use it from one thread at a time.
    """

    def __init__(
        self,
        file: RuleFile,
        stores: Stores,
        catalog: TierCatalog,
        transfer: Transfer,
        *,
        clock: Callable[[], float] | None = None,
        lock: TierLock | None = None,
        take_guard: Callable[[float], DeletionGuard] | None = None,
        cancel: Event | None = None,
    ) -> None:
        """Store the arguments; no store is asked yet. The caller keeps the ownership of all arguments.

        Args:
            file: Rule file, as it is now.
            stores: Stores of the rule file's tiers.
            catalog: Tier catalog of this machine.
            transfer: Transfer that makes the copies.
            clock: Function that returns seconds since the epoch. None: the system clock.
            lock: Lock that the caller already holds. None: apply() and settle() take and release it.
            take_guard: Function that returns the DeletionGuard at a time in seconds since the epoch, called before
                anything is deleted. None: the tiers are listed and planned again.
            cancel: Event that is set where apply() or settle() ends with an exception, so that running copies end soon:
                the cancel event of the transfer.
        """
        self._file, self._stores, self._catalog, self._transfer = file, stores, catalog, transfer
        self._clock, self._lock, self._cancel = clock, lock, cancel
        self._take_guard = take_guard or (lambda now_s: take_deletion_guard(file, stores, catalog, now_s))
        catalog.bind({tier.name: tier.url for tier in file.tiers})

    def now_s(self) -> float:
        """Return the seconds since the epoch, by the clock that the caller gave."""
        return time.time() if self._clock is None else self._clock()

    def apply(self, plan: Plan, *, on_progress: Callable[[Progress], object] | None = None) -> ApplyResult:
        """Make the moves of a plan, exactly as planned. Moves that were made earlier stay as they are.

        A move is stopped where the objects are not as the plan saw them; the other moves go on. Deletions wait for
        settle().

        Args:
            plan: Plan to apply.
            on_progress: Function that receives the progress; called from several threads.

        Returns:
            Counts of the moves that were made, and the moves that were stopped, with reasons.

        Raises:
            CommitConflict: Another process moves data between these tiers.
            StoreError: The store of the home tier failed.
            OSError: The catalog of this machine cannot be written.
        """
        with self._locked() as lock, self._context() as context:
            return PlanExecutor(context, lock, plan, self.now_s, on_progress).run()

    def settle(
        self,
        now_s: float | None = None,
        *,
        guard: tuple[DeletionGuard, float] | None = None,
        on_progress: Callable[[Progress], object] | None = None,
    ) -> ApplyResult:
        """Make the deletions and the class changes whose grace period is over, and finish those that were interrupted.

        Each of them is checked again: what is not in the required state stays, and is reported. Raises as apply().

        Args:
            now_s: Seconds since the epoch. None: now.
            guard: Guard of a listing that was made already, and when it began, by SYSTEM_CLOCK. None: see Mover.
            on_progress: Function that receives how many bytes of the copies were read back.
        """
        now_s = self.now_s() if now_s is None else now_s
        with self._locked() as lock, self._context() as context:
            deletions = DeferredDeletions(context, lock, self._take_guard, now_s, guard=guard, on_progress=on_progress)
            return deletions.run()

    def finish(self) -> ApplyResult:
        """Finish the deletions that were begun and interrupted, and make no others. Raises as apply()."""
        with self._locked() as lock, self._context() as context:
            return DeferredDeletions(context, lock, self._take_guard, self.now_s(), only_begun=True).run()

    @contextmanager
    def _locked(self) -> Iterator[TierLock]:
        if self._lock is not None:
            yield self._lock
            return
        home = self._stores.store(self._file.home.name)
        with TierLock(home) as lock:
            yield lock

    @contextmanager
    def _context(self) -> Iterator[MoveContext]:
        pool = ThreadPoolExecutor(self._file.tiering.jobs, thread_name_prefix="tiercache-mover")
        try:
            yield MoveContext(self._file, self._stores, self._catalog, self._transfer, pool)
        except BaseException:
            if self._cancel is not None:
                self._cancel.set()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


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
    places = {tier.name: tier.url for tier in file.tiers}
    with ExitStack() as stack:
        stores = stack.enter_context(Stores(file)) if stores is None else stores
        catalog = stack.enter_context(TierCatalog(catalog_path(file), places))
        if dry_run:
            return _Run(file, stores, catalog).rehearse()
        with TierLock(stores.store(file.home.name)) as lock:
            return _Run(file, stores, catalog).carry_out(lock, on_progress)


class _Run:
    """One run of a rule file."""

    def __init__(self, file: RuleFile, stores: Stores, catalog: TierCatalog) -> None:
        self._file, self._stores, self._catalog = file, stores, catalog
        self._started_s, self._unseen = time.monotonic(), dict[str, str]()
        self._losses: tuple[Loss, ...] = ()

    def rehearse(self) -> RunReport:
        inventory, _, plan = self._planned()
        waiting = len(self._catalog.open_moves(self._file.home.url, "waiting", "dropping"))
        return self._report(inventory, plan, settled=ApplyResult(waiting_drops=waiting), dry_run=True)

    def carry_out(self, lock: TierLock, on_progress: Callable[[Progress], object] | None) -> RunReport:
        tiering, cancel = self._file.tiering, Event()
        with Transfer(self._stores, jobs=tiering.jobs, rate_bytes_s=tiering.rate_bytes_s, cancel=cancel) as transfer:
            mover = Mover(self._file, self._stores, self._catalog, transfer, lock=lock, cancel=cancel)
            # First, because the plan would otherwise count half of a copy.
            finished = mover.finish()
            crash_point("tier_run.finished")
            listed_s = SYSTEM_CLOCK.monotonic()
            inventory, decisions, plan = self._planned()
            crash_point("tier_run.planned")
            adopted = track_ruled(inventory, self._stores)
            crash_point("tier_run.adopted")
            applied = mover.apply(plan, on_progress=on_progress)
            crash_point("tier_run.applied")
            # The listing is before this run's own moves. Without a grace period they are due already: it is made anew.
            guard = (deletion_guard_of(inventory.snapshot, decisions), listed_s) if tiering.grace_s > 0 else None
            settled = mover.settle(guard=guard, on_progress=on_progress)
        return self._report(inventory, plan, applied, _both(finished, settled), adopted)

    def _planned(self) -> tuple[Inventory, Decisions, Plan]:
        file, stores = self._file, self._stores
        prices = [prices_if_known(tier) for tier in file.tiers]
        now_s = time.time()
        inventory = take_inventory(file, stores, self._catalog, now_s=now_s)
        self._losses = find_losses(inventory, file, stores, self._catalog, now_s=now_s)
        self._unseen = unavailable_tiers(file, stores, self._catalog)
        capacity = [stores.capacity(tier.name) for tier in file.tiers]
        decisions = decide(inventory.snapshot, file, prices, capacity_bytes=capacity, missing=self._unseen)
        return inventory, decisions, make_plan(decisions, inventory, file, prices)

    def _report(
        self,
        inventory: Inventory,
        plan: Plan,
        applied: ApplyResult | None = None,
        settled: ApplyResult | None = None,
        adopted: Sequence[str] = (),
        *,
        dry_run: bool = False,
    ) -> RunReport:
        snapshot = inventory.snapshot
        return RunReport(
            plan,
            applied or ApplyResult(),
            settled or ApplyResult(),
            tuple(adopted),
            self._unseen,
            metric_gaps(snapshot, self._file, inventory.facts["in_files"])[0],
            self._losses,
            n_groups=snapshot.n_groups,
            n_restoring=int(np.count_nonzero(snapshot.state == RESTORING)),
            seconds=time.monotonic() - self._started_s,
            dry_run=dry_run,
        )


def _both(first: ApplyResult, then: ApplyResult) -> ApplyResult:
    """Return two settlements as one. What the first one kept was checked again by the second one."""
    again = {(one.plan, one.number) for one in then.stopped}
    stopped = tuple(one for one in first.stopped if (one.plan, one.number) not in again)
    n_bytes, proof_bytes = first.n_bytes + then.n_bytes, first.proof_bytes + then.proof_bytes
    return ApplyResult(first.done + then.done, stopped + then.stopped, then.waiting_drops, n_bytes, proof_bytes)


def _holdings(plan: Plan, when: str) -> Mapping[str, Mapping[str, float]]:
    found = getattr(plan, when)
    return {
        tier: {"n_bytes": one.n_bytes, "n_objects": one.n_objects, "dollars_month": round(one.dollars_month, 6)}
        for tier, one in found.items()
    }
