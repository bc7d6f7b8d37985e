"""Which checkpoints keep lists name. Pure, by columns: each question is a sort of all series together.

Steps are compared as numbers; of equal steps the one that was written later is the higher, then the later row. What is
not complete is named by its tags and its youth alone: it takes nobody's place.

A `best` whose metric no checkpoint of a run has cannot tell the checkpoints of that run apart, so the keep list keeps
all of them: the name may be misspelt, or the metrics may lie where they cannot be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tiercache.tier.model import CHECKPOINT

if TYPE_CHECKING:
    from tiercache.tier.model import Snapshot
    from tiercache.tierfile import Best, Keep

_Rows = NDArray[np.int64]
_Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What a keep list keeps of some groups; bool[n_rows] each, in their order.

    named: its keys name the group; unscored: `best` cannot tell whether the group is among the best. Both are kept.
    without: the group lacks a metric of `best` that another of its run has, so that it is not among the best.
    unscored_by, without_by: the metrics of each `best` for which any group is unscored, or without.
    """

    named: _Flags
    unscored: _Flags
    without: _Flags
    unscored_by: tuple[tuple[str, ...], ...] = ()
    without_by: tuple[tuple[str, ...], ...] = ()


def kept(snapshot: Snapshot, rows: _Rows, keep: Keep) -> Kept:
    """Which of these groups a keep list keeps, in each series of its own.

    Args:
        snapshot: where they stand; metrics and tags are its.
        rows: numbers of groups that are checkpoints, no two alike, in any order.
        keep: what it names is the union of what its keys name.
    """
    named, unscored, without = (np.zeros(snapshot.n_groups, np.bool_) for _ in range(3))
    complete = rows[snapshot.complete[rows]]
    if keep.last is not None or keep.every_steps is not None:
        rising = _sorted(snapshot, complete)
        if keep.last is not None:
            named[rising[_from_end(snapshot.series[rising]) < keep.last]] = True
        if keep.every_steps is not None:
            named[_first_of_steps(snapshot, rising, keep.every_steps)] = True
    if keep.every_s is not None:
        named[_first_of_stretches(snapshot, complete, keep.every_s)] = True
    unscored_by: list[tuple[str, ...]] = []
    without_by: list[tuple[str, ...]] = []
    for best in keep.best:
        scores = scores_of(snapshot, complete, best)
        named[_best(snapshot, complete, scores.values, best)] = True
        unsure = scores.is_unscored | (np.isnan(scores.values) & snapshot.unread[complete])
        lacks = np.isnan(scores.values) & ~unsure
        unscored[complete[unsure]], without[complete[lacks]] = True, True
        unscored_by += [best.metrics] if unsure.any() else []
        without_by += [best.metrics] if lacks.any() else []
    if keep.tags:
        wanted = set(keep.tags)
        named[[group for group, tags in snapshot.tags.items() if not wanted.isdisjoint(tags)]] = True
    if keep.younger_s is not None:
        named[rows[snapshot.now_s - snapshot.created_s[rows] <= keep.younger_s]] = True
    return Kept(named[rows], unscored[rows], without[rows], tuple(unscored_by), tuple(without_by))


@dataclass(frozen=True, slots=True, eq=False)
class BestScores:
    """The metric that a `best` goes by, of some groups: float64[n_rows], NaN where there is none.

    is_unscored: bool[n_rows], no group of its series has any of the metrics.
    """

    values: NDArray[np.float64]
    is_unscored: _Flags


def scores_of(snapshot: Snapshot, complete: _Rows, best: Best) -> BestScores:
    """Of complete checkpoints the first of the metrics that any of their series has: two metrics are not compared."""
    _, run = np.unique(snapshot.series[complete], return_inverse=True)
    values = np.full(len(complete), np.nan)
    has = np.zeros(int(run.max(initial=-1)) + 1, np.bool_)
    for name in best.metrics:
        if name in snapshot.metrics:
            found = snapshot.metrics[name][complete]
            is_first = np.bincount(run, weights=~np.isnan(found), minlength=len(has)).astype(np.bool_) & ~has
            values = np.where(is_first[run], found, values)
            has |= is_first
    return BestScores(values, ~has[run])


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


def _best(snapshot: Snapshot, rows: _Rows, values: NDArray[np.float64], best: Best) -> _Rows:
    """Of equal values the higher step is the better. values: of each row."""
    rows, values = rows[~np.isnan(values)], values[~np.isnan(values)]
    worse = values if best.mode == "min" else -values
    rows = rows[np.lexsort((-rows, -snapshot.created_s[rows], -snapshot.step[rows], worse, snapshot.series[rows]))]
    return rows[_from_start(snapshot.series[rows]) < best.n]
