"""Mixed sources: several sources in exact shares. By number, records are in the order of an unshuffled epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tiercache.order.mixture import MixtureSpec, StoredMixture
from tiercache.views.joined import Joined, JoinedSpec
from tiercache.views.steps import StoredOrderStep
from tiercache.views.view import apply_step

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from tiercache.shard.read.values import ColumnValues
    from tiercache.views.contract import Readable

Stop = Literal["first", "all"]


@dataclass(frozen=True, slots=True)
class MixedSpec(JoinedSpec):
    """Spec of mixed sources."""

    weights: tuple[Any, ...]
    stop: Stop

    def open(self, opened: dict[int, Any]) -> Mixed:
        """See Plan.open."""
        return Mixed([plan.open(opened) for plan in self.below], self.weights, self.stop)


class Mixed(Joined):
    """Several sources mixed; implements Readable. Shards are those of all sources, one source after the other.

    Record i is the record at position i of an unshuffled epoch: each source is taken in stored order, and again from
    its start after its end. n_records counts a record as often as an epoch serves it.

    Raises:
        SchemaError: The sources' columns differ.
        ValueError: A source has no records, or the weights are invalid.
    """

    def __init__(self, below: Sequence[Readable], weights: Sequence[Any], stop: Stop) -> None:
        # A mixture decides the order itself: explicit orders of the sources are dropped.
        super().__init__(
            [source if source.record_order is None else apply_step(source, StoredOrderStep()) for source in below]
        )
        self._weights, self._stop = tuple(weights), stop
        self._spec = MixtureSpec(tuple(self._first_shard[:-1].tolist()), self._weights, stop)
        self._records = StoredMixture(self._spec, self._spec.part_records(self.shard_records))
        self.n_records = len(self._records)

    @property
    def spec(self) -> MixedSpec:
        """See Readable.spec."""
        return MixedSpec(tuple(source.spec for source in self.below), self._weights, self._stop)

    @property
    def mixture(self) -> MixtureSpec:
        """Parts and weights of the mixture."""
        return self._spec

    def unmixed(self) -> Joined:
        """Return the sources joined: a shuffled epoch may serve records that have no number in the mixture."""
        return Joined(self.below)

    @property
    def is_in_stored_order(self) -> bool:
        """False: the sources alternate."""
        return False

    @cached_property
    def record_order(self) -> NDArray[np.int64]:
        """Explicit order of an unshuffled epoch, int64[n]: place of each record in stored order.

        Samplers number records by it. The native path does not use this array; it computes the order from the mixture.
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
