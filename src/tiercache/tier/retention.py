"""Which checkpoints keep lists name. Pure, by columns: each question is a sort of all series together.

Steps are compared as numbers; of equal steps the one that was written later is the higher, then the later row. What is
not complete is named by its tags and its youth alone: it takes nobody's place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tiercache.tier.model import CHECKPOINT

if TYPE_CHECKING:
    from tiercache.tier.model import Snapshot
    from tiercache.tierfile import Best, Keep

_Rows = NDArray[np.int64]
_Flags = NDArray[np.bool_]


def kept(snapshot: Snapshot, rows: _Rows, keep: Keep) -> _Flags:
    """Whether a keep list names each of these groups, in each series of its own.

    Args:
        snapshot: where they stand; metrics and tags are its.
        rows: numbers of groups that are checkpoints, no two alike, in any order.
        keep: what it names is the union of what its keys name.

    Returns:
        bool[n_rows], in the order of rows.
    """
    named = np.zeros(snapshot.n_groups, np.bool_)
    complete = rows[snapshot.complete[rows]]
    if keep.last is not None or keep.every_steps is not None:
        rising = _sorted(snapshot, complete)
        if keep.last is not None:
            named[rising[_from_end(snapshot.series[rising]) < keep.last]] = True
        if keep.every_steps is not None:
            named[_first_of_steps(snapshot, rising, keep.every_steps)] = True
    if keep.every_s is not None:
        named[_first_of_stretches(snapshot, complete, keep.every_s)] = True
    for best in keep.best:
        named[_best(snapshot, complete, best)] = True
    if keep.tags:
        wanted = set(keep.tags)
        named[[group for group, tags in snapshot.tags.items() if not wanted.isdisjoint(tags)]] = True
    if keep.younger_s is not None:
        named[rows[snapshot.now_s - snapshot.created_s[rows] <= keep.younger_s]] = True
    return named[rows]


def newest(snapshot: Snapshot) -> _Flags:
    """bool[n_groups]: the newest complete checkpoint of its series."""
    found = np.zeros(snapshot.n_groups, np.bool_)
    rows = _sorted(snapshot, np.flatnonzero((snapshot.kind == CHECKPOINT) & snapshot.complete))
    found[rows[_from_end(snapshot.series[rows]) == 0]] = True
    return found


def _sorted(snapshot: Snapshot, rows: _Rows) -> _Rows:
    """By series and step."""
    columns = (rows, snapshot.created_s[rows], snapshot.step[rows], snapshot.series[rows])
    return rows[np.lexsort(columns)]


def _begins(*columns: NDArray[np.generic]) -> _Flags:
    """Whether each row differs from the one before, in any column."""
    begins = np.ones(len(columns[0]), np.bool_)
    begins[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return begins


def _from_start(series: NDArray[np.int32]) -> NDArray[np.int64]:
    """How many of its series stand before each row of a sorted column."""
    starts = np.flatnonzero(_begins(series))
    places = np.arange(len(series))
    return places - np.repeat(starts, np.diff(np.append(starts, len(series))))


def _from_end(series: NDArray[np.int32]) -> NDArray[np.int64]:
    return _from_start(series[::-1])[::-1]


def _first_of_steps(snapshot: Snapshot, rising: _Rows, every: int) -> _Rows:
    rows = rising[snapshot.step[rising] >= 0]
    return rows[_begins(snapshot.series[rows], snapshot.step[rows] // every)]


def _first_of_stretches(snapshot: Snapshot, rows: _Rows, every_s: float) -> _Rows:
    rows = rows[np.lexsort((rows, snapshot.created_s[rows], snapshot.series[rows]))]
    series, created_s = snapshot.series[rows], snapshot.created_s[rows]
    starts = np.flatnonzero(_begins(series))
    first_s = np.repeat(created_s[starts], np.diff(np.append(starts, len(rows))))
    return rows[_begins(series, np.floor((created_s - first_s) / every_s))]


def _best(snapshot: Snapshot, rows: _Rows, best: Best) -> _Rows:
    """Of equal values the higher step is the better."""
    values = snapshot.metrics.get(best.metric)
    if values is None:
        return rows[:0]
    rows = rows[~np.isnan(values[rows])]
    worse = values[rows] if best.mode == "min" else -values[rows]
    rows = rows[np.lexsort((-rows, -snapshot.created_s[rows], -snapshot.step[rows], worse, snapshot.series[rows]))]
    return rows[_from_start(snapshot.series[rows]) < best.n]
