"""Where records lie in the mapped shards that are open, for a gather of all of them at once.

A finder is safe from any thread, without locks: nothing here drops the GIL. In a forked child it is as it was in the
parent; whoever owns it sees to what that means.
"""

from typing import Any, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

U64: TypeAlias = NDArray[np.uint64]
Places: TypeAlias = NDArray[np.uint32]
Found: TypeAlias = tuple[tuple[U64, ...], tuple[U64, ...] | None, Places, Places, Any]
"""Of each stream, addresses uint64[n_blocks, 3] and checks uint64[n_blocks, 4] (or None: nothing is to be checked), as
the gather takes them; block and row of each record, uint32[n]; and what must be kept while they are gathered."""

@final
class BlockTable:
    """A shard's blocks. Immutable; keeps owner, and with it the mapping.

    first: uint64[n_blocks + 1], the first row of each block and the number of rows; addresses: uint64[n_streams,
    n_blocks, 3]; checks: uint64[n_streams, n_blocks, 4] or None; file: (fd, changed_ns, pause_ns): a descriptor of the
    mapped file, open as long as owner is; its ctime for which checks hold: once the file has another one the finder
    drops the table, and 0 is none that a file has; and how long after a look the file is not looked at again. None:
    nothing is ever checked.

    Raises:
        ValueError: shapes do not fit, or there are no blocks.
    """

    def __new__(
        cls, first: U64, addresses: U64, checks: U64 | None, owner: Any, file: tuple[int, int, int] | None = None
    ) -> BlockTable: ...

@final
class RecordFinder:
    """Tables of shards by number, and the way from record numbers to them.

    first_record: int64[n_shards + 1], of each shard's first record and of all records; held. n_streams: of each table.

    Raises:
        ValueError: first_record is empty.
    """

    def __new__(cls, first_record: NDArray[np.int64], n_streams: int) -> RecordFinder: ...
    def __len__(self) -> int:
        """Shards whose tables are here."""

    def __contains__(self, shard: int) -> bool:
        """Whether a shard's table is here."""

    def put(self, shard: int, table: BlockTable) -> None:
        """Take a shard's table. Raises ValueError for one that does not fit."""

    def forget(self, shard: int) -> None:
        """Drop a shard's table, if it is here; who has found records in it keeps it."""

    def clear(self) -> None:
        """Drop all tables."""

    def find(self, records: NDArray[np.int64]) -> Found | None:
        """Where records are, int64[n]; None if one of them is in a shard without a table, or was written to since.

        Records of several shards become blocks of their own, so that one gather serves them all.

        Raises:
            IndexError: a record that is not there.
        """

    def find_one(self, record: int) -> Found | None:
        """Where one record is, as `find`, without an array to look for it by."""

def wrapped(records: NDArray[np.int64], n_records: int) -> NDArray[np.int64]:
    """Records with those below 0 counted from the end; the array itself where there are none.

    Raises:
        IndexError: a record that is not there.
    """
