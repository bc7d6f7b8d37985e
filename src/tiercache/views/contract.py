"""What a view is made over: a Source that can also be read record by record, scanned, and opened again elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from tiercache.load.source import Source

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from tiercache.cache import Cache, WarmProgress
    from tiercache.shard.statistics import Facts
    from tiercache.shard.types import Schema
    from tiercache.shard.values import ColumnValues


class Plan(Protocol):
    """All that a source is made of, and nothing that is open: picklable, and small."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that are served, in order."""

    @property
    def versions(self) -> tuple[int, ...]:
        """Of each data set that is read."""

    def open(self, opened: dict[int, Any]) -> Readable:
        """The source. opened: what the same call has opened by now, by id() of its plan, to be shared."""


@runtime_checkable
class Leaf(Protocol):
    """What a source says of one opened version below it: where its figures are counted."""

    @property
    def url(self) -> str:
        """The data set's, without credentials."""

    @property
    def cache(self) -> Cache | None:
        """What it is read through."""

    def figures(self) -> Mapping[str, float]:
        """See Readable.figures."""

    def versions(self) -> list[int]:
        """Numbers of all versions there are, oldest first."""

    def close(self) -> None:
        """See Readable.close."""


class Readable(Source, Protocol):
    """A Source, and what reading by index, filters and warming need. Methods are for any thread."""

    def at_versions(self, versions: Sequence[int]) -> Readable:
        """See Source.at_versions."""

    @property
    def plan(self) -> Plan:
        """What opens it again."""

    @property
    def n_records(self) -> int:
        """How many records are served."""

    @property
    def first_record(self) -> NDArray[np.int64]:
        """int64[n_shards + 1]: number of each shard's first record in stored order, and of all records."""

    @property
    def is_in_stored_order(self) -> bool:
        """Whether record i as served is record i of the shards, counted one after the other."""

    @property
    def stored_schema(self) -> Schema:
        """All columns that there are, served or not."""

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """The opened versions below, each once."""

    def statistics(self, shard: int) -> Facts:
        """What the version says of a shard's columns: {column: {"nulls", "bytes", "stored", "min", "max"}}.

        Any of them may be missing; those that are there can be true.

        Raises:
            CorruptShard: a value that cannot be; it names the segment, the shard, the column and the field.
        """

    def arrays(self, shard: int, block: int) -> list[pa.Array]:
        """A whole stored block as Arrow arrays, the columns that are served, wholly checked."""

    def record(self, number: int) -> dict[str, Any] | None:
        """A record as served: a value by column; None: it is not mapped, ask with `values`. Raises IndexError."""

    def values(self, records: NDArray[np.int64]) -> list[ColumnValues]:
        """Values of records by their numbers as served, int64[n], by column. Raises as `load`, and IndexError."""

    def take_arrow(self, records: NDArray[np.int64]) -> list[pa.Array]:
        """As `values`, as Arrow arrays."""

    def with_columns(self, columns: Sequence[str]) -> Readable:
        """The same records with other columns of the stored schema. Raises SchemaError."""

    def scanning(self, columns: Sequence[str]) -> Readable:
        """As with_columns, to be read once from end to end: shards that are not in the cache are read past it."""

    def warm(
        self, shards: Sequence[int], *, jobs: int, on_progress: Callable[[WarmProgress], None] | None = None
    ) -> None:
        """Bring shards into the cache."""

    def close(self) -> None:
        """Give shards and connections back; it may be used again."""
