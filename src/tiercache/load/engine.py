"""The engine of tiercache's own order: it names the order, keeps the position and makes one iterator per epoch."""

from __future__ import annotations

import operator
import sys
import time
import warnings
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex, TypeAlias

import numpy as np

from tiercache import config
from tiercache._native.ring import FastIterator, held_bytes
from tiercache.data.opened_version import SHARD_READS_AGAIN
from tiercache.data.output_spec import OutputSpec, as_columns
from tiercache.data.records import Records
from tiercache.errors import CorruptShard
from tiercache.load.batch import ArrayLibrary, Batch, BatchMemory, PipelineSetup, lent_bytes
from tiercache.load.corrupt import CorruptLocation, corruption_map_for
from tiercache.load.decode import DecodedPipeline
from tiercache.load.epoch import (
    EpochPosition,
    OrderShare,
    Position,
    ReadingPlanPublisher,
    RunState,
    epoch_records,
    make_order,
    make_share,
    mixture_values,
    order_options,
    reopen,
    with_own_weights,
)
from tiercache.load.loader_options import (
    LoaderOptions,
    Rank,
    Resources,
    agree,
    find_rank,
    find_slowest,
    must_not_draw,
    share_resources,
    warn_of_meshes,
)
from tiercache.load.pipeline import ClosingPipeline, Pipeline
from tiercache.load.planner import NextEpoch, PipelineInputs
from tiercache.load.transform import BatchFunction, TransformedPipeline
from tiercache.model import format_bytes, short_repr
from tiercache.order.rank_plan import RankPlan
from tiercache.stats import Counters, WaitHistogram

if TYPE_CHECKING:
    from tiercache.load.device import BatchDevice
    from tiercache.load.transform_workers import WorkerPool, WorkerSettings

# Function that makes the pipeline whose batches follow from those of another one.
Stage: TypeAlias = "Callable[[PipelineInputs, ClosingPipeline], ClosingPipeline]"


class NativeIterator(FastIterator, Iterator[Batch]):
    """Batches of one epoch from a state on. Independent of the loader's other iterators; closes itself when dropped."""

    def __init__(
        self,
        position: Position,
        inputs: PipelineInputs,
        resources: Resources,
        timeout_s: float,
        pin: Callable[[Any], Any] | None,
        stages: Sequence[Stage],
        function: BatchFunction | None,
        workers: WorkerPool | None,
    ) -> None:
        self._position = position
        self._inputs = inputs
        self._resources = resources
        self._stages, self._workers = stages, workers
        self._timeout_s = timeout_s if timeout_s > 0 else -1.0
        self._pin = pin
        # names of the entries of a tuple; None: batches are dicts, or the user's functions make them
        self._names = inputs.output_spec.names if function is None else None
        self._start_s = time.perf_counter()
        self._counted = False
        self._read_again: Counter[int] = Counter()  # how often each shard was read again
        self._replaced_locations: set[CorruptLocation] = set()
        self._profiler = inputs.setup.library.profiler
        super().__init__(position, self._profiler, is_plain=self._pin is None and self._names is None)
        self._start(inputs)

    def __len__(self) -> int:
        return self._inputs.share.rank_plan.n_batches

    def __getstate__(self) -> NoReturn:
        raise NotImplementedError(f"{type(self).__name__} cannot be pickled")  # torch's iterators raise the same error

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        self.__getstate__()  # Pickle protocols 0 and 1 do not call __getstate__ of a native base class.

    def __del__(self, is_exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_exiting() and hasattr(self, "_pipeline"):
            self.close()

    def figures(self) -> Mapping[str, float]:
        """Return the pipeline's counters and wall_s of this epoch; {} once the loader's counters have them."""
        if self._counted:
            return {}
        return {**self._pipeline.figures(), "wall_s": time.perf_counter() - self._start_s}

    def close(self) -> None:
        """End this epoch, early or not, and add its counters to the loader's. May be called repeatedly."""
        self._pipeline.close()
        if self._counted:
            return
        if self._workers is not None:
            self._workers.release()
        publisher = self._inputs.publisher
        if publisher is not None:
            (publisher.finish if self._position.finished else publisher.close)()
        if not self._pipeline.is_forked_copy:
            self._count(self.figures())
            self._counted = True

    def _start(self, inputs: PipelineInputs) -> None:
        native = DecodedPipeline if inputs.output_spec.decode else Pipeline
        inner = replace(inputs, waits=WaitHistogram())  # the waits of a stage before another one are not the consumer's
        self._pipeline: ClosingPipeline = native(inner if self._stages else inputs, self._resources)
        for number, stage in enumerate(self._stages, 1):
            self._pipeline = stage(inputs if number == len(self._stages) else inner, self._pipeline)
        self._set_fast_path(self._pipeline.fast_take)

    def _next(self) -> Any:
        try:
            # torch's hook costs more than a whole batch here, so it is entered only while a profiler runs.
            if self._profiler._is_profiler_enabled:  # noqa: SLF001 -- the flag that torch's own hooks test
                with self._profiler.record_function("enumerate(DataLoader)#tiercache.__next__"):
                    return self._take()
            return self._take()
        except KeyboardInterrupt as error:
            self._on_take_error(error)
            raise

    def _on_take_error(self, error: BaseException) -> None:
        if isinstance(error, KeyboardInterrupt):
            # Ctrl-C struck after a batch was taken and before it was counted: that batch is lost, as with torch, but
            # later batches keep their positions.
            self._position.n_yielded = max(self._position.n_yielded, self._pipeline.n_taken)
        else:  # There was no memory for a batch. The next batch must not be served in its place.
            self._pipeline.close()

    def _count(self, figures: Mapping[str, float]) -> None:
        for name, figure in figures.items():
            self._inputs.counters.add(name, figure)

    def _take(self) -> Any:
        batch = self._next_ready()
        if batch is None:
            batch = self._take_next()
        if self._pin is not None:
            batch = self._pin(batch)
        return batch if self._names is None else as_columns(batch, self._names)

    def _take_next(self) -> Any:
        if self._position.finished:
            raise StopIteration
        try:
            try:
                batch = self._pipeline.take(self._timeout_s)
            except CorruptShard as error:
                batch = self._take_past(error)
        except TimeoutError as error:
            raise RuntimeError(f"DataLoader timed out after {self._timeout_s:g} seconds") from error
        except Exception:
            if self._pipeline.is_closed:  # a device without memory for a batch serves it later
                self.close()
            raise
        if batch is None:
            self._position.finished = True
            self._inputs.counters.add("padded", self._inputs.share.rank_plan.n_padding)
            self.close()
            raise StopIteration
        self._position.n_yielded += 1
        return batch

    def _take_past(self, error: CorruptShard) -> Any:
        """Return the batch that failed: read again after a corrupt local copy, else without its corrupt records.

        The order is a function of the position, so a second pipeline can continue where the first one failed.
        """
        corruption = self._inputs.corruption
        try:
            while True:
                shard = self._pipeline.corrupt_shard
                was_removed = shard is not None and self._inputs.source.storage.remove_if_corrupt(shard)
                # Every shard is read again: another loader or process may have replaced the copy meanwhile, and if the
                # cache has given up the object, it is read from its store. If that did not help and the local copy is
                # right, the data itself is corrupt.
                if shard is not None and (was_removed or self._read_again[shard] < SHARD_READS_AGAIN):
                    self._read_again[shard] += 1
                else:
                    self._replace_corrupt(error)
                self._count(self._pipeline.figures())
                if self._inputs.next_epoch is not None:
                    self._inputs.next_epoch.drop_preparation()
                here = replace(self._inputs, first_batch=self._position.n_yielded, epoch_start=None)
                self._start(here)
                try:
                    return self._pipeline.take(self._timeout_s)
                except CorruptShard as again:
                    # Else keep the first error: it names the block.
                    if was_removed or corruption is not None or self._pipeline.corrupt_shard is not None:
                        error = again
        finally:
            del error  # The error's traceback would form a cycle that holds windows.

    def _replace_corrupt(self, error: CorruptShard) -> None:
        location: CorruptLocation | None = error.location
        if self._inputs.corruption is None or location is None or location in self._replaced_locations:
            try:
                raise error
            finally:
                del error  # as in _take_past()
        self._replaced_locations.add(location)
        self._inputs.corruption.note_corruption(location, error)


@dataclass(frozen=True, slots=True)
class LoaderArguments:
    """The loader's own arguments, as far as the native path needs them.

    batch_device: Function that returns what the pipelines of a loader share about its device: its argument, unless the
    device has changed.
    """

    library: ArrayLibrary
    batch_size: int
    shuffle: bool
    drop_last: bool
    timeout_s: float
    draw_seed: Callable[[], int]
    options: LoaderOptions
    output_spec: OutputSpec = field(default_factory=OutputSpec)
    num_workers: int = 0
    fills_first: bool = False
    pin_function: Callable[[], Callable[[Any], Any] | None] | None = None
    batch_device: Callable[[BatchDevice | None], BatchDevice] | None = None


class Engine(ABC):
    """Base of the native path's engines: the source, the counters, and what the epochs' pipelines have in common."""

    def __init__(self, source: Records, arguments: LoaderArguments) -> None:
        self.arguments = arguments
        self._source = source
        self._corruption = corruption_map_for(source, arguments.options)
        self._setup: PipelineSetup | None = None  # of the last pipeline
        # the user's functions, and the processes that run them; the loader may set both before each epoch
        self.function: BatchFunction | None = None  # None: batches are served as gathered
        self.worker_settings: WorkerSettings | None = None  # None: the consumer's thread runs the functions
        self._workers: WorkerPool | None = None  # of the last epoch
        self._counters = Counters("padded")
        self._epoch_counters = Counters()  # of the newest epoch
        self._waits = WaitHistogram()
        self._waits_before_s = 0.0, 0.0  # totals of `_waits` and of the exposed waits before the newest epoch
        self._memory = BatchMemory()
        self._device: BatchDevice | None = None  # of the newest epoch
        self._warned: set[str] = set()
        self._figures_before = dict(source.storage.figures())
        self._ready: Records | None = None  # the source whose shards were found readable
        self._limits: tuple[int, int] | None = None  # cores and memory; reading the cgroups takes 1.2 ms
        self._n_epochs = 0  # epochs that began in this process
        # weak: if a loop is left early, its iterator must be dropped and end its threads
        self._iterator: weakref.ref[Any] | None = None

    def facts(self) -> list[str]:
        facts = [f"{name}=True" for name in ("shuffle", "drop_last") if getattr(self.arguments, name)]
        options = self.arguments.options
        return facts if options == LoaderOptions() else [*facts, short_repr(options)]

    @abstractmethod
    def describe_position(self) -> str:
        """Return the order, and the position of the next batch in it, for people. A run does not begin by it."""

    @abstractmethod
    def rank(self) -> Rank:
        """Return the rank whose share of an epoch this process is served."""

    def stats(self, *, across_ranks: bool = False) -> dict[str, Any]:
        counters, epoch = self._counters.snapshot(), self._epoch_counters.snapshot()
        iterator = self._iterator() if self._iterator is not None else None
        if iterator is not None:
            for name, figure in iterator.figures().items():
                counters[name] = counters.get(name, 0) + figure
                epoch[name] = epoch.get(name, 0) + figure
        exposed = self._exposed_waits()
        for name, waits, before_s in zip(
            ("wait_s", "idle_s"), (self._waits, exposed), self._waits_before_s, strict=True
        ):
            epoch[name] = waits.total_s - before_s
        workers = 0 if self.worker_settings is None else self.worker_settings.n_workers
        n_threads, has_cache = self._resources().n_threads, self._source.storage.has_cache
        stats = summarise(
            counters,
            epoch,
            self._waits,
            exposed,
            self._fetched(),
            has_cache=has_cache,
            threads=n_threads,
            workers=workers,
        )
        if self._source.fill_ratio is not None:
            stats["fill_ratio"] = self._source.fill_ratio
        if across_ranks:
            stats["exposed_wait_s"]["slowest_rank"] = find_slowest(self.rank(), stats["exposed_wait_s"])
        return stats

    def _exposed_waits(self) -> WaitHistogram:
        return self._waits if self._device is None else self._device.exposed_waits()

    def _fetched(self) -> dict[str, float]:
        now = self._source.storage.figures()
        return {name: now[name] - self._figures_before.get(name, 0) for name in now}

    def _resources(self) -> Resources:
        if self._limits is None:
            self._limits = config.available_cpus(), config.memory_limit_bytes()
        return share_resources(self.arguments.options, self.rank(), *self._limits)

    def _check_readable(self) -> None:
        if self._ready is not self._source:
            self._source.storage.prepare_reading(np.flatnonzero(self._source.shard_records))
            self._ready = self._source

    def _pin(self) -> Callable[[Any], Any] | None:
        return None if self.arguments.pin_function is None else self.arguments.pin_function()

    def _start_iterator(
        self,
        position: Position,
        share: OrderShare,
        pin: Callable[[Any], Any] | None,
        **planned: Any,
    ) -> NativeIterator:
        """Return the iterator of an epoch, whose pipeline has begun. planned: Further fields of PipelineInputs."""
        if self._setup is None or self._setup.source is not self._source:
            self._setup = PipelineSetup(self._source, self.arguments.output_spec, self.arguments.library)
        function, workers, pinned = self.function, None, None
        resources, timeout_s = self._resources(), self.arguments.timeout_s
        stages: list[Stage] = []
        if self.worker_settings is not None:
            if self._workers is None or not self._workers.is_reusable:
                self._workers = self.worker_settings.start(share.seed)
            workers = self._workers
            workers.is_used = True
            stages.append(workers.stage(resources.memory_bytes))
        elif function is not None:
            stages.append(partial(TransformedPipeline, function))
        if self.arguments.batch_device is not None:
            self._device = self.arguments.batch_device(self._device)
            stages.append(self._device.pipeline)
            # A transform may keep what it saw as long as it likes; what it makes is copied into pinned memory.
            is_plain = function is None or (function.is_own and workers is None)
            pinned = self._device.pinned if is_plain else None
            batch_size = share.rank_plan.batch_size
            n_last = share.rank_plan.n_served % batch_size
            if self._device.is_fixed and n_last:
                raise ValueError(
                    f'device_buffers="fixed" serves full batches only, and this epoch ends with a batch of {n_last} '
                    f"records instead of {batch_size}: give drop_last=True"
                )
        self._epoch_counters = Counters(total=self._counters)
        self._waits_before_s = self._waits.total_s, self._exposed_waits().total_s
        inputs = PipelineInputs(
            setup=self._setup,
            share=share,
            counters=self._epoch_counters,
            waits=self._waits,
            memory=self._memory if pinned is None else pinned,
            warned=self._warned,
            corruption=self._corruption,
            pinned=pinned,
            **planned,
        )
        return NativeIterator(position, inputs, resources, timeout_s, pin, stages, function, workers)


class OrderEngine(Engine):
    """The engine of a loader without a sampler. One consumer thread uses it."""

    def __init__(self, source: Records, arguments: LoaderArguments) -> None:
        super().__init__(source, arguments)
        self._dataset = source
        self._options = arguments.options
        self._state: RunState | None = None  # position of the next iter(); None: the run has not begun
        self._epoch = 0  # set by set_epoch() before the run began
        # position of the newest iter(); None: there was none since the last load()
        self._position: EpochPosition | None = None
        self._next_epoch: NextEpoch | None = None
        self._publisher: ReadingPlanPublisher | None = None  # of the newest epoch
        # A mesh does not change; torch may know what it is a part of only in this thread.
        self._rank: Rank | None = None if self._options.mesh is None else find_rank(self._options)
        self._n_records = epoch_records(source)  # the sum took 70 us of the start of each epoch

    def describe_position(self) -> str:
        order = "tiercache's shuffled order" if self.arguments.shuffle else "stored order"
        try:
            state = self._state if self._position is None else self.state()
        except RuntimeError:  # another loader has the batches
            return f"{order}, at a position that its sampler's user knows"
        epoch, offset = (self._epoch, 0) if state is None else (state.epoch, state.offset)
        return f"{order}, at record {offset:,} of {self._n_records:,} in epoch {epoch}"

    def rank(self) -> Rank:
        """Return this process's rank, found anew until the run begins: torch.distributed may be initialised late."""
        return self._rank or find_rank(self._options)

    def state(self) -> RunState:
        """Return the position of the run; begins the run (draws a seed) if it has not begun."""
        if self._position is not None and not self._position.is_between_epochs:
            return self._position.state()
        return self.next_state()

    @property
    def rebuild_arguments(self) -> tuple[LoaderArguments, RunState | None]:
        """Arguments that make an equal engine elsewhere, and its position if the run has begun."""
        return self.arguments, self._state if self._position is None else self.state()

    def load(self, state: RunState) -> None:
        self._check(state)
        order_options(state)  # raises ValueError for an order that this release does not know
        source = reopen(self._dataset, state)
        state = with_own_weights(source, state)
        is_changed = state.mixture is not None and "before" in state.mixture
        n_records = make_order(source, state).n_records if is_changed else epoch_records(source)
        if state.offset > n_records:
            raise ValueError(f"the state's offset {state.offset} is outside an epoch of {n_records} records")
        self._use(source)
        self._state = state
        self._position = None

    def _check(self, state: RunState) -> None:
        options, arguments, defaults = self._options, self.arguments, LoaderOptions()
        checks = [
            ("shuffle", arguments.shuffle, state.shuffle, True),
            ("drop_last", arguments.drop_last, state.drop_last, True),
            ("mixture", mixture_values(self._dataset) is not None, state.mixture is not None, True),
            ("seed", options.seed, state.seed, options.seed is not None),
            ("shuffle_streams", options.shuffle_streams, state.streams, options.shuffle_streams and arguments.shuffle),
        ]
        for attribute in ("placement", "group_bytes", "window_bytes"):
            mine = getattr(options, attribute)
            name = attribute if attribute == "placement" else f"shuffle_{attribute}"
            checks.append((name, mine, getattr(state, attribute), mine != getattr(defaults, attribute)))
        for name, mine, theirs, is_explicit in checks:
            if is_explicit and mine != theirs:
                raise ValueError(
                    f"{name}={mine!r} differs from the state's {theirs!r}, so the order would change: make the loader "
                    "with the state's value"
                )

    def set_epoch(self, epoch: int) -> None:
        epoch = operator.index(epoch)
        if epoch < 0:
            raise ValueError(f"an epoch is 0 or more, got {epoch}")
        self._epoch = epoch
        if self._position is not None:
            self._position.redirect(epoch)
        elif self._state is not None and self._state.epoch != epoch:
            self._state = self._state.following(epoch)

    def n_batches(self) -> int:
        return self._whole_epoch(self.arguments.drop_last).n_batches

    def n_served(self) -> int:
        """Return the records of a whole epoch on this rank; a single rank includes those of a dropped last batch."""
        return self._whole_epoch(self.arguments.drop_last and self.rank().world_size > 1).n_served

    def _whole_epoch(self, drop_last: bool) -> RankPlan:
        rank = self.rank()
        return RankPlan(0, rank.world_size, rank.rank, self.arguments.batch_size, drop_last, self._n_records)

    def iterate(self) -> NativeIterator:
        state = self.next_state()
        self._check_readable()
        rank = self.rank()
        ordered = self._source if self._corruption is None else self._corruption
        share_of = partial(make_share, ordered, rank, self.arguments.batch_size, self.arguments.fills_first)
        prepared = None if self._next_epoch is None else self._next_epoch.take(self._source, state)
        share, epoch_start = prepared or (share_of(state), None)
        publisher = ReadingPlanPublisher(self._source, state, share_of, self._publisher)
        if share.rank_plan.ignores_streams:
            self._warn_of_streams(share.rank_plan)
        position = EpochPosition(state, share.rank_plan)
        next_epoch = NextEpoch(self._source, position.next_state(), share_of, is_expected=self._n_epochs > 0)
        iterator = self._start_iterator(
            position,
            share,
            self._pin(),
            epoch_start=epoch_start,
            next_epoch=next_epoch,
            publisher=publisher,
        )
        self._position = position  # set last: if the iterator cannot be made, no epoch has begun
        self._next_epoch, self._publisher = next_epoch, publisher
        self._source.storage.on_close(next_epoch.on_source_closed)
        self._source.storage.on_close(publisher.on_source_closed)
        self._n_epochs += 1
        self._iterator = weakref.ref(iterator)
        return iterator

    def begin_for_sampler(self, state: RunState | None) -> tuple[RunState, Records, OrderShare]:
        """Begin the next epoch for a loader that another library made from this loader's sampler."""
        if state is None:
            if self._position is None and self._state is not None and self._state.offset > 0:
                raise RuntimeError(
                    f"the loaded state stands within epoch {self._state.epoch}, but the loader's sampler was iterated, "
                    "which starts an epoch from its beginning (Accelerate's skip_first_batches and prepare do so): "
                    "iterate the loader itself, which skips the records that were served, or load no state"
                )
            state = self.next_state()
        before = (state.mixture or {}).get("before", ())
        is_changed = any(epoch == state.epoch and offset for epoch, offset, _ in before)
        if self._source.mixture is not None and (self.arguments.shuffle or is_changed):
            raise RuntimeError(
                "the sampler of a mixture that is shuffled, or whose weights were changed at a resume, was iterated "
                "(Accelerate's skip_first_batches and prepare do so), "
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
        self._check_readable()
        rank = self.rank()
        # A single rank also returns the records of a last batch that is dropped, as torch's sampler does: the batch
        # sampler drops it.
        planned = state if rank.world_size > 1 else replace(state, drop_last=False)
        share = make_share(self._source, rank, self.arguments.batch_size, self.arguments.fills_first, planned)
        self._position = EpochPosition(state, share.rank_plan, is_counted=False)
        self._n_epochs += 1
        return state, self._source, share

    def end_for_sampler(self, share: OrderShare) -> None:
        """Note that the last record of begin_for_sampler()'s share was requested.

        With worker processes the epoch may not have ended then: workers request records that their loader has not
        handed out yet.
        """
        position = self._position
        if position is not None and position.rank_plan is share.rank_plan and not self.arguments.num_workers:
            position.finished = True

    def next_state(self) -> RunState:
        return self._start_run() if self._position is None else self._position.next_state()

    def _warn_of_streams(self, rank_plan: RankPlan) -> None:
        if "streams" in self._warned:
            return
        self._warned.add("streams")
        warnings.warn(
            f"the order's {rank_plan.n_streams} streams do not divide a global batch of {rank_plan.global_batch} "
            f"records ({rank_plan.world_size} ranks of {rank_plan.batch_size}): each rank is served records of all "
            "streams, so several ranks read the same blocks; choose a batch_size that makes the global batch a "
            f"multiple of {rank_plan.n_streams} to avoid that",
            RuntimeWarning,
            stacklevel=4,  # the caller of iter(loader)
        )

    def _use(self, source: Records) -> None:
        """Read another version. The counters of its store begin at 0, so earlier fetches are carried over."""
        if source is not self._source:
            fetched, at_start = self._fetched(), source.storage.figures()
            self._source, self._n_records = source, epoch_records(source)
            self._corruption = corruption_map_for(source, self._options)
            self._figures_before = {name: at_start[name] - fetched[name] for name in at_start}

    def _start_run(self) -> RunState:
        if self._rank is None:
            self._rank = find_rank(self._options)
            warn_of_meshes(self._rank)
        if self._state is None:
            self._state = self._first_state(self._rank)
        return self._state

    def _first_state(self, rank: Rank) -> RunState:
        """Return the first state of the run; with torch.distributed rank 0 decides it."""
        arguments, options = self.arguments, self._options
        seed = options.seed
        if seed is None:
            is_drawn = arguments.shuffle and not must_not_draw(rank)
            seed = arguments.draw_seed() if is_drawn else 0
        order: dict[str, Any] = {
            "shuffle": arguments.shuffle,
            "drop_last": arguments.drop_last,
            "streams": (options.shuffle_streams or rank.world_size) if arguments.shuffle else 1,
            "placement": options.placement,
            "group_bytes": options.group_bytes,
            "window_bytes": options.window_bytes,
            "mixture": mixture_values(self._source),
        }
        versions = [part.version for part in self._source.parts]
        mine = {"versions": versions, "seed": seed, "epoch": self._epoch}
        agreed = agree(rank, mine, {"batch_size": arguments.batch_size, **order})
        if agreed["versions"] != versions:
            self._use(self._source.at_versions(agreed["versions"]))
        return RunState(parts=self._source.parts, seed=agreed["seed"], epoch=agreed["epoch"], offset=0, **order)


# Below this share of the wall time, the loader does not make the consumer wait.
WAITING_SHARE = 0.05


# Where the bytes of loaded blocks come from.
SOURCES = ("memory", "cache", "disk", "store")


def summarise(
    counters: Mapping[str, float],
    epoch: Mapping[str, float],
    waits: WaitHistogram,
    exposed: WaitHistogram,
    fetched: Mapping[str, float],
    *,
    has_cache: bool,
    threads: int,
    workers: int = 0,
) -> dict[str, Any]:
    """Return the dict of `DataLoader.stats()`.

    epoch: counters of the newest epoch, with wait_s and idle_s, its parts of waits and exposed; waits: of the
    consumer's thread, for the stages before the device; exposed: of the training loop, on its device if it has one;
    has_cache: whether the data is read through a cache; workers: processes that run transforms (0: the consumer's
    thread does, which counts as waiting).
    """
    wall_s = counters.get("wall_s", 0.0)
    wait, idle = waits.snapshot(), exposed.snapshot()
    share = min(1.0, wait["total"] / wall_s) if wall_s else 0.0
    return {
        **_served(counters, has_cache),
        "epoch": _served(epoch, has_cache) | {"wall_s": epoch.get("wall_s", 0.0), "wait_s": epoch["wait_s"]},
        "bytes_fetched": int(fetched.get("bytes_fetched", 0)),
        **{name: int(fetched.get(name, 0)) for name in ("requests", "retries", "hedges", "throttled")},
        **{name: fetched.get(name, 0.0) for name in ("dollars", "egress_dollars")},
        **{name: int(counters.get(name, 0)) for name in ("padded", "skipped", "unpinned")},
        "held_bytes": held_bytes() + lent_bytes(),
        "wait_s": {"p50": wait["p50"], "p95": wait["p95"], "p99": wait["p99"], "share": share},
        "exposed_wait_s": {
            "total": idle["total"],
            "mean": idle["total"] / idle["n"] if idle["n"] else 0.0,
            "p99": idle["p99"],
        },
        "samples_per_s": counters.get("samples", 0) / wall_s if wall_s else None,
        "stages": _stages(counters),
        "threads": threads,
        "bottleneck": _verdict(epoch, threads, workers),
    }


def _served(counters: Mapping[str, float], has_cache: bool) -> dict[str, Any]:
    bytes_from = {source: int(counters.get(f"bytes_from_{source}", 0)) for source in SOURCES}
    read_bytes = sum(bytes_from.values())
    return {
        **{name: int(counters.get(name, 0)) for name in ("samples", "batches", "bytes_served")},
        "bytes_from": bytes_from,
        "hit_ratio": 1 - bytes_from["store"] / read_bytes if has_cache and read_bytes else None,
    }


def _stages(counters: Mapping[str, float]) -> dict[str, float]:
    stages = {name: counters.get(name, 0.0) for name in ("plan_s", "load_s")}
    stages["gather_s"] = counters.get("gather_ns", 0.0) / 1e9
    for name in ("decode", "transform", "copy"):
        if f"{name}_ns" in counters:
            stages[f"{name}_s"] = counters[f"{name}_ns"] / 1e9
    return stages


def _verdict(epoch: Mapping[str, float], threads: int, workers: int) -> str:
    wall_s, stages = epoch.get("wall_s", 0.0), _stages(epoch)
    share = min(1.0, epoch["idle_s"] / wall_s) if wall_s else 0.0
    waited = f"waited {share:.1%} of the time"
    if share < WAITING_SHARE:
        return f"consumer ({waited} for data)"
    if epoch["idle_s"] > 2 * epoch["wait_s"]:
        return (
            f"copy ({waited}, most of it for copies to the device; serve fewer bytes, e.g. by cast=, or raise "
            "device_batches)"
        )
    parallel = {"gather_s": threads, "decode_s": threads, "transform_s": max(workers, 1)}
    busiest = max(stages, key=lambda name: stages[name] / parallel.get(name, 1))
    runs = f"{workers} worker processes run" if workers else "one thread runs"
    sentences = {
        "decode_s": f"decode ({waited}; {threads} threads decode images; store smaller images, or give more threads)",
        "transform_s": f"transform ({waited}; {runs} the transforms; give the DataLoader more num_workers)",
        "copy_s": f"copy ({waited}; a thread copies what transforms return into pinned memory; return fewer bytes)",
        "gather_s": f"copy ({waited}; {threads} threads copy and check records; serve fewer columns, or more threads)",
        "plan_s": f"plan ({waited} for the order; a smaller shuffle_window_bytes is computed sooner)",
    }
    if busiest in sentences:
        return sentences[busiest]
    store_bytes = epoch.get("bytes_from_store", 0)
    if store_bytes:
        rate = format_bytes(store_bytes / max(stages["load_s"], 1e-9))
        return f"store ({waited}; {rate}/s from the store; warm the cache first)"
    return f"disk ({waited} for blocks to be read and decompressed; columns stored raw need no decompression)"
