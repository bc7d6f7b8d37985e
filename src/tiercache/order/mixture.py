"""Several data sets mixed in exact shares: a pure function of epoch and position, as the order of one data set is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction
from numbers import Rational, Real
from typing import TYPE_CHECKING, Literal

import numpy as np

from tiercache.order.groups import Groups, together
from tiercache.order.memory import empty_rows
from tiercache.order.part import Lane, MixedPart, Run, part_options
from tiercache.order.shares import Deal, StreamShares, apportion, stream_records

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from tiercache.order.options import Layout, OrderOptions
    from tiercache.order.window import Window


def exact_weight(weight: Real | Fraction | float) -> Fraction:
    """A weight as the fraction that was written: 0.7 is 7/10, not the binary number next to it.

    Raises:
        ValueError: it is not a number above 0.
        TypeError: it is no real number.
    """
    if isinstance(weight, bool | np.bool_) or not isinstance(weight, Real):
        raise TypeError(f"a weight is a number above 0, got {weight!r}")
    if not isinstance(weight, Rational) and not math.isfinite(weight):
        raise ValueError(f"a weight is a number above 0, got {weight!r}")
    exact = Fraction(weight) if isinstance(weight, Rational) else Fraction(str(weight))
    if exact <= 0:
        raise ValueError(f"a weight is a number above 0, got {weight!r}; leave the part out instead")
    return exact


@dataclass(frozen=True, slots=True)
class MixtureSpec:
    """How parts are mixed. Plain values: equal specs of equal parts give equal mixtures, and it is JSON-able.

    Attributes:
        first_shards: of each part in the joined numbering; the first is 0.
        weights: of each part, in records; kept as the smallest whole numbers in their ratio, given as any real numbers
            (a float stands for its decimal digits: 0.7 is 7/10).
        stop: "first": an epoch ends before any part would be repeated in it; "all": when every part was served whole.
    """

    first_shards: tuple[int, ...]
    weights: tuple[int, ...]
    stop: Literal["first", "all"] = "first"

    def __post_init__(self) -> None:
        """Check and reduce the values.

        Raises:
            ValueError: a weight is not above 0, there is not one for each part, or another value is out of range.
            TypeError: a weight is no number.
        """
        if self.stop not in ("first", "all"):
            raise ValueError(f"stop must be 'first' or 'all', got {self.stop!r}")
        if len(self.weights) != len(self.first_shards) or not self.weights:
            raise ValueError(f"{len(self.first_shards)} parts need as many weights, got {len(self.weights)}")
        if self.first_shards[0] != 0 or any(np.diff(self.first_shards) < 0):
            raise ValueError(f"first_shards must rise from 0, got {self.first_shards}")
        exact = [exact_weight(weight) for weight in self.weights]
        denominator = math.lcm(*(weight.denominator for weight in exact))
        whole = [int(weight * denominator) for weight in exact]
        divisor = math.gcd(*whole)
        object.__setattr__(self, "first_shards", tuple(int(shard) for shard in self.first_shards))
        object.__setattr__(self, "weights", tuple(weight // divisor for weight in whole))

    def shards_of(self, part: int, n_shards: int) -> slice:
        """A part's shards among n_shards of all parts."""
        ends = (*self.first_shards[1:], n_shards)
        return slice(self.first_shards[part], ends[part])

    def part_records(self, shard_records: NDArray[np.int64]) -> tuple[int, ...]:
        """Records of each part, from those of all shards.

        Raises:
            ValueError: a part has none.
        """
        parts = range(len(self.weights))
        found = tuple(int(shard_records[self.shards_of(part, len(shard_records))].sum()) for part in parts)
        if 0 in found:
            raise ValueError(f"part {found.index(0)} of the mixture has no records, so it can have no share of them")
        return found

    def epoch_records(self, part_records: Sequence[int]) -> int:
        """Records of an epoch: the most that repeat no part ("first"), or the fewest that serve each whole ("all").

        It depends on the parts' sizes and weights alone, not on streams or ranks: len() of the mixture.
        """
        total = sum(self.weights)
        if self.stop == "first":
            return min(n * total // weight for n, weight in zip(part_records, self.weights, strict=True))
        return max(-(-n * total // weight) for n, weight in zip(part_records, self.weights, strict=True))

    def epoch_shares(self, part_records: Sequence[int]) -> tuple[int, ...]:
        """Records of each part in an epoch: its share of them, exact to one record."""
        return apportion(self.epoch_records(part_records), self.weights)


class StoredMixture:
    """A mixture without shuffle, as records by number: record p is what an unshuffled epoch serves at position p.

    Parts are taken in stored order, from their start again where they end. Immutable.
    """

    def __init__(self, spec: MixtureSpec, part_records: Sequence[int]) -> None:
        self._sizes = np.array(part_records, np.int64)
        self._shares = StreamShares(Deal(spec.epoch_shares(part_records), 1), 0)

    def __len__(self) -> int:
        return self._shares.n_records

    def locate(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where records are: part int64[n], and the record's number in that part int64[n].

        Raises:
            IndexError: a number is outside [0, len).
        """
        numbers = np.asarray(numbers, np.int64)
        if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) < len(self):
            outside = numbers[(numbers < 0) | (numbers >= len(self))][0]
            raise IndexError(f"record {outside} of a mixture of {len(self)} records")
        part, draw = self._shares.locate(numbers)
        return part, draw % self._sizes[part]


@dataclass(frozen=True, slots=True, eq=False)
class MixedStretch:
    """Positions [start, stop) of a mixture's stream over which no part's window changes. Immutable.

    windows: one for each part that it draws from, or drew from before and will again, in the order of the parts: the
    same object in all stretches that it goes through. Its shards are in the joined numbering, its stream, start and
    stop are the part's own.
    """

    start: int
    stop: int
    windows: tuple[Window, ...]
    _shares: StreamShares = field(repr=False)
    _runs: dict[int, Run] = field(repr=False)  # by part, in the order of windows

    def rows(self, lo: int, hi: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Places of positions [lo, hi), counted from start.

        Returns:
            block: uint32[hi - lo], counted through the blocks of the windows one after the other; row: uint32[hi - lo],
            the row inside its block.

        Raises:
            ValueError: positions outside the stretch.
        """
        if not 0 <= lo <= hi <= self.stop - self.start:
            raise ValueError(f"positions [{lo}, {hi}) are no range inside a stretch of {self.stop - self.start}")
        block, row = empty_rows(hi - lo), empty_rows(hi - lo)
        drawn = self._shares.drawn(self.start + lo)
        places = self._shares.places(self.start + lo, self.start + hi)
        n_blocks = 0
        for part, run in self._runs.items():
            where = places[part]
            if len(where):
                blocks, rows = run.rows(drawn[part], len(where))
                block[where] = blocks + np.uint32(n_blocks)
                row[where] = rows
            n_blocks += len(run.window.blocks)
        return block, row


@dataclass(slots=True)
class _Stream:
    """What is kept of a stream: its shares, its way through each part, and the stretch that was used last."""

    shares: StreamShares
    lanes: list[Lane]
    stretch: MixedStretch | None = None


class MixtureOrder:
    """The order of one epoch of a mixture: each part's own order, interleaved in exact shares.

    Stream s is made of one stream of each part. A part's records run on without end: a part that is larger than its
    share of an epoch goes on in the next one where it stopped, a smaller one begins its next own epoch, in another
    order. Nothing is counted: epoch and position alone say which record comes. Without shuffle every epoch is the same:
    parts in stored order, position p is record p of the mixture.

    Over any stretch of the sequence of an epoch each part's records are its share of it: with one stream to less than
    5 records; with S streams to 5 + 2 sqrt(S) (measured: 24 with 256), and over the epoch to less than one.

    Immutable but for the last windows, which are kept as in `EpochOrder`; threads may share it.
    """

    def __init__(self, layout: Layout, spec: MixtureSpec, options: OrderOptions, epoch: int) -> None:
        if epoch < 0:
            raise ValueError(f"an epoch is 0 or more, got {epoch}")
        self.layout = layout
        self.spec = spec
        self.options = options
        self.epoch = epoch
        self._deal = Deal(
            spec.epoch_shares(spec.part_records(layout.records)), options.streams if options.shuffle else 1
        )
        shards = [spec.shards_of(part, len(layout.records)) for part in range(len(spec.weights))]
        brought = part_options(options, spec.weights, [(layout.records[s], layout.stored_bytes[s]) for s in shards])
        self._parts = [MixedPart(layout, *of_part) for of_part in zip(shards, brought, self._deal.totals, strict=True)]
        self._streams: dict[int, _Stream] = {}

    @property
    def n_records(self) -> int:
        """Records of the epoch, those that come more than once counted each time."""
        return sum(self._deal.totals)

    @property
    def n_streams(self) -> int:
        """Streams: as the options say; 1 without shuffle."""
        return self._deal.n_streams

    def stream_records(self, stream: int) -> int:
        """Records of a stream: ceil((n_records - stream) / n_streams). Raises ValueError if there is no such stream."""
        if not 0 <= stream < self.n_streams:
            raise ValueError(f"stream {stream} of {self.n_streams}")
        return stream_records(self.n_records, self.n_streams, stream)

    def stretch_at(self, stream: int, position: int) -> MixedStretch:
        """The stretch that holds a position of a stream: to where the first of the parts' windows ends.

        It reads the footers of one group of each part that the stream still draws from.

        Raises:
            ValueError: the position is outside the stream, or a footer and the layout differ in records.
        """
        n_records = self.stream_records(stream)
        if not 0 <= position < n_records:
            raise ValueError(f"position {position} is outside stream {stream} of {n_records} records")
        kept = self._keep(stream)
        last = kept.stretch
        if last is not None and last.start <= position < last.stop:
            return last
        shares, start, stop, runs = kept.shares, 0, n_records, {}
        for part, draw in enumerate(shares.drawn(position)):
            if draw < shares.quotas[part]:
                runs[part] = run = kept.lanes[part].run_at(draw)
                stop = min(stop, shares.position_of(part, run.stop - 1) + 1)
                draw = run.start
            if draw > 0:
                start = max(start, shares.position_of(part, draw - 1) + 1)
        drawn = shares.drawn(stop)
        runs = {part: run for part, run in runs.items() if run.start < drawn[part]}  # the others have not begun
        kept.stretch = found = MixedStretch(start, stop, tuple(run.window for run in runs.values()), shares, runs)
        return found

    def shards_ahead(self, stream: int, position: int, n_bytes: int | None) -> NDArray[np.int64]:
        """Shards that are read from a position of a stream on, by the parts' shares, about in reading order.

        Args:
            stream: of n_streams.
            position: in the stream; its end is one too.
            n_bytes: stored bytes that the shards shall hold together; None: all to the end of the stream.

        Returns:
            int64[m] in the joined numbering; none at the end of the stream. Reads no footers.

        Raises:
            ValueError: the position is outside the stream.
        """
        n_records = self.stream_records(stream)
        if not 0 <= position <= n_records:
            raise ValueError(f"position {position} is outside stream {stream} of {n_records} records")
        kept = self._keep(stream)
        lists = [
            lane.shards_ahead(draw, n_bytes) for lane, draw in zip(kept.lanes, kept.shares.drawn(position), strict=True)
        ]
        # All lists are read side by side, each to its end.
        when = np.concatenate([(np.arange(len(shards)) + 0.5) / max(len(shards), 1) for shards in lists])
        return np.concatenate(lists)[np.argsort(when, kind="stable")]

    def groups(self, stream: int) -> Groups:
        """See Order.groups: those of each part, one part after the other."""
        self.stream_records(stream)  # raises
        kept = self._keep(stream)
        found = []
        for part, lane in enumerate(kept.lanes):
            of_part = lane.groups()
            ends = [kept.shares.positions_of(part, draws) for draws in (of_part.starts, of_part.stops - 1)]
            found.append(replace(of_part, starts=ends[0], stops=ends[1] + 1))
        return together(found)

    def _keep(self, stream: int) -> _Stream:
        kept = self._streams.get(stream)
        if kept is None:
            shares = StreamShares(self._deal, stream)
            epoch = self.epoch if self.options.shuffle else 0
            turns = self._deal.turns(stream)
            of_parts = zip(self._parts, turns, shares.quotas, strict=True)
            lanes = [Lane.of(part, self._deal, turned, quota, epoch) for part, turned, quota in of_parts]
            kept = self._streams[stream] = _Stream(shares, lanes)
        return kept
