"""The metrics of checkpoints that rules ask for: from names, and for the rest from small files, read side by side."""

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
from tiercache.tier.columns import ROWS_AT_A_TIME, matches, split_keys
from tiercache.tier.listing import NO_CRC
from tiercache.tier.metrics import MAY_HOLD, metrics_of, read_metrics
from tiercache.tier.model import CHECKPOINT, HERE, RESTORED
from tiercache.tier.name_metrics import metrics_in
from tiercache.tier.retention import scores_of
from tiercache.tier.view import fits_size, largest_copies, rules_of

if TYPE_CHECKING:
    from tiercache.tier.copies import Copies
    from tiercache.tier.listing import Listed
    from tiercache.tier.model import Snapshot
    from tiercache.tier.stores import Stores
    from tiercache.tierfile import Best, TierFile

_THREADS = 16
_MAY_SAY = r"=|\d\.\d"


def wanted_metrics(file: TierFile) -> tuple[tuple[str, ...], ...]:
    """What keep lists of the file ask for: names of a metric, of which the first that a run has counts; sorted."""
    keeps = [keep for rule in file.rules for keep in rule.keep.values()]
    return tuple(sorted({best.metrics for keep in keeps for best in keep.best}))


class Scores:
    """Finds metrics of checkpoints.

    Attributes, after of():
        unread: groups with files that may hold metrics, none of which can be read; rising.
        in_files: group -> names of all metrics that its files have, of groups whose files were read.
    """

    def __init__(self, stores: Stores, tiers: Sequence[str], listed: Listed, copies: Copies) -> None:
        self._stores, self._tiers, self._listed, self._copies = stores, tiers, listed, copies
        self.unread = np.empty(0, np.int64)
        self.in_files: dict[int, frozenset[str]] = {}
        self._names: dict[frozenset[str], frozenset[str]] = {}  # each once: a million checkpoints have the same

    def of(
        self, wanted: Sequence[Sequence[str]], paths: pa.Array, checkpoints: NDArray[np.int64]
    ) -> dict[str, NDArray[np.float64]]:
        """float64[n_groups] of each name that is wanted, NaN where there is no such metric.

        Nothing is read where no rule asks for a metric, or a checkpoint's name has the first of each.

        Args:
            wanted: as wanted_metrics() has them.
            paths: of all groups.
            checkpoints: int64[m], groups.

        Raises:
            StoreError: a file is there and cannot be read now; what is best is not known then.
        """
        names = sorted({name for some in wanted for name in some})
        found = {name: np.full(len(paths), np.nan) for name in names}
        if not names:
            return found
        for groups in _parts(checkpoints):
            texts = paths.take(pa.array(groups))
            says = matches(texts, _MAY_SAY)
            last = split_keys(texts.filter(pa.array(says)))[2]
            for name, column in metrics_in(last, names).items():
                found[name][groups[says]] = column
        lacking = np.isnan(np.array([found[some[0]][checkpoints] for some in wanted])).any(axis=0)
        self._read(found, paths, checkpoints[lacking])
        return found

    def _read(self, found: dict[str, NDArray[np.float64]], paths: pa.Array, groups: NDArray[np.int64]) -> None:
        """Read what is lacking, from the fastest tier whose copy has a file and can be read."""
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
        """Groups that have a file with metrics -> the copy to read it from; None: it cannot be read."""
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
                asked[group] = copy if copies.state[copy] in (HERE, RESTORED) else None
        return asked

    def _holding(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of the rows of copies' objects that may hold metrics."""
        return rows[matches(self._listed.keys.take(pa.array(self._copies.row[rows])), MAY_HOLD)]

    def _one(self, readable: tuple[int, int, str]) -> Mapping[str, float] | None:
        _, copy, path = readable
        start, end = self._copies.start[copy : copy + 2].tolist()
        rows = self._copies.row[start:end]
        rows = rows[matches(self._listed.keys.take(pa.array(rows)), MAY_HOLD)]
        objects = self._listed.objects(rows, np.full(len(rows), NO_CRC))
        try:
            return read_metrics(self._stores.store(self._tiers[int(self._copies.tier[copy])]), objects, path)
        except StoreError as error:
            if error.retryable:
                raise
            return None


def _parts(rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """The rows, so many at a time that what is taken of them stays small."""
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        yield rows[start : start + ROWS_AT_A_TIME]


def _fill(found: dict[str, NDArray[np.float64]], group: int, metrics: Mapping[str, float]) -> None:
    """Note those of the metrics that are asked for and not known yet: a name says more than a file."""
    for name, column in found.items():
        if name in metrics and np.isnan(column[group]):
            column[group] = metrics[name]


# -- metrics that are not found ---------------------------------------------------------------------------------------

_MOST_NAMES = 200  # checkpoints of a run whose names are looked at for the metrics that the run has
_SHOWN = 10
_NO_WORD = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True, slots=True)
class MetricGap:
    """A metric that a keep list asks for and that no complete checkpoint of a run has: the keep list keeps all of them.

    Attributes:
        rule, tiers: whose keep lists ask.
        metrics: the names that are asked for.
        run: its checkpoints, as a glob.
        n_checkpoints: how many complete ones the run has.
        found: the metrics that the run has.
        likely: the one of them that is probably meant; None: none is like it.
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
        """For people."""
        lists = ", ".join(f"keep_{tier}" for tier in self.tiers)
        asked = " or ".join(map(repr, self.metrics))
        if self.found:
            more = ", ..." if len(self.found) > _SHOWN else ""
            there = f"found there: {', '.join(self.found[:_SHOWN])}{more}"
        else:
            there = "no metric at all is found there, in names or in files that can be read"
        meant = f"; did you mean {self.likely!r}?" if self.likely else ""
        return (
            f"{self.rule}: no checkpoint of {self.run} has the metric {asked}, so that {lists} keeps all "
            f"{self.n_checkpoints:,} of them and none is deleted; {there}{meant}"
        )


@dataclass(frozen=True, slots=True)
class PassedOver:
    """Complete checkpoints without a metric that others of their runs have: `best` does not keep them.

    paths: some of them.
    """

    rule: str
    metrics: tuple[str, ...]
    n_checkpoints: int
    n_runs: int
    paths: tuple[str, ...]

    @property
    def text(self) -> str:
        """For people."""
        asked = " or ".join(map(repr, self.metrics))
        more = ", ..." if self.n_checkpoints > len(self.paths) else ""
        return (
            f"{self.rule}: {self.n_checkpoints:,} checkpoints have no metric {asked}, which others of their run have: "
            f"`best` does not keep them: {', '.join(self.paths)}{more}"
        )


def metric_gaps(
    snapshot: Snapshot, file: TierFile, in_files: Mapping[int, frozenset[str]]
) -> tuple[tuple[MetricGap, ...], tuple[PassedOver, ...]]:
    """What keep lists ask for and do not find: in whole runs, and in some checkpoints of a run.

    Args:
        snapshot: what there is.
        file: its rules.
        in_files: group -> names of the metrics that its files have.
    """
    gaps: list[MetricGap] = []
    passed: list[PassedOver] = []
    if not wanted_metrics(file):
        return (), ()
    rule_of, n_bytes = rules_of(snapshot, file), largest_copies(snapshot)
    for number, rule in enumerate(file.rules):
        rows = np.flatnonzero((rule_of == number) & (snapshot.kind == CHECKPOINT) & snapshot.complete)
        rows = rows[fits_size(rule, n_bytes[rows])]
        asked: dict[tuple[str, ...], tuple[Best, list[str]]] = {}
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
                passed.append(PassedOver(rule.name, metrics, len(without), n_runs, paths))
    return tuple(gaps), tuple(passed)


def _names_in(snapshot: Snapshot, run: NDArray[np.int64], in_files: Mapping[int, frozenset[str]]) -> tuple[str, ...]:
    """All metrics that checkpoints of a run have, sorted."""
    found: set[str] = set()
    for group in run.tolist():
        found |= in_files.get(group, frozenset())
    for group in run[:_MOST_NAMES].tolist():
        found |= metrics_of(snapshot.paths[group].as_py().rpartition("/")[2]).keys()
    return tuple(sorted(found))


def _run_name(snapshot: Snapshot, run: NDArray[np.int64]) -> str:
    """The checkpoints of a run as a glob: "checkpoints/run7/step-*"."""
    folder, slash, name = snapshot.paths[int(run[0])].as_py().rpartition("/")
    return f"{folder}{slash}{re.sub('[0-9]+', '*', name)}"


def _likely(metrics: Sequence[str], found: Sequence[str]) -> str | None:
    """The one of the metrics found that is most like one of those asked for; None: none is like it."""
    plain = {_NO_WORD.sub("_", name.lower()): name for name in reversed(found)}
    for metric in metrics:
        near = get_close_matches(_NO_WORD.sub("_", metric.lower()), plain, n=1)
        if near:
            return plain[near[0]]
    return None
