"""Samplers: those of torch and torchdata on the native path, and tiercache's order for loaders of other libraries.

A known sampler is one of torch's or torchdata's, or a plain sequence: all its indices are drawn when its pass begins.
SamplerEngine serves them as an explicit order. OrderSampler gives tiercache's order to torch's iterators, and to
libraries that make a loader of their own from a loader's sampler.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils import data as torch_data
from torchdata.stateful_dataloader import sampler as torchdata_samplers

from tiercache._native.record_finder import normalize_indices
from tiercache.data.records import Records
from tiercache.load.engine import Engine, LoaderArguments, NativeIterator, OrderEngine
from tiercache.load.epoch import OrderShare, Position, RunState, explicit_order
from tiercache.load.loader_options import Rank, find_rank
from tiercache.load.pieces import AnyPiece
from tiercache.order.rank_plan import RankPlan

# Samplers of more records take torch's path: an array of their indices would take 512 MiB and more.
MAX_INDICES = 1 << 26

_PLAIN = (list, tuple, range, np.ndarray, torch.Tensor)

_RANDOM = (torch_data.RandomSampler, torchdata_samplers.RandomSampler)

_KNOWN = (
    *_PLAIN,
    *_RANDOM,
    torch_data.distributed.DistributedSampler,
    torchdata_samplers.StatefulDistributedSampler,
    torch_data.SequentialSampler,
    torch_data.SubsetRandomSampler,
    torch_data.WeightedRandomSampler,
)


def is_known(sampler: Any) -> bool:
    """Whether all indices of a sampler can be drawn at once when its pass begins."""
    return type(sampler) in _KNOWN and len(sampler) <= MAX_INDICES


def is_known_batch_sampler(batch_sampler: Any) -> bool:
    kinds = (torch_data.BatchSampler, torchdata_samplers.BatchSampler)
    return type(batch_sampler) in kinds and is_known(batch_sampler.sampler)


def draw_indices(sampler: Any) -> NDArray[np.int64]:
    """Return the indices of a known sampler, int64[n]: what its iterator returns, mostly in a hundredth of the time."""
    kind = type(sampler)
    if kind in _PLAIN:
        numbers = np.asarray(sampler.numpy(force=True) if isinstance(sampler, torch.Tensor) else sampler)
        if len(numbers) and (numbers.ndim != 1 or numbers.dtype.kind not in "iu"):
            raise TypeError(f"a sampler must return integer record numbers, it returned {numbers.dtype}")
        return np.ascontiguousarray(numbers, np.int64)
    if kind is torch_data.SequentialSampler:
        return np.arange(len(sampler))
    if kind in _RANDOM and not sampler.replacement and sampler.num_samples <= len(sampler.data_source):
        generator = sampler.generator
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
        return torch.randperm(len(sampler.data_source), generator=generator).numpy()[: sampler.num_samples]
    return np.fromiter(sampler, np.int64)


def set_sampler_epoch(index_sampler: Any, epoch: int) -> None:
    for sampler in (index_sampler, getattr(index_sampler, "sampler", None)):
        set_epoch = getattr(sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)


def get_sampler_epoch(index_sampler: Any) -> int | None:
    for sampler in (index_sampler, getattr(index_sampler, "sampler", None)):
        epoch = getattr(sampler, "epoch", None)
        if isinstance(epoch, int) and hasattr(sampler, "set_epoch"):
            return epoch
    return None


_EPOCH, _BATCHES, _SEED, _SAMPLER_EPOCH, _GENERATOR = "epoch", "batches", "seed", "sampler_epoch", "generator"

_KEYS = {_EPOCH, _BATCHES, _SEED, _SAMPLER_EPOCH, _GENERATOR}


class SamplerPass(Position):
    """One pass over a known sampler: the loader's position, and what its state consists of.

    As in torch's loader, the indices are drawn when the first batch is requested: until then set_epoch() may be
    called, as Lightning does to resume.
    """

    def __init__(self, batch_sampler: Any, epoch: int, seed: int, saved: Mapping[str, Any] | None) -> None:
        super().__init__()
        self.rank_plan: RankPlan | None = None
        self.epoch, self.seed = epoch, seed
        self._batch_sampler = batch_sampler
        self._n_before = 0 if saved is None else int(saved[_BATCHES])
        # of the sampler's own generator, before it drew the indices
        self._generator_state = None if saved is None else saved[_GENERATOR]

    def begin(self) -> NDArray[np.int64]:
        batch_sampler = self._batch_sampler
        generator = getattr(batch_sampler.sampler, "generator", None)
        if generator is not None and self._generator_state is not None:
            generator.set_state(self._generator_state)
        self._generator_state = None if generator is None else generator.get_state()
        indices = draw_indices(batch_sampler.sampler)
        size = batch_sampler.batch_size
        start = min(self._n_before * size, len(indices))
        self.rank_plan = RankPlan(start, 1, 0, size, batch_sampler.drop_last, len(indices))
        return indices

    def state(self) -> dict[str, Any]:
        generator = getattr(self._batch_sampler.sampler, "generator", None)
        is_new = self.finished or (self.rank_plan is None and self._generator_state is None)
        return {
            _EPOCH: self.epoch + self.finished,
            _BATCHES: 0 if self.finished else self._n_before + self.n_yielded,
            _SEED: self.seed,
            _SAMPLER_EPOCH: get_sampler_epoch(self._batch_sampler),
            _GENERATOR: generator.get_state() if is_new and generator is not None else self._generator_state,
        }


class SampledIterator(Iterator[Any]):
    """The batches that a known sampler selects; made anew by each iter(). It closes itself when dropped."""

    def __init__(self, begin: Callable[[], NativeIterator], n_batches: int) -> None:
        self._begin = begin
        self._n_batches = n_batches
        self._native: NativeIterator | None = None

    def __next__(self) -> Any:
        if self._native is None:
            self._native = self._begin()
        return next(self._native)

    def __len__(self) -> int:
        return self._n_batches

    def __getstate__(self) -> NoReturn:
        raise NotImplementedError(f"{type(self).__name__} cannot be pickled")  # torch's iterators raise the same error

    def figures(self) -> Mapping[str, float]:
        return {} if self._native is None else self._native.figures()

    def close(self) -> None:
        if self._native is not None:
            self._native.close()


class SamplerEngine(Engine):
    """The engine of a loader with a known sampler, whose indices replace the order. One consumer thread uses it."""

    def __init__(self, source: Records, arguments: LoaderArguments, batch_sampler: Any) -> None:
        super().__init__(source, arguments)
        self._batch_sampler = batch_sampler
        self._saved: Mapping[str, Any] | None = None  # the state to continue from
        self._pass: SamplerPass | None = None  # the newest
        self._epoch = 0  # number of the next epoch
        self._seed = arguments.options.seed  # seed of the random values of a record

    def describe_position(self) -> str:
        state = self._saved if self._pass is None or self._saved is not None else self._pass.state()
        epoch, batch = (self._epoch, 0) if state is None else (state[_EPOCH], state[_BATCHES])
        return f"the order of its {type(self._batch_sampler.sampler).__name__}, at batch {batch:,} in epoch {epoch}"

    def rank(self) -> Rank:
        return Rank(0, 1, "sampler", find_rank(self.arguments.options).local_ranks)

    def state(self) -> dict[str, Any]:
        """Return the position as plain values, and the state of the sampler's own generator, if it has one."""
        if self._pass is None or self._saved is not None:
            return self._make(self._saved).state()
        return self._pass.state()

    @property
    def rebuild_arguments(self) -> tuple[LoaderArguments, Mapping[str, Any] | None]:
        return self.arguments, self._saved if self._pass is None else self.state()

    def load(self, state: Mapping[str, Any]) -> None:
        if set(state) != _KEYS:
            raise ValueError(
                f"not a state of a loader with a sampler over a tiercache.Dataset: it has the keys {sorted(state)}"
            )
        self._saved = state
        self._epoch, self._seed = state[_EPOCH], state[_SEED]
        if state[_SAMPLER_EPOCH] is not None:
            set_sampler_epoch(self._batch_sampler, state[_SAMPLER_EPOCH])

    def set_epoch(self, epoch: int) -> None:
        self._epoch = operator.index(epoch)
        set_sampler_epoch(self._batch_sampler, self._epoch)

    def n_batches(self) -> int:
        return len(self._batch_sampler)

    def iterate(self) -> SampledIterator:
        self._check_readable()
        saved, self._saved = self._saved, None
        self._pass = self._make(saved)
        self._epoch += 1
        self._n_epochs += 1
        iterator = SampledIterator(partial(self._begin, self._pass, self._pin()), self.n_batches())
        self._iterator = weakref.ref(iterator)
        return iterator

    def _make(self, saved: Mapping[str, Any] | None) -> SamplerPass:
        if self._seed is None:
            self._seed = self.arguments.draw_seed()
        return SamplerPass(self._batch_sampler, self._epoch, self._seed, saved)

    def _begin(self, epoch: SamplerPass, pin: Callable[[Any], Any] | None) -> NativeIterator:
        numbers, listed = epoch.begin(), self._source.record_order
        n_records = int(self._source.shard_records.sum()) if listed is None else len(listed)
        numbers = normalize_indices(numbers, n_records)
        if listed is not None:
            numbers = listed[numbers]
        assert epoch.rank_plan is not None  # noqa: S101 -- begin() has set it
        ordered = self._source if self._corruption is None else self._corruption
        order = explicit_order(ordered, numbers, self.arguments.options.window_bytes)
        share = OrderShare(order, epoch.rank_plan, epoch.seed, epoch.epoch, self._corruption)
        return self._start_iterator(epoch, share, pin)


# Positions of an unshuffled epoch that are converted to record numbers at a time.
_CHUNK_ROWS = 1 << 16


def served_numbers(source: Records, share: OrderShare, *, shuffle: bool) -> Iterator[NDArray[np.int64]]:
    """Yield the numbers of a rank's records in served order, some at a time. Reads footers for a shuffled order."""
    if not shuffle:  # position p is record p, also in listed and mixed sources
        for start in range(0, share.rank_plan.n_served, _CHUNK_ROWS):
            yield share.rank_plan.positions_between(start, min(start + _CHUNK_ROWS, share.rank_plan.n_served))
        return
    listed = source.record_order
    served = None if listed is None else np.argsort(listed, kind="stable")  # by number in stored order
    first_records = np.concatenate([[0], np.cumsum(source.shard_records)])
    starts: dict[int, NDArray[np.int64]] = {}
    for piece in share.pieces(0):
        shards = sorted({int(shard) for window in piece.windows for shard in window.shards})
        missing = [shard for shard in shards if shard not in starts]
        starts = {shard: starts[shard] for shard in shards if shard in starts}
        for shard, sizes in zip(missing, source.block_sizes(missing), strict=True):
            starts[shard] = first_records[shard] + np.cumsum(sizes.records) - sizes.records
        numbers = _record_numbers(piece, starts)
        yield numbers if served is None else served[numbers]


def _record_numbers(piece: AnyPiece, starts: dict[int, NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return the stored numbers of a piece's rows. starts: by shard, the number of each block's first record."""
    first = [
        starts[shard][block]
        for window in piece.windows
        for shard, block in zip(window.shards.tolist(), window.blocks.tolist(), strict=True)
    ]
    block, row = piece.rows()
    return np.array(first, np.int64)[block] + row


_YIELDED, _ORDER, _N_RANKS = "yielded", "order", "ranks"


class OrderSampler(torch_data.Sampler[int]):
    """Mixin for torch's samplers: its iterators return the record numbers of the loader's next epoch.

    Such an iterator begins the epoch, as iter(loader) does. If `engine` is None, the class behaves as torch's sampler.

    Attributes:
        engine: The loader's engine. Copies have none, because it has threads.
        is_split_by_others: Whether another library splits the record numbers among processes. Then the sampler returns
            all records in torch's order: that library keeps the generators of torch's samplers equal on all processes.
        requested_epoch: The epoch that set_epoch() chose for the next iterator.
    """

    engine: OrderEngine | None = None
    is_split_by_others = False
    requested_epoch: int | None = None

    def __iter__(self) -> Iterator[int]:
        engine = self.engine
        if engine is None or (self.is_split_by_others and engine.rank().world_size > 1):
            return super().__iter__()
        return OrderIterator(self, engine)

    def __len__(self) -> int:
        engine = self.engine
        if engine is None or (self.is_split_by_others and engine.rank().world_size > 1):
            return super().__len__()  # type: ignore[misc, no-any-return]  # torch's samplers define it
        return engine.n_served()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of this sampler's next iterator. The loader's own iterators ignore it."""
        self.requested_epoch = epoch

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "engine"}


class ShuffledOrder(OrderSampler, torch_data.RandomSampler):
    """The sampler of a shuffled loader."""


class StoredOrder(OrderSampler, torch_data.SequentialSampler):
    """The sampler of a loader that does not shuffle."""


class OrderIterator(Iterator[int]):
    """This rank's record numbers of one epoch, which begins with the first number: torch's samplers draw then.

    torchdata's iterators save its state.
    """

    def __init__(self, sampler: OrderSampler, engine: OrderEngine) -> None:
        self._sampler = sampler
        self._engine = engine
        self._numbers: Iterator[int] | None = None
        self._epoch_state: RunState | None = None
        self._n_yielded = 0

    def __next__(self) -> int:
        number = next(self._numbers or self._begin(None))
        self._n_yielded += 1
        return number

    def state_dict(self) -> dict[str, Any]:
        state, requested = self._epoch_state, self._sampler.requested_epoch
        if state is None:
            state = self._engine.next_state()
            state = state if requested is None else state.following(requested)
        return {_YIELDED: self._n_yielded, _ORDER: state.to_dict(), _N_RANKS: self._engine.rank().world_size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        n_ranks = self._engine.rank().world_size
        if state[_N_RANKS] != n_ranks:
            raise ValueError(
                f"the state was saved with {state[_N_RANKS]} ranks on torch's path, and here are {n_ranks}: only the "
                "native path continues on another number of ranks (give the data set a transform= instead of "
                "overriding how records are read)"
            )
        numbers = self._begin(RunState.from_dict(state[_ORDER]))
        self._n_yielded = sum(1 for _ in zip(range(state[_YIELDED]), numbers, strict=False))

    def _begin(self, state: RunState | None) -> Iterator[int]:
        epoch, self._sampler.requested_epoch = self._sampler.requested_epoch, None
        if state is None and epoch is not None:
            self._engine.set_epoch(epoch)
        self._epoch_state, source, share = self._engine.begin_for_sampler(state)
        self._numbers = self._given(source, share)
        return self._numbers

    def _given(self, source: Records, share: OrderShare) -> Iterator[int]:
        for numbers in served_numbers(source, share, shuffle=self._engine.arguments.shuffle):
            yield from numbers.tolist()
        self._engine.end_for_sampler(share)
