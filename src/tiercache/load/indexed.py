"""The engine of torch's path over a tiercache data set: torch's fetchers get the indices of the native order.

torch's own iterators serve a transform, a collate function, single records and subclasses. The order, the ranks' shares
and the state are those of the native path, so either path can load the other's state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tiercache.load.draws import TorchDraws, next_seed
from tiercache.load.epochs import epoch_records, plan_epoch
from tiercache.load.iterator import EpochPosition
from tiercache.load.run import LoaderArguments, NativeEngine
from tiercache.load.source import prepare_reading
from tiercache.order import BlockTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.load.plan import Piece
    from tiercache.load.share import OrderShare
    from tiercache.load.source import Source
    from tiercache.load.state import RunState

# Positions of an unshuffled epoch that are converted to lists of indices at a time.
_CHUNK_ROWS = 1 << 16


@dataclass(frozen=True, slots=True)
class _Numbered:
    """The records of a data set whose class defines its own length, as one block.

    It has the part of Source that an order needs. Its record numbers are not places in shards, so nothing is known
    about which records are adjacent.
    """

    n_records: int
    mixture: None = None
    listed: None = None
    is_whole: bool = True

    @property
    def shard_records(self) -> NDArray[np.int64]:
        return np.array([self.n_records], np.int64)

    @property
    def shard_bytes(self) -> NDArray[np.int64]:
        return np.array([self.n_records], np.int64)

    def block_tables(self, shards: Sequence[int]) -> list[BlockTable]:
        return [BlockTable(self.shard_records, self.shard_records) for _ in shards]


class IndexSampler:
    """The sampler of torch's iterators: it returns the indices of the current epoch. It does not refer to a loader.

    torch makes more than one iterator of a sampler per epoch. Each returns the indices of the epoch that begin() set
    last.
    """

    def __init__(self, *, is_batched: bool) -> None:
        self._is_batched = is_batched
        self._epoch: Any = None  # (source, share, draws)

    def begin(self, read: Any, share: OrderShare, draws: TorchDraws) -> None:
        """Return the indices of another epoch from now on. read: source of its order."""
        self._epoch = read, share, draws

    def __iter__(self) -> Iterator[Any]:
        """Yield lists of indices for batches, or single indices."""
        read, share, draws = self._epoch
        size = share.batch_size
        left = np.empty(0, np.int64)
        draws.sample()
        for numbers in served_numbers(read, share, is_shuffled=draws.shuffle):
            rows = np.concatenate([left, numbers]) if len(left) else numbers
            n_whole = len(rows) // size * size
            whole = rows[:n_whole].tolist()
            yield from (whole[i : i + size] for i in range(0, n_whole, size)) if self._is_batched else whole
            left = rows[n_whole:]
        draws.exhaust()  # torch asks its sampler until it ends before it returns a short last batch
        if len(left):
            yield left.tolist()


class IndexEngine(NativeEngine):
    """The engine of a loader on torch's path. Call begin() before torch's iterator is made, and begun() after it.

    sampler: The sampler that torch's iterators ask for indices.
    """

    def __init__(self, dataset: Any, asked: LoaderArguments, *, is_batched: bool) -> None:
        super().__init__(dataset.source, asked)
        self.sampler = IndexSampler(is_batched=is_batched)
        self._users = dataset
        self._pending: Any = None  # the position of the epoch that begin() chose
        self._torch_iterator: Any = None  # of the newest epoch
        self._over: tuple[Source, Any] | None = None  # the source, and the data set over it

    @property
    def fetched_dataset(self) -> Any:
        """The data set of the indices: the user's, or a copy over other versions or over a mixture's parts."""
        if self._over is None or self._over[0] is not self._source:
            source: Any = self._source
            found = self._users if source is self._users.source else self._users.over(source)
            is_mixed = source.mixture is not None and self._asked.shuffle
            self._over = source, found.over(source.unmixed()) if is_mixed else found
        return self._over[1]

    def begin(self) -> bool:
        """Choose the next epoch. Draws nothing: torch's iterator makes the draws.

        Returns:
            Whether the run resumes within the epoch: the iterator's draws were then made before the state was saved.
        """
        is_resumed = self._position is None and self._state is not None and self._state.offset > 0
        state = self._begin(drawn=False) if self._position is None else self._position.next_state()
        keeps_seed = is_resumed or (self._position is None and self._keeps_seed(state))
        if self._draws_seeds(state) and not keeps_seed:
            state = replace(state, seed=next_seed(self._asked.generator, after_begin=not self._begins()))
        if self._ready is not self._source:
            prepare_reading(self._source)
            self._ready = self._source
        self._n_records = None  # a subclass may have another length now
        read = self._numbered()
        share = plan_epoch(read, self.rank(), self._asked.batch_size, self._asked.fills_first, state)
        if share.ranks.ignores_streams:
            self._warn_of_streams(share.ranks)
        draws = TorchDraws(self._asked.generator, self._asked.shuffle, share.n_records, is_sampled=is_resumed)
        self.sampler.begin(read, share, draws)
        self._pending = EpochPosition(state, share.ranks)
        return is_resumed

    def begun(self, iterator: Any) -> None:
        """Note that torch's iterator of the epoch was made."""
        self._position, self._torch_iterator = self._pending, iterator
        self._n_epochs += 1

    def begin_for_sampler(self, state: RunState | None) -> tuple[RunState, Any, OrderShare, TorchDraws]:
        """See NativeEngine.begin_for_sampler."""
        self._n_records = None  # as in begin()
        self._torch_iterator = None
        return super().begin_for_sampler(state)

    def state(self) -> RunState:
        """Return the state after the batches that torch's iterator has handed out. See NativeEngine.state."""
        if self._position is not None and self._torch_iterator is not None:
            self._position.n_yielded = self._torch_iterator._num_yielded  # noqa: SLF001 -- torchdata's count
            self._position.finished = self._torch_iterator._finished  # noqa: SLF001
        return super().state()

    def _records_of(self, source: Source) -> int:
        return len(self._users if source is self._users.source else self._users.over(source))

    def _numbered(self) -> Any:
        """Return the source of the order; a _Numbered if the data set's class defines its own length."""
        n_records = self._epoch_records()
        return self._source if n_records == epoch_records(self._source) else _Numbered(n_records)


def served_numbers(read: Any, share: OrderShare, *, is_shuffled: bool) -> Iterator[NDArray[np.int64]]:
    """Yield the indices of a rank's records in served order, some at a time. Reads footers for a shuffled order."""
    ranks = share.ranks
    if not is_shuffled:  # position p is record p, also in listed and mixed sources
        for start in range(0, ranks.n_served, _CHUNK_ROWS):
            yield ranks.positions_between(start, min(start + _CHUNK_ROWS, ranks.n_served))
        return
    listed = None if read.mixture is not None else read.listed
    served = None if listed is None else np.argsort(listed, kind="stable")  # by number in stored order
    first_records = np.concatenate([[0], np.cumsum(read.shard_records)])
    starts: dict[int, NDArray[np.int64]] = {}
    for piece in share.pieces(0):
        shards = sorted({int(shard) for window in piece.windows for shard in window.shards})
        missing = [shard for shard in shards if shard not in starts]
        starts = {shard: starts[shard] for shard in shards if shard in starts}
        for shard, table in zip(missing, read.block_tables(missing), strict=True):
            starts[shard] = first_records[shard] + np.cumsum(table.records) - table.records
        numbers = _record_numbers(piece, starts)
        yield numbers if served is None else served[numbers]


def _record_numbers(piece: Piece, starts: dict[int, NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return the stored numbers of a piece's rows. starts: by shard, the number of each block's first record."""
    first = [
        starts[shard][block]
        for window in piece.windows
        for shard, block in zip(window.shards.tolist(), window.blocks.tolist(), strict=True)
    ]
    block, row = piece.rows()
    return np.array(first, np.int64)[block] + row
