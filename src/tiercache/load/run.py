"""The native path's way through the epochs: what names the order, where it stands, one iterator an epoch."""

from __future__ import annotations

import logging
import operator
import weakref
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch

from tiercache import config
from tiercache.load.coming import Coming
from tiercache.load.figures import summarise
from tiercache.load.iterator import Delivery, NativeIterator, Position
from tiercache.load.memory import BatchMemory
from tiercache.load.options import LoaderOptions
from tiercache.load.pipeline import Resources, Work
from tiercache.load.ranks import Rank, agree, draw_seed, find_rank
from tiercache.load.serving import Serving
from tiercache.load.source import Source
from tiercache.load.state import RunState, reopen
from tiercache.model import parse_bytes
from tiercache.order import EpochOrder, Layout, OrderOptions, RankPlan
from tiercache.stats import Counters, Waits

logger = logging.getLogger("tiercache")

# Of the memory limit, for batches ahead: enough for 32 batches of 8 MiB, little beside a model.
_MEMORY_SHARE, _MEMORY_MAX_BYTES = 32, 256 << 20


@dataclass(frozen=True, slots=True)
class Asked:
    """What the loader's own arguments say of the native path."""

    batch_size: int
    shuffle: bool
    drop_last: bool
    timeout_s: float
    pin_memory: bool
    generator: torch.Generator | None
    options: LoaderOptions
    serving: Serving = field(default_factory=Serving)


class NativeRun:
    """A loader's way through its epochs: what names the order, where it stands, and the figures.

    One consumer thread.
    """

    def __init__(self, source: Source, asked: Asked) -> None:
        self._dataset = source
        self._asked = asked
        self._options = asked.options
        self._source = source
        self._state: RunState | None = None  # of the next iter(); None: the run has not begun
        self._epoch = 0  # asked for before the run began
        self._position: Position | None = None  # of the newest iter(); None: there was none since the last load()
        self._iterator: weakref.ref[NativeIterator] | None = None
        self._coming: Coming | None = None
        self._rank: Rank | None = None
        self._counters = Counters("padded")
        self._waits = Waits()
        self._memory = BatchMemory()
        self._figures_before = dict(source.figures())

    def rank(self) -> Rank:
        """This process's rank; asked anew until the run has begun, as torch.distributed may be initialised late."""
        return self._rank or find_rank(self._options)

    def state(self) -> RunState:
        """Where the run stands; begins it (draws a seed) where it has not begun."""
        return self._begin() if self._position is None else self._position.state()

    @property
    def recipe(self) -> tuple[Asked, RunState | None]:
        """What makes a run like this one elsewhere: what was asked, and where it stands if it has begun."""
        return self._asked, self._state if self._position is None else self._position.state()

    def load(self, state: RunState) -> None:
        """Go on from a state. Raises ValueError or ObjectChanged as DataLoader.load_state_dict."""
        options, asked = self._options, self._asked
        defaults = LoaderOptions()
        checks = [
            ("shuffle", asked.shuffle, state.shuffle, True),
            ("drop_last", asked.drop_last, state.drop_last, True),
            ("seed", options.seed, state.seed, options.seed is not None),
            (
                "shuffle_group_bytes",
                options.group_bytes,
                state.group_bytes,
                options.group_bytes != defaults.group_bytes,
            ),
            (
                "shuffle_window_bytes",
                options.window_bytes,
                state.window_bytes,
                options.window_bytes != defaults.window_bytes,
            ),
        ]
        for name, mine, theirs, explicit in checks:
            if explicit and mine != theirs:
                raise ValueError(
                    f"{name}={mine!r} differs from the state's {theirs!r}: the order would not be the one to resume"
                )
        _order_options(state)  # refuses an order that this release does not know
        source = reopen(self._dataset, state)
        n_records = int(source.shard_records.sum())
        if state.offset > n_records:
            raise ValueError(f"the state's offset {state.offset} is outside an epoch of {n_records} records")
        self._use(source)
        self._state = state
        self._position = None

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` the next one."""
        epoch = operator.index(epoch)
        if epoch < 0:
            raise ValueError(f"an epoch is 0 or more, got {epoch}")
        self._epoch = epoch
        if self._position is not None:
            self._position.redirect(epoch)
        elif self._state is not None and self._state.epoch != epoch:
            self._state = replace(self._state, epoch=epoch, offset=0)

    def n_batches(self) -> int:
        """Batches of a whole epoch at this rank."""
        rank = self.rank()
        return RankPlan(
            0, rank.world_size, rank.rank, self._asked.batch_size, self._asked.drop_last, self._n_records()
        ).n_batches

    def iterate(self) -> NativeIterator:
        """The next epoch's batches."""
        state = self._begin() if self._position is None else self._position.next_state()
        rank = self.rank()
        plan_epoch = partial(_plan_epoch, self._layout(), rank, self._asked.batch_size)
        begun = None if self._coming is None else self._coming.take(self._source, state)
        order, plan = plan_epoch(state) if begun is None else (begun.order, begun.ranks)
        position = Position(state, plan)
        coming = Coming(self._source, position.next_state(), plan_epoch)
        work = Work(
            source=self._source,
            order=order,
            ranks=plan,
            counters=self._counters,
            waits=self._waits,
            serving=self._asked.serving,
            memory=self._memory,
            begun=begun,
            coming=coming,
        )
        delivery = Delivery(self._asked.timeout_s, self._asked.pin_memory)
        iterator = NativeIterator(position, work, self._resources(rank), delivery)
        self._position = position  # only now: an iterator that could not be made is no epoch
        self._coming = coming
        self._iterator = weakref.ref(iterator)  # a loop that was left must be able to end its threads
        return iterator

    def stats(self) -> dict[str, Any]:
        """See DataLoader.stats."""
        counters = self._counters.snapshot()
        iterator = self._iterator() if self._iterator is not None else None
        if iterator is not None:
            for name, figure in iterator.figures().items():
                counters[name] = counters.get(name, 0) + figure
        return summarise(counters, self._waits, self._fetched(), threads=self._resources(self.rank()).n_threads)

    def _fetched(self) -> dict[str, float]:
        now = self._source.figures()
        return {name: now[name] - self._figures_before.get(name, 0) for name in now}

    def _use(self, source: Source) -> None:
        """Read another version from here on. Its store counts from 0: what was fetched by now stays counted."""
        if source is not self._source:
            fetched, begins = self._fetched(), source.figures()
            self._source = source
            self._figures_before = {name: begins[name] - fetched[name] for name in begins}

    def _begin(self) -> RunState:
        if self._rank is None:
            self._rank = find_rank(self._options)
        if self._state is None:
            if self._rank.origin in ("environment", "torch.distributed") and self._rank.world_size > 1:
                logger.info("this loader serves %s", self._rank)
            self._state = self._first_state(self._rank)
        return self._state

    def _first_state(self, rank: Rank) -> RunState:
        """Where the run begins; with torch.distributed rank 0 says it."""
        asked, options = self._asked, self._options
        seed = options.seed
        if seed is None:
            seed = draw_seed(rank, asked.generator) if asked.shuffle else 0
        order: dict[str, Any] = {
            "shuffle": asked.shuffle,
            "drop_last": asked.drop_last,
            "group_bytes": options.group_bytes,
            "window_bytes": options.window_bytes,
        }
        mine = {"version": self._source.version, "seed": seed, "epoch": self._epoch}
        agreed = agree(rank, mine, {"batch_size": asked.batch_size, **order})
        if agreed["version"] != self._source.version:
            self._use(self._source.at_version(agreed["version"]))
        return RunState(
            dataset_id=self._source.dataset_id,
            version=self._source.version,
            fingerprint=self._source.fingerprint,
            seed=agreed["seed"],
            epoch=agreed["epoch"],
            offset=0,
            **order,
        )

    def _layout(self) -> Layout:
        return Layout(self._source.shard_records, self._source.shard_bytes, self._source.block_tables)

    def _n_records(self) -> int:
        return int(self._source.shard_records.sum())

    @cached_property
    def _machine(self) -> tuple[int, int]:
        """Cores and bytes of memory, asked once: reading the cgroups takes 1.2 ms, which shows in short epochs."""
        return config.available_cpus(), config.memory_limit_bytes()

    def _resources(self, rank: Rank) -> Resources:
        options = self._options
        n_cpus, limit_bytes = self._machine
        n_threads = options.threads or max(1, n_cpus // rank.local_ranks)
        share_bytes = min(_MEMORY_MAX_BYTES, limit_bytes // _MEMORY_SHARE) // rank.local_ranks
        memory_bytes = share_bytes if options.memory_bytes is None else parse_bytes(options.memory_bytes)
        return Resources(n_threads, memory_bytes, limit_bytes // rank.local_ranks)


def _plan_epoch(layout: Layout, rank: Rank, batch_size: int, state: RunState) -> tuple[EpochOrder, RankPlan]:
    order = EpochOrder(layout, _order_options(state), state.epoch)
    return order, RankPlan(state.offset, rank.world_size, rank.rank, batch_size, state.drop_last, order.n_records)


def _order_options(state: RunState) -> OrderOptions:
    return OrderOptions(
        seed=state.seed,
        shuffle=state.shuffle,
        group_bytes=state.group_bytes,
        window_bytes=state.window_bytes,
        streams=state.streams,
        placement=state.placement,
    )
