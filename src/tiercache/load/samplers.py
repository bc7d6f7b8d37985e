"""One pass over a user's sampler as torch and torchdata make it, and how far ahead the sampler may be asked.

Samplers of known types give all their indices at once as an array, without Python code per index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils import data as torch_data
from torch.utils.data.dataloader import _InfiniteConstantSampler
from torchdata.stateful_dataloader import Stateful
from torchdata.stateful_dataloader import sampler as torchdata_samplers
from torchdata.stateful_dataloader.worker import try_to_deserialize

from tiercache._native.record_finder import normalize_indices
from tiercache.load.sampler_queue import SamplerBatch, SamplerQueue
from tiercache.load.torch_rng import REPLAY, YIELDED, RandomGenerators, Replay, ReplayedSampler, ReplayState, next_seed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.load.source import Source


# Larger samplers are asked index by index: an array of their indices would take 512 MiB and more.
MAX_INDICES = 1 << 26

SAMPLES_YIELDED = "samples_yielded"  # torchdata's key in the state of its BatchSampler's iterator


_CHUNK = 1 << 12  # indices per call while skipping


class _BatchIterator(torchdata_samplers._BatchSamplerIterator):  # type: ignore[misc]  # noqa: SLF001 -- its state
    """torchdata's iterator, with its state. C code loops over a batch's indices: 15 us less per batch of 256.

    Attributes:
        replay: Pass over a sampler without a state; None: the sampler has a state.
    """

    def __init__(self, sampler: Any, batch_size: int, drop_last: bool) -> None:
        self.sampler, self.batch_size, self.drop_last = sampler, batch_size, drop_last
        self.samples_yielded = 0
        self.replay: Replay | None = None
        if not isinstance(sampler, (Stateful, _InfiniteConstantSampler)):
            self.replay = Replay(sampler)
        self.sampler_iter = iter(sampler) if self.replay is None else self.replay.iterator
        if isinstance(self.sampler_iter, Stateful):
            self.replay = None

    def __next__(self) -> list[Any]:
        size = self.batch_size
        batch = list(islice(self.sampler_iter, size)) if self.replay is None else self.replay.take(size)
        self.samples_yielded += len(batch)
        if len(batch) < (size if self.drop_last else 1):
            raise StopIteration
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return torchdata's state, and the replay state of a sampler without a state."""
        state: dict[str, Any] = super().state_dict()
        return state if self.replay is None else {**state, REPLAY: self.replay.state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state. Raises ValueError as Replay.resume."""
        if self.replay is None:
            super().load_state_dict(state_dict)
            return
        replay, n_left = self.replay, state_dict[SAMPLES_YIELDED]

        def skip() -> None:
            nonlocal n_left
            while n_left and (items := replay.take(min(n_left, _CHUNK))):
                n_left -= len(items)

        self.samples_yielded = n_left
        replay.resume(state_dict.get(REPLAY), skip)
        self.sampler_iter = replay.iterator


class BatchSampler(torchdata_samplers.BatchSampler):  # type: ignore[misc]
    """The batch sampler of a loader that was given none."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the sampler, if it takes one. Hugging Face's Trainer calls this to skip batches."""
        set_epoch = getattr(self.sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)

    def __iter__(self) -> Iterator[list[Any]]:
        return _BatchIterator(self.sampler, self.batch_size, self.drop_last)


def with_state(index_sampler: Any) -> Any:
    """Return a sampler or batch sampler that, itself or by its iterators, has a state; the given one if it does."""
    if type(index_sampler) is torchdata_samplers.BatchSampler:  # its iterators have no state for a sampler without one
        return BatchSampler(index_sampler.sampler, index_sampler.batch_size, index_sampler.drop_last)
    if isinstance(index_sampler, (BatchSampler, Stateful, _InfiniteConstantSampler)):
        return index_sampler
    return ReplayedSampler(index_sampler)


OF_TORCHDATA = (BatchSampler, torchdata_samplers.BatchSampler)
BATCH_ITERATORS = (_BatchIterator, torchdata_samplers._BatchSamplerIterator)  # noqa: SLF001 -- its exact type


class IndexArrayIterator(Iterator[Any]):
    """The iterator of a batch sampler over a sampler whose indices are known.

    replay: The generators' states before the sampler drew; it counts the indices that are returned, from `start` on.
    """

    def __init__(
        self,
        numbers: NDArray[np.int64],
        batch_sampler: Any,
        start: int,
        at_end: Callable[[], object],
        replay: ReplayState,
    ) -> None:
        self._numbers = numbers
        self._size, self._drop_last = batch_sampler.batch_size, batch_sampler.drop_last
        self._has_state = type(batch_sampler) in OF_TORCHDATA
        self._at = start
        self._at_end = at_end
        self._replay = replay
        replay.add(numbers[:start])

    def __next__(self) -> NDArray[np.int64]:
        """Return the next batch's indices, a view."""
        batch = self._numbers[self._at : self._at + self._size]
        if len(batch) < (self._size if self._drop_last else 1):
            self._at_end()
            raise StopIteration
        self._at += len(batch)
        self._replay.add(batch)
        return batch

    def look(self) -> tuple[None, dict[str, Any]]:
        """Return the states of batch sampler and iterator after the batches returned so far."""
        replay = self._replay.to_dict()
        if self._has_state:
            return None, {SAMPLES_YIELDED: self._at, REPLAY: replay}
        return None, {YIELDED: -(-self._at // self._size), REPLAY: replay}


def index_array_iterator(batch_sampler: Any, n_before: int, state: Any) -> IndexArrayIterator | None:
    """Return an iterator over all indices of a batch sampler, new or continued; draws what the sampler draws.

    Args:
        batch_sampler: Batch sampler of torch or torchdata; for other types the result is None.
        n_before: Number of batches that were served before.
        state: State of its iterator, or None.

    Returns:
        The iterator. None: the sampler itself must be asked; nothing was drawn.

    Raises:
        ValueError: The sampler returns other indices than before the state was taken.
    """
    if type(batch_sampler) in OF_TORCHDATA:
        start = 0 if state is None else state[SAMPLES_YIELDED]
    elif type(batch_sampler) is torch_data.BatchSampler:
        start = n_before * batch_sampler.batch_size
    else:
        return None
    sampler, replay = batch_sampler.sampler, ReplayState.fresh()
    saved = ReplayState.from_dict(state[REPLAY]) if state is not None and REPLAY in state else None
    if type(sampler) is not torch_data.RandomSampler:
        found = _indices(sampler)
    elif saved is None:
        with replay.recording(RandomGenerators(sampler), "first"):
            found = _indices(sampler)
    else:
        randomness = RandomGenerators(sampler)
        with randomness.replaying():
            for step in ("iter", "first"):
                saved.restore(randomness, step)
            found = _indices(sampler)
        replay.moved = saved.moved
    if found is None:
        return None
    bulk = IndexArrayIterator(found[0], batch_sampler, start, found[1], replay)
    if saved is not None:
        replay.check(sampler, saved)
    return bulk


def _indices(sampler: Any) -> tuple[NDArray[np.int64], Callable[[], object]] | None:
    """Return a non-empty sampler's indices, int64[n], and its action at the end; None if it must be asked itself."""
    n = _length(sampler)
    if not 0 < n <= MAX_INDICES:
        return None
    if type(sampler) is torch_data.RandomSampler:
        return _random(sampler)
    if type(sampler) is torch_data.SequentialSampler:
        return np.arange(n), _do_nothing
    if type(sampler) is torch_data.distributed.DistributedSampler:
        return _distributed(sampler), _do_nothing
    if type(sampler) is range:
        return np.arange(sampler.start, sampler.stop, sampler.step), _do_nothing
    if type(sampler) not in (list, tuple, np.ndarray, torch.Tensor):
        return None
    try:
        numbers = np.array(sampler.numpy(force=True) if isinstance(sampler, torch.Tensor) else sampler)
    except (TypeError, ValueError, RuntimeError):  # lists of unequal lengths, or a type that NumPy does not know
        return None
    is_plain = numbers.ndim == 1 and numbers.dtype.kind in "iu"
    return (np.ascontiguousarray(numbers, np.int64), _do_nothing) if is_plain else None


def _random(sampler: Any) -> tuple[NDArray[np.int64], Callable[[], object]] | None:
    """Draw as torch's sampler: a seed if it has no generator; else with it, and one more permutation at the end."""
    n = len(sampler.data_source)
    if sampler.replacement or sampler.num_samples != n:
        return None
    generator = sampler.generator
    at_end: Callable[[], object] = _do_nothing
    if generator is None:
        generator = torch.Generator()
        generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
    else:
        at_end = partial(torch.randperm, n, generator=generator)  # these numbers are drawn, but not used
    return torch.randperm(n, generator=generator).numpy(), at_end


def _distributed(sampler: Any) -> NDArray[np.int64]:
    """Return the indices of torch's sampler: the permutation of its seed and epoch, repeated or cut to equal shares."""
    n = len(sampler.dataset)
    if sampler.shuffle:
        generator = torch.Generator()
        generator.manual_seed(sampler.seed + sampler.epoch)
        indices = torch.randperm(n, generator=generator).numpy()
    else:
        indices = np.arange(n)
    return np.resize(indices, sampler.total_size)[sampler.rank :: sampler.num_replicas].copy()


def _do_nothing() -> None:
    """Do nothing at the end of a sampler that draws nothing then."""


def _length(sampler: Any) -> int:
    try:
        return len(sampler)
    except TypeError:
        return 0


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
        numbers = normalize_indices(np.ascontiguousarray(rows, np.int64).reshape(-1), self._n_records)
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
