"""The sampler of a loader without a user's: the loader's own order, for whoever makes another loader of this one.

Frameworks rebuild a loader from its data set and its sampler or batch sampler (Accelerate's `skip_first_batches`, for
example). torch's sampler would give them another order than that which the loader serves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils import data as torch_data

from tiercache.load.draws import Draws
from tiercache.load.sampling import RandomSampler
from tiercache.load.state import RunState

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.load.plan import Piece
    from tiercache.load.run import NativeRun
    from tiercache.load.share import OrderShare
    from tiercache.load.source import Source

_YIELDED, _ORDER = "yielded", "order"
_CHUNK_ROWS = 1 << 16  # of an unshuffled epoch that become Python's integers at a time


class OrderSampler(torch_data.Sampler[int]):
    """Mixed into torch's class of the same kind of order: its iterators give the records of the loader's next epoch.

    Such an iterator begins the epoch, as iter(loader) does. Where `run` is None, it is torch's sampler.

    Attributes:
        run: the loader's.
        is_split_by_others: whether another library splits what the sampler gives among processes. Then it gives all
            records, in torch's order: that library keeps the generators of torch's sampler alike on all processes.
    """

    run: NativeRun | None = None
    is_split_by_others = False
    told_epoch: int | None = None

    def __iter__(self) -> Iterator[int]:
        run = self.run
        if run is None or (self.is_split_by_others and run.rank().world_size > 1):
            return super().__iter__()
        return OrderIterator(self, run)

    def __len__(self) -> int:
        run = self.run
        if run is None or (self.is_split_by_others and run.rank().world_size > 1):
            return super().__len__()  # type: ignore[misc, no-any-return]  # torch's samplers have one
        return run.n_served()

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` the one that the next iterator of this sampler begins; the loader's own iterators ignore it."""
        self.told_epoch = epoch

    def __getstate__(self) -> dict[str, Any]:
        """A copy is torch's sampler until it is bound to a loader: a run has threads."""
        return {name: value for name, value in vars(self).items() if name != "run"}


class ShuffledOrder(OrderSampler, RandomSampler):
    """Of a shuffled loader."""


class StoredOrder(OrderSampler, torch_data.SequentialSampler):
    """Of a loader that does not shuffle."""


class OrderIterator(Iterator[int]):
    """Record numbers of one epoch, of this rank. The epoch begins with the first number, as torch's samplers draw."""

    def __init__(self, sampler: OrderSampler, run: NativeRun) -> None:
        self._sampler = sampler
        self._run = run
        self._numbers: Iterator[int] | None = None
        self._begun: RunState | None = None
        self._n_yielded = 0

    def __next__(self) -> int:
        numbers = self._begin(None) if self._numbers is None else self._numbers
        number = next(numbers)
        self._n_yielded += 1
        return number

    def state_dict(self) -> dict[str, Any]:
        """Plain values: the epoch's order, once it has begun, and how many numbers were given."""
        order = None if self._begun is None else self._begun.to_dict()
        return {_YIELDED: self._n_yielded, _ORDER: order}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the epoch of a state."""
        self._n_yielded = 0
        if state[_ORDER] is not None:
            numbers = self._begin(RunState.from_dict(state[_ORDER]))
            for _ in zip(range(state[_YIELDED]), numbers, strict=False):
                self._n_yielded += 1

    def _begin(self, state: RunState | None) -> Iterator[int]:
        epoch, self._sampler.told_epoch = self._sampler.told_epoch, None
        if state is None and epoch is not None:
            self._run.set_epoch(epoch)
        self._begun, share, draws = self._run.begin_elsewhere(state)
        self._numbers = self._given(share, draws, is_drawn=state is not None)
        return self._numbers

    def _given(self, share: OrderShare, draws: Draws, *, is_drawn: bool) -> Iterator[int]:
        if not is_drawn:
            draws.sample()
        for numbers in record_numbers(self._run.source, share, shuffle=draws.shuffle):
            yield from numbers.tolist()
        draws.exhaust()
        self._run.end_elsewhere(share)


def record_numbers(source: Source, share: OrderShare, *, shuffle: bool) -> Iterator[NDArray[np.int64]]:
    """Numbers, in the data set, of a share's records in served order, some at a time. Reads footers where shuffled."""
    ranks = share.ranks
    if not shuffle:  # position p is record p, of lists and mixtures too
        for start in range(0, ranks.n_served, _CHUNK_ROWS):
            yield ranks.positions_between(start, min(start + _CHUNK_ROWS, ranks.n_served))
        return
    listed = source.listed
    served = None if listed is None else np.argsort(listed, kind="stable")  # by number in stored order
    first_records = np.concatenate([[0], np.cumsum(source.shard_records)])
    starts: dict[int, NDArray[np.int64]] = {}
    for piece in share.pieces(0):
        shards = sorted({int(shard) for window in piece.windows for shard in window.shards})
        missing = [shard for shard in shards if shard not in starts]
        starts = {shard: starts[shard] for shard in shards if shard in starts}
        for shard, table in zip(missing, source.block_tables(missing), strict=True):
            starts[shard] = first_records[shard] + np.cumsum(table.records) - table.records
        numbers = _stored_numbers(piece, starts)
        yield numbers if served is None else served[numbers]


def _stored_numbers(piece: Piece, starts: dict[int, NDArray[np.int64]]) -> NDArray[np.int64]:
    """Numbers in stored order of a piece's rows. starts: by shard, the number of each block's first record."""
    first = [
        starts[shard][block]
        for window in piece.windows
        for shard, block in zip(window.shards.tolist(), window.blocks.tolist(), strict=True)
    ]
    block, row = piece.rows()
    return np.array(first, np.int64)[block] + row
