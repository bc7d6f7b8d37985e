"""The accounts in memory, as arrays: each update fetches only what has changed since the one before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tiercache.cache.names import Names

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from tiercache.catalog import Accounts, CopyRow

_ROW = np.dtype(
    [
        ("charge_bytes", np.int64),
        ("last_use", np.int64),
        ("turn", np.int64),
        ("freq", np.int64),
        ("main", np.bool_),
        ("recorded", np.bool_),
    ]
)


@dataclass(frozen=True, slots=True, eq=False)
class AccountsSnapshot:
    """All copies at one moment, sorted by name. Immutable.

    Attributes:
        names: Names of the copies; the same object as before if no copy came or went.
        recorded: Whether the source of the copy is known, bool[n]. The other columns are those of policy.Snapshot.
    """

    names: Names
    charge_bytes: NDArray[np.int64]
    last_use: NDArray[np.int64]
    turn: NDArray[np.int64]
    freq: NDArray[np.int64]
    main: NDArray[np.bool_]
    recorded: NDArray[np.bool_]
    has_evicted: bool
    limit_bytes: int

    def among(self, texts: Iterable[str]) -> NDArray[np.bool_]:
        """Return a mask of the copies with one of these names, which are given as 40 hexadecimal digits: bool[n]."""
        mask = np.zeros(len(self.names), np.bool_)
        rows = self.names.rows_of(Names.of_texts(texts))
        mask[rows[rows >= 0]] = True
        return mask


class AccountsMirror:
    """The accounts in memory, updated by changes. Only one caller at a time; the lock of the evictor ensures that."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._since = ("", 0)
        self._names, self._rows = Names.of_texts(()), np.empty(0, _ROW)

    def look(self) -> AccountsSnapshot:
        """Return the accounts now: one short transaction, and a millisecond if one of 25,000 copies changed."""
        changes = self._accounts.changes(self._since)
        if changes.whole:
            self._names, self._rows = Names.of_texts(()), np.empty(0, _ROW)
        if changes.gone:
            self._drop([*changes.gone])
        if changes.rows:
            self._set(changes.rows)
        self._since = changes.since
        columns = {name: np.ascontiguousarray(self._rows[name]) for name in _ROW.names or ()}
        return AccountsSnapshot(
            self._names, **columns, has_evicted=changes.has_evicted, limit_bytes=changes.limit_bytes
        )

    def _drop(self, gone: Sequence[str]) -> None:
        rows = self._names.rows_of(Names.of_texts(gone))
        stay = np.ones(len(self._names), np.bool_)
        stay[rows[rows >= 0]] = False
        if not stay.all():
            self._names, self._rows = self._names.take(stay), self._rows[stay]

    def _set(self, changed: Sequence[CopyRow]) -> None:
        names, rows = Names.of_texts(row.name for row in changed), np.empty(len(changed), _ROW)
        rows[:] = [(r.charge_bytes, r.last_use, r.turn, r.freq, bool(r.main), r.record != "") for r in changed]
        order = names.order()
        names, rows = names.take(order), rows[order]
        at = self._names.rows_of(names)
        here = at >= 0
        self._rows[at[here]] = rows[here]
        if not here.all():
            new = names.take(~here)
            places = self._names.places_of(new)
            self._names = self._names.insert(places, new)
            self._rows = np.insert(self._rows, places, rows[~here])
