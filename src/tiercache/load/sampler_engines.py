"""The engines of loaders with a sampler: known samplers on the native path, and tiercache's order on torch's path.

SamplerEngine serves the indices of a sampler of torch or torchdata as an explicit order. TorchPathEngine gives torch's
fetchers the indices of tiercache's order. OrderSampler gives that order to libraries that rebuild a loader from its
sampler.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from torch.utils import data as torch_data

from tiercache._native.record_finder import normalize_indices
from tiercache.load.engine import Engine, EpochPosition, LoaderArguments, NativeIterator, OrderEngine
from tiercache.load.epoch import OrderShare, epoch_records, explicit_order, plan_epoch
from tiercache.load.ranks import Rank, find_rank
from tiercache.load.samplers import (
    FINISHED,
    STATE_KEYS,
    RandomSampler,
    SamplerPass,
    permutes_at_end,
    set_sampler_epoch,
)
from tiercache.load.state import RunState
from tiercache.load.torch_rng import RandomGenerators, TorchDraws, next_seed
from tiercache.order import BlockSizes

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from tiercache.data.output_spec import NativeDataset
    from tiercache.data.records import Records
    from tiercache.load.array_library import EpochDraws
    from tiercache.load.prefetch import AnyPiece


class SampledIterator(Iterator[Any]):
    """The batches that a known sampler selects; made anew by each iter(). It closes itself when dropped.

    begin: Function that draws the sampler's indices and starts the pipeline.
    """

    def __init__(self, begin: Callable[[], NativeIterator], n_batches: int) -> None:
        self._begin = begin
        self._n_batches = n_batches
        self._native: NativeIterator | None = None

    def begin(self) -> NativeIterator:
        """Return the iterator over the pipeline, started at the first call."""
        if self._native is None:
            self._native = self._begin()
        return self._native

    def __next__(self) -> Any:
        return next(self._native or self.begin())

    def __len__(self) -> int:
        return self._n_batches

    def __getstate__(self) -> NoReturn:
        raise NotImplementedError(f"{type(self).__name__} cannot be pickled")  # torch's iterators raise the same error

    def figures(self) -> Mapping[str, float]:
        """See NativeIterator.figures."""
        return {} if self._native is None else self._native.figures()

    def close(self) -> None:
        """End this epoch, early or not. May be called repeatedly."""
        if self._native is not None:
            self._native.close()


class SamplerEngine(Engine):
    """The engine of a loader with a known sampler (`samplers.is_known`), whose indices replace the order.

    One consumer thread uses it.
    """

    def __init__(self, source: Records, arguments: LoaderArguments, batch_sampler: Any) -> None:
        super().__init__(source, arguments)
        self._batch_sampler = batch_sampler
        self._saved: Mapping[str, Any] | None = None  # the state to continue from
        self._pass: SamplerPass | None = None  # the newest
        self._is_fresh = False  # made only to read its state, so that the next iter() uses it
        self._epoch = 0  # number of the next epoch
        self._seed = arguments.options.seed  # seed of the random values of a record

    def rank(self) -> Rank:
        """Return a rank that is served all records: the sampler decides this process's share."""
        return Rank(0, 1, "sampler", find_rank(self._arguments.options).local_ranks)

    def state(self) -> dict[str, Any]:
        """Return the position; draws the sampler's indices if the epoch has not begun."""
        if self._pass is None:
            self._pass, self._is_fresh = self._make(), True
        return self._pass.state()

    @property
    def rebuild_arguments(self) -> tuple[LoaderArguments, Mapping[str, Any] | None]:
        """Arguments that make an equal engine elsewhere, and its position if the run has begun."""
        return self._arguments, self._saved if self._pass is None else self._pass.state()

    def load(self, state: Mapping[str, Any]) -> None:
        """Resume from a saved state. Raises ValueError: the state is not one of a loader with a sampler."""
        missing = [key for key in STATE_KEYS if key not in state]
        if missing:
            raise ValueError(
                f"not a state of a loader with a sampler (and num_workers=0): it lacks {missing[0]!r}, "
                f"it has the keys {sorted(state)}"
            )
        self._saved, self._pass, self._is_fresh = state, None, False
        if state[FINISHED]:  # Replayed now: a reseed between here and iter() decides the next epoch's order.
            with RandomGenerators(self._batch_sampler).replaying():
                self._pass, self._is_fresh = self._make(), True
                self._draws(self._pass).exhaust()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the samplers that take one."""
        self._epoch = operator.index(epoch)
        set_sampler_epoch(self._batch_sampler, self._epoch)

    def n_batches(self) -> int:
        """Return the batches of an epoch."""
        return len(self._batch_sampler)

    def iterate(self) -> SampledIterator:
        """Return the iterator of the next epoch."""
        self._check_readable()
        if self._pass is None or not self._is_fresh or self._pass.finished:
            self._pass = self._make()
        self._is_fresh = False
        iterator = SampledIterator(partial(self._begin, self._pass, self._pin_function()), self.n_batches())
        self._iterator = weakref.ref(iterator)
        if self._arguments.num_workers:
            iterator.begin()  # torch sends workers their first indices in iter()
        return iterator

    def _make(self) -> SamplerPass:
        """Return a new pass, or that of the loaded state. Draws the base seed that torch draws in iter()."""
        saved, self._saved = self._saved, None
        # A resumed epoch drew it before its state was saved.
        if saved is None and not (
            self._arguments.persistent_workers and self._arguments.num_workers and self._n_epochs
        ):
            TorchDraws(self._arguments.generator, False, 0).begin()
        if self._seed is None:
            self._seed = next_seed(self._arguments.generator, after_begin=True)
        made = SamplerPass(self._batch_sampler, saved, self._epoch, self._seed)
        self._seed, self._epoch, self._n_epochs = made.seed, made.epoch + 1, self._n_epochs + 1
        if made.finished:
            made.begin()
        return made

    def _draws(self, epoch: SamplerPass) -> TorchDraws:
        """Return what the sampler draws after its last index. What it draws before, begin() has drawn."""
        sampler, n = self._batch_sampler.sampler, len(epoch.begin())
        generator = sampler.generator if permutes_at_end(sampler) else None
        ends_short = not self._batch_sampler.drop_last and n % self._batch_sampler.batch_size > 0
        return TorchDraws(generator, generator is not None, n, ends_short, is_sampled=True)

    def _begin(self, epoch: SamplerPass, pin: Callable[[Any], Any] | None) -> NativeIterator:
        listed = self._source.record_order
        numbers = normalize_indices(
            epoch.begin(), int(self._source.shard_records.sum()) if listed is None else len(listed)
        )
        if listed is not None:
            numbers = listed[numbers]
        ordered = self._source if self._corruption is None else self._corruption
        order = explicit_order(ordered, numbers, self._arguments.options.window_bytes)
        share = OrderShare(order, epoch.rank_plan, epoch.seed, epoch.epoch, self._corruption)
        return self._start_iterator(epoch, share, self._draws(epoch), pin)


# Positions of an unshuffled epoch that are converted to lists of indices at a time.
_CHUNK_ROWS = 1 << 16


@dataclass(frozen=True, slots=True)
class _Numbered:
    """The records of a data set whose class defines its own length, as one block.

    It has the part of Records that an order needs. Its record numbers are not positions in shards, so nothing is known
    about which records are adjacent.
    """

    n_records: int
    mixture: None = None
    record_order: None = None
    selects_all: bool = True

    @property
    def shard_records(self) -> NDArray[np.int64]:
        return np.array([self.n_records], np.int64)

    @property
    def shard_bytes(self) -> NDArray[np.int64]:
        return np.array([self.n_records], np.int64)

    def block_sizes(self, shards: Sequence[int]) -> list[BlockSizes]:
        return [BlockSizes(self.shard_records, self.shard_records) for _ in shards]


class IndexSampler:
    """The sampler of torch's iterators: it returns the indices of the current epoch. It does not refer to a loader.

    torch makes more than one iterator of a sampler per epoch. Each returns the indices of the epoch that begin() set
    last.
    """

    def __init__(self, *, is_batched: bool) -> None:
        self._is_batched = is_batched
        self._epoch: Any = None  # (source, share, draws)

    def begin(self, ordered: Any, share: OrderShare, draws: EpochDraws) -> None:
        """Return the indices of another epoch from now on. ordered: source of its order."""
        self._epoch = ordered, share, draws

    def __iter__(self) -> Iterator[Any]:
        """Yield lists of indices for batches, or single indices."""
        ordered, share, draws = self._epoch
        size = share.rank_plan.batch_size
        left = np.empty(0, np.int64)
        for numbers in served_numbers(ordered, share, draws):
            rows = np.concatenate([left, numbers]) if len(left) else numbers
            n_whole = len(rows) // size * size
            whole = rows[:n_whole].tolist()
            yield from (whole[i : i + size] for i in range(0, n_whole, size)) if self._is_batched else whole
            left = rows[n_whole:]
        if len(left):  # torch asks its sampler until it ends before it returns a short last batch
            yield left.tolist()


class TorchPathEngine(OrderEngine):
    """The engine of tiercache's order on torch's path: it gives the order as indices to torch's fetchers.

    Call begin() before torch's iterator is made, and set_iterator() after it.

    sampler: The sampler that torch's iterators ask for indices.
    """

    def __init__(self, dataset: NativeDataset, arguments: LoaderArguments, *, is_batched: bool) -> None:
        super().__init__(dataset.__tiercache__().source, arguments)
        self.sampler = IndexSampler(is_batched=is_batched)
        self._users = dataset
        self._pending: Any = None  # the position of the epoch that begin() chose
        self._torch_iterator: Any = None  # of the newest epoch
        self._over: tuple[Records, Any] | None = None  # the source, and the data set over it

    @property
    def fetched_dataset(self) -> Any:
        """The data set of the indices: the user's, or a copy over other versions or over a mixture's parts."""
        if self._over is None or self._over[0] is not self._source:
            source: Any = self._source
            access = self._users.__tiercache__()
            dataset = self._users if source is access.source else access.with_source(source)
            is_mixed = source.mixture is not None and self._arguments.shuffle
            self._over = source, access.with_source(source.unmixed()) if is_mixed else dataset
        return self._over[1]

    def begin(self) -> bool:
        """Choose the next epoch. Draws nothing: torch's iterator makes the draws.

        Returns:
            Whether the run resumes within the epoch: the iterator's draws were then made before the state was saved.
        """
        is_resumed = self._is_resumed
        state = self._next_state(drawn=False)
        self._check_readable()
        self._n_records = None  # a subclass may have another length now
        ordered = self._numbered()
        share = plan_epoch(ordered, self.rank(), self._arguments.batch_size, self._arguments.fills_first, state)
        if share.rank_plan.ignores_streams:
            self._warn_of_streams(share.rank_plan)
        draws = TorchDraws(
            self._arguments.generator, self._arguments.shuffle, share.rank_plan.n_records, is_sampled=is_resumed
        )
        self.sampler.begin(ordered, share, draws)
        self._pending = EpochPosition(state, share.rank_plan)
        return is_resumed

    def set_iterator(self, iterator: Any) -> None:
        """Set torch's iterator over the epoch that begin() chose; the position is read from it."""
        self._position, self._torch_iterator = self._pending, iterator
        self._n_epochs += 1

    def begin_for_sampler(self, state: RunState | None) -> tuple[RunState, Any, OrderShare, EpochDraws]:
        """See OrderEngine.begin_for_sampler."""
        self._n_records = None  # as in begin()
        self._torch_iterator = None
        return super().begin_for_sampler(state)

    def state(self) -> RunState:
        """Return the state after the batches that torch's iterator has handed out. See OrderEngine.state."""
        if self._position is not None and self._torch_iterator is not None:
            self._position.n_yielded = self._torch_iterator._num_yielded  # noqa: SLF001 -- torchdata's count
            self._position.finished = self._torch_iterator._finished  # noqa: SLF001
        return super().state()

    def _records_of(self, source: Records) -> int:
        access = self._users.__tiercache__()
        return len(self._users if source is access.source else access.with_source(source))

    def _numbered(self) -> Any:
        """Return the source of the order; a _Numbered if the data set's class defines its own length."""
        n_records = self._epoch_records()
        return self._source if n_records == epoch_records(self._source) else _Numbered(n_records)


def served_numbers(ordered: Any, share: OrderShare, draws: EpochDraws) -> Iterator[NDArray[np.int64]]:
    """Yield the indices of a rank's records in served order, some at a time, and draw what torch's sampler draws.

    Reads footers for a shuffled order.
    """
    draws.sample()
    if draws.shuffle:
        yield from _shuffled_numbers(ordered, share)
    else:  # position p is record p, also in listed and mixed sources
        for start in range(0, share.rank_plan.n_served, _CHUNK_ROWS):
            yield share.rank_plan.positions_between(start, min(start + _CHUNK_ROWS, share.rank_plan.n_served))
    draws.exhaust()


def _shuffled_numbers(ordered: Any, share: OrderShare) -> Iterator[NDArray[np.int64]]:
    listed = None if ordered.mixture is not None else ordered.record_order
    served = None if listed is None else np.argsort(listed, kind="stable")  # by number in stored order
    first_records = np.concatenate([[0], np.cumsum(ordered.shard_records)])
    starts: dict[int, NDArray[np.int64]] = {}
    for piece in share.pieces(0):
        shards = sorted({int(shard) for window in piece.windows for shard in window.shards})
        missing = [shard for shard in shards if shard not in starts]
        starts = {shard: starts[shard] for shard in shards if shard in starts}
        for shard, sizes in zip(missing, ordered.block_sizes(missing), strict=True):
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


_YIELDED, _ORDER = "yielded", "order"


class OrderSampler(torch_data.Sampler[int]):
    """Mixin for torch's samplers: its iterators return the record numbers of the loader's next epoch.

    Such an iterator begins the epoch, as iter(loader) does. If `engine` is None, the class behaves as torch's sampler.

    Attributes:
        engine: The loader's engine.
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
        """Return the state of a copy, without the engine, which has threads.

        The copy behaves as torch's sampler until it is bound to a loader.
        """
        return {name: value for name, value in vars(self).items() if name != "engine"}


class ShuffledOrder(OrderSampler, RandomSampler):
    """The sampler of a shuffled loader."""


class StoredOrder(OrderSampler, torch_data.SequentialSampler):
    """The sampler of a loader that does not shuffle."""


class OrderIterator(Iterator[int]):
    """This rank's record numbers of one epoch, which begins with the first number: torch's samplers draw then."""

    def __init__(self, sampler: OrderSampler, engine: OrderEngine) -> None:
        self._sampler = sampler
        self._engine = engine
        self._numbers: Iterator[int] | None = None
        self._epoch_state: RunState | None = None
        self._n_yielded = 0

    def __next__(self) -> int:
        numbers = self._begin(None) if self._numbers is None else self._numbers
        number = next(numbers)
        self._n_yielded += 1
        return number

    def state_dict(self) -> dict[str, Any]:
        """Return plain values: the epoch's order, once it has begun, and how many numbers were returned."""
        order = None if self._epoch_state is None else self._epoch_state.to_dict()
        return {_YIELDED: self._n_yielded, _ORDER: order}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue in the epoch of a state."""
        self._n_yielded = 0
        if state[_ORDER] is not None:
            numbers = self._begin(RunState.from_dict(state[_ORDER]))
            for _ in zip(range(state[_YIELDED]), numbers, strict=False):
                self._n_yielded += 1

    def _begin(self, state: RunState | None) -> Iterator[int]:
        epoch, self._sampler.requested_epoch = self._sampler.requested_epoch, None
        if state is None and epoch is not None:
            self._engine.set_epoch(epoch)
        self._epoch_state, ordered, share, draws = self._engine.begin_for_sampler(state)
        self._numbers = self._given(ordered, share, draws)
        return self._numbers

    def _given(self, ordered: Any, share: OrderShare, draws: EpochDraws) -> Iterator[int]:
        for numbers in served_numbers(ordered, share, draws):
            yield from numbers.tolist()
        self._engine.end_for_sampler(share)
