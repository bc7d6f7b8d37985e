"""One tier run for a scheduler: finish interrupted deletions, plan, make the moves, settle the deletions that are due.

No process stays resident: cron, Airflow or Kubernetes calls the run, for example once a day. Two runs at once do not
conflict: the second one fails and names the process that holds the lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np

from tiercache import config
from tiercache.catalog.tiers import TierCatalog
from tiercache.points import crash_point
from tiercache.prices import prices_if_known
from tiercache.tier.adopting import track_ruled
from tiercache.tier.inventory import Inventory, take_inventory
from tiercache.tier.lock import TierLock
from tiercache.tier.losses import Loss, find_losses
from tiercache.tier.marks import unavailable_tiers
from tiercache.tier.model import RESTORING, Plan
from tiercache.tier.mover import ApplyResult, Mover, Progress, StoppedMove
from tiercache.tier.plan import make_plan
from tiercache.tier.policy import decide
from tiercache.tier.scores import MetricGap, metric_gaps
from tiercache.tier.stores import Stores
from tiercache.tier.transfer import Transfer

if TYPE_CHECKING:
    from tiercache.tierfile import RuleFile

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
            marks.unavailable_tiers().
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
            "cost": round(sum(move.money.once for move in self.plan.moves), 6),
            "saving_month": round(sum(move.money.saving_month for move in self.plan.moves), 6),
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
    if stores is None:
        with Stores(file) as opened:
            return run_once(file, dry_run=dry_run, on_progress=on_progress, stores=opened)
    places = {tier.name: tier.url for tier in file.tiers}
    with TierCatalog(catalog_path(file), places) as catalog:
        if dry_run:
            return _Run(file, stores, catalog).rehearse()
        with TierLock(stores.store(file.home.name), folder=catalog.path.parent) as lock:
            return _Run(file, stores, catalog).carry_out(lock, on_progress)


class _Run:
    """One run of a rule file."""

    def __init__(self, file: RuleFile, stores: Stores, catalog: TierCatalog) -> None:
        self._file, self._stores, self._catalog = file, stores, catalog
        self._started_s, self._unseen = time.monotonic(), dict[str, str]()
        self._losses: tuple[Loss, ...] = ()

    def rehearse(self) -> RunReport:
        inventory, plan = self._planned()
        waiting = len(self._catalog.open_moves(self._file.home.url, "waiting", "dropping"))
        return self._report(inventory, plan, settled=ApplyResult(waiting_drops=waiting), dry_run=True)

    def carry_out(self, lock: TierLock, on_progress: Callable[[Progress], object] | None) -> RunReport:
        tiering, cancel = self._file.tiering, Event()
        with Transfer(self._stores, jobs=tiering.jobs, rate_bytes_s=tiering.rate_bytes_s, cancel=cancel) as transfer:
            mover = Mover(self._file, self._stores, self._catalog, transfer, lock=lock, cancel=cancel)
            # First, because the plan would otherwise count half of a copy.
            finished = mover.finish()
            crash_point("tier_run.finished")
            inventory, plan = self._planned()
            crash_point("tier_run.planned")
            adopted = track_ruled(inventory, self._stores)
            crash_point("tier_run.adopted")
            applied = mover.apply(plan, on_progress=on_progress)
            crash_point("tier_run.applied")
            settled = mover.settle(on_progress=on_progress)
        return self._report(inventory, plan, applied, _both(finished, settled), adopted)

    def _planned(self) -> tuple[Inventory, Plan]:
        file, stores = self._file, self._stores
        prices = [prices_if_known(tier) for tier in file.tiers]
        now_s = time.time()
        inventory = take_inventory(file, stores, self._catalog, now_s=now_s)
        self._losses = find_losses(inventory, file, stores, self._catalog, now_s=now_s)
        self._unseen = unavailable_tiers(file, stores, self._catalog)
        capacity = [stores.capacity(tier.name) for tier in file.tiers]
        decisions = decide(inventory.snapshot, file, prices, capacity_bytes=capacity, missing=self._unseen)
        return inventory, make_plan(decisions, inventory, file, prices)

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
