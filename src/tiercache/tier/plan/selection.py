"""Selects groups: which rule, pins and keep lists apply to each, and which tiers hold copies of it.

The last checkpoints of a run are those that were written last, whatever their steps: a run that restarts at a lower
step goes on from them. Steps are compared as numbers, within the part of a run between two restarts. An incomplete
checkpoint is kept only by its age, so that it does not displace a complete one. If no checkpoint of a run
has the metric of a `best`, the keep list keeps all checkpoints of that run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.tier.costs import leaves_and_streams
from tiercache.tier.model import CHECKPOINT, KINDS, READABLE, RESTORED
from tiercache.tier.text_columns import first_match

if TYPE_CHECKING:
    from tiercache.prices import Prices
    from tiercache.tier.model import Snapshot
    from tiercache.tier.rules import BestMetric, KeepList, Rule, RuleFile

Rows = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class SnapshotIndex:
    """The snapshot indexed for the policy. In two-dimensional columns, tiers are rows and groups are columns."""

    snapshot: Snapshot
    file: RuleFile
    prices: Sequence[Prices | None]  # of each tier; None: unknown
    at: NDArray[np.int32]  # [n_tiers, n_groups], number of the group's copy in the tier; -1: none
    readable: Flags  # [n_tiers, n_groups], whether the copy can be read now
    whole: Flags  # [n_tiers, n_groups]
    reliable: Flags  # [n_tiers, n_groups], whether the copy is whole and verified
    rule: NDArray[np.int16]  # [n_groups], number of the rule that applies to the group; -1: none
    pin: NDArray[np.int16]  # [n_groups], number of the first pin in force that matches the group; -1: none
    newest: Flags  # [n_groups], see find_newest()
    age_s: NDArray[np.float64]  # [n_groups], seconds since the group was written
    unused_s: NDArray[np.float64]  # [n_groups], since its last use, or since it was written if that is later
    group_bytes: NDArray[np.int64]  # [n_groups], size of the largest copy
    same_url: Flags  # [n_tiers, n_tiers]: a move between the tiers changes the storage class
    leaves: Flags  # [n_tiers, n_tiers], whether a copy between the tiers leaves the provider's region
    streams: Flags  # [n_tiers, n_tiers], whether it passes through this machine; otherwise the store copies objects

    @classmethod
    def of(cls, snapshot: Snapshot, file: RuleFile, prices: Sequence[Prices | None]) -> SnapshotIndex:
        """Index a snapshot. Raises ValueError if its tiers differ from those of the rule file."""
        names = tuple(tier.name for tier in file.tiers)
        if snapshot.tiers != names:
            raise ValueError(f"the snapshot has tiers {snapshot.tiers}, and {file.path} has {names}: take a new one")
        shape = len(names), snapshot.n_groups

        def spread(column: NDArray[np.bool_]) -> Flags:
            out = np.zeros(shape, np.bool_)
            out[snapshot.tier, snapshot.group] = column
            return out

        at = np.full(shape, -1, np.int32)
        at[snapshot.tier, snapshot.group] = np.arange(snapshot.n_copies, dtype=np.int32)
        pins = [pin for pin in file.pins if pin.until_s is None or pin.until_s > snapshot.now_s]
        # The snapshot has no objects: the path of a folder stands for the objects that `run/step-10/**` matches.
        pin = first_match(snapshot.paths, [(pin.match + covered_folders(pin.match), ()) for pin in pins])
        tiers = [(tier.url.rstrip("/"), price) for tier, price in zip(file.tiers, prices, strict=True)]
        routes = np.array(
            [[(src == dst, *leaves_and_streams(src, dst, old, new)) for dst, new in tiers] for src, old in tiers]
        )
        return cls(
            snapshot=snapshot,
            file=file,
            prices=prices,
            at=at,
            readable=spread((snapshot.state == READABLE) | (snapshot.state == RESTORED)),
            whole=spread(snapshot.whole),
            reliable=spread(snapshot.whole & snapshot.verified),
            rule=rules_of(snapshot, file),
            pin=np.append([file.pins.index(pin) for pin in pins], -1).astype(np.int16)[pin],
            newest=find_newest(snapshot),
            age_s=snapshot.now_s - snapshot.created_s,
            unused_s=snapshot.now_s - np.maximum(snapshot.last_use_s, snapshot.created_s),
            group_bytes=largest_copies(snapshot),
            same_url=routes[:, :, 0],
            leaves=routes[:, :, 1],
            streams=routes[:, :, 2],
        )

    @property
    def n_tiers(self) -> int:
        """Number of tiers."""
        return len(self.at)

    def name(self, tier: int) -> str:
        """Return the name of a tier."""
        return self.snapshot.tiers[tier]

    def has(self, tier: int, rows: Rows) -> Flags:
        """Return whether each of the groups has a copy in the tier; bool[n_rows]."""
        return np.asarray(self.at[tier, rows] >= 0)


def rules_of(snapshot: Snapshot, file: RuleFile) -> NDArray[np.int16]:
    """Return the number of the first rule whose globs and kind match each group; -1: none. int16[n_groups]."""
    found = np.full(snapshot.n_groups, -1, np.int16)
    for number, kind in enumerate(KINDS):
        of_kind = snapshot.kind == number
        rules = [i for i, rule in enumerate(file.rules) if rule.kind in (None, kind)]
        globs = [(file.rules[i].match, file.rules[i].exclude) for i in rules]
        hits = first_match(snapshot.paths.filter(pa.array(of_kind)), globs)
        found[of_kind] = np.append(rules, -1).astype(np.int16)[hits]
    return found


def fits_size(rule: Rule, n_bytes: NDArray[np.int64]) -> Flags:
    """Return whether groups of these sizes satisfy larger_than and smaller_than of a rule; bool[n]."""
    fits = np.ones(len(n_bytes), np.bool_)
    if rule.larger_than_bytes is not None:
        fits &= n_bytes > rule.larger_than_bytes
    if rule.smaller_than_bytes is not None:
        fits &= n_bytes < rule.smaller_than_bytes
    return fits


def largest_copies(snapshot: Snapshot) -> NDArray[np.int64]:
    """Return the size in bytes of each group's largest copy; int64[n_groups]."""
    n_bytes = np.zeros(snapshot.n_groups, np.int64)
    np.maximum.at(n_bytes, snapshot.group, snapshot.n_bytes)
    return n_bytes


def covered_folders(globs: Sequence[str]) -> tuple[str, ...]:
    """Return the folders that `**` globs cover completely: "a/b" for "a/b/**"."""
    return tuple(glob.removesuffix("/**") for glob in globs if glob.endswith("/**") and glob != "/**")


# -- keep lists -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class KeepResult:
    """The result of a keep list for some groups, in the order of the rows."""

    named: Flags  # whether the list keeps the group
    unscored: Flags  # whether `best` cannot be evaluated for the group, so that the group is kept
    without: Flags  # whether the group lacks a metric of `best` that others of its run have: `best` ignores it
    unscored_by: tuple[tuple[str, ...], ...] = ()  # metrics of each `best` for which any group is unscored
    without_by: tuple[tuple[str, ...], ...] = ()  # metrics of each `best` that any group lacks


def evaluate_keep_list(snapshot: Snapshot, rows: Rows, keep: KeepList) -> KeepResult:
    """Return which of the groups a keep list keeps: the union of what its keys keep, evaluated per run.

    rows: Group numbers of checkpoints, unique, in any order.
    """
    named, unscored, without = (np.zeros(snapshot.n_groups, np.bool_) for _ in range(3))
    complete = rows[snapshot.complete[rows]]
    if keep.last is not None or keep.every_steps is not None:
        written = _by_time(snapshot, complete)
        if keep.last is not None:
            named[written[_from_end(snapshot.run[written]) < keep.last]] = True
        if keep.every_steps is not None:
            named[_first_of_steps(snapshot, written, keep.every_steps)] = True
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
    if keep.younger_s is not None:
        named[rows[snapshot.now_s - snapshot.created_s[rows] <= keep.younger_s]] = True
    return KeepResult(named[rows], unscored[rows], without[rows], tuple(unscored_by), tuple(without_by))


@dataclass(frozen=True, slots=True, eq=False)
class BestScores:
    """Values of the metric of a `best`, for some groups."""

    values: NDArray[np.float64]  # NaN where the group has no value
    is_unscored: Flags  # whether no group of the run has any of the metrics


def scores_of(snapshot: Snapshot, complete: Rows, best: BestMetric) -> BestScores:
    """Return the metric of complete checkpoints: per run, the first metric that any of its checkpoints has.

    One metric is used per run, because values of two metrics cannot be compared.
    """
    _, run = np.unique(snapshot.run[complete], return_inverse=True)
    values = np.full(len(complete), np.nan)
    has = np.zeros(int(run.max(initial=-1)) + 1, np.bool_)
    for name in best.metrics:
        if name in snapshot.metrics:
            found = snapshot.metrics[name][complete]
            is_first = np.bincount(run, weights=~np.isnan(found), minlength=len(has)).astype(np.bool_) & ~has
            values = np.where(is_first[run], found, values)
            has |= is_first
    return BestScores(values, ~has[run])


def find_newest(snapshot: Snapshot) -> Flags:
    """Return whether each group is the newest complete checkpoint of its run; bool[n_groups].

    The newest is the one that was written last. The one with the highest step counts as newest, too: where the catalog
    that knows when moved checkpoints were written is lost, copies of old checkpoints look as if they were written last.
    """
    found = np.zeros(snapshot.n_groups, np.bool_)
    complete = np.flatnonzero((snapshot.kind == CHECKPOINT) & snapshot.complete)
    run, step, created_s = snapshot.run[complete], snapshot.step[complete], snapshot.created_s[complete]
    for order in (np.lexsort((complete, step, created_s, run)), np.lexsort((complete, created_s, step, run))):
        rows = complete[order]
        found[rows[_from_end(snapshot.run[rows]) == 0]] = True
    return found


def _by_time(snapshot: Snapshot, rows: Rows) -> Rows:
    """Sort rows by run and time of writing; by step where the times are equal."""
    return rows[np.lexsort((rows, snapshot.step[rows], snapshot.created_s[rows], snapshot.run[rows]))]


def _begins(*columns: NDArray[np.generic]) -> Flags:
    """Return whether each row differs from the previous row in any column; bool[n]."""
    begins = np.ones(len(columns[0]), np.bool_)
    begins[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return begins


def _from_start(run: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return, for each row of a sorted column, the number of earlier rows of its run; int64[n]."""
    starts = np.flatnonzero(_begins(run))
    positions = np.arange(len(run))
    return positions - np.repeat(starts, np.diff(np.append(starts, len(run))))


def _from_end(run: NDArray[np.int32]) -> NDArray[np.int64]:
    return _from_start(run[::-1])[::-1]


def _first_of_steps(snapshot: Snapshot, written: Rows, every: int) -> Rows:
    """Return the first rows at or after each multiple, counted anew after each restart. written: Rows by time."""
    rows = written[snapshot.step[written] >= 0]
    run, step = snapshot.run[rows], snapshot.step[rows]
    restarts = np.zeros(len(rows), np.int64)
    restarts[1:] = np.cumsum((run[1:] == run[:-1]) & (step[1:] < step[:-1]))
    return rows[_begins(run, restarts, step // every)]


def _first_of_stretches(snapshot: Snapshot, rows: Rows, every_s: float) -> Rows:
    rows = rows[np.lexsort((rows, snapshot.created_s[rows], snapshot.run[rows]))]
    run, created_s = snapshot.run[rows], snapshot.created_s[rows]
    starts = np.flatnonzero(_begins(run))
    first_s = np.repeat(created_s[starts], np.diff(np.append(starts, len(rows))))
    return rows[_begins(run, np.floor((created_s - first_s) / every_s))]


def _best(snapshot: Snapshot, rows: Rows, values: NDArray[np.float64], best: BestMetric) -> Rows:
    """Return the best rows of each run. Among equal values, the higher step is better. values: Value of each row."""
    rows, values = rows[~np.isnan(values)], values[~np.isnan(values)]
    worse = values if best.mode == "min" else -values
    rows = rows[np.lexsort((-rows, -snapshot.created_s[rows], -snapshot.step[rows], worse, snapshot.run[rows]))]
    return rows[_from_start(snapshot.run[rows]) < best.n]
