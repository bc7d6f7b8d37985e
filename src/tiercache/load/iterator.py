"""One epoch of the native path as its consumer sees it: where it stands, batches, and going on past a rotten copy."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, SupportsIndex

import torch

from tiercache._native.assembly import ReadyIterator
from tiercache.errors import CorruptShard
from tiercache.load.assemble import Batch
from tiercache.load.decoding import start_pipeline
from tiercache.load.draws import Draws
from tiercache.load.pipeline import Resources, Work
from tiercache.load.state import RunState
from tiercache.load.tuples import as_columns
from tiercache.order import RankPlan

if TYPE_CHECKING:
    from collections.abc import Callable

    from tiercache.load.damage import Damaged

_profiler = torch.autograd.profiler


class Progress(Protocol):
    """How far an epoch is: moved by its iterator.

    n_yielded: batches handed out since it began or was resumed; finished: whether its end was reached.
    """

    n_yielded: int
    finished: bool


class Position:
    """Where an epoch stands: kept by the loader, moved by the epoch's iterator, which may be gone long before.

    is_counted: whether the batches handed out are known; they are not where another loader hands them out.
    """

    def __init__(self, begun: RunState, ranks: RankPlan, *, is_counted: bool = True) -> None:
        self._begun = begun
        self.ranks = ranks
        self._is_counted = is_counted
        self._redirected: RunState | None = None
        self._next: RunState | None = None  # once it was asked for
        self.n_yielded = 0
        self.finished = False

    def state(self) -> RunState:
        """Where the run stands after the batches handed out; after the end, at the start of the next epoch.

        Raises:
            RuntimeError: another loader hands them out.
        """
        if self._redirected is not None:
            return self._redirected
        if self.finished:
            return self.next_state()
        if not self._is_counted:
            raise RuntimeError(
                f"how much of epoch {self._begun.epoch} was served is not known: this loader's sampler or "
                "batch_sampler was iterated, usually by another loader that was made of it (as by Accelerate's "
                "skip_first_batches). Call state_dict() before that loader begins or after it ends; if it has worker "
                f"processes, call set_epoch({self._begun.epoch + 1}) of this loader first. Otherwise resume "
                "with load_state_dict()"
            )
        return replace(self._begun, offset=self.ranks.offset_after(self.n_yielded))

    def next_state(self) -> RunState:
        """Where the loader's next iter() begins: the next epoch, however far this one got."""
        if self._next is None:
            self._next = self._begun.following(self._begun.epoch + 1)
        return self._redirected or self._next

    def redirect(self, epoch: int) -> None:
        """Let the loader go on with another epoch."""
        if self.next_state().epoch != epoch:
            self._redirected = self._begun.following(epoch)

    @property
    def is_between_epochs(self) -> bool:
        """Whether state() is the beginning of an epoch that no iter() has begun."""
        return self.finished or self._redirected is not None


@dataclass(frozen=True, slots=True)
class Delivery:
    """What the loader's own arguments say of handing batches over.

    timeout_s: 0 for none; draws: what the epoch draws from torch's random numbers.
    """

    timeout_s: float
    pin_memory: bool
    draws: Draws


class NativeIterator(ReadyIterator, Iterator[Batch]):
    """Batches of one epoch from a state on. Independent of its loader's other iterators; closes itself when dropped."""

    def __init__(self, position: Progress, work: Work, resources: Resources, delivery: Delivery) -> None:
        self._position = position
        self._work = work
        self._resources = resources
        self._timeout_s = delivery.timeout_s if delivery.timeout_s > 0 else -1.0
        self._pin = _pinning() if delivery.pin_memory else None
        self._names = work.serving.names  # of a tuple's entries
        self._start_s = time.perf_counter()
        self._counted = False
        self._read_again: set[int] = set()  # shards
        self._passed_by: set[Damaged] = set()
        self._draws = delivery.draws
        # torch's sampler draws numbers before the first batch, and at the end before a short one, which comes last.
        n_undrawn = work.share.n_batches - 1 if self._draws.ends_short else sys.maxsize
        super().__init__(position, _profiler, n_undrawn, is_plain=self._pin is None and self._names is None)
        self._start(work)

    def __len__(self) -> int:
        return self._work.share.n_batches

    def __getstate__(self) -> NoReturn:
        raise NotImplementedError(f"{type(self).__name__} cannot be pickled")  # as torch's iterators say

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        self.__getstate__()  # which protocols 0 and 1 do not ask of a native base

    def __del__(self, is_exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_exiting() and hasattr(self, "_pipeline"):
            self.close()

    def figures(self) -> Mapping[str, float]:
        """The pipeline's, and wall_s of this epoch; nothing once they are in the loader's counters."""
        if self._counted:
            return {}
        return {**self._pipeline.figures(), "wall_s": time.perf_counter() - self._start_s}

    def close(self) -> None:
        """End this epoch, early or not, and add its figures to the loader's. Repeatable."""
        self._pipeline.close()
        if self._counted:
            return
        publishing, coming = self._work.publishing, self._work.coming
        if publishing is not None and coming is not None and self._position.finished:
            publishing.finish()
            coming.publishing.succeed(publishing)  # no moment without a plan, if an epoch follows
        elif publishing is not None:
            publishing.close()
        if not self._pipeline.inherited:
            self._count(self.figures())
            self._counted = True

    def _start(self, work: Work) -> None:
        self._pipeline = start_pipeline(work, self._resources)
        self._take_by(self._pipeline.take_ready)

    def _next(self) -> Any:
        try:
            # torch's hook costs more than our whole batch, so it is entered only while somebody looks.
            if _profiler._is_profiler_enabled:  # noqa: SLF001 -- the flag that torch's own hooks test
                with _profiler.record_function("enumerate(DataLoader)#tiercache.__next__"):
                    return self._take()
            return self._take()
        except KeyboardInterrupt as error:
            self._missed(error)
            raise

    def _missed(self, error: BaseException) -> None:
        if isinstance(error, KeyboardInterrupt):
            # Between a batch and its count: that batch is lost, as with torch, but those after it keep their places.
            self._position.n_yielded = max(self._position.n_yielded, self._pipeline.n_taken)
        else:  # a batch found no memory: going on would serve the next one as if nothing had been
            self._pipeline.close()

    def _count(self, figures: Mapping[str, float]) -> None:
        for name, figure in figures.items():
            self._work.counters.add(name, figure)

    def _take(self) -> Any:
        batch = self._take_ready()
        if batch is None:
            batch = self._take_drawing()
        if self._pin is not None:
            batch = self._pin(batch)
        return batch if self._names is None else as_columns(batch, self._names)

    def _take_drawing(self) -> Batch:
        """The next batch, and what the sampler of torch's loader would draw. Raises StopIteration."""
        if self._position.finished:
            raise StopIteration
        self._draws.sample()
        try:
            batch = self._pipeline.take(self._timeout_s)
        except TimeoutError as error:
            raise RuntimeError(f"DataLoader timed out after {self._timeout_s:g} seconds") from error
        except CorruptShard as error:
            batch = self._take_past(error)
        if batch is None:
            self._position.finished = True
            self._draws.exhaust()
            self._work.counters.add("padded", self._work.share.padded)
            self.close()
            raise StopIteration
        self._position.n_yielded += 1
        if self._draws.ends_short and self._position.n_yielded == self._work.share.n_batches:
            self._draws.exhaust()
        return batch

    def _take_past(self, error: CorruptShard) -> Batch | None:
        """The batch that could not be made: read again where a local copy was to blame, else without what is damaged.

        The order is a function of the position, so a second pipeline goes on where the first one failed.

        Raises:
            CorruptShard: the error, where what was read is what the source sent and damage is not passed by.
        """
        damage = self._work.damage
        try:
            while True:
                healed = self._may_read_again()
                if healed is None:
                    self._pass_by(error)
                self._count(self._pipeline.figures())
                if self._work.coming is not None:
                    self._work.coming.forget()
                here = replace(self._work, first_batch=self._position.n_yielded, begun=None)
                self._start(here)
                try:
                    return self._pipeline.take(self._timeout_s)
                except CorruptShard as again:
                    # Else the first says more: it names the block.
                    if healed or damage is not None or self._pipeline.damaged_shard is not None:
                        error = again
        finally:
            del error  # kept, it would be a cycle by its traceback, which holds windows

    def _may_read_again(self) -> bool | None:
        """Whether a copy was replaced, so that what failed may be read now; None: it was read again before.

        Once it is in any case: what was read may be a copy that another loader or process has replaced since.
        """
        shard = self._pipeline.damaged_shard
        healed = shard is not None and self._work.source.heal(shard)
        if shard is None or (not healed and shard in self._read_again):
            return None
        self._read_again.add(shard)
        return healed

    def _pass_by(self, error: CorruptShard) -> None:
        """Let what is damaged be replaced from here on. Raises the error where it is not to be, or was before."""
        place: Damaged | None = error.facts.get("place")
        if self._work.damage is None or place is None or place in self._passed_by:
            try:
                raise error
            finally:
                del error  # as above
        self._passed_by.add(place)
        self._work.damage.learn(place, error)


def _pinning() -> Any:
    """What pins a batch; None, with torch's warning, where nothing can be pinned."""
    accelerator = getattr(torch, "accelerator", None)
    if accelerator is None:  # torch before 2.6 knows only cuda here, and says nothing
        return torch.utils.data._utils.pin_memory.pin_memory if torch.cuda.is_available() else None  # noqa: SLF001
    if not accelerator.is_available():
        warnings.warn(
            "'pin_memory' argument is set as true but no accelerator is found, "
            "then device pinned memory won't be used.",
            stacklevel=5,  # the caller of iter(loader)
        )
        return None
    return torch.utils.data._utils.pin_memory.pin_memory  # noqa: SLF001 -- pins nested batches as torch's loader does
