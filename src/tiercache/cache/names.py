"""The names, specifications and records of copies, and tables of many names.

A copy of a shard is named by the hash of its identity, which is the same for all mirrors; a copy of another object by
the hash of its URL and version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

NAME_BYTES = 20


@dataclass(frozen=True, slots=True, eq=False)
class Names:
    """An immutable table of names.

    Attributes:
        raw: The names, uint8[n, 20].
        heads: First 8 bytes of each name as a number, uint64[n], which sorts as the names do. Names are hashes, so the
            heads nearly always differ, and numbers compare four times as fast as bytes.
        middles: Next 8 bytes of each name, uint64[n].
        tails: Last 4 bytes of each name, uint32[n].
    """

    raw: NDArray[np.uint8]
    heads: NDArray[np.uint64]
    middles: NDArray[np.uint64]
    tails: NDArray[np.uint32]

    @classmethod
    def of(cls, names: NDArray[np.uint8]) -> Names:
        """Return a table of names that are given as uint8[n, 20]."""
        rows = np.ascontiguousarray(names, dtype=np.uint8).reshape(-1, NAME_BYTES)
        heads, middles = (np.ascontiguousarray(rows[:, i : i + 8]).view(">u8").reshape(-1) for i in (0, 8))
        tails = np.ascontiguousarray(rows[:, 16:]).view(">u4").reshape(-1)
        return cls(rows, heads.astype(np.uint64), middles.astype(np.uint64), tails.astype(np.uint32))

    @classmethod
    def of_texts(cls, texts: Iterable[str]) -> Names:
        """Return a table of names that are given as 40 hexadecimal digits each."""
        return cls.of(np.frombuffer(bytes.fromhex("".join(texts)), np.uint8))

    def __len__(self) -> int:
        return len(self.raw)

    def take(self, rows: NDArray[Any]) -> Names:
        """Return the names of some rows."""
        return Names(self.raw[rows], self.heads[rows], self.middles[rows], self.tails[rows])

    def insert(self, places: NDArray[np.int64], names: Names) -> Names:
        """Return a table with `names` inserted before the rows in `places`."""
        return Names(
            np.insert(self.raw, places, names.raw, axis=0),
            np.insert(self.heads, places, names.heads),
            np.insert(self.middles, places, names.middles),
            np.insert(self.tails, places, names.tails),
        )

    def order(self) -> NDArray[np.int64]:
        """Return the rows in the order of their names, int64[n]."""
        return np.lexsort((self.tails, self.middles, self.heads))

    def is_new(self) -> NDArray[np.bool_]:
        """Return whether each name differs from the one before, bool[n]."""
        new = np.ones(len(self), np.bool_)
        new[1:] = (self.raw[1:] != self.raw[:-1]).any(axis=1)
        return new

    def text(self, row: int) -> str:
        """Return a name as 40 hexadecimal digits."""
        return bytes(self.raw[row]).hex()

    def places_of(self, wanted: Names) -> NDArray[np.int64]:
        """Return the rows of this sorted table before which the wanted names belong, int64[len(wanted)]."""
        return np.searchsorted(self.heads, wanted.heads)

    def rows_of(self, wanted: Names) -> NDArray[np.int64]:
        """Return the row of each wanted name in this sorted table, int64[len(wanted)]; -1: not in the table."""
        if not len(self):
            return np.full(len(wanted), -1, np.int64)
        at = np.minimum(self.places_of(wanted), len(self) - 1)
        found = self.heads[at] == wanted.heads
        whole = found & (self.middles[at] == wanted.middles) & (self.tails[at] == wanted.tails)
        at[~whole] = -1
        # Two names with equal heads are extremely rare; for them, all rows with that head are searched.
        for i in np.flatnonzero(found & ~whole).tolist():
            alike = np.flatnonzero(self.heads == wanted.heads[i])
            at[i] = max([row for row in alike.tolist() if (self.raw[row] == wanted.raw[i]).all()], default=-1)
        return at
