"""Names of copies by the thousand: sorted tables of their 20 bytes, and where names stand in them."""

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
    """Names, not changed any more.

    Attributes:
        raw: uint8[n, 20].
        heads, middles, tails: int[n], their first 8, next 8 and last 4 bytes as numbers that sort as the names do.
            Names are hashes: the heads nearly always tell them apart, and numbers compare four times as fast as bytes.
    """

    raw: NDArray[np.uint8]
    heads: NDArray[np.uint64]
    middles: NDArray[np.uint64]
    tails: NDArray[np.uint32]

    @classmethod
    def of(cls, names: NDArray[np.uint8]) -> Names:
        """Names given as uint8[n, 20]."""
        rows = np.ascontiguousarray(names, dtype=np.uint8).reshape(-1, NAME_BYTES)
        heads, middles = (np.ascontiguousarray(rows[:, i : i + 8]).view(">u8").reshape(-1) for i in (0, 8))
        tails = np.ascontiguousarray(rows[:, 16:]).view(">u4").reshape(-1)
        return cls(rows, heads.astype(np.uint64), middles.astype(np.uint64), tails.astype(np.uint32))

    @classmethod
    def of_texts(cls, texts: Iterable[str]) -> Names:
        """Names given as 40 hexadecimal digits each."""
        return cls.of(np.frombuffer(bytes.fromhex("".join(texts)), np.uint8))

    def __len__(self) -> int:
        return len(self.raw)

    def take(self, rows: NDArray[Any]) -> Names:
        """Those of some rows."""
        return Names(self.raw[rows], self.heads[rows], self.middles[rows], self.tails[rows])

    def insert(self, places: NDArray[np.int64], names: Names) -> Names:
        """These, with names before the rows of places."""
        return Names(
            np.insert(self.raw, places, names.raw, axis=0),
            np.insert(self.heads, places, names.heads),
            np.insert(self.middles, places, names.middles),
            np.insert(self.tails, places, names.tails),
        )

    def order(self) -> NDArray[np.int64]:
        """int64[n], rows in the order of their names."""
        return np.lexsort((self.tails, self.middles, self.heads))

    def is_new(self) -> NDArray[np.bool_]:
        """bool[n]: the name differs from the one before."""
        new = np.ones(len(self), np.bool_)
        new[1:] = (self.raw[1:] != self.raw[:-1]).any(axis=1)
        return new

    def text(self, row: int) -> str:
        """40 hexadecimal digits."""
        return bytes(self.raw[row]).hex()

    def places_of(self, wanted: Names) -> NDArray[np.int64]:
        """Before which rows of this sorted table wanted belong: int64[len(wanted)]."""
        return np.searchsorted(self.heads, wanted.heads)

    def rows_of(self, wanted: Names) -> NDArray[np.int64]:
        """Where each of wanted stands in this table, which is sorted: int64[len(wanted)], -1: nowhere."""
        if not len(self):
            return np.full(len(wanted), -1, np.int64)
        at = np.minimum(self.places_of(wanted), len(self) - 1)
        found = self.heads[at] == wanted.heads
        whole = found & (self.middles[at] == wanted.middles) & (self.tails[at] == wanted.tails)
        at[~whole] = -1
        # Two names with one head are so rare that nobody will meet them; then those after the first are looked at.
        for i in np.flatnonzero(found & ~whole).tolist():
            alike = np.flatnonzero(self.heads == wanted.heads[i])
            at[i] = max([row for row in alike.tolist() if (self.raw[row] == wanted.raw[i]).all()], default=-1)
        return at
