"""The iterator of one epoch on the native path, its position, and how it continues after a corrupt copy."""

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
from tiercache.load.draws import TorchDraws
from tiercache.load.pipeline import PipelineInputs, Resources
from tiercache.load.state import RunState
from tiercache.load.tuples import as_columns
from tiercache.order import RankPlan

if TYPE_CHECKING:
    from collections.abc import Callable

    from tiercache.load.damage import CorruptLocation

_profiler = torch.autograd.profiler


class EpochProgress(Protocol):
    """How far an epoch is; its iterator updates it.

    n_yielded: batches handed out since the epoch began or was resumed; finished: whether its end was reached.
    """

    n_yielded: int
    finished: bool


class EpochPosition:
    """The position in an epoch.

    The loader keeps it; the epoch's iterator updates it, and may be dropped long before.

    is_counted: whether the number of batches handed out is known; it is not if another loader hands them out.
    """

    def __init__(self, begun: RunState, ranks: RankPlan, *, is_counted: bool = True) -> None:
        self._begun = begun
        self.ranks = ranks
        self._is_counted = is_counted
        self._redirected: RunState | None = None
        self._next: RunState | None = None  # cached by next_state()
        self.n_yielded = 0
        self.finished = False

    def state(self) -> RunState:
        """Return the state after the batches handed out; after the end, the state at the start of the next epoch.

        Raises:
            RuntimeError: Another loader hands the batches out.
        """
        if self._redirected is not None:
            return self._redirected
        if self.finished:
            return self.next_state()
        if not self._is_counted:
            raise RuntimeError(
                f"the position in epoch {self._begun.epoch} is unknown: this loader's sampler or batch_sampler was "
                "iterated, usually by another loader that was made from it (as by Accelerate's skip_first_batches). "
                "Call state_dict() before that loader begins or after it ends; if it has worker processes, call "
                f"set_epoch({self._begun.epoch + 1}) of this loader first. To resume within an epoch, use "
                "load_state_dict() instead"
            )
        return replace(self._begun, offset=self.ranks.offset_after(self.n_yielded))

    def next_state(self) -> RunState:
        """Return the state from which the loader's next iter() begins: the next epoch, even if this one did not end."""
        if self._next is None:
            self._next = self._begun.following(self._begun.epoch + 1)
        return self._redirected or self._next

    def redirect(self, epoch: int) -> None:
        """Make another epoch the next one."""
        if self.next_state().epoch != epoch:
            self._redirected = self._begun.following(epoch)

    @property
    def is_between_epochs(self) -> bool:
        """Whether state() is the beginning of an epoch that no iter() has begun."""
        return self.finished or self._redirected is not None


@dataclass(frozen=True, slots=True)
class Delivery:
    """The loader's arguments about handing out batches.

    timeout_s: Seconds to wait for a batch, 0 for no limit; pin_memory: whether to pin batches; draws: The epoch's draws
    from torch's random numbers.
    """

    timeout_s: float
    pin_memory: bool
    draws: TorchDraws


class NativeIterator(ReadyIterator, Iterator[Batch]):
    """Batches of one epoch from a state on. Independent of the loader's other iterators; closes itself when dropped."""

    def __init__(self, position: EpochProgress, work: PipelineInputs, resources: Resources, delivery: Delivery) -> None:
        self._position = position
        self._work = work
        self._resources = resources
        self._timeout_s = delivery.timeout_s if delivery.timeout_s > 0 else -1.0
        self._pin = _pinning() if delivery.pin_memory else None
        self._names = work.output_spec.names  # names of the entries of a tuple; None: batches are dicts
        self._start_s = time.perf_counter()
        self._counted = False
        self._read_again: set[int] = set()  # numbers of shards that were read a second time
        self._passed_by: set[CorruptLocation] = set()
        self._draws = delivery.draws
        # torch's sampler draws numbers before the first batch. It draws again at its end, which comes before a short
        # last batch.
        n_undrawn = work.share.n_batches - 1 if self._draws.ends_short else sys.maxsize
        super().__init__(position, _profiler, n_undrawn, is_plain=self._pin is None and self._names is None)
        self._start(work)

    def __len__(self) -> int:
        return self._work.share.n_batches

    def __getstate__(self) -> NoReturn:
        raise NotImplementedError(f"{type(self).__name__} cannot be pickled")  # torch's iterators raise the same error

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        self.__getstate__()  # Pickle protocols 0 and 1 do not call __getstate__ of a native base class.

    def __del__(self, is_exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_exiting() and hasattr(self, "_pipeline"):
            self.close()

    def figures(self) -> Mapping[str, float]:
        """Return the pipeline's counters and wall_s of this epoch; {} once they are added to the loader's counters."""
        if self._counted:
            return {}
        return {**self._pipeline.figures(), "wall_s": time.perf_counter() - self._start_s}

    def close(self) -> None:
        """End this epoch, early or not, and add its counters to the loader's. May be called repeatedly."""
        self._pipeline.close()
        if self._counted:
            return
        publishing, coming = self._work.publisher, self._work.next_epoch
        if publishing is not None and coming is not None and self._position.finished:
            publishing.finish()
            coming.publishing.succeed(publishing)  # If another epoch follows, the cache has a plan at every moment.
        elif publishing is not None:
            publishing.close()
        if not self._pipeline.is_forked_copy:
            self._count(self.figures())
            self._counted = True

    def _start(self, work: PipelineInputs) -> None:
        self._pipeline = start_pipeline(work, self._resources)
        self._take_by(self._pipeline.take_ready)

    def _next(self) -> Any:
        try:
            # torch's hook costs more than a whole batch here, so it is entered only while a profiler runs.
            if _profiler._is_profiler_enabled:  # noqa: SLF001 -- the flag that torch's own hooks test
                with _profiler.record_function("enumerate(DataLoader)#tiercache.__next__"):
                    return self._take()
            return self._take()
        except KeyboardInterrupt as error:
            self._missed(error)
            raise

    def _missed(self, error: BaseException) -> None:
        if isinstance(error, KeyboardInterrupt):
            # Ctrl-C struck after a batch was taken and before it was counted: that batch is lost, as with torch, but
            # later batches keep their positions.
            self._position.n_yielded = max(self._position.n_yielded, self._pipeline.n_taken)
        else:  # There was no memory for a batch. The next batch must not be served in its place.
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
        """Return the next batch, and draw the random numbers that torch's sampler draws here. Raises StopIteration."""
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
        """Return the batch that failed: read again after a corrupt local copy, else without its corrupt records.

        The order is a function of the position, so a second pipeline can continue where the first one failed.

        Raises:
            CorruptShard: The data is corrupt in the store, and corrupt records are not replaced.
        """
        damage = self._work.corruption
        try:
            while True:
                healed = self._may_read_again()
                if healed is None:
                    self._replace_corrupt(error)
                self._count(self._pipeline.figures())
                if self._work.next_epoch is not None:
                    self._work.next_epoch.on_source_closed()
                here = replace(self._work, first_batch=self._position.n_yielded, epoch_start=None)
                self._start(here)
                try:
                    return self._pipeline.take(self._timeout_s)
                except CorruptShard as again:
                    # Else keep the first error: it names the block.
                    if healed or damage is not None or self._pipeline.corrupt_shard is not None:
                        error = again
        finally:
            del error  # The error's traceback would form a cycle that holds windows.

    def _may_read_again(self) -> bool | None:
        """Whether a local copy was replaced; None: the shard was read again before, so the data itself is corrupt.

        Every shard is read again once: another loader or process may have replaced the copy in the meantime.
        """
        shard = self._pipeline.corrupt_shard
        healed = shard is not None and self._work.source.discard_corrupt_copy(shard)
        if shard is None or (not healed and shard in self._read_again):
            return None
        self._read_again.add(shard)
        return healed

    def _replace_corrupt(self, error: CorruptShard) -> None:
        """Replace the corrupt records from now on. Raises the error if they must not be replaced, or already were."""
        place: CorruptLocation | None = error.facts.get("place")
        if self._work.corruption is None or place is None or place in self._passed_by:
            try:
                raise error
            finally:
                del error  # as in _take_past()
        self._passed_by.add(place)
        self._work.corruption.note_corruption(place, error)


def _pinning() -> Any:
    """Return the function that pins a batch; None, with torch's warning, if there is no accelerator."""
    accelerator = getattr(torch, "accelerator", None)
    if accelerator is None:  # torch before 2.6 supports only CUDA here and does not warn
        return torch.utils.data._utils.pin_memory.pin_memory if torch.cuda.is_available() else None  # noqa: SLF001
    if not accelerator.is_available():
        warnings.warn(
            "'pin_memory' argument is set as true but no accelerator is found, "
            "then device pinned memory won't be used.",
            stacklevel=5,  # the caller of iter(loader)
        )
        return None
    return torch.utils.data._utils.pin_memory.pin_memory  # noqa: SLF001 -- pins nested batches as torch's loader does
