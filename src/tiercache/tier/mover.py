"""Carrying out plans, so that nothing is ever lost, whatever stops it and whoever else is at work.

A move from src to dst, each step journaled before the next, and each harmless when repeated::

    1. begin     the journal says what it is about: every object as it must be. Earlier moves of the path give way
    2. copy      objects that dst has not; those that make the group whole last. Each copy is verified
    3. record    the books of this machine know the verified copies, in src and in dst, by size, ETag and CRC-32C
    4. look      src once more: what changed while it was copied is not what dst has
    5. place     every reader is told where it lies from now on
    6. wait      for grace: readers that were not told yet go on reading src
    7. re-check  (settling.py) dst is whole and as it was verified, src is as it was copied, nobody reads it, no pin
                 holds it, readers are told, and src and dst are two places; files in dst are read from their disk
    8. drop      first the object that makes the group whole, then the rest
    9. done

What may happen between two steps:

    1-2  killed: an open row, no harm. The plan applied again goes on; another plan's move of the path replaces the row.
    2-3  killed: copies that nobody knows. They are compared with src, and not copied again.
    2-6  killed, when what is copied was lost while it waited: the row says that before the books know the new copy, and
         grace begins anew.
    3-4  src is replaced: step 4 sees another ETag and stops; the copy in dst stays, verified for what it is, and is
         overwritten by a later move from src only while it is as it was made, and if the group is that object alone.
    4-5  src is replaced in this instant: readers are led to what it was before. Step 7 sees it, and takes that back.
    5-6  killed: readers are told and nothing waits. The plan applied again starts grace; another plan asks for a drop.
    6-7  the copy in dst is lost, spoilt or restored and moved by somebody: step 7 compares, and stops. No store says
         that a file has rotted: that it is read shows it.
    6-7  another process moves the object back, with another journal: its placement leads to src, step 7 reads that.
    7-8  src is replaced: it is looked at once more, after all that takes long, and S3 is told which ETag it is to
         delete. Other stores have no such request: the time that the announcement takes remains.
    7-8  the copy in dst is removed by somebody: it is looked at once more, as src is. Who removes it while the deletion
         of the other one is announced and made loses both: no store deletes one object only while another is there.
    7-8  it is pinned: the rule file is read anew after all that takes long. From tier_drop.decided on, while one batch
         of deletions is announced and made, a pin is too late for that batch; it holds for all that is left.
    7-8  the lock was lost while this process slept: it is looked at after all that step 7 asks, directly before the
         deletion; and see lock.py for a process that sleeps just after that.
    8-8  killed among deletions: the row says "dropping", and the rest goes when dst is confirmed once more.
    any  the books are lost or old: what they do not know is verified anew, or stops; what they say is compared with
         what lies there, by ETag. The worst that an old journal asks for is a drop that step 7 refuses.
    any  an answer of a store is lost: a copy is there or not, deletions are repeated, placement is read back.
    any  the clock jumps: grace gets shorter or longer, and nothing hangs on it but readers' comfort.

A `drop` is a move whose copy was made before: it is not copied, but must be verified. A `delete` takes last copies: it
waits too, and is made only if a plan made anew still asks for it (survey.py). A `reclass` into a class that must be
restored before it is read is announced and waits; into any other it is done at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import TYPE_CHECKING

from tiercache.tier.applying import Application
from tiercache.tier.lock import TierLock
from tiercache.tier.outcome import Applied, Progress, Settled, Stopped
from tiercache.tier.settling import Settling
from tiercache.tier.steps import Sight
from tiercache.tier.survey import Survey, take_survey

if TYPE_CHECKING:
    from tiercache.catalog.tiers import TierCatalog
    from tiercache.tier.model import Plan
    from tiercache.tier.stores import Stores
    from tiercache.tier.transfer import Transfer
    from tiercache.tierfile import TierFile

__all__ = ["Applied", "Mover", "Progress", "Stopped"]


class Mover:
    """Applies plans of a rule file, and settles what waits. One at a time, on all machines: it holds the home's lock.

    For one thread at a time.
    """

    def __init__(
        self,
        file: TierFile,
        stores: Stores,
        catalog: TierCatalog,
        transfer: Transfer,
        *,
        clock: Callable[[], float] | None = None,
        lock: TierLock | None = None,
        survey: Callable[[float], Survey] | None = None,
        cancel: Event | None = None,
    ) -> None:
        """Nothing is asked yet; all that is given stays the caller's.

        Args:
            file: the rule file as it is now.
            stores: of its tiers.
            catalog: this machine's books.
            transfer: makes copies.
            clock: seconds since the epoch; None: the machine's.
            lock: that is held already; None: apply() and settle() take and release it.
            survey: what there is at a time, asked before anything is deleted; None: it is listed and planned anew.
            cancel: set where apply() or settle() ends by an exception, so that copies under way end soon too: the
                transfer's.
        """
        self._file, self._stores, self._catalog, self._transfer = file, stores, catalog, transfer
        self._clock, self._lock, self._cancel = clock, lock, cancel
        self._survey = survey or (lambda now_s: take_survey(file, stores, catalog, now_s))
        catalog.bind({tier.name: tier.url for tier in file.tiers})

    def now_s(self) -> float:
        """Seconds since the epoch, by the clock that was given."""
        return time.time() if self._clock is None else self._clock()

    def apply(self, plan: Plan, *, on_progress: Callable[[Progress], object] | None = None) -> Applied:
        """Make the moves of a plan, exactly; those that were made before stay as they are.

        Where the world is not as the plan saw it, that move is stopped and the others go on. Deletions wait for
        settle().

        Raises:
            CommitConflict: another process moves things between these tiers.
            StoreError: the store of the home failed.
            OSError: this machine's books cannot be written.
        """
        with self._locked() as lock, self._sight() as sight:
            return Application(sight, lock, plan, self.now_s, on_progress).run()

    def settle(self, now_s: float | None = None, *, on_progress: Callable[[Progress], object] | None = None) -> Applied:
        """Make the deletions whose grace is over, and changes of class that end readability; and finish broken ones.

        Each is re-checked: what is not as it must be stays, and is told. now_s: seconds since the epoch, None: now.
        on_progress: hears how much of the copies was read back. Raises as apply().
        """
        now_s = self.now_s() if now_s is None else now_s
        with self._locked() as lock, self._sight() as sight:
            return _applied(Settling(sight, lock, self._survey, now_s, on_progress=on_progress).run())

    def finish(self) -> Applied:
        """Make the deletions that were begun and broken off, and no others. Raises as apply()."""
        with self._locked() as lock, self._sight() as sight:
            return _applied(Settling(sight, lock, self._survey, self.now_s(), only_begun=True).run())

    @contextmanager
    def _locked(self) -> Iterator[TierLock]:
        if self._lock is not None:
            yield self._lock
            return
        home = self._stores.store(self._file.home.name)
        with TierLock(home, folder=self._catalog.path.parent) as lock:
            yield lock

    @contextmanager
    def _sight(self) -> Iterator[Sight]:
        pool = ThreadPoolExecutor(self._file.tiering.jobs, thread_name_prefix="tiercache-mover")
        try:
            yield Sight(self._file, self._stores, self._catalog, self._transfer, pool)
        except BaseException:
            if self._cancel is not None:
                self._cancel.set()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _applied(settled: Settled) -> Applied:
    stopped = tuple(Stopped(row.number, why, row.path, row.plan) for row, why in settled.stopped)
    return Applied(settled.n_done, stopped, settled.n_waiting, settled.n_bytes, settled.proof_bytes)
