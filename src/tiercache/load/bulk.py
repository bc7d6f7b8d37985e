"""Samplers whose indices are available all at once as an array, without Python code per index.

Asking torch's RandomSampler index by index takes 0.2 us per index: as long as torch's whole loader takes to serve one
record by `Dataset.__getitems__`. Only exact types are accepted, and the draws equal theirs; tests compare each type
with torch's loader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils import data as torch_data
from torch.utils.data.dataloader import _InfiniteConstantSampler
from torchdata.stateful_dataloader import Stateful
from torchdata.stateful_dataloader import sampler as torchdata_samplers

from tiercache.load.replay import REPLAY, YIELDED, RandomGenerators, Replay, ReplayedSampler, ReplayState

if TYPE_CHECKING:
    from numpy.typing import NDArray

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
