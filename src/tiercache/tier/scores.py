"""The metrics of checkpoints that rules ask for: from names, and for the rest from small files, read side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.errors import StoreError
from tiercache.tier.columns import ROWS_AT_A_TIME, matches, split_keys
from tiercache.tier.listing import NO_CRC
from tiercache.tier.metrics import FILES, read_metrics
from tiercache.tier.model import HERE, RESTORED
from tiercache.tier.name_metrics import metrics_in

if TYPE_CHECKING:
    from tiercache.tier.copies import Copies
    from tiercache.tier.listing import Listed
    from tiercache.tier.stores import Stores
    from tiercache.tierfile import TierFile

_THREADS = 16
_MAY_HOLD = rf"(?:^|/)(?:{'|'.join(FILES)})$".replace(".json", r"\.json")
_MAY_SAY = r"=|\d\.\d"


def wanted_metrics(file: TierFile) -> tuple[str, ...]:
    """The metrics that any keep list of the file asks for, sorted."""
    keeps = [keep for rule in file.rules for keep in rule.keep.values()]
    return tuple(sorted({best.metric for keep in keeps for best in keep.best}))


class Scores:
    """Finds metrics of checkpoints. unread: (how many could not be had, some of their paths), after of()."""

    def __init__(self, stores: Stores, tiers: Sequence[str], listed: Listed, copies: Copies) -> None:
        self._stores, self._tiers, self._listed, self._copies = stores, tiers, listed, copies
        self.unread: tuple[int, tuple[str, ...]] = 0, ()

    def of(
        self, names: Sequence[str], paths: pa.Array, checkpoints: NDArray[np.int64]
    ) -> dict[str, NDArray[np.float64]]:
        """float64[n_groups] of each name, NaN where there is no such metric.

        Nothing is read where no rule asks for a metric, or all of a checkpoint's stand in its name.

        Args:
            names: the metrics.
            paths: of all groups.
            checkpoints: int64[m], groups.

        Raises:
            StoreError: a file is there and cannot be read now; what is best is not known then.
        """
        found = {name: np.full(len(paths), np.nan) for name in names}
        if not names:
            return found
        for groups in _parts(checkpoints):
            texts = paths.take(pa.array(groups))
            says = matches(texts, _MAY_SAY)
            last = split_keys(texts.filter(pa.array(says)))[2]
            for name, column in metrics_in(last, names).items():
                found[name][groups[says]] = column
        lacking = np.isnan(np.array([found[name][checkpoints] for name in names])).any(axis=0)
        self._read(found, paths, checkpoints[lacking])
        return found

    def _read(self, found: dict[str, NDArray[np.float64]], paths: pa.Array, groups: NDArray[np.int64]) -> None:
        """Read what is lacking, from the fastest tier whose copy has a file and can be read."""
        asked = self._asked(groups)
        unread = sorted(set(asked) - {group for group, copy in asked.items() if copy is not None})
        readable = [(group, copy) for group, copy in asked.items() if copy is not None]
        if readable:
            with ThreadPoolExecutor(min(_THREADS, len(readable)), "tiercache-metrics") as pool:
                for (group, _), metrics in zip(readable, pool.map(self._one, readable), strict=True):
                    if metrics is None:
                        unread.append(group)
                    else:
                        _fill(found, group, metrics)
        self.unread = len(unread), tuple(paths[group].as_py() for group in sorted(unread)[:10])

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
        return rows[matches(self._listed.keys.take(pa.array(self._copies.row[rows])), _MAY_HOLD)]

    def _one(self, readable: tuple[int, int]) -> Mapping[str, float] | None:
        copy = readable[1]
        start, end = self._copies.start[copy : copy + 2].tolist()
        rows = self._copies.row[start:end]
        rows = rows[matches(self._listed.keys.take(pa.array(rows)), _MAY_HOLD)]
        objects = self._listed.objects(rows, np.full(len(rows), NO_CRC))
        try:
            return read_metrics(self._stores.store(self._tiers[int(self._copies.tier[copy])]), objects)
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
