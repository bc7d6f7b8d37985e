"""A rank's share of an epoch: the state that names its position, its order, and the reading plan that the cache gets.

The clock of a reading plan is the number of stored bytes that the job has read since the start of its epoch.
make_reading_plan() is a pure function; ReadingPlanPublisher publishes, advances and withdraws the plan.
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tiercache.data.records import Records
from tiercache.errors import ObjectChanged, TierCacheError, UnsupportedFormat
from tiercache.load.corrupt import CorruptionMap, replace_corrupt
from tiercache.load.loader_options import Rank
from tiercache.load.pieces import ARRAY_PIECES, RUN_PIECES, AnyPiece, PieceSizes, cut_pieces, locate
from tiercache.model import NEVER, PublishedPlan, ReadingPlan, SourcePart
from tiercache.order.epoch_order import EpochOrder
from tiercache.order.explicit import ExplicitOrder, ServedOrder
from tiercache.order.mixture import MixtureChange, MixtureOrder
from tiercache.order.rank_plan import RankPlan
from tiercache.order.window import DatasetSizes, Order, OrderOptions, ShardGroups

# Format 2 has streams, several data sets and selections. This release does not read format 1 (one stream, other keys).
STATE_FORMAT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """The position of a run.

    offset: records of the epoch that all ranks together were served; group_bytes, window_bytes: None for "all";
    mixture: weights and stop rule as plain values; `before` lists [epoch, offset, weights until there] of each change.
    """

    parts: tuple[SourcePart, ...]
    seed: int
    epoch: int
    offset: int
    shuffle: bool
    drop_last: bool
    streams: int
    placement: Literal["sticky", "global"]
    group_bytes: int | None
    window_bytes: int | None
    mixture: Any = None
    format: int = STATE_FORMAT

    def following(self, epoch: int) -> RunState:
        return replace(self, epoch=epoch, offset=0)

    def to_dict(self) -> dict[str, Any]:
        parts = [[part.dataset_id, part.version, part.fingerprint, part.selection] for part in self.parts]
        # Field by field: dataclasses.asdict copies each value deeply, which takes 60 us, and a state may be saved at
        # every step.
        values = {name: getattr(self, name) for name in _NAMES}
        return {**values, "parts": parts, "mixture": deepcopy(self.mixture)}

    @staticmethod
    def from_dict(state: Any) -> RunState:
        if not isinstance(state, Mapping) or not _is_count(state.get("format")):
            found = f"it has the keys {sorted(state)}" if isinstance(state, Mapping) else f"it is {state!r}"
            raise ValueError(f"not a state of tiercache.DataLoader over a tiercache.Dataset: {found}")
        if state["format"] != STATE_FORMAT:
            what = "update tiercache" if state["format"] > STATE_FORMAT else "go on with the release that saved it"
            raise UnsupportedFormat(
                f"the state has format {state['format']}, this release reads {STATE_FORMAT}: {what}",
                url="state_dict",
                found=state["format"],
                supported=STATE_FORMAT,
            )
        if set(state) != set(_NAMES):
            raise ValueError(
                f"the state's keys are not those of format {STATE_FORMAT}: {sorted(set(_NAMES) ^ set(state))} differ"
            )
        for name, (fits, expected) in _CHECKS.items():
            if not fits(state[name]):
                raise ValueError(f"the state's {name} must be {expected}, got {state[name]!r}")
        return RunState(**{**state, "parts": tuple(SourcePart(*part) for part in state["parts"])})


_NAMES = tuple(field.name for field in fields(RunState))


def _is_integer(value: Any, least: int | None = None) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)


def _is_count(value: Any) -> bool:
    return _is_integer(value, 0)


def _is_size(value: Any) -> bool:
    return value is None or _is_integer(value, 1)


def _is_part(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 4:
        return False
    dataset_id, version, fingerprint, selection = value
    texts = [dataset_id, fingerprint, "" if selection is None else selection]
    return _is_count(version) and all(isinstance(text, str) for text in texts)


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epoch": (_is_count, "an integer of 0 or more"),
    "offset": (_is_count, "an integer of 0 or more"),
    "streams": (lambda value: _is_integer(value, 1), "an integer of 1 or more"),
    "seed": (_is_integer, "an integer"),
    "shuffle": (lambda value: isinstance(value, bool), "true or false"),
    "drop_last": (lambda value: isinstance(value, bool), "true or false"),
    "group_bytes": (_is_size, "null or an integer of 1 or more"),
    "window_bytes": (_is_size, "null or an integer of 1 or more"),
    "placement": (lambda value: value in ("sticky", "global"), "'sticky' or 'global'"),
    "parts": (
        lambda value: isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_part, value)),
        "a list of [data set, version, fingerprint, selection]",
    ),
}


def reopen(source: Records, state: RunState) -> Records:
    """Return the source at the versions that the state names. Raises ObjectChanged: their contents differ."""
    if [part.dataset_id for part in state.parts] != [part.dataset_id for part in source.parts]:
        raise ObjectChanged(
            "the state is of another data set",
            url=source.url,
            expected=", ".join(part.dataset_id for part in state.parts),
            found=", ".join(part.dataset_id for part in source.parts),
        )
    versions = [part.version for part in state.parts]
    reopened = source if versions == [part.version for part in source.parts] else source.at_versions(versions)
    for expected, part in zip(state.parts, reopened.parts, strict=True):
        if part.fingerprint != expected.fingerprint:
            raise ObjectChanged(
                f"version {part.version} is not the one that the state was saved on",
                url=source.url,
                expected=expected.fingerprint,
                found=part.fingerprint,
            )
        if part.selection != expected.selection:
            raise ObjectChanged(
                "the state is of another selection of the data set's records, or of documents packed in another way",
                url=source.url,
                expected=expected.selection or "all records",
                found=part.selection or "all records",
            )
    return reopened


class Position:
    """How far an iterator has come. The loader keeps it; the iterator updates it, and may be dropped long before.

    n_yielded: batches handed out since the epoch began or was resumed.
    """

    def __init__(self) -> None:
        self.n_yielded, self.finished = 0, False


class EpochPosition(Position):
    """The position in an epoch of tiercache's order. is_counted: False if another loader hands the batches out."""

    def __init__(self, start: RunState, rank_plan: RankPlan, *, is_counted: bool = True) -> None:
        super().__init__()
        self._start = start
        self.rank_plan = rank_plan
        self._is_counted = is_counted
        self._redirected: RunState | None = None
        self._next: RunState | None = None  # cached by next_state()

    def state(self) -> RunState:
        """Return the state after the batches handed out; after the end, the state at the start of the next epoch."""
        if self._redirected is not None:
            return self._redirected
        if self.finished:
            return self.next_state()
        if not self._is_counted:
            raise RuntimeError(
                f"the position in epoch {self._start.epoch} is unknown: this loader's sampler or batch_sampler was "
                "iterated, usually by another loader that was made from it (as by Accelerate's skip_first_batches). "
                "Call state_dict() before that loader begins or after it ends; if it has worker processes, call "
                f"set_epoch({self._start.epoch + 1}) of this loader first. To resume within an epoch, use "
                "load_state_dict() instead"
            )
        return replace(self._start, offset=self.rank_plan.offset_after(self.n_yielded))

    def next_state(self) -> RunState:
        """Return the state from which the loader's next iter() begins: the next epoch, even if this one did not end."""
        if self._next is None:
            self._next = self._start.following(self._start.epoch + 1)
        return self._redirected or self._next

    def redirect(self, epoch: int) -> None:
        if self.next_state().epoch != epoch:
            self._redirected = self._start.following(epoch)

    @property
    def is_between_epochs(self) -> bool:
        return self.finished or self._redirected is not None


# The records that an order orders, or their corrupt records if these are replaced.
Ordered: TypeAlias = "Records | CorruptionMap"

# Function that returns a rank's share of the epoch of a state.
MakeShare: TypeAlias = "Callable[[RunState], OrderShare]"


@dataclass(frozen=True, slots=True)
class OrderShare:
    """A rank's batches of one epoch, in order. Immutable; its methods may be called from any thread."""

    order: Order
    rank_plan: RankPlan
    seed: int
    epoch: int
    corruption: CorruptionMap | None = None
    sizes: PieceSizes = ARRAY_PIECES
    is_local: Callable[[int], bool] | None = None  # see cut_pieces()

    def pieces(self, n_batches: int) -> Iterator[AnyPiece]:
        """Yield what is served after n_batches, in order, padding last. Reads footers."""
        rank_plan = replace(self.rank_plan, offset=self.rank_plan.offset_after(n_batches))
        all_pieces = cut_pieces(self.order, rank_plan, self.sizes, self.is_local)
        if self.corruption is None:
            return all_pieces
        return replace_corrupt(all_pieces, self.corruption, self.order, rank_plan)

    def locate(self, position: int) -> tuple[int, int, int]:
        return locate(self.order, position)

    def shards_ahead(self, n_batches: int, n_rows: int, n_bytes: int) -> list[int]:
        """Return the shards that are read after n_batches and then n_rows, in reading order. Reads no footers.

        Their stored bytes are about n_bytes, or less near the end of the epoch.
        """
        n_done = min(n_batches + n_rows // self.rank_plan.batch_size, self.rank_plan.n_batches)
        offset, n_streams, streams = self.rank_plan.offset_after(n_done), self.order.n_streams, self.rank_plan.streams
        share_bytes = max(n_bytes // len(streams), 1)
        runs = [
            self.order.shards_ahead(stream, -(-(offset - stream) // n_streams), share_bytes).tolist()
            for stream in streams
            if self.order.stream_records(stream)
        ]
        return interleaved(runs)


def interleaved(runs: Sequence[Sequence[int]]) -> list[int]:
    """Return the first of each run, then the second of each, and so on; each number once."""
    longest = max(map(len, runs), default=0)
    return list(dict.fromkeys(run[i] for i in range(longest) for run in runs if i < len(run)))


def records_of(ordered: Ordered) -> Records:
    return ordered.source if isinstance(ordered, CorruptionMap) else ordered


def make_share(ordered: Ordered, rank: Rank, batch_size: int, fills_first: bool, state: RunState) -> OrderShare:
    """Return the rank's share of the state's epoch. Costs O(shards); reads no data."""
    order, corruption = make_order(ordered, state), ordered if isinstance(ordered, CorruptionMap) else None
    is_run = corruption is None and records_of(ordered).selection is None  # otherwise the rows are needed as arrays
    sizes = RUN_PIECES if is_run else ARRAY_PIECES
    rank_plan = RankPlan(
        offset=state.offset,
        world_size=rank.world_size,
        rank=rank.rank,
        batch_size=batch_size,
        drop_last=state.drop_last,
        n_records=order.n_records,
        n_streams=order.n_streams,
        fills_first=fills_first,
    )
    storage = records_of(ordered).storage
    is_local = storage.is_local if storage.can_prefetch or storage.sends_requests else None
    return OrderShare(order, rank_plan, state.seed, state.epoch, corruption, sizes, is_local)


def make_order(ordered: Ordered, state: RunState) -> Order:
    source = records_of(ordered)
    sizes = DatasetSizes(source.shard_records, source.shard_bytes, ordered.block_sizes)
    options = order_options(state)
    if source.mixture is not None:
        changes = [MixtureChange(*change) for change in (state.mixture or {}).get("before", ())]
        return MixtureOrder(sizes, source.mixture, options, state.epoch, changes)
    listed = source.record_order
    if listed is not None and not state.shuffle:
        return explicit_order(ordered, listed, state.window_bytes)
    return EpochOrder(sizes, options, state.epoch)


def explicit_order(ordered: Ordered, numbers: ServedOrder, window_bytes: int | None) -> Order:
    """Return the order that serves these records, counted in stored order."""
    source = records_of(ordered)
    sizes = DatasetSizes(source.shard_records, source.shard_bytes, ordered.block_sizes)
    return ExplicitOrder(sizes, numbers, window_bytes, source.storage.is_mapped)


def order_options(state: RunState) -> OrderOptions:
    return OrderOptions(**{option.name: getattr(state, option.name) for option in fields(OrderOptions)})


def epoch_records(source: Records) -> int:
    mixture = source.mixture
    if mixture is not None:
        return int(mixture.epoch_records(mixture.part_records(source.shard_records)))
    return int(source.shard_records.sum())


def mixture_values(source: Records) -> dict[str, Any] | None:
    mixture = source.mixture
    if mixture is None:
        return None
    # The state omits which shards belong to which part: that follows from the parts, and changes with their versions.
    changes = [[position, list(weights)] for position, weights in mixture.schedule]
    return {"weights": changes if len(changes) > 1 else changes[0][1], "stop": mixture.stop}


def with_own_weights(source: Records, state: RunState) -> RunState:
    """Return a state with the mixture of the source, whose weights hold from the state's position on.

    Raises ValueError: the stop rule differs, or a weight of a record that was served.
    """
    mixture, mine, theirs = source.mixture, mixture_values(source), state.mixture
    if mixture is None or mine is None or not isinstance(theirs, Mapping) or mine == theirs:
        return state
    before = list(theirs.get("before", ()))
    if mine == {name: value for name, value in theirs.items() if name != "before"}:
        return state
    if mine["stop"] != theirs["stop"]:
        raise ValueError(
            f"stop='{mine['stop']}_exhausted' of the mixture differs from the state's '{theirs['stop']}_exhausted', so "
            "the order would change: make the mixture with the state's value"
        )
    before_weights = theirs["weights"]
    n_parts = len(before_weights[0][1] if isinstance(before_weights[0], list | tuple) else before_weights)
    if n_parts != mixture.n_parts:
        raise ValueError(f"the mixture has {mixture.n_parts} data sets, and that of the state {n_parts}")
    served, own = (
        [change for change in schedule if change[0] < state.offset]
        for schedule in (replace(mixture, weights=before_weights).schedule, mixture.schedule)
    )
    if served != own:
        raise ValueError(
            f"the mixture has weights={mine['weights']} and the state {before_weights}, which differ before record "
            f"{state.offset:,} of the epoch, and these records were served: give tc.mix() the state's weights up to "
            f"there, and other weights from there on, as weights=[(0, ...), ({state.offset}, ...)]"
        )
    if state.epoch or state.offset:
        mine["before"] = [*before, [state.epoch, state.offset, deepcopy(before_weights)]]
    return replace(state, mixture=mine)


# Maximum of later epochs that are examined. If a rank reads the same shards in each epoch, one is enough.
MAX_EPOCHS_AHEAD = 64

# Maximum of shards examined over all epochs. A shard takes 0.15 us and a stream 150 us, so the maximum takes 0.3 s.
MAX_SHARDS_AHEAD = 1 << 21

_SHARDS_A_STREAM = 1024

# Epochs without a new shard after which the search ends. A rank with fixed shards reads no others; a rank that gets
# other shards in each epoch has then probably met all but a few.
EPOCHS_WITHOUT_NEWS = 3


class ReadClock:
    """Maps positions of an epoch, from `start` on, to the clock. A group is read between its begin and its end."""

    def __init__(
        self, start: int, begins: NDArray[np.int64], ends: NDArray[np.int64], n_bytes: NDArray[np.int64]
    ) -> None:
        bounds, where = np.unique(np.concatenate([[start], begins, ends]), return_inverse=True)
        rates = n_bytes / np.maximum(ends - begins, 1)
        changes = np.bincount(where[1:], np.concatenate([rates, -rates]), len(bounds))
        read = np.cumsum(changes)[:-1] * np.diff(bounds)
        self._bounds = bounds
        # Rounding errors of the summed rates could make the clock run backwards.
        self._bytes = np.maximum.accumulate(np.concatenate([[0.0], np.cumsum(read)]))

    @property
    def total(self) -> int:
        return round(float(self._bytes[-1]))

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.round(np.interp(positions, self._bounds, self._bytes)).astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class ShardUses:
    """The shards that a rank reads in one epoch, and when.

    begins, ends: int64[n_shards], positions of the epoch between which each shard is in use; NEVER and 0: not read.
    """

    begins: NDArray[np.int64]
    ends: NDArray[np.int64]
    clock: ReadClock

    @property
    def shards(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.ends)


def find_shard_uses(share: OrderShare, start: int, n_shards: int) -> ShardUses:
    """Return what the rank reads from a position of its epoch to the end. Reads no footers.

    Padding, and records of a last batch that come from another rank's stream, are not counted.
    """
    order, rank_plan = share.order, share.rank_plan
    begins, ends = np.full(n_shards, NEVER), np.zeros(n_shards, np.int64)
    spans: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]] = []
    for stream in rank_plan.streams:
        groups = _groups_from(order.groups(stream), stream, order.n_streams, start)
        sizes = np.diff(groups.cuts)
        np.minimum.at(begins, groups.shards, np.repeat(groups.starts, sizes))
        np.maximum.at(ends, groups.shards, np.repeat(groups.stops, sizes))
        spans.append((groups.starts, groups.stops, groups.stored_bytes))
    return ShardUses(begins, ends, ReadClock(start, *(np.concatenate(column) for column in zip(*spans, strict=True))))


def _groups_from(groups: ShardGroups, stream: int, n_streams: int, start: int) -> ShardGroups:
    """Return a stream's groups, in positions of the epoch, without what lies before `start`."""
    # Position p of the stream is position p * n_streams + stream of the epoch.
    begins, ends = groups.starts * n_streams + stream, (groups.stops - 1) * n_streams + stream + 1
    return replace(groups, starts=begins, stops=ends).moved_to(np.maximum(begins, start), ends)


def make_reading_plan(
    owner: str, uses: ShardUses, later: Iterable[OrderShare], n_filled: int, max_shards: int = MAX_SHARDS_AHEAD
) -> ReadingPlan:
    """Return the reading plan of a rank.

    later: The rank's shares of the later epochs, examined until all shards of this epoch are found again and
    EPOCHS_WITHOUT_NEWS further epochs show no new shard, or max_shards were examined.
    """
    n_shards = len(uses.ends)
    next_read = np.full(n_shards, NEVER)
    elapsed, cost, n_quiet = uses.clock.total, 0, 0
    for number, share in enumerate(later):
        later_uses = find_shard_uses(share, 0, n_shards)
        new_shards = later_uses.shards[next_read[later_uses.shards] == NEVER]
        next_read[new_shards] = elapsed + later_uses.clock.at(later_uses.begins[new_shards])
        elapsed += later_uses.clock.total
        cost += n_shards + _SHARDS_A_STREAM * len(share.rank_plan.streams)
        n_quiet = n_quiet + 1 if not len(new_shards) and (next_read[uses.shards] != NEVER).all() else 0
        if n_quiet >= EPOCHS_WITHOUT_NEWS or np.count_nonzero(next_read != NEVER) == n_filled:
            break
        if number + 1 >= MAX_EPOCHS_AHEAD or cost >= max_shards or elapsed >= NEVER // 2:
            break
    shards = np.flatnonzero((uses.ends > 0) | (next_read != NEVER))
    is_read = uses.ends[shards] > 0
    first, last = (
        np.where(is_read, uses.clock.at(np.where(is_read, positions[shards], 0)), NEVER)
        for positions in (uses.begins, uses.ends)
    )
    return ReadingPlan(owner, shards, first, last, next_read[shards])


logger = logging.getLogger("tiercache")

# A plan of this many shards is published in some 10 ms, before the first shard is opened, and later epochs are examined
# in as much time. A thread of its own makes larger plans: 1,000,000 shards take 3 s, in which windows must be loaded.
QUICK_SHARDS, QUICK_SHARDS_AHEAD = 4096, 1 << 17


class ReadingPlanPublisher:
    """Publishes the reading plan of one rank's epoch.

    The planner begins, completes and advances it. The iterator finishes it at the end of the epoch, else closes it. A
    finished plan says what the next epoch reads, and stays until that one has published. Without a cache nothing is
    computed. A plan that cannot be written is not an error: the cache then knows less. Thread-safe; in a forked child
    the methods do nothing.
    """

    def __init__(
        self, source: Records, state: RunState, make_share: MakeShare, earlier: ReadingPlanPublisher | None = None
    ) -> None:
        self._source = source
        self._state = state
        self._make_share = make_share
        self._earlier = earlier  # of the epoch before; closed once this one has published, or is closed
        self._lock = threading.RLock()  # The garbage collector may call close() in a thread that holds the lock.
        self._share: OrderShare | None = None
        self._uses: ShardUses | None = None
        self._published: PublishedPlan | None = None
        self._is_complete = self._is_closed = False
        self._clock = 0
        self._pid = os.getpid()

    def begin(self, share: OrderShare, n_batches: int = 0) -> None:
        """Publish the plan of a share, of which n_batches were served before; many shards wait for complete().

        Only the first call counts. It comes before a shard of the share is opened.
        """
        if self._share is not None or self._is_closed or not self._source.storage.has_cache:
            return
        self._share, self._start = share, share.rank_plan.offset_after(n_batches)
        if len(self._source.shard_records) <= QUICK_SHARDS:
            self._is_complete = True
            self._publish(QUICK_SHARDS_AHEAD)

    def complete(self) -> None:
        """Publish the plan of many shards in a thread, after the first batch was pushed. Only the first call counts."""
        if self._share is not None and not self._is_complete and not self._is_closed:
            self._is_complete = True
            threading.Thread(target=self._publish, args=(MAX_SHARDS_AHEAD,), name="tiercache-plan", daemon=True).start()

    def advance(self, n_batches: int, n_rows: int) -> None:
        """Set the clock to n_batches of the share and then n_rows."""
        uses, share = self._uses, self._share
        if uses is not None and share is not None:
            n_done = min(n_batches + n_rows // share.rank_plan.batch_size, share.rank_plan.n_batches)
            position = np.array([share.rank_plan.offset_after(n_done)], np.int64)
            self._advance(int(uses.clock.at(position)[0]))

    def finish(self) -> None:
        """Set the clock to the end of the epoch: no shard is in use, not even those of a dropped last batch."""
        if self._uses is not None and self._pid == os.getpid():  # a forked child may have inherited the lock locked
            self._advance(self._uses.clock.total)

    def close(self) -> None:
        if self._pid != os.getpid():
            return
        with self._lock:
            self._is_closed = True
            published, self._published = self._published, None
            earlier, self._earlier = self._earlier, None
        for one in (published, earlier):
            if one is not None:
                one.close()

    def on_source_closed(self) -> None:
        self.close()

    def __del__(self, is_exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_exiting() and hasattr(self, "_pid"):
            self.close()

    def _advance(self, clock: int) -> None:
        with self._lock:  # The planner may report an older position after the consumer took the last batch.
            if clock > self._clock:
                self._clock = clock
                if self._published is not None:
                    self._published.advance(clock)

    def _publish(self, max_shards: int) -> None:
        published: PublishedPlan | None
        try:
            published = self._make_and_publish(max_shards)
        except (OSError, TierCacheError) as error:
            logger.debug("the reading plan cannot be published, so the cache does not know what comes: %s", error)
            # The earlier plan is withdrawn all the same: it would announce this epoch as the next one for ever.
            published = None
        with self._lock:
            earlier, self._earlier = self._earlier, None
            is_unwanted = self._is_closed
            if not is_unwanted:
                self._published = published
                if published is not None and self._clock:
                    published.advance(self._clock)
        for one in (earlier, published if is_unwanted else None):
            if one is not None:
                one.close()

    def _make_and_publish(self, max_shards: int) -> PublishedPlan | None:
        share, source = self._share, self._source
        if share is None:
            return None
        n_shards = len(source.shard_records)
        self._uses = find_shard_uses(share, self._start, n_shards)
        rank_plan, n_filled = share.rank_plan, int(np.count_nonzero(source.shard_records))
        owner = f"rank {rank_plan.rank} of {rank_plan.world_size}, epoch {self._state.epoch}, seed {share.seed}"
        # The rank's shares of the following epochs.
        later = (self._make_share(self._state.following(n)) for n in itertools.count(self._state.epoch + 1))
        plan = make_reading_plan(owner, self._uses, later, n_filled, max_shards)
        # Closed while the plan was computed. The cache may be closed too, and must not be opened again.
        if self._is_closed:
            return None
        return source.storage.publish_plan(replace(plan, reader=self._reader(share)))

    def _reader(self, share: OrderShare) -> str:
        """Return ReadingPlan.reader: of a rank that ends its epoch first, the others keep what it reads next."""
        rank_plan, parts = share.rank_plan, [(part.dataset_id, part.selection) for part in self._source.parts]
        beside = rank_plan.world_size > 1
        seed = self._state.following(0).seed  # the same in all epochs of the run
        return f"rank {rank_plan.rank} of {rank_plan.world_size}, seed {seed}, of {parts}" if beside else ""
