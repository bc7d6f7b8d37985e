"""Evaluates keep lists: which checkpoints each keep list keeps. Pure, with one sort over all runs for each key.

Steps are compared as numbers. Among equal steps, the checkpoint that was written later ranks higher, and then the later
row. An incomplete checkpoint is kept only by its tags and its age, so that it does not displace a complete one.

If no checkpoint of a run has the metric of a `best`, the keep list keeps all checkpoints of that run, because the name
of the metric may be misspelt or its files unreadable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tiercache.tier.model import CHECKPOINT

if TYPE_CHECKING:
    from tiercache.tier.model import Snapshot
    from tiercache.tierfile import BestMetric, KeepList

_Rows = NDArray[np.int64]
_Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class KeepResult:
    """The result of a keep list for some groups; bool[n_rows] each, in the order of the rows.

    Attributes:
        named: Whether the list keeps the group.
        unscored: Whether `best` cannot be evaluated for the group, so that the group is kept.
        without: Whether the group lacks a metric of `best` that another group of its run has, so that `best` ignores
            it.
        unscored_by: Metrics of each `best` for which any group is unscored.
        without_by: Metrics of each `best` that any group lacks.
    """

    named: _Flags
    unscored: _Flags
    without: _Flags
    unscored_by: tuple[tuple[str, ...], ...] = ()
    without_by: tuple[tuple[str, ...], ...] = ()


def evaluate_keep_list(snapshot: Snapshot, rows: _Rows, keep: KeepList) -> KeepResult:
    """Return which of the groups a keep list keeps, evaluated per run.

    Args:
        snapshot: Snapshot, for its columns, metrics and tags.
        rows: Group numbers of checkpoints, unique, in any order.
        keep: Keep list; it keeps the union of what its keys keep.
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
    return KeepResult(named[rows], unscored[rows], without[rows], tuple(unscored_by), tuple(without_by))


@dataclass(frozen=True, slots=True, eq=False)
class BestScores:
    """Values of the metric of a `best`.

    Attributes:
        values: float64[n_rows], NaN where the group has no value.
        is_unscored: bool[n_rows], whether no group of the run has any of the metrics.
    """

    values: NDArray[np.float64]
    is_unscored: _Flags


def scores_of(snapshot: Snapshot, complete: _Rows, best: BestMetric) -> BestScores:
    """Return the metric of complete checkpoints: per run, the first metric that any of its checkpoints has.

    One metric is used per run, because values of two metrics cannot be compared.
    """
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


def find_newest(snapshot: Snapshot) -> _Flags:
    """Return whether each group is the newest complete checkpoint of its run; bool[n_groups]."""
    found = np.zeros(snapshot.n_groups, np.bool_)
    rows = _sorted(snapshot, np.flatnonzero((snapshot.kind == CHECKPOINT) & snapshot.complete))
    found[rows[_from_end(snapshot.series[rows]) == 0]] = True
    return found


def _sorted(snapshot: Snapshot, rows: _Rows) -> _Rows:
    """Sort rows by run and step."""
    columns = (rows, snapshot.created_s[rows], snapshot.step[rows], snapshot.series[rows])
    return rows[np.lexsort(columns)]


def _begins(*columns: NDArray[np.generic]) -> _Flags:
    """Return whether each row differs from the previous row in any column; bool[n]."""
    begins = np.ones(len(columns[0]), np.bool_)
    begins[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return begins


def _from_start(series: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return, for each row of a sorted column, the number of earlier rows of its run; int64[n]."""
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


def _best(snapshot: Snapshot, rows: _Rows, values: NDArray[np.float64], best: BestMetric) -> _Rows:
    """Return the best rows of each run. Among equal values, the higher step is better. values: Value of each row."""
    rows, values = rows[~np.isnan(values)], values[~np.isnan(values)]
    worse = values if best.mode == "min" else -values
    rows = rows[np.lexsort((-rows, -snapshot.created_s[rows], -snapshot.step[rows], worse, snapshot.series[rows]))]
    return rows[_from_start(snapshot.series[rows]) < best.n]
