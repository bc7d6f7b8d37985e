"""Samplers: the indices of those that are known, as one array, and a state for those that have none.

A known sampler is one of torch's or torchdata's, or a plain sequence. Any other sampler is asked by torch's own loader.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils import data as torch_data
from torch.utils.data.dataloader import _InfiniteConstantSampler
from torchdata.stateful_dataloader import Stateful
from torchdata.stateful_dataloader import sampler as torchdata_samplers

from tiercache.load.torch_rng import REPLAY, YIELDED, RandomGenerators, Replay, ReplayedSampler, ReplayState, next_seed
from tiercache.order import RankPlan

if TYPE_CHECKING:
    from numpy.typing import NDArray


SAMPLES_YIELDED = "samples_yielded"  # torchdata's key in the state of its BatchSampler's iterator


_CHUNK = 1 << 12  # indices per call while skipping


class _BatchIterator(torchdata_samplers._BatchSamplerIterator):  # type: ignore[misc]  # noqa: SLF001 -- its state
    """torchdata's iterator, with its state. C code loops over a batch's indices: 15 us less per batch of 256."""

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

# Samplers of more records take torch's path: an array of their indices would take 512 MiB and more.
MAX_INDICES = 1 << 26

_PLAIN = (list, tuple, range, np.ndarray, torch.Tensor)
_DISTRIBUTED = (torch_data.distributed.DistributedSampler, torchdata_samplers.StatefulDistributedSampler)
_RANDOM = (torch_data.RandomSampler, torchdata_samplers.RandomSampler)
_KNOWN = (
    *_PLAIN,
    *_RANDOM,
    *_DISTRIBUTED,
    torch_data.SequentialSampler,
    torch_data.SubsetRandomSampler,
    torch_data.WeightedRandomSampler,
)


def is_known(sampler: Any) -> bool:
    """Whether all indices of a sampler can be drawn at once when its pass begins.

    That is known of plain sequences and of the samplers of torch and torchdata, by their exact types: they draw all
    their random numbers then. A RandomSampler draws further numbers during the pass if it serves records repeatedly.
    Nothing observes that if it seeds a generator of its own in each pass.
    """
    if type(sampler) in _RANDOM and not _is_one_permutation(sampler) and sampler.generator is not None:
        return False
    return type(sampler) in _KNOWN and len(sampler) <= MAX_INDICES


def is_known_batch_sampler(batch_sampler: Any) -> bool:
    """Whether it is a batch sampler of torch or torchdata over a known sampler."""
    return type(batch_sampler) in (torch_data.BatchSampler, *OF_TORCHDATA) and is_known(batch_sampler.sampler)


def _is_one_permutation(sampler: Any) -> bool:
    return not sampler.replacement and sampler.num_samples <= len(sampler.data_source)


def permutes_at_end(sampler: Any) -> bool:
    """Whether a sampler draws a permutation from its generator after its last index, and does not use it."""
    return type(sampler) is torch_data.RandomSampler and sampler.num_samples == len(sampler.data_source)


def draw_indices(sampler: Any) -> NDArray[np.int64]:
    """Return the indices of a known sampler, int64[n], and draw the random numbers that its iterator draws.

    Raises:
        TypeError: A sequence does not consist of integers.
    """
    kind = type(sampler)
    if kind in _PLAIN:
        numbers = np.asarray(sampler.numpy(force=True) if isinstance(sampler, torch.Tensor) else sampler)
        if len(numbers) and (numbers.ndim != 1 or numbers.dtype.kind not in "iu"):
            raise TypeError(f"a sampler must return integer record numbers, it returned {numbers.dtype}")
        return np.ascontiguousarray(numbers, np.int64)
    if kind is torch_data.SequentialSampler:
        return np.arange(len(sampler))
    if kind is torch_data.WeightedRandomSampler:
        drawn = torch.multinomial(
            sampler.weights, sampler.num_samples, sampler.replacement, generator=sampler.generator
        )
        return drawn.numpy()
    if kind is torch_data.SubsetRandomSampler:
        return draw_indices(np.asarray(sampler.indices))[_permutation(len(sampler.indices), sampler.generator)]
    if kind in _RANDOM and _is_one_permutation(sampler):
        generator = sampler.generator
        if generator is None:
            generator = torch.Generator()
            generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
        return _permutation(len(sampler.data_source), generator)[: sampler.num_samples]
    if kind in _DISTRIBUTED:
        indices = np.arange(len(sampler.dataset))
        if sampler.shuffle:
            indices = _permutation(len(indices), torch.Generator().manual_seed(sampler.seed + sampler.epoch))
        # repeated or cut to equal shares
        return np.resize(indices, sampler.total_size)[sampler.rank :: sampler.num_replicas].copy()
    return np.fromiter(sampler, np.int64, len(sampler))


def _permutation(n: int, generator: torch.Generator | None) -> NDArray[np.int64]:
    return torch.randperm(n, generator=generator).numpy()


# torchdata's keys of the state of a single-process iterator: a state of either kind of loader serves the other.
_INDEX_SAMPLER, _SAMPLER_ITER, _YIELDED, _N_YIELDED, FINISHED = (
    "_index_sampler_state",
    "_sampler_iter_state",
    "_sampler_iter_yielded",
    "_num_yielded",
    "_iterator_finished",
)
STATE_KEYS = (_INDEX_SAMPLER, _SAMPLER_ITER, _YIELDED, _N_YIELDED, FINISHED)
_OF_SAMPLER, _OF_ITERATOR = "sampler_state", "sampler_iter_state"  # in the state of torchdata's BatchSampler's iterator
OURS = "_tiercache"  # beside them: the key of random crops
NEXT_EPOCH = "_tiercache_next_epoch"  # the start of the next epoch, in a state at the end of an epoch
SAMPLER_EPOCH = "_tiercache_sampler_epoch"  # the epoch that was set in a DistributedSampler, which has no state


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

    def next_epoch(self, *, draws_base_seed: bool) -> dict[str, Any]:
        """Return what names the next epoch's order, if no other code draws until then.

        draws_base_seed: whether the loader draws a base seed before it asks for indices.
        """
        if self.generator is not None:
            return {_GENERATOR: self.generator.get_state()}
        seed = self._loaded_seed()
        return {_SEED: next_seed(None, after_begin=not draws_base_seed) if seed is None else seed}

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
        self._seed_or_state: dict[str, Any] | None = None  # the seed or the generator state that determines the order

    def __iter__(self) -> _RandomIterator:
        return self

    def __next__(self) -> int:
        indices = self._begin(None) if self._indices is None else self._indices
        index = next(indices)
        self._n += 1
        return index

    def state_dict(self) -> dict[str, Any]:
        """Return plain values, and the generator's state if the user gave a generator. Draws nothing."""
        if self._seed_or_state is None and self._sampler.generator is None:
            self._seed_or_state = {_SEED: self._sampler.look_at_seed()}
        state = {_N_INDICES: self._n, **(self._seed_or_state or {_GENERATOR: self._sampler.generator.get_state()})}
        return {**state, _IS_DRAWN: False} if self._indices is None else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. Does not repeat draws from torch's own random numbers."""
        self._n = state[_N_INDICES]
        seed_or_state = {key: state[key] for key in (_SEED, _GENERATOR) if key in state}
        if _SEED in seed_or_state and not state.get(_IS_DRAWN, True):
            self._seed_or_state = seed_or_state
            return
        for _ in islice(self._begin(seed_or_state), self._n):
            pass

    def _begin(self, seed_or_state: dict[str, Any] | None) -> Iterator[int]:
        """Draw the order. seed_or_state: the seed or generator state of a loaded state; None: a new epoch."""
        sampler, generator = self._sampler, self._sampler.generator
        if generator is None:
            if seed_or_state is None:  # a state that was taken before the first index stays valid
                seed = sampler.take_seed()
                seed_or_state = self._seed_or_state or {_SEED: seed}
            generator = torch.Generator()
            if _SEED in seed_or_state:
                generator.manual_seed(seed_or_state[_SEED])
            else:
                generator.set_state(seed_or_state[_GENERATOR])
        elif seed_or_state is None:
            seed_or_state = {_GENERATOR: generator.get_state()}
        elif _GENERATOR in seed_or_state:
            generator.set_state(seed_or_state[_GENERATOR])
        self._seed_or_state = seed_or_state
        n_samples = sampler._num_samples  # noqa: SLF001 -- None: one per record
        self._indices = iter(torch_data.RandomSampler(sampler.data_source, sampler.replacement, n_samples, generator))
        return self._indices


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


class SamplerPass:
    """One pass over a batch sampler whose sampler is known: all indices as one array, and the loader's position.

    One consumer thread uses it. As in torch's loader, the indices are drawn when the first batch is requested: until
    then set_epoch() may be called, as Lightning does to resume.

    Attributes:
        indices: int64[n], what the sampler returned. None: not drawn yet.
        rank_plan: The batches of the pass, from where it was resumed; set with `indices`.
        n_yielded, finished: See EpochPosition.
    """

    rank_plan: RankPlan

    def __init__(self, batch_sampler: Any, saved: Mapping[str, Any] | None, epoch: int, seed: int) -> None:
        self.indices: NDArray[np.int64] | None = None
        self.n_yielded = 0
        self.finished = saved is not None and bool(saved[FINISHED])
        self._batch_sampler = batch_sampler
        self._saved = saved
        ours = {} if saved is None else saved.get(OURS, {})
        self.epoch, self.seed = ours.get("epoch", epoch), ours.get("seed", seed)
        self._n_before = 0 if saved is None else saved[_N_YIELDED]
        self._replay = ReplayState.fresh()
        self._generator_state: Any = None  # of torchdata's RandomSampler, before it drew the indices
        self._n_checked = 0  # indices in the checksum

    def begin(self) -> NDArray[np.int64]:
        """Draw the indices, if that was not done; return them.

        Raises:
            ValueError: The sampler returns other indices than before the state was saved.
        """
        if self.indices is not None:
            return self.indices
        batch_sampler, sampler = self._batch_sampler, self._batch_sampler.sampler
        generators, start, saved_replay = RandomGenerators(sampler), 0, None
        of_batches = RandomGenerators(batch_sampler)  # other names of the same generators
        if self._saved is None:
            is_plain = type(batch_sampler) not in OF_TORCHDATA
            with self._replay.recording(of_batches if is_plain else generators, "first"):  # as torch's path names them
                indices = self._draw()
            if type(sampler) is torchdata_samplers.StatefulDistributedSampler:  # the user may have loaded its state
                start, sampler.next_yielded = sampler.next_yielded or 0, None
        else:
            of_iterator = self._saved[_SAMPLER_ITER] or {}
            if REPLAY in of_iterator:
                saved_replay = ReplayState.from_dict(of_iterator[REPLAY])
                self._replay.moved = saved_replay.moved
            with generators.replaying():
                for step in ("iter", "first"):
                    self._replay.restore(generators, step)
                    self._replay.restore(of_batches, step)
                if _GENERATOR in of_iterator.get(_OF_ITERATOR, {}):
                    sampler.generator.set_state(of_iterator[_OF_ITERATOR][_GENERATOR])
                indices = self._draw()
            start = of_iterator.get(SAMPLES_YIELDED, self._n_before * batch_sampler.batch_size)
            if start and _OF_SAMPLER in of_iterator:  # before the first batch it is that of the epoch before
                start = of_iterator[_OF_SAMPLER][_N_INDICES]
        self.indices = indices
        start = min(start, len(indices))
        self.rank_plan = RankPlan(start, 1, 0, batch_sampler.batch_size, batch_sampler.drop_last, len(indices))
        self._add_to_checksum(start)
        if saved_replay is not None:
            self._replay.check(sampler, saved_replay)
        return indices

    def state(self) -> dict[str, Any]:
        """Return the state after the batches handed out, with torchdata's keys. Begins a new pass."""
        if self.indices is None and self._saved is not None:
            return dict(self._saved)
        self.begin()
        n_rows, n_batches = self.rank_plan.offset_after(self.n_yielded), self._n_before + self.n_yielded
        return {
            _INDEX_SAMPLER: None,
            _SAMPLER_ITER: self._iterator_state(n_rows, n_batches),
            _YIELDED: n_batches,
            _N_YIELDED: n_batches,
            "_IterableDataset_len_called": None,
            "_shared_seed": None,
            "fetcher_state": None,
            "dataset_state": None,
            FINISHED: self.finished,
            OURS: {"epoch": self.epoch, "seed": self.seed, "rows": n_rows},
        }

    def _iterator_state(self, n_rows: int, n_batches: int) -> dict[str, Any]:
        self._add_to_checksum(n_rows)
        replay = self._replay.to_dict()
        if type(self._batch_sampler) not in OF_TORCHDATA:
            return {YIELDED: n_batches, REPLAY: replay}
        kind = type(self._batch_sampler.sampler)
        if kind is torchdata_samplers.RandomSampler:
            own: dict[str, Any] = {_OF_ITERATOR: {_N_INDICES: n_rows, _GENERATOR: self._generator_state}}
        elif kind is torchdata_samplers.StatefulDistributedSampler:
            own = {_OF_SAMPLER: {_N_INDICES: n_rows}}
        else:
            own = {REPLAY: replay}
        return {SAMPLES_YIELDED: n_rows, **own}

    def _draw(self) -> NDArray[np.int64]:
        sampler = self._batch_sampler.sampler
        if type(sampler) is torchdata_samplers.RandomSampler:
            self._generator_state = sampler.generator.get_state()
        return draw_indices(sampler)

    def _add_to_checksum(self, n_rows: int) -> None:
        if self.indices is not None and n_rows > self._n_checked:
            self._replay.add(self.indices[self._n_checked : n_rows])
            self._n_checked = n_rows
