"""The engine of tiercache's own order: it names the order, keeps the position and makes one iterator per epoch."""

from __future__ import annotations

import logging
import operator
import warnings
import weakref
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from tiercache.load.coming import ClaimedEpoch, NextEpoch
from tiercache.load.damage import corruption_map_for
from tiercache.load.draws import TorchDraws, next_seed, predict_seeds
from tiercache.load.epochs import epoch_records, mixture_values, order_options, plan_epoch
from tiercache.load.figures import summarise
from tiercache.load.fittings import PipelineCache
from tiercache.load.iterator import Delivery, EpochPosition, NativeIterator
from tiercache.load.memory import BatchMemory
from tiercache.load.options import LoaderOptions
from tiercache.load.pipeline import PipelineInputs
from tiercache.load.publishing import ReadPlanPublisher
from tiercache.load.ranks import Rank, agree, find_rank, must_not_draw
from tiercache.load.resources import ResourceBudget
from tiercache.load.serving import OutputSpec
from tiercache.load.share import OrderShare
from tiercache.load.source import Source, prepare_reading
from tiercache.load.state import RunState, reopen
from tiercache.order import RankPlan
from tiercache.stats import Counters, WaitHistogram

logger = logging.getLogger("tiercache")


@dataclass(frozen=True, slots=True)
class LoaderArguments:
    """The loader's own arguments, as far as the native path needs them.

    num_workers, persistent_workers: They start no process here, but they change which random numbers torch's loader
    draws. fills_first: See `RankPlan`; integrations set it.
    """

    batch_size: int
    shuffle: bool
    drop_last: bool
    timeout_s: float
    pin_memory: bool
    generator: torch.Generator | None
    options: LoaderOptions
    serving: OutputSpec = field(default_factory=OutputSpec)
    num_workers: int = 0
    persistent_workers: bool = False
    fills_first: bool = False


class NativeEngine:
    """The engine of a loader without a sampler: the epochs' order, the loader's position and the counters.

    One consumer thread uses it.
    """

    def __init__(self, source: Source, asked: LoaderArguments) -> None:
        self._dataset = source
        self._asked = asked
        self._options = asked.options
        self._source = source
        self._state: RunState | None = None  # position of the next iter(); None: the run has not begun
        self._loaded_under: int | None = None  # torch's initial seed when _state was loaded; None: no state was loaded
        self._foreseen: int | None = None  # the next epoch's seed, if only this loader draws random numbers until then
        self._epoch = 0  # set by set_epoch() before the run began
        # position of the newest iter(); None: there was none since the last load()
        self._position: EpochPosition | None = None
        self._iterator: weakref.ref[NativeIterator] | None = None
        self._coming: NextEpoch | None = None
        self._rank: Rank | None = None
        self._counters = Counters("padded")
        self._waits = WaitHistogram()
        self._memory = BatchMemory()
        self._fittings = PipelineCache()
        self._n_records: int | None = None  # records per epoch of the source, computed on first use
        self._said: set[str] = set()
        self._n_epochs = 0  # epochs that iter() began
        self._damage = corruption_map_for(source, asked.options)
        self._machine = ResourceBudget(asked.options)
        self._figures_before = dict(source.figures())
        self._ready: Source | None = None  # the source whose shards were found readable

    def rank(self) -> Rank:
        """Return this process's rank, found anew until the run begins: torch.distributed may be initialised late."""
        return self._rank or find_rank(self._options)

    def state(self) -> RunState:
        """Return the position of the run; begins the run (draws a seed) if it has not begun."""
        state = self._begin(drawn=False) if self._position is None else self._position.state()
        is_begun = self._keeps_seed(state) if self._position is None else not self._position.is_between_epochs
        if is_begun or not self._draws_seeds(state):
            return state
        return replace(state, seed=next_seed(self._asked.generator, after_begin=not self._begins()))

    @property
    def rebuild_arguments(self) -> tuple[LoaderArguments, RunState | None]:
        """Arguments that make an equal engine elsewhere, and its position if the run has begun."""
        return self._asked, self._state if self._position is None else self.state()

    def load(self, state: RunState) -> None:
        """Continue from a state. Raises ValueError or ObjectChanged as DataLoader.load_state_dict."""
        self._check(state)
        order_options(state)  # raises ValueError for an order that this release does not know
        source = reopen(self._dataset, state)
        n_records = self._records_of(source)
        if state.offset > n_records:
            raise ValueError(f"the state's offset {state.offset} is outside an epoch of {n_records} records")
        self._use(source)
        self._state = state
        self._loaded_under = self._initial_seed()
        self._position = None

    def _check(self, state: RunState) -> None:
        """Raise ValueError for an explicit argument or option that differs from the state."""
        options, asked, defaults = self._options, self._asked, LoaderOptions()
        checks = [
            ("shuffle", asked.shuffle, state.shuffle, True),
            ("drop_last", asked.drop_last, state.drop_last, True),
            ("mixture", mixture_values(self._dataset), state.mixture, True),
            ("seed", options.seed, state.seed, options.seed is not None),
            ("streams", options.streams, state.streams, options.streams is not None and asked.shuffle),
            ("placement", options.placement, state.placement, options.placement != defaults.placement),
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
                    f"{name}={mine!r} differs from the state's {theirs!r}, so the order would change: make the loader "
                    "with the state's value"
                )

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` the next epoch."""
        epoch = operator.index(epoch)
        if epoch < 0:
            raise ValueError(f"an epoch is 0 or more, got {epoch}")
        self._epoch = epoch
        if self._position is not None:
            self._position.redirect(epoch)
        elif self._state is not None and self._state.epoch != epoch:
            self._state, self._loaded_under = self._state.following(epoch), None

    def n_batches(self) -> int:
        """Return the number of batches of a whole epoch on this rank."""
        return self._whole_epoch(self._asked.drop_last).n_batches

    def n_served(self) -> int:
        """Return the records of a whole epoch on this rank; a single rank includes those of a dropped last batch."""
        return self._whole_epoch(self._asked.drop_last and self.rank().world_size > 1).n_served

    def _whole_epoch(self, drop_last: bool) -> RankPlan:
        rank = self.rank()
        return RankPlan(0, rank.world_size, rank.rank, self._asked.batch_size, drop_last, self._epoch_records())

    def iterate(self) -> NativeIterator:
        """Return the iterator of the next epoch."""
        # A run that resumes within an epoch drew that epoch's numbers before its state was saved.
        is_resumed = self._position is None and self._state is not None and self._state.offset > 0
        draws = self._draw(is_resumed=is_resumed)
        state = self._begin(drawn=True) if self._position is None else self._position.next_state()
        foreseen: int | None = None
        is_predicted = True
        if self._draws_seeds(state):
            seed, foreseen = predict_seeds(self._asked.generator, self._epoch_records(), begins=self._begins(1))
            if is_resumed or (self._position is None and self._keeps_seed(state)):
                foreseen = None if is_resumed else foreseen
            else:
                state = replace(state, seed=seed)
            # After an epoch whose seed was not the predicted one, no epoch is loaded ahead until a prediction was right
            # again.
            is_predicted = foreseen is not None and self._foreseen in (None, state.seed)
            self._foreseen = foreseen
        if self._ready is not self._source:
            prepare_reading(self._source)
            self._ready = self._source
        rank = self.rank()
        read = self._source if self._damage is None else self._damage
        plan_share = partial(plan_epoch, read, rank, self._asked.batch_size, self._asked.fills_first)
        found = None if self._coming is None else self._coming.take(self._source, state)
        if found is None:
            found = ClaimedEpoch(plan_share(state), None, ReadPlanPublisher(self._source, state, plan_share))
            if self._coming is not None:
                found.publishing.succeed(self._coming.publishing)
        share = found.share
        if share.ranks.ignores_streams:
            self._warn_of_streams(share.ranks)
        position = EpochPosition(state, share.ranks)
        following = position.next_state()
        coming = NextEpoch(
            self._source,
            following if foreseen is None else replace(following, seed=foreseen),
            plan_share,
            is_expected=self._n_epochs > 0,
            is_predicted=is_predicted,
        )
        work = PipelineInputs(
            source=self._source,
            share=share,
            counters=self._counters,
            waits=self._waits,
            output_spec=self._asked.serving,
            memory=self._memory,
            cache=self._fittings,
            warned=self._said,
            epoch_start=found.begun,
            next_epoch=coming,
            corruption=self._damage,
            publisher=found.publishing,
        )
        delivery = Delivery(self._asked.timeout_s, self._asked.pin_memory, draws)
        iterator = NativeIterator(position, work, self._machine.resources(rank), delivery)
        if self._asked.num_workers:
            draws.sample()  # torch sends workers their first indices in iter()
        self._position = position  # set last: if the iterator cannot be made, no epoch has begun
        self._coming = coming
        self._source.on_close(coming)
        self._n_epochs += 1
        # weak: if a loop is left early, its iterator must be dropped and end its threads
        self._iterator = weakref.ref(iterator)
        return iterator

    def begin_for_sampler(self, state: RunState | None) -> tuple[RunState, Any, OrderShare, TorchDraws]:
        """Begin the next epoch for a loader that another library made from this loader's sampler.

        Args:
            state: State of an epoch to begin again. None: the epoch that iterate() would begin.

        Returns:
            The epoch's state, the source of its order, the rank's share from the start of the epoch, and the draws of
            torch's sampler.

        Raises:
            RuntimeError: The loader stands within an epoch, or its data set does not number the records of its order.
        """
        is_again = state is not None
        if state is None:
            if self._position is None and self._state is not None and self._state.offset > 0:
                raise RuntimeError(
                    f"the loaded state stands within epoch {self._state.epoch}, but the loader's sampler was iterated, "
                    "which starts an epoch from its beginning (Accelerate's skip_first_batches and prepare do so): "
                    "iterate the loader itself, which skips the records that were served, or load no state"
                )
            state = self._begin(drawn=True) if self._position is None else self._position.next_state()
            if self._draws_seeds(state) and not (self._position is None and self._keeps_seed(state)):
                state = replace(state, seed=next_seed(self._asked.generator, after_begin=True))
        if self._asked.shuffle and self._source.mixture is not None:
            raise RuntimeError(
                "the sampler of a shuffled mixture was iterated (Accelerate's skip_first_batches and prepare do so), "
                "but the records of a mixture have no numbers: iterate the loader itself; to skip batches, call "
                "load_state_dict()"
            )
        if self._source is not self._dataset:
            versions = ", ".join(str(part.version) for part in self._source.parts)
            raise RuntimeError(
                f"the sampler was iterated, but its record numbers are those of the data set's version, and the loader "
                f"reads version {versions} of {self._source.url}, which a state or another rank names: open the data "
                f"set with version={versions}"
            )
        prepare_reading(self._source)
        rank = self.rank()
        # A single rank also returns the records of a last batch that is dropped, as torch's sampler does: the batch
        # sampler drops it.
        planned = state if rank.world_size > 1 else replace(state, drop_last=False)
        read = self._numbered()
        share = plan_epoch(read, rank, self._asked.batch_size, self._asked.fills_first, planned)
        self._position = EpochPosition(state, share.ranks, is_counted=False)
        self._foreseen = None
        self._n_epochs += 1
        return (
            state,
            read,
            share,
            TorchDraws(self._asked.generator, self._asked.shuffle, self._epoch_records(), is_sampled=is_again),
        )

    def _numbered(self) -> Any:
        """Return the source whose record numbers the order counts."""
        return self._source

    def end_for_sampler(self, share: OrderShare) -> None:
        """Note that the last record of begin_for_sampler()'s share was requested.

        With worker processes the epoch may not have ended then: workers request records that their loader has not
        handed out yet.
        """
        position = self._position
        if position is not None and position.ranks is share.ranks and not self._asked.num_workers:
            position.finished = True

    def _draw(self, *, is_resumed: bool) -> TorchDraws:
        """Draw the random numbers that torch's loader draws in iter(); a resumed epoch draws nothing."""
        asked = self._asked
        n_records = self._epoch_records()
        ends_short = not asked.drop_last and n_records % asked.batch_size > 0
        draws = TorchDraws(asked.generator, asked.shuffle, n_records, ends_short, is_sampled=is_resumed)
        if self._begins() and not is_resumed:
            draws.begin()
        return draws

    def _begins(self, n_more: int = 0) -> bool:
        """Whether torch's loader draws a base seed for workers in the next iter(), or n_more calls later."""
        return not (self._asked.persistent_workers and self._asked.num_workers and self._n_epochs + n_more)

    def _draws_seeds(self, state: RunState) -> bool:
        """Whether each iter() draws its epoch's seed.

        Ranks that share an epoch draw a seed only at the start of the run: they have no common random numbers, and
        iter() must not communicate, because a prefetching thread may call it beside the training's own collectives.
        """
        return state.is_seed_drawn and self._options.seed is None and self.rank().world_size == 1

    def _keeps_seed(self, state: RunState) -> bool:
        """Whether the next iter() uses the seed of a loaded state.

        A state from between two epochs holds the seed that would be drawn next. Reseeding after load_state_dict()
        overrides it.
        """
        return self._loaded_under is not None and (state.offset > 0 or self._loaded_under == self._initial_seed())

    def _initial_seed(self) -> int:
        """Return the initial seed of the generator from which the seeds are drawn."""
        generator = self._asked.generator
        return torch.initial_seed() if generator is None else generator.initial_seed()

    def _epoch_records(self) -> int:
        """Return the records of an epoch. Cached, because the sum took 70 us of the start of each epoch."""
        if self._n_records is None:
            self._n_records = self._records_of(self._source)
        return self._n_records

    def _records_of(self, source: Source) -> int:
        """Return the records of an epoch of a source, all ranks together."""
        return epoch_records(source)

    def _warn_of_streams(self, ranks: RankPlan) -> None:
        """Warn once that several ranks read the same blocks."""
        if "streams" in self._said:
            return
        self._said.add("streams")
        warnings.warn(
            f"the order's {ranks.n_streams} streams do not divide a global batch of {ranks.global_batch} records "
            f"({ranks.world_size} ranks of {ranks.batch_size}): each rank is served records of all streams, so several "
            "ranks read the same blocks; choose a batch_size that makes the global batch a multiple of "
            f"{ranks.n_streams} to avoid that",
            RuntimeWarning,
            stacklevel=4,  # the caller of iter(loader)
        )

    def stats(self) -> dict[str, Any]:
        """See DataLoader.stats."""
        counters = self._counters.snapshot()
        iterator = self._iterator() if self._iterator is not None else None
        if iterator is not None:
            for name, figure in iterator.figures().items():
                counters[name] = counters.get(name, 0) + figure
        return summarise(counters, self._waits, self._fetched(), threads=self._machine.resources(self.rank()).n_threads)

    def _fetched(self) -> dict[str, float]:
        """Return the source's counters since the loader was made."""
        now = self._source.figures()
        return {name: now[name] - self._figures_before.get(name, 0) for name in now}

    def _use(self, source: Source) -> None:
        """Read another version from now on.

        The counters of its store begin at 0, so earlier fetches are carried over.
        """
        if source is not self._source:
            fetched, begins = self._fetched(), source.figures()
            self._source, self._n_records = source, None
            self._damage = corruption_map_for(source, self._options)
            self._figures_before = {name: begins[name] - fetched[name] for name in begins}

    def _begin(self, *, drawn: bool) -> RunState:
        """Return the start of the run. drawn: whether iter() has drawn this epoch's random numbers."""
        if self._rank is None:
            self._rank = find_rank(self._options)
        if self._state is None:
            if self._rank.origin in ("environment", "torch.distributed") and self._rank.world_size > 1:
                logger.info("this loader serves %s", self._rank)
            self._state = self._first_state(self._rank, drawn=drawn)
        return self._state

    def _first_state(self, rank: Rank, *, drawn: bool) -> RunState:
        """Return the first state of the run; with torch.distributed rank 0 decides it."""
        asked, options = self._asked, self._options
        seed = options.seed
        if seed is None:
            unseeded = not asked.shuffle or must_not_draw(rank)
            seed = 0 if unseeded else next_seed(asked.generator, after_begin=drawn)
        order: dict[str, Any] = {
            "shuffle": asked.shuffle,
            "drop_last": asked.drop_last,
            "streams": (options.streams or rank.world_size) if asked.shuffle else 1,
            "placement": options.placement,
            "group_bytes": options.group_bytes,
            "window_bytes": options.window_bytes,
            "mixture": mixture_values(self._source),
        }
        versions = [part.version for part in self._source.parts]
        mine = {"versions": versions, "seed": seed, "epoch": self._epoch}
        agreed = agree(rank, mine, {"batch_size": asked.batch_size, **order})
        if agreed["versions"] != versions:
            self._use(self._source.at_versions(agreed["versions"]))
        # In the next epoch a mixture's parts continue where they stopped, so its epochs share a seed.
        is_seed_drawn = asked.shuffle and options.seed is None and rank.world_size == 1 and self._source.mixture is None
        return RunState(
            parts=self._source.parts,
            seed=agreed["seed"],
            epoch=agreed["epoch"],
            offset=0,
            is_seed_drawn=is_seed_drawn,
            **order,
        )
