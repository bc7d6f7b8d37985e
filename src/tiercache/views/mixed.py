"""Sources mixed in exact shares; by number they are what an epoch without shuffle serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tiercache.order.mixture import MixtureSpec, StoredMixture
from tiercache.views.joined import Joined, Joint
from tiercache.views.steps import InStoredOrder
from tiercache.views.view import choose

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from tiercache.shard.values import ColumnValues
    from tiercache.views.contract import Readable

Stop = Literal["first", "all"]


@dataclass(frozen=True, slots=True)
class Blend(Joint):
    """What a mixture is made of."""

    weights: tuple[Any, ...]
    stop: Stop

    def open(self, opened: dict[int, Any]) -> Mixed:
        """See Plan.open."""
        return Mixed([plan.open(opened) for plan in self.below], self.weights, self.stop)


class Mixed(Joined):
    """Several sources mixed; implements Readable. Shards are those of all sources, one after the other.

    Record i is the one that an epoch without shuffle has at position i: each source in stored order, from its start
    again where it ends. n_records counts those that come twice each time, and none that no epoch comes to.

    Raises:
        SchemaError: their columns differ.
        ValueError: a source without records; weights that are none.
    """

    def __init__(self, below: Sequence[Readable], weights: Sequence[Any], stop: Stop) -> None:
        # A list of numbers has an order of its own, and a mixture another one.
        super().__init__([source if source.listed is None else choose(source, InStoredOrder()) for source in below])
        self._weights, self._stop = tuple(weights), stop
        self._spec = MixtureSpec(tuple(self._first_shard[:-1].tolist()), self._weights, stop)
        self._records = StoredMixture(self._spec, self._spec.part_records(self.shard_records))
        self.n_records = len(self._records)

    @property
    def plan(self) -> Blend:
        """See Readable.plan."""
        return Blend(tuple(source.plan for source in self.below), self._weights, self._stop)

    @property
    def mixture(self) -> MixtureSpec:
        """How they are mixed."""
        return self._spec

    def unmixed(self) -> Joined:
        """The parts one after the other: a shuffled epoch serves records that have no number in the mixture."""
        return Joined(self.below)

    @property
    def is_in_stored_order(self) -> bool:
        """Parts alternate."""
        return False

    @cached_property
    def listed(self) -> NDArray[np.int64]:
        """Places in stored order, int64[n], as an unshuffled epoch serves them: samplers name records by that order.

        The native path asks the mixture instead, which lists nothing.
        """
        return self._joined_numbers(np.arange(self.n_records))

    def record(self, number: int) -> dict[str, Any] | None:
        """See Readable.record."""
        part, within = self._records.locate(np.array([number]))
        return self.below[int(part[0])].record(int(within[0]))

    def values(self, records: NDArray[np.int64]) -> list[ColumnValues]:
        """See Readable.values."""
        return super().values(self._joined_numbers(records))

    def take_arrow(self, records: NDArray[np.int64]) -> list[pa.Array]:
        """See Readable.take_arrow."""
        return super().take_arrow(self._joined_numbers(records))

    def _joined_numbers(self, records: NDArray[np.int64]) -> NDArray[np.int64]:
        part, within = self._records.locate(records)
        return self._first_number[part] + within

    def _of(self, below: Sequence[Readable]) -> Joined:
        return Mixed(below, self._weights, self._stop)
