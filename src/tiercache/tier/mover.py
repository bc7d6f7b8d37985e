"""The mover, which makes the moves of a plan. No data is lost, whatever interrupts the mover and whatever else runs.

A move from src to dst has these steps. Each step is journaled before the next one, and each is harmless when repeated::

    1. begin     the journal records the move and the expected state of every object; it cancels earlier moves of the
       path
    2. copy      copies the objects that dst lacks, and last the one that makes the group complete; verifies each copy
    3. record    the catalog of this machine records the verified copies in src and dst, by size, ETag and CRC-32C
    4. look      checks src again: an object that changed during the copy is not what dst has
    5. place     commits the placement, which tells every reader where the objects are from now on
    6. wait      waits for the grace period: readers that do not know the new placement yet still read src
    7. re-check  (settling.py) dst is complete and as it was verified; src is as it was copied; nobody reads src; no pin
                 protects it; the placement leads to dst; src and dst are two locations; files in dst are read from disk
    8. drop      deletes from src, first the object that makes the group complete, then the rest
    9. done

What can happen between two steps:

    1-2  The process is killed: a row stays open and does no harm. Applying the same plan again continues; a move of the
         path in another plan replaces the row.
    2-3  The process is killed: copies exist that the catalog does not know. They are compared with src, not copied
    again.
    2-6  The process is killed after a lost copy was made again: the row was reset before the catalog knew the new copy,
         so the grace period starts again.
    3-4  src is replaced: step 4 sees another ETag and stops. The copy in dst stays, verified as what it is. A later
    move
         from src overwrites it only while it is as it was made, and only if the group consists of that one object.
    4-5  src is replaced in this instant: readers are led to the old object. Step 7 notices and reverts the placement.
    5-6  The process is killed: readers know the placement, but no deletion waits. Applying the same plan again starts
    the
         grace period; another plan asks for a drop.
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
    compared
         with the stores by ETag. The worst request of an old journal is a drop that step 7 refuses.
    any  The answer of a store is lost: a copy exists or not, deletions are repeated, the placement is read back.
    any  The clock jumps: the grace period gets shorter or longer. Only the convenience of readers depends on it.

A `drop` is a move whose copy was made earlier: nothing is copied, but the copy must be verified. A `delete` removes
last copies: it waits too, and is made only if a new plan still asks for it (survey.py). A `reclass` into a class from
which objects must be restored before they can be read is announced and waits; a `reclass` into any other class is made
at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import TYPE_CHECKING

from tiercache.tier.applying import PlanExecutor
from tiercache.tier.lock import TierLock
from tiercache.tier.outcome import ApplyResult, Progress, SettlementCounts, StoppedMove
from tiercache.tier.settling import DeferredDeletions
from tiercache.tier.steps import MoveContext
from tiercache.tier.survey import DeletionGuard, take_deletion_guard

if TYPE_CHECKING:
    from tiercache.catalog.tiers import TierCatalog
    from tiercache.tier.model import Plan
    from tiercache.tier.stores import Stores
    from tiercache.tier.transfer import Transfer
    from tiercache.tierfile import RuleFile

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
        survey: Callable[[float], DeletionGuard] | None = None,
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
            survey: Function that returns the Survey at a time in seconds since the epoch, called before anything is
                deleted. None: the tiers are listed and planned again.
            cancel: Event that is set where apply() or settle() ends with an exception, so that running copies end soon:
                the cancel event of the transfer.
        """
        self._file, self._stores, self._catalog, self._transfer = file, stores, catalog, transfer
        self._clock, self._lock, self._cancel = clock, lock, cancel
        self._survey = survey or (lambda now_s: take_deletion_guard(file, stores, catalog, now_s))
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
        with self._locked() as lock, self._sight() as sight:
            return PlanExecutor(sight, lock, plan, self.now_s, on_progress).run()

    def settle(
        self, now_s: float | None = None, *, on_progress: Callable[[Progress], object] | None = None
    ) -> ApplyResult:
        """Make the deletions and the class changes whose grace period is over, and finish those that were interrupted.

        Each of them is checked again: what is not in the required state stays, and is reported. Raises as apply().

        Args:
            now_s: Seconds since the epoch. None: now.
            on_progress: Function that receives how many bytes of the copies were read back.
        """
        now_s = self.now_s() if now_s is None else now_s
        with self._locked() as lock, self._sight() as sight:
            return _applied(DeferredDeletions(sight, lock, self._survey, now_s, on_progress=on_progress).run())

    def finish(self) -> ApplyResult:
        """Finish the deletions that were begun and interrupted, and make no others. Raises as apply()."""
        with self._locked() as lock, self._sight() as sight:
            return _applied(DeferredDeletions(sight, lock, self._survey, self.now_s(), only_begun=True).run())

    @contextmanager
    def _locked(self) -> Iterator[TierLock]:
        if self._lock is not None:
            yield self._lock
            return
        home = self._stores.store(self._file.home.name)
        with TierLock(home, folder=self._catalog.path.parent) as lock:
            yield lock

    @contextmanager
    def _sight(self) -> Iterator[MoveContext]:
        pool = ThreadPoolExecutor(self._file.tiering.jobs, thread_name_prefix="tiercache-mover")
        try:
            yield MoveContext(self._file, self._stores, self._catalog, self._transfer, pool)
        except BaseException:
            if self._cancel is not None:
                self._cancel.set()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _applied(settled: SettlementCounts) -> ApplyResult:
    stopped = tuple(StoppedMove(row.number, why, row.path, row.plan) for row, why in settled.stopped)
    return ApplyResult(settled.n_done, stopped, settled.n_waiting, settled.n_bytes, settled.proof_bytes)
