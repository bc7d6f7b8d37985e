"""Which shards of a data set a verb is about, in which order: globs, a list, a share, what a training reads first."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from tiercache.cli.options import parse_rate, parse_share, parse_size
from tiercache.cli.training import GROUP_BYTES, Training, epoch_reads, first_bytes, read_first
from tiercache.pack.files import selected

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.shard.segments import ShardTable

_RANKS = re.compile(r"(\d+)(?:-(\d+))?/(\d+)")


@dataclass(frozen=True, slots=True)
class Choice:
    """Shards, as the flags say it; None: not said. Of the parts of it each leaves fewer, in the order that they have.

    share: the first so many bytes of what else is chosen; first_bytes: the same, as a size; files: names of shards,
    whose order holds where there is no training.
    """

    include: Sequence[str] | None = None
    exclude: Sequence[str] | None = None
    files: Sequence[str] | None = None
    training: Training | None = None
    share: float = 1.0
    first_bytes: float | None = None

    def shards(self, table: ShardTable) -> NDArray[np.int64]:
        """The chosen shards, int64[m].

        Raises:
            ValueError: a name that the data set has not, or an order that cannot be.
        """
        names = table.names.to_pylist() if self.include or self.exclude or self.files is not None else []
        shards = self._in_order(table, names)
        if self.include or self.exclude:
            wanted = [selected(names[i], self.include or (), self.exclude or ()) for i in shards.tolist()]
            shards = shards[np.array(wanted, bool)]
        limit_bytes = self.share * int(table.n_bytes[shards].sum())
        if self.first_bytes is not None:
            limit_bytes = min(limit_bytes, self.first_bytes)
        return first_bytes(shards, table.n_bytes, limit_bytes)

    def _in_order(self, table: ShardTable, names: Sequence[str]) -> NDArray[np.int64]:
        shards = np.arange(len(table), dtype=np.int64)
        if self.training is not None:
            reads = epoch_reads(table.n_records, table.n_bytes, self.training)
            shards = read_first(list(reads.values()))
        if self.files is None:
            return shards
        listed = _numbers(self.files, names)
        return listed if self.training is None else shards[np.isin(shards, listed)]


def _numbers(files: Sequence[str], names: Sequence[str]) -> NDArray[np.int64]:
    """Numbers of shards by their names, each once."""
    known = {name: i for i, name in enumerate(names)}
    missing = [name for name in files if name not in known]
    if missing:
        raise ValueError(f"--files-from: the data set has no shard {missing[0]!r} (`ls` shows the names)")
    return np.array(list(dict.fromkeys(known[name] for name in files)), np.int64)


@dataclass(frozen=True, slots=True)
class OrderFlags:
    """The flags of a training's order, as they were given."""

    seed: int | None = None
    epoch: int | None = None
    ranks: Sequence[str] | None = None
    streams: int | None = None
    placement: str | None = None
    group: str | None = None
    batch_size: int | None = None

    def training(self) -> Training | None:
        """The training that they name; None: none of them was given.

        Raises:
            ValueError: one that means nothing without --seed, or cannot be.
        """
        given = {name: value for name in self.__slots__ if (value := getattr(self, name)) is not None}
        if not given:
            return None
        if self.seed is None:
            flag = next(iter(given)).replace("ranks", "rank").replace("group", "shuffle-group").replace("_", "-")
            raise ValueError(f"--{flag} needs --seed: without it every rank reads all shards, in stored order")
        training = Training(self.seed, epoch=self.epoch or 0, streams=self.streams, batch_size=self.batch_size)
        ranks, world_size = parse_ranks(self.ranks or ["0/1"])
        return replace(
            training,
            ranks=ranks,
            world_size=world_size,
            placement=parse_placement(self.placement),
            group_bytes=parse_group(self.group),
        )


def parse_placement(text: str | None) -> Literal["sticky", "global"]:
    """The placement that a flag names. Raises ValueError."""
    if text in (None, "sticky"):
        return "sticky"
    if text == "global":
        return "global"
    raise ValueError(f"--placement is sticky or global, got {text!r}")


def parse_group(text: str | None) -> int | None:
    """Bytes of --shuffle-group, None for "all". Raises ValueError."""
    if text is None:
        return GROUP_BYTES
    return None if text == "all" else parse_size("--shuffle-group", text)


def parse_ranks(texts: Sequence[str]) -> tuple[tuple[int, ...], int]:
    """Ranks and their number in all, from "3/8" or "0-3/8", each text's ranks after the other.

    Raises:
        ValueError: no such form, or of different numbers of ranks.
    """
    ranks: list[int] = []
    sizes: set[int] = set()
    for text in texts:
        match = _RANKS.fullmatch(text.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if match is None or not first <= last < int(match[3]):
            raise ValueError(f"--rank takes RANK/RANKS, as in 3/8, or some: 0-3/8; got {text!r}")
        ranks += range(first, last + 1)
        sizes.add(int(match[3]))
    if len(sizes) != 1:
        raise ValueError(f"--rank: all must be of the same number of ranks, got {sorted(sizes)}")
    return tuple(dict.fromkeys(ranks)), sizes.pop()


@dataclass(frozen=True, slots=True)
class PartFlags:
    """The flags that say how much of what is chosen, as they were given."""

    share: str | None = None
    first: str | None = None
    minutes: float | None = None
    rate: str | None = None

    def limits(self) -> tuple[float, float | None]:
        """The share, and the size.

        Raises:
            ValueError: two of them at once, one that cannot be, or minutes without a rate.
        """
        given = [f"--{n}" for n in ("share", "first", "minutes") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} say the same thing in two ways: give one of them")
        if (self.minutes is None) != (self.rate is None):
            raise ValueError("--minutes and --rate go together: so many minutes of reading at so many bytes a second")
        if self.minutes is not None and self.rate is not None:
            if not 0 <= self.minutes < float("inf"):
                raise ValueError(f"--minutes is 0 or more, got {self.minutes}")
            return 1.0, self.minutes * 60 * parse_rate("--rate", self.rate)
        share = 1.0 if self.share is None else parse_share(self.share)
        return share, None if self.first is None else parse_size("--first", self.first)


def read_names(path: str | None) -> list[str] | None:
    """Names from a file, one a line, "-" for standard input; None for None. Empty lines do not count."""
    if path is None:
        return None
    text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.strip()]
