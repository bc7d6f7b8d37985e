"""One pass over a user's sampler as torch and torchdata make it, and how far ahead the sampler may be asked."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils import data as torch_data
from torchdata.stateful_dataloader import Stateful
from torchdata.stateful_dataloader import sampler as torchdata_samplers
from torchdata.stateful_dataloader.worker import try_to_deserialize

from tiercache._native.finder import wrapped
from tiercache.load.bulk import (
    BATCH_ITERATORS,
    OF_TORCHDATA,
    SAMPLES_YIELDED,
    IndexArrayIterator,
    index_array_iterator,
    with_state,
)
from tiercache.load.draws import next_seed
from tiercache.load.feed import SamplerBatch, SamplerQueue
from tiercache.load.replay import REPLAY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from tiercache.load.source import Source

# Rows asked ahead of samplers that allow it: a window costs 1.5 ms and more, however few rows it has.
AHEAD_ROWS = 1 << 17
MIN_AHEAD, MAX_AHEAD = 8, 1 << 10

# torchdata's keys of the state of a single-process iterator: a state of either kind of loader serves the other.
_INDEX_SAMPLER, _SAMPLER_ITER, _YIELDED, _N_YIELDED, FINISHED = (
    "_index_sampler_state",
    "_sampler_iter_state",
    "_sampler_iter_yielded",
    "_num_yielded",
    "_iterator_finished",
)
STATE_KEYS = (_INDEX_SAMPLER, _SAMPLER_ITER, _YIELDED, _N_YIELDED, FINISHED)
OURS = "_tiercache"  # beside them: the key of random crops
NEXT_EPOCH = "_tiercache_next_epoch"  # the start of the next epoch, in a state at the end of an epoch
SAMPLER_EPOCH = "_tiercache_sampler_epoch"  # the epoch that was set in a DistributedSampler, which has no state

_PLAIN = (list, tuple, range, np.ndarray, torch.Tensor)
_TORCH = (
    torch_data.SequentialSampler,
    torch_data.SubsetRandomSampler,
    torch_data.WeightedRandomSampler,
    torch_data.distributed.DistributedSampler,
    torchdata_samplers.StatefulDistributedSampler,
)


class RandomSampler(torch_data.RandomSampler):
    """torch's RandomSampler with a state in its iterators. It draws the same numbers at the same moments as torch's.

    It subclasses torch's RandomSampler because Lightning replaces exactly that class.
    """

    _next_seed: int | None = None  # seed of the next epoch, from a loaded state
    _loaded_under: int | None = None  # torch's initial seed at load time: a later reseed overrides the loaded seed

    def __iter__(self) -> Iterator[int]:
        return _RandomIterator(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._loaded_under = torch.initial_seed()  # of this process

    def next_epoch(self, *, begins: bool) -> dict[str, Any]:
        """Return what names the next epoch's order, if no other code draws until then.

        begins: whether the loader draws a base seed before it asks for indices.
        """
        if self.generator is not None:
            return {_GENERATOR: self.generator.get_state()}
        seed = self._loaded_seed()
        return {_SEED: next_seed(None, after_begin=not begins) if seed is None else seed}

    def load_next_epoch(self, state: Mapping[str, Any]) -> None:
        """Make the epoch that next_epoch() named the next one."""
        if self.generator is not None and _GENERATOR in state:
            self.generator.set_state(state[_GENERATOR])
        self._next_seed, self._loaded_under = state.get(_SEED), torch.initial_seed()

    def take_seed(self) -> int:
        """Return the seed of the epoch that begins; draws as torch's sampler does."""
        drawn = int(torch.empty((), dtype=torch.int64).random_().item())
        loaded, self._next_seed = self._loaded_seed(), None
        return drawn if loaded is None else loaded

    def look_at_seed(self) -> int:
        """Return the seed that take_seed() would return now."""
        seed = self._loaded_seed()
        return next_seed(None, after_begin=True) if seed is None else seed

    def _loaded_seed(self) -> int | None:
        return self._next_seed if self._loaded_under == torch.initial_seed() else None


# Keys of an iterator's state. The state of torchdata's sampler has the first two, and "generator" even if the user gave
# none. The last key is False if the seed is still to be drawn, which then advances torch's random numbers; else it is
# absent.
_N_INDICES, _GENERATOR, _SEED, _IS_DRAWN = "yielded", "generator", "seed", "is_drawn"


class _RandomIterator:
    """One epoch of a RandomSampler. All indices are drawn with the first one, as in torch's generator function."""

    def __init__(self, sampler: RandomSampler) -> None:
        self._sampler = sampler
        self._indices: Iterator[int] | None = None
        self._n = 0
        self._begun: dict[str, Any] | None = None  # the seed or the generator state that determines the order

    def __iter__(self) -> _RandomIterator:
        return self

    def __next__(self) -> int:
        indices = self._begin(None) if self._indices is None else self._indices
        index = next(indices)
        self._n += 1
        return index

    def state_dict(self) -> dict[str, Any]:
        """Return plain values, and the generator's state if the user gave a generator. Draws nothing."""
        if self._begun is None and self._sampler.generator is None:
            self._begun = {_SEED: self._sampler.look_at_seed()}
        state = {_N_INDICES: self._n, **(self._begun or {_GENERATOR: self._sampler.generator.get_state()})}
        return {**state, _IS_DRAWN: False} if self._indices is None else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. Does not repeat draws from torch's own random numbers."""
        self._n = state[_N_INDICES]
        begun = {key: state[key] for key in (_SEED, _GENERATOR) if key in state}
        if _SEED in begun and not state.get(_IS_DRAWN, True):
            self._begun = begun
            return
        for _ in islice(self._begin(begun), self._n):
            pass

    def _begin(self, begun: dict[str, Any] | None) -> Iterator[int]:
        """Draw the order. begun: the seed or generator state of a loaded state; None: a new epoch."""
        sampler, generator = self._sampler, self._sampler.generator
        if generator is None:
            if begun is None:  # a state that was taken before the first index stays valid
                seed = sampler.take_seed()
                begun = self._begun or {_SEED: seed}
            generator = torch.Generator()
            if _SEED in begun:
                generator.manual_seed(begun[_SEED])
            else:
                generator.set_state(begun[_GENERATOR])
        elif begun is None:
            begun = {_GENERATOR: generator.get_state()}
        elif _GENERATOR in begun:
            generator.set_state(begun[_GENERATOR])
        self._begun = begun
        asked = sampler._num_samples  # noqa: SLF001 -- None: one per record
        self._indices = iter(torch_data.RandomSampler(sampler.data_source, sampler.replacement, asked, generator))
        return self._indices


_RANDOM = (torch_data.RandomSampler, torchdata_samplers.RandomSampler, RandomSampler)
_BATCH = (torch_data.BatchSampler, *OF_TORCHDATA)


def allows_lookahead(sampler: Any) -> bool:
    """Whether the sampler may be asked ahead unnoticed: it draws all its random numbers when it begins.

    That is known of plain sequences and of the samplers of torch and torchdata, by their exact types; of a
    RandomSampler only if it draws a single permutation.
    """
    if type(sampler) in _BATCH:
        return allows_lookahead(sampler.sampler)
    if type(sampler) in _RANDOM:
        return not sampler.replacement and sampler.num_samples <= len(sampler.data_source)
    return type(sampler) in _PLAIN or type(sampler) in _TORCH


def set_sampler_epoch(index_sampler: Any, epoch: int) -> None:
    """Call set_epoch() of a batch sampler and of its sampler, if they have it."""
    for sampler in (index_sampler, getattr(index_sampler, "sampler", None)):
        set_epoch = getattr(sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)


def get_sampler_epoch(index_sampler: Any) -> int | None:
    """Return the epoch that was set in a batch sampler or in its sampler; None: neither has set_epoch()."""
    for sampler in (index_sampler, getattr(index_sampler, "sampler", None)):
        epoch = getattr(sampler, "epoch", None)
        if isinstance(epoch, int) and hasattr(sampler, "set_epoch"):
            return epoch
    return None


@dataclass(frozen=True, slots=True)
class SamplerLookahead:
    """How far ahead a sampler is asked, in batches. at_begin: batches asked in iter(), which torch sends to workers."""

    n_batches: int
    at_begin: int

    @staticmethod
    def of(sampler: Any, n_workers: int, prefetch_factor: int | None) -> SamplerLookahead | None:
        """Return how far ahead a sampler may be asked; None: each batch must be asked for when it is due."""
        at_begin = n_workers * max(prefetch_factor or 0, 1)
        if not allows_lookahead(sampler):
            return SamplerLookahead(at_begin, at_begin) if n_workers else None
        return SamplerLookahead(max(min(AHEAD_ROWS // batch_rows(sampler), MAX_AHEAD), MIN_AHEAD, at_begin), at_begin)


def batch_rows(index_sampler: Any) -> int:
    """Return the rows of its batches if the sampler states them, else 1."""
    return int(index_sampler.batch_size) if says_size(index_sampler) else 1


def says_size(index_sampler: Any) -> bool:
    """Whether the sampler states the number of rows of its batches."""
    size = getattr(index_sampler, "batch_size", None)
    return isinstance(size, int) and size > 0


class SamplerPass:
    """One pass over a sampler: the batches that it returned, their states, and how many were handed out.

    One consumer thread uses it. As in torch's loader, the sampler's iterator is made when the first batch is drawn:
    until then set_epoch() may be called, as Lightning does to resume.

    Attributes:
        feed: Queue of the batches, for the pipeline.
        n_yielded: Batches handed out since the epoch began or was resumed.
        finished: Whether the end was reached.
    """

    def __init__(self, index_sampler: Any, feed: SamplerQueue, source: Source) -> None:
        self.feed = feed
        self.finished = False
        self._index_sampler = index_sampler
        self._iterator: Iterator[Any] | None = None
        self._begun: Mapping[str, Any] | None = None  # the state to begin from
        self._listed = source.record_order
        self._n_records = int(source.shard_records.sum()) if self._listed is None else len(self._listed)
        self._n_before = self._n_rows = self._first_row = 0
        self._ended = False
        self._look: Callable[[], tuple[Any, Any]] = _no_states
        self._snapshot = self._look()

    @property
    def n_yielded(self) -> int:
        """See the class."""
        return self.feed.n_handed_out

    @n_yielded.setter
    def n_yielded(self, n_batches: int) -> None:
        while self.feed.n_handed_out < n_batches:
            self.feed.drop_oldest()

    @property
    def is_bulk(self) -> bool:
        """Whether the sampler returned all its indices at once, so that asking ahead costs next to nothing."""
        return isinstance(self._iterator, IndexArrayIterator)

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue from a state as torchdata does: by the sampler's own state, else by asking the sampler again."""
        self._begun = state
        self._n_before = state[_YIELDED]
        self._n_rows = self._first_row = state.get(OURS, {}).get("rows", 0)
        self._snapshot = state[_INDEX_SAMPLER], state[_SAMPLER_ITER]
        self.finished = state[FINISHED]
        if self.finished:  # Nothing is drawn from it, and the sampler's next epoch begins where this one ended.
            self._begin()

    def draw(self, n_batches: int) -> None:
        """Ask the sampler for n_batches more. Its errors and its end are reported in their places in the order."""
        if n_batches > 0 and not self._ended:
            iterator = self._begin() if self._iterator is None else self._iterator
        for _ in range(0 if self._ended else n_batches):
            try:
                numbers = self._numbers(next(iterator))
                snapshot = self._look()
            except StopIteration:
                return self._end(None)
            except Exception as error:  # noqa: BLE001 -- the user's code: raised when its batch is due
                return self._end(error)
            self.feed.add(SamplerBatch(numbers, self._n_rows, snapshot))
            self._n_rows += len(numbers)
        return None

    def state(self) -> dict[str, Any]:
        """Return the state after the batches handed out, whatever was drawn since; with torchdata's keys."""
        if self._iterator is None and self._begun is None:
            self._begin()
        last = self.feed.last
        index_sampler, sampler_iter = self._snapshot if last is None else last.snapshot
        n_rows = self._first_row if last is None else last.first_row + len(last.numbers)
        n_batches = self._n_before + self.feed.n_handed_out
        return {
            _INDEX_SAMPLER: index_sampler,
            _SAMPLER_ITER: sampler_iter,
            _YIELDED: n_batches,
            _N_YIELDED: n_batches,
            "_IterableDataset_len_called": None,
            "_shared_seed": None,
            "fetcher_state": None,
            "dataset_state": None,
            FINISHED: self.finished,
            OURS: {"epoch": self.feed.epoch, "seed": self.feed.seed, "rows": n_rows},
        }

    def _begin(self) -> Iterator[Any]:
        """Make the sampler's iterator and advance it to the start of the epoch, or to the loaded state."""
        state = self._begun
        bulk = index_array_iterator(
            self._index_sampler, self._n_before, None if state is None else state[_SAMPLER_ITER]
        )
        if bulk is not None:
            self._iterator, self._look, self._snapshot = bulk, bulk.look, bulk.look()
            return bulk
        index_sampler = with_state(self._index_sampler)
        iterator: Iterator[Any] = iter(index_sampler)
        if state is not None:
            index_sampler = try_to_deserialize(index_sampler, state[_INDEX_SAMPLER])
            iterator = iter(index_sampler)
            if state[_SAMPLER_ITER] is not None:
                iterator = try_to_deserialize(iterator, state[_SAMPLER_ITER])
        self._iterator = iterator
        self._look = _snapshots(index_sampler, iterator)
        self._snapshot = self._look()
        return iterator

    def _end(self, error: Exception | None) -> None:
        self._ended = True
        self.feed.end(error)

    def _numbers(self, indices: Any) -> NDArray[np.int64]:
        """Return the record numbers of a batch's indices.

        Raises:
            IndexError: A record does not exist.
            TypeError: The indices are not integers.
            ValueError: The batch is empty.
        """
        rows = np.asarray(indices)
        if rows.size == 0:
            raise ValueError("the batch sampler returned an empty batch: a batch needs one record or more")
        if rows.dtype.kind not in "iu":
            raise TypeError(f"a sampler must return integer record numbers, it returned {rows.dtype}")
        numbers = wrapped(np.ascontiguousarray(rows, np.int64).reshape(-1), self._n_records)
        return numbers if self._listed is None else self._listed[numbers]


def _no_states() -> tuple[Any, Any]:
    """Return the states of a sampler and an iterator without a state."""
    return None, None


def _snapshots(index_sampler: Any, iterator: Any) -> Callable[[], tuple[Any, Any]]:
    """Return a function that returns the states of a sampler and its iterator, as torchdata's loader saves them.

    The check whether an object is Stateful takes 5 us, and torchdata makes it for each object and batch: 18 us per
    batch for its BatchSampler. This function builds the state of that iterator in 1 us.
    """
    of_sampler, of_iterator = isinstance(index_sampler, Stateful), isinstance(iterator, Stateful)
    if not of_sampler and not of_iterator:
        return _no_states
    if of_sampler or type(iterator) not in BATCH_ITERATORS:
        return lambda: (
            index_sampler.state_dict() if of_sampler else None,
            iterator.state_dict() if of_iterator else None,
        )
    below = {"sampler_state": iterator.sampler, "sampler_iter_state": iterator.sampler_iter}  # torchdata's keys
    parts = {key: one.state_dict for key, one in below.items() if isinstance(one, Stateful)}
    replay = getattr(iterator, "replay", None)
    if replay is not None:
        parts[REPLAY] = replay.state

    def look() -> tuple[None, dict[str, Any]]:
        return None, {SAMPLES_YIELDED: iterator.samples_yielded} | {key: state() for key, state in parts.items()}

    return look
