"""The metrics of checkpoints that rules use: from names, and otherwise from small files, read in parallel.

Also reports metrics that a keep list uses and that no checkpoint of a run, or only some checkpoints, have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.errors import StoreError
from tiercache.tier.columns import ROWS_AT_A_TIME, match_regex, split_keys
from tiercache.tier.listing import NO_CRC
from tiercache.tier.metrics import MAY_HOLD, metrics_in_name, read_metrics
from tiercache.tier.model import CHECKPOINT, READABLE, RESTORED
from tiercache.tier.name_metrics import metrics_in_names
from tiercache.tier.retention import scores_of
from tiercache.tier.view import fits_size, largest_copies, rules_of

if TYPE_CHECKING:
    from tiercache.tier.copies import Copies
    from tiercache.tier.listing import Listing
    from tiercache.tier.model import Snapshot
    from tiercache.tier.stores import Stores
    from tiercache.tierfile import BestMetric, RuleFile

_THREADS = 16
_MAY_SAY = r"=|\d\.\d"


def wanted_metrics(file: RuleFile) -> tuple[tuple[str, ...], ...]:
    """Return the metrics that keep lists use, sorted.

    Each is a tuple of names; a run uses the first name that any of its checkpoints has.
    """
    keeps = [keep for rule in file.rules for keep in rule.keep.values()]
    return tuple(sorted({best.metrics for keep in keeps for best in keep.best}))


class MetricReader:
    """Finds the metrics of checkpoints.

    Attributes (valid after of()):
        unread: int64[k], ascending: groups with files that may hold metrics, none of which can be read.
        in_files: Group to the names of all metrics in its files, for groups whose files were read.
    """

    def __init__(self, stores: Stores, tiers: Sequence[str], listed: Listing, copies: Copies) -> None:
        self._stores, self._tiers, self._listed, self._copies = stores, tiers, listed, copies
        self.unread = np.empty(0, np.int64)
        self.in_files: dict[int, frozenset[str]] = {}
        self._names: dict[frozenset[str], frozenset[str]] = {}  # interned: a million checkpoints have equal sets

    def of(
        self, wanted: Sequence[Sequence[str]], paths: pa.Array, checkpoints: NDArray[np.int64]
    ) -> dict[str, NDArray[np.float64]]:
        """Return each wanted metric as float64[n_groups], NaN where there is none.

        No file is read if no rule uses a metric, or if a checkpoint's name contains the first name of each metric.

        Args:
            wanted: Result of wanted_metrics().
            paths: Paths of all groups.
            checkpoints: int64[m], group numbers.

        Raises:
            StoreError: A file exists and cannot be read now, so that the best checkpoints are unknown.
        """
        names = sorted({name for some in wanted for name in some})
        found = {name: np.full(len(paths), np.nan) for name in names}
        if not names:
            return found
        for groups in _parts(checkpoints):
            texts = paths.take(pa.array(groups))
            says = match_regex(texts, _MAY_SAY)
            last = split_keys(texts.filter(pa.array(says)))[2]
            for name, column in metrics_in_names(last, names).items():
                found[name][groups[says]] = column
        lacking = np.isnan(np.array([found[some[0]][checkpoints] for some in wanted])).any(axis=0)
        self._read(found, paths, checkpoints[lacking])
        return found

    def _read(self, found: dict[str, NDArray[np.float64]], paths: pa.Array, groups: NDArray[np.int64]) -> None:
        """Read the missing metrics of each group from the fastest tier with a readable copy that has a metrics file."""
        asked = self._asked(groups)
        unread = [group for group, copy in asked.items() if copy is None]
        readable = [(group, copy, paths[group].as_py()) for group, copy in asked.items() if copy is not None]
        if readable:
            with ThreadPoolExecutor(min(_THREADS, len(readable)), "tiercache-metrics") as pool:
                for (group, *_), metrics in zip(readable, pool.map(self._one, readable), strict=True):
                    if metrics is None:
                        unread.append(group)
                    else:
                        _fill(found, group, metrics)
                        names = frozenset(metrics)
                        self.in_files[group] = self._names.setdefault(names, names)
        self.unread = np.array(sorted(unread), np.int64)

    def _asked(self, groups: NDArray[np.int64]) -> dict[int, int | None]:
        """Return the groups that have a metrics file, each with the copy to read; None: no such copy is readable."""
        copies = self._copies
        wanted = np.zeros(int(copies.group.max(initial=-1)) + 1, np.bool_)
        wanted[groups] = True
        copy_of = np.repeat(np.arange(len(copies.group)), copies.n_objects)
        rows = np.flatnonzero(wanted[copies.group[copy_of]])
        rows = np.concatenate([rows[:0], *(self._holding(some) for some in _parts(rows))])
        asked: dict[int, int | None] = {}
        for copy in np.unique(copy_of[rows]).tolist():
            group = int(copies.group[copy])
            if asked.get(group) is None:
                asked[group] = copy if copies.state[copy] in (READABLE, RESTORED) else None
        return asked

    def _holding(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows of objects that may hold metrics."""
        return rows[match_regex(self._listed.keys.take(pa.array(self._copies.row[rows])), MAY_HOLD)]

    def _one(self, readable: tuple[int, int, str]) -> Mapping[str, float] | None:
        _, copy, path = readable
        start, end = self._copies.start[copy : copy + 2].tolist()
        rows = self._copies.row[start:end]
        rows = rows[match_regex(self._listed.keys.take(pa.array(rows)), MAY_HOLD)]
        objects = self._listed.objects(rows, np.full(len(rows), NO_CRC))
        try:
            return read_metrics(self._stores.store(self._tiers[int(self._copies.tier[copy])]), objects, path)
        except StoreError as error:
            if error.retryable:
                raise
            return None


def _parts(rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Yield the rows in parts, so that temporary arrays stay small."""
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        yield rows[start : start + ROWS_AT_A_TIME]


def _fill(found: dict[str, NDArray[np.float64]], group: int, metrics: Mapping[str, float]) -> None:
    """Record the wanted metrics that are still missing; a metric in the name has precedence over one in a file."""
    for name, column in found.items():
        if name in metrics and np.isnan(column[group]):
            column[group] = metrics[name]


# -- missing metrics -------------------------------------------------------------------------------------------------

_MOST_NAMES = 200  # number of checkpoint names per run that are parsed to list the run's metrics in a message
_SHOWN = 10
_NO_WORD = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True, slots=True)
class MetricGap:
    """A metric of a keep list that no complete checkpoint of a run has, so that the list keeps all of the run.

    Attributes:
        rule: Name of the rule.
        tiers: Tiers whose keep lists use the metric.
        metrics: Names of the metric in the keep list.
        run: Checkpoints of the run, as a glob.
        n_checkpoints: Number of complete checkpoints of the run.
        found: Metrics that the run has.
        likely: Metric of the run with the most similar name; None: there is no similar name.
    """

    rule: str
    tiers: tuple[str, ...]
    metrics: tuple[str, ...]
    run: str
    n_checkpoints: int
    found: tuple[str, ...]
    likely: str | None

    @property
    def text(self) -> str:
        """The message for people."""
        lists = ", ".join(f"keep_{tier}" for tier in self.tiers)
        asked = " or ".join(map(repr, self.metrics))
        if self.found:
            more = ", ..." if len(self.found) > _SHOWN else ""
            there = f"found: {', '.join(self.found[:_SHOWN])}{more}"
        else:
            there = "no metric was found, neither in names nor in readable files"
        meant = f"; did you mean {self.likely!r}?" if self.likely else ""
        return (
            f"{self.rule}: no checkpoint of {self.run} has the metric {asked}, so that {lists} keeps all "
            f"{self.n_checkpoints:,} of them and none is deleted; {there}{meant}"
        )


@dataclass(frozen=True, slots=True)
class UnscoredCheckpoints:
    """Complete checkpoints without a metric that others of their runs have, so that `best` does not keep them.

    Attributes:
        rule: Name of the rule.
        metrics: Names of the metric in the keep list.
        n_checkpoints: Number of such checkpoints.
        n_runs: Number of their runs.
        paths: Paths of the first few.
    """

    rule: str
    metrics: tuple[str, ...]
    n_checkpoints: int
    n_runs: int
    paths: tuple[str, ...]

    @property
    def text(self) -> str:
        """The message for people."""
        asked = " or ".join(map(repr, self.metrics))
        more = ", ..." if self.n_checkpoints > len(self.paths) else ""
        return (
            f"{self.rule}: {self.n_checkpoints:,} checkpoints lack the metric {asked}, which others of their run have, "
            f"so that `best` does not keep them: {', '.join(self.paths)}{more}"
        )


def metric_gaps(
    snapshot: Snapshot, file: RuleFile, in_files: Mapping[int, frozenset[str]]
) -> tuple[tuple[MetricGap, ...], tuple[UnscoredCheckpoints, ...]]:
    """Return the metrics that keep lists use and that are missing: in whole runs, and in some checkpoints of a run.

    Args:
        snapshot: Snapshot.
        file: Rule file.
        in_files: Group to the names of the metrics in its files.
    """
    gaps: list[MetricGap] = []
    passed: list[UnscoredCheckpoints] = []
    if not wanted_metrics(file):
        return (), ()
    rule_of, n_bytes = rules_of(snapshot, file), largest_copies(snapshot)
    for number, rule in enumerate(file.rules):
        rows = np.flatnonzero((rule_of == number) & (snapshot.kind == CHECKPOINT) & snapshot.complete)
        rows = rows[fits_size(rule, n_bytes[rows])]
        asked: dict[tuple[str, ...], tuple[BestMetric, list[str]]] = {}
        for tier, keep in rule.keep.items():
            for best in keep.best:
                asked.setdefault(best.metrics, (best, []))[1].append(tier)
        for metrics, (best, tiers) in asked.items():
            scores = scores_of(snapshot, rows, best)
            unscored = rows[scores.is_unscored]
            for series in np.unique(snapshot.series[unscored]).tolist():
                run = unscored[snapshot.series[unscored] == series]
                found = _names_in(snapshot, run, in_files)
                facts = (rule.name, tuple(dict.fromkeys(tiers)), metrics, _run_name(snapshot, run), len(run))
                gaps.append(MetricGap(*facts, found, _likely(metrics, found)))
            without = rows[np.isnan(scores.values) & ~scores.is_unscored & ~snapshot.unread[rows]]
            if len(without):
                paths = tuple(snapshot.paths[row].as_py() for row in without[:3].tolist())
                n_runs = len(np.unique(snapshot.series[without]))
                passed.append(UnscoredCheckpoints(rule.name, metrics, len(without), n_runs, paths))
    return tuple(gaps), tuple(passed)


def _names_in(snapshot: Snapshot, run: NDArray[np.int64], in_files: Mapping[int, frozenset[str]]) -> tuple[str, ...]:
    """Return the names of all metrics of a run's checkpoints, sorted."""
    found: set[str] = set()
    for group in run.tolist():
        found |= in_files.get(group, frozenset())
    for group in run[:_MOST_NAMES].tolist():
        found |= metrics_in_name(snapshot.paths[group].as_py().rpartition("/")[2]).keys()
    return tuple(sorted(found))


def _run_name(snapshot: Snapshot, run: NDArray[np.int64]) -> str:
    """Return the checkpoints of a run as a glob: "checkpoints/run7/step-*"."""
    folder, slash, name = snapshot.paths[int(run[0])].as_py().rpartition("/")
    return f"{folder}{slash}{re.sub('[0-9]+', '*', name)}"


def _likely(metrics: Sequence[str], found: Sequence[str]) -> str | None:
    """Return the found metric whose name is most similar to one of the wanted names; None: there is no similar name."""
    plain = {_NO_WORD.sub("_", name.lower()): name for name in reversed(found)}
    for metric in metrics:
        near = get_close_matches(_NO_WORD.sub("_", metric.lower()), plain, n=1)
        if near:
            return plain[near[0]]
    return None
