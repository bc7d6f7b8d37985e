"""The sampler of a loader that was given none: it returns the loader's order to libraries that rebuild the loader.

Such libraries make a new loader from its data set and its sampler or batch sampler (for example Accelerate's
`skip_first_batches`). torch's sampler would give the new loader another order than the original one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch.utils import data as torch_data

from tiercache.load.indexed import served_numbers
from tiercache.load.sampling import RandomSampler
from tiercache.load.state import RunState

if TYPE_CHECKING:
    from tiercache.load.draws import TorchDraws
    from tiercache.load.run import NativeEngine
    from tiercache.load.share import OrderShare

_YIELDED, _ORDER = "yielded", "order"


class OrderSampler(torch_data.Sampler[int]):
    """Mixin for torch's samplers: its iterators return the record numbers of the loader's next epoch.

    Such an iterator begins the epoch, as iter(loader) does. If `run` is None, the class behaves as torch's sampler.

    Attributes:
        run: The loader's engine.
        is_split_by_others: Whether another library splits the record numbers among processes. Then the sampler returns
            all records in torch's order: that library keeps the generators of torch's samplers equal on all processes.
        told_epoch: The epoch that set_epoch() chose for the next iterator.
    """

    run: NativeEngine | None = None
    is_split_by_others = False
    requested_epoch: int | None = None

    def __iter__(self) -> Iterator[int]:
        run = self.run
        if run is None or (self.is_split_by_others and run.rank().world_size > 1):
            return super().__iter__()
        return OrderIterator(self, run)

    def __len__(self) -> int:
        run = self.run
        if run is None or (self.is_split_by_others and run.rank().world_size > 1):
            return super().__len__()  # type: ignore[misc, no-any-return]  # torch's samplers define it
        return run.n_served()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of this sampler's next iterator. The loader's own iterators ignore it."""
        self.requested_epoch = epoch

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, without the engine, which has threads.

        The copy behaves as torch's sampler until it is bound to a loader.
        """
        return {name: value for name, value in vars(self).items() if name != "run"}


class ShuffledOrder(OrderSampler, RandomSampler):
    """The sampler of a shuffled loader."""


class StoredOrder(OrderSampler, torch_data.SequentialSampler):
    """The sampler of a loader that does not shuffle."""


class OrderIterator(Iterator[int]):
    """This rank's record numbers of one epoch, which begins with the first number: torch's samplers draw then."""

    def __init__(self, sampler: OrderSampler, run: NativeEngine) -> None:
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
        """Return plain values: the epoch's order, once it has begun, and how many numbers were returned."""
        order = None if self._begun is None else self._begun.to_dict()
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
            self._run.set_epoch(epoch)
        self._begun, read, share, draws = self._run.begin_for_sampler(state)
        self._numbers = self._given(read, share, draws)
        return self._numbers

    def _given(self, read: Any, share: OrderShare, draws: TorchDraws) -> Iterator[int]:
        draws.sample()
        for numbers in served_numbers(read, share, is_shuffled=draws.shuffle):
            yield from numbers.tolist()
        draws.exhaust()
        self._run.end_for_sampler(share)
