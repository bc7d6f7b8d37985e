"""Interface of the sources that views are built on: a Source that is also read by index, scanned, and reopened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from tiercache.load.source import Source

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from tiercache.cache import Cache, WarmProgress
    from tiercache.shard.format.statistics import Statistics
    from tiercache.shard.read.values import ColumnValues
    from tiercache.shard.schema import Schema


class SourceSpec(Protocol):
    """Small picklable spec of a source: everything needed to open it, and nothing that is open."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the served columns, in order."""

    @property
    def versions(self) -> tuple[int, ...]:
        """Version number of each data set that is read."""

    def open(self, opened: dict[int, Any]) -> Readable:
        """Open the source.

        Args:
            opened: Sources that this call has already opened, by id() of their specs. They are shared.
        """


@runtime_checkable
class VersionHandle(Protocol):
    """One opened version below a source, where its counters are kept."""

    @property
    def url(self) -> str:
        """URL of the data set, without credentials."""

    @property
    def cache(self) -> Cache | None:
        """Cache that the version is read through; None: no cache."""

    def figures(self) -> Mapping[str, float]:
        """See Source.figures."""

    def versions(self) -> list[int]:
        """Return the numbers of all versions of the data set, oldest first."""

    def close(self) -> None:
        """See Readable.close."""


class Readable(Source, Protocol):
    """Source with what reading by index, filters and warming need. All methods may be called from any thread."""

    def at_versions(self, versions: Sequence[int]) -> Readable:
        """See Source.at_versions."""

    @property
    def spec(self) -> SourceSpec:
        """Spec that opens the source again."""

    @property
    def n_records(self) -> int:
        """Number of records that are served."""

    @property
    def first_record(self) -> NDArray[np.int64]:
        """int64[n_shards + 1]: number of each shard's first record in stored order, then the number of all records."""

    @property
    def is_in_stored_order(self) -> bool:
        """Whether served record i is record i of the concatenated shards."""

    @property
    def stored_schema(self) -> Schema:
        """All stored columns, served or not."""

    @property
    def opened_versions(self) -> tuple[VersionHandle, ...]:
        """Opened versions below the source, each once."""

    def statistics(self, shard: int) -> Statistics:
        """Return the statistics of a shard's columns: {column: {"nulls", "bytes", "stored", "min", "max"}}.

        Any entry may be missing. Entries have been checked for plausibility.

        Raises:
            CorruptShard: A value is impossible; the message names the segment, the shard, the column and the field.
        """

    def arrays(self, shard: int, block: int) -> list[pa.Array]:
        """Return a whole stored block as Arrow arrays of the served columns, completely checked."""

    def record(self, number: int) -> dict[str, Any] | None:
        """Return a served record as a dict of values by column; None if it is not mapped: then call `values`.

        Raises:
            IndexError: There is no such record.
        """

    def values(self, records: NDArray[np.int64]) -> list[ColumnValues]:
        """Return the values of served records, int64[n], by column. Raises as `load`, and IndexError."""

    def take_arrow(self, records: NDArray[np.int64]) -> list[pa.Array]:
        """Return the values of records as Arrow arrays; see `values`."""

    def with_columns(self, columns: Sequence[str]) -> Readable:
        """Return the same records with other columns of the stored schema. Raises SchemaError for an unknown column."""

    def for_scan(self, columns: Sequence[str]) -> Readable:
        """Return a source as `with_columns` does, for a single pass: shards that are not cached bypass the cache."""

    def warm(
        self, shards: Sequence[int], *, jobs: int, on_progress: Callable[[WarmProgress], None] | None = None
    ) -> None:
        """Fetch the served columns of shards into the cache.

        Args:
            shards: Numbers of the shards.
            jobs: Number of shards fetched in parallel.
            on_progress: Function called after each shard.
        """

    def close(self) -> None:
        """Release shards and connections. The source may be used again afterwards."""
