"""The engine of a loader with a user's sampler or batch sampler, which selects the records, on the native path.

A sampler is asked in the consumer's thread, as torch does, and no further ahead than torch would ask it:
`prefetch_factor * num_workers` batches (the workers are not started). With `num_workers=0` torch's path serves such a
sampler. Only samplers that draw all their random numbers when they begin are asked further ahead
(`sampling.allows_lookahead`), with any `num_workers`.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from tiercache.load.damage import corruption_map_for
from tiercache.load.draws import TorchDraws, next_seed
from tiercache.load.feed import SamplerQueue
from tiercache.load.figures import summarise
from tiercache.load.fittings import PipelineCache
from tiercache.load.iterator import Delivery, NativeIterator
from tiercache.load.memory import BatchMemory
from tiercache.load.pipeline import PipelineInputs
from tiercache.load.ranks import Rank, find_rank
from tiercache.load.replay import RandomGenerators
from tiercache.load.resources import ResourceBudget
from tiercache.load.sampling import (
    FINISHED,
    OURS,
    STATE_KEYS,
    SamplerLookahead,
    SamplerPass,
    batch_rows,
    says_size,
    set_sampler_epoch,
)
from tiercache.load.source import prepare_reading
from tiercache.order import Layout
from tiercache.order.explicit import RecordLocator
from tiercache.stats import Counters, WaitHistogram

if TYPE_CHECKING:
    from tiercache.load.run import LoaderArguments
    from tiercache.load.source import Source


class SampledIterator(Iterator[Any]):
    """The batches that a sampler selects. Independent of its loader's other iterators; closes itself when dropped."""

    def __init__(self, epoch: SamplerPass, run: SamplerEngine, draws: TorchDraws) -> None:
        self._epoch = epoch
        self._run = run
        self._draws = draws
        epoch.draw(run.lead.at_begin)
        epoch.feed.make_plannable()
        # Begun now if possible: torch's loader gives its warnings (about pinning) in iter().
        self._native = run.begin(epoch, draws) if run.says_size else None

    def __next__(self) -> Any:
        if self._epoch.finished:
            raise StopIteration
        self._ask()
        if self._native is None:
            self._native = self._run.begin(self._epoch, self._draws)
        return next(self._native)

    def __iter__(self) -> SampledIterator:
        return self

    def __len__(self) -> int:
        return self._run.n_batches()

    def __getstate__(self) -> NoReturn:
        raise NotImplementedError(f"{type(self).__name__} cannot be pickled")  # torch's iterators raise the same error

    def figures(self) -> Mapping[str, float]:
        """See NativeIterator.figures."""
        return {} if self._native is None else self._native.figures()

    def close(self) -> None:
        """End this epoch, early or not. May be called repeatedly."""
        self._epoch.feed.close()
        if self._native is not None:
            self._native.close()

    def _ask(self) -> None:
        """Ask the sampler as far ahead as allowed.

        If that is far, each batch that is taken asks for two more, so that no call takes long. The planner gets the new
        batches together when half of the queue is not planned yet: few for the first batch, then more and more.
        """
        feed, lead, n_yielded = self._epoch.feed, self._run.lead, self._epoch.n_yielded
        ahead = feed.n_drawn - n_yielded
        if lead.n_batches == lead.at_begin:  # as torch: one more for each batch that is taken
            self._epoch.draw(lead.n_batches + 1 - ahead)
            feed.make_plannable()
            return
        self._epoch.draw(min(8 if self._epoch.is_bulk else 2, lead.n_batches - ahead))
        if 2 * (feed.n_plannable - n_yielded) <= feed.n_drawn - n_yielded:
            feed.make_plannable()


class SamplerEngine:
    """The engine of a loader with a sampler: the position, one iterator per epoch, and the counters.

    One consumer thread uses it.
    """

    def __init__(self, source: Source, asked: LoaderArguments, index_sampler: Any, lead: SamplerLookahead) -> None:
        self.lead = lead
        self._source = source
        self._asked = asked
        self._index_sampler = index_sampler
        self._damage = corruption_map_for(source, asked.options)
        block_tables = source.block_tables if self._damage is None else self._damage.block_tables
        self._locator = RecordLocator(Layout(source.shard_records, source.shard_bytes, block_tables))
        self._machine = ResourceBudget(asked.options)
        self._counters = Counters("padded")
        self._waits = WaitHistogram()
        self._memory = BatchMemory()
        self._fittings = PipelineCache()
        self._said: set[str] = set()
        self._figures_before = dict(source.figures())
        self._next: Mapping[str, Any] | None = None  # the state to continue from
        self._epoch: SamplerPass | None = None  # the newest
        self._is_fresh = False  # made only to read its state, so that the next iter() uses it
        self._number = 0  # number of the next epoch
        self._seed = asked.options.seed  # seed of the random values of a record
        self._n_epochs = 0  # epochs that began in this process
        self._iterator: weakref.ref[SampledIterator] | None = None
        self._is_ready = False  # whether the source's shards were found readable

    @property
    def says_size(self) -> bool:
        """Whether the length of the batches is known before the first one, so that their memory can be allocated."""
        return says_size(self._index_sampler)

    def rank(self) -> Rank:
        """Return a rank that is served all records: the sampler decides this process's share."""
        return Rank(0, 1, "sampler", find_rank(self._asked.options).local_ranks)

    def state(self) -> dict[str, Any]:
        """Return the position; makes the sampler's iterator if the epoch has not begun."""
        if self._epoch is None:
            self._epoch, self._is_fresh = self._make(), True
        return self._epoch.state()

    @property
    def rebuild_arguments(self) -> tuple[LoaderArguments, Mapping[str, Any] | None]:
        """Arguments that make an equal engine elsewhere, and its position if the run has begun."""
        return self._asked, self._next if self._epoch is None else self._epoch.state()

    def load(self, state: Mapping[str, Any]) -> None:
        """Resume from a saved state.

        Raises:
            ValueError: The state is not one of a loader with a sampler.
        """
        missing = [key for key in STATE_KEYS if key not in state]
        if missing:
            raise ValueError(
                f"not a state of a loader with a sampler (and num_workers=0): it lacks {missing[0]!r}, "
                f"it has the keys {sorted(state)}"
            )
        self._next, self._epoch, self._is_fresh = state, None, False
        if state[FINISHED]:  # Made now: a reseed between here and iter() decides the next epoch's order.
            with RandomGenerators(self._index_sampler).replaying():
                self._epoch, self._is_fresh = self._make(), True

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the samplers that take one."""
        self._number = operator.index(epoch)
        set_sampler_epoch(self._index_sampler, self._number)

    def n_batches(self) -> int:
        """Return the batches of an epoch. Raises TypeError if the sampler has no length, as torch's loader does."""
        return len(self._index_sampler)

    def iterate(self) -> SampledIterator:
        """Return the iterator of the next epoch."""
        if not self._is_ready:
            prepare_reading(self._source)
            self._is_ready = True
        if not (self._is_fresh and self._epoch is not None):
            self._epoch = self._make()
        if self._epoch.finished:
            self._epoch = self._make()
        self._is_fresh = False
        iterator = SampledIterator(self._epoch, self, TorchDraws(self._asked.generator, False, 0))
        # weak: if a loop is left early, its iterator must be dropped and end its threads
        self._iterator = weakref.ref(iterator)
        return iterator

    def begin(self, epoch: SamplerPass, draws: TorchDraws) -> NativeIterator:
        """Start to gather the drawn batches of an epoch."""
        work = PipelineInputs(
            source=self._source,
            share=epoch.feed,
            counters=self._counters,
            waits=self._waits,
            output_spec=self._asked.serving,
            memory=self._memory,
            cache=self._fittings,
            warned=self._said,
            corruption=self._damage,
        )
        delivery = Delivery(self._asked.timeout_s, self._asked.pin_memory, draws)
        return NativeIterator(epoch, work, self._machine.resources(self.rank()), delivery)

    def stats(self) -> dict[str, Any]:
        """See DataLoader.stats."""
        counters = self._counters.snapshot()
        iterator = self._iterator() if self._iterator is not None else None
        for name, figure in (iterator.figures() if iterator is not None else {}).items():
            counters[name] = counters.get(name, 0) + figure
        now = self._source.figures()
        fetched = {name: now[name] - self._figures_before.get(name, 0) for name in now}
        return summarise(counters, self._waits, fetched, threads=self._machine.resources(self.rank()).n_threads)

    def _make(self) -> SamplerPass:
        """Return the next epoch, or that of the loaded state. Draws the random numbers that torch draws in iter()."""
        state, self._next = self._next, None
        ours = {} if state is None else state.get(OURS, {})
        number = ours.get("epoch", self._number)
        window_bytes = self._asked.options.window_bytes
        rows = ours.get("rows", 0)
        feed = SamplerQueue(
            self._source, self._locator, window_bytes, epoch=number, first_row=rows, damage=self._damage
        )
        feed.batch_size = batch_rows(self._index_sampler)
        epoch = SamplerPass(self._index_sampler, feed, self._source)  # first: it may draw from the generator too
        # A resumed epoch drew it before its state was saved.
        if state is None and not (self._asked.persistent_workers and self._asked.num_workers and self._n_epochs):
            TorchDraws(self._asked.generator, False, 0).begin()
        if self._seed is None:
            self._seed = next_seed(self._asked.generator, after_begin=True)
        feed.seed = self._seed = ours.get("seed", self._seed)
        self._number, self._n_epochs = number + 1, self._n_epochs + 1
        if state is not None:
            epoch.resume(state)
        return epoch
