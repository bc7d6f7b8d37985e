"""Location of records in the open mapped shards: block, row and the addresses for one gather of many records.

Any thread may use a finder without locks, because no function here releases the GIL. A forked child inherits the finder
as it is; its owner must handle forks.
"""

from typing import Any, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

U64: TypeAlias = NDArray[np.uint64]
Indices: TypeAlias = NDArray[np.uint32]
FoundRecords: TypeAlias = tuple[tuple[U64, ...], tuple[U64, ...] | None, Indices, Indices, Any]
"""Result of a search: addresses, checks, block, row, kept.

addresses: uint64[n_blocks, 3] for each stream. checks: uint64[n_blocks, 4] for each stream, or None if nothing is to be
checked; both in the form of gather.pyi. block, row: uint32[n], one for each record. kept: Object that must stay alive
during the gather.
"""

@final
class BlockTable:
    """The blocks of one shard. Immutable. The table keeps owner alive, and with it the mapping.

    Args:
        first: uint64[n_blocks + 1], the first row of each block, and the number of rows.
        addresses: uint64[n_streams, n_blocks, 3].
        checks: uint64[n_streams, n_blocks, 4], or None if nothing is to be checked.
        owner: Owner of the mapping.
        file: (fd, changed_ns, pause_ns), or None if the file's ctime is not checked. fd: Descriptor of the mapped file,
            open while owner lives. changed_ns: ctime for which `checks` hold; the finder drops the table when the file
            has another ctime (0 never matches). pause_ns: Interval after which the ctime is read again.

    Raises:
        ValueError: The shapes do not fit, or there are no blocks.
    """

    def __new__(
        cls, first: U64, addresses: U64, checks: U64 | None, owner: Any, file: tuple[int, int, int] | None = None
    ) -> BlockTable: ...

@final
class RecordFinder:
    """Finds records in the block tables of shards.

    Args:
        first_record: int64[n_shards + 1], the first record of each shard, and the number of all records. It is kept.
        n_streams: Number of streams of each table.

    Raises:
        ValueError: first_record is empty.
    """

    def __new__(cls, first_record: NDArray[np.int64], n_streams: int) -> RecordFinder: ...
    def __len__(self) -> int:
        """Return the number of shards that have a table."""

    def __contains__(self, shard: int) -> bool:
        """Return whether a shard has a table."""

    def put(self, shard: int, table: BlockTable) -> None:
        """Set the table of a shard. Raises ValueError if the table does not fit the shard."""

    def forget(self, shard: int) -> None:
        """Drop the table of a shard, if there is one. Results of earlier searches keep it alive."""

    def clear(self) -> None:
        """Drop all tables."""

    def find(self, records: NDArray[np.int64]) -> FoundRecords | None:
        """Return the locations of records, int64[n]; None if a record's shard has no table, or its file has changed.

        The records of several shards become separate blocks, so that one gather serves all of them.

        Raises:
            IndexError: A record does not exist.
        """

    def find_one(self, record: int) -> FoundRecords | None:
        """Return the location of one record, as `find` does, without an array of record numbers."""

def normalize_indices(records: NDArray[np.int64], n_records: int) -> NDArray[np.int64]:
    """Return records with negative numbers counted from the end; the array itself if there are none.

    Args:
        records: int64[n], each from -n_records to n_records - 1.
        n_records: Number of records.

    Raises:
        IndexError: A record does not exist.
    """
