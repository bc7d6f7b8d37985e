"""The drop-in DataLoader: torch's constructor and behaviour, and a native path for tiercache data sets."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, fields, replace
from multiprocessing.context import BaseContext
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset, Sampler, default_collate
from torchdata.stateful_dataloader import Stateful, StatefulDataLoader
from torchdata.stateful_dataloader import sampler as torchdata_samplers

from tiercache.data.output_spec import NativeAccess, NativeDataset, native_access
from tiercache.load.collate import collate
from tiercache.load.device import find_device
from tiercache.load.engine import LoaderArguments, OrderEngine
from tiercache.load.options import LoaderOptions
from tiercache.load.ranks import Rank, find_rank
from tiercache.load.sampler_engines import OrderSampler, SamplerEngine, ShuffledOrder, StoredOrder, TorchPathEngine
from tiercache.load.samplers import (
    NEXT_EPOCH,
    SAMPLER_EPOCH,
    BatchSampler,
    RandomSampler,
    get_sampler_epoch,
    is_known,
    is_known_batch_sampler,
    set_sampler_epoch,
    with_state,
)
from tiercache.load.state import STEPS_SINCE, RunState, state_for_workers
from tiercache.load.torch_library import TorchLibrary
from tiercache.load.torch_rng import RandomGenerators, loadable, next_seed, settled
from tiercache.load.transform import BatchFunction
from tiercache.load.transform_workers import TransformSettings
from tiercache.model import short_repr
from tiercache.transform_rng import use_fresh_key

logger = logging.getLogger("tiercache")

T_co = TypeVar("T_co", covariant=True)  # The type of a batch, as in torch: `DataLoader[Batch]` is a type.

_NOT_OURS = "the data set is a {0.__class__.__name__}, not a tiercache.Dataset"
_OF_NATIVE_PATH = "applies only to a tiercache.Dataset served by the native path; here"
_NO_PIN_DEVICE = (  # The wording is torch's.
    "pin_memory_device is deprecated, the current accelerator will be used as the device,ignore pin_memory_device='{}'."
)


class DataLoader(StatefulDataLoader[T_co]):  # type: ignore[misc]  # torchdata ships no types
    """torch's DataLoader with a resumable state and a native path for `tiercache.Dataset`.

    The loader honours torch's arguments (and torchdata's `snapshot_every_n_steps`) as torch does; only `options` is
    new. On the native path, threads gather batches without Python. The transforms of the data set and of the options
    are applied to these batches: in next(), or by `num_workers` processes, which only run the user's functions. On
    torch's path, torchdata's StatefulDataLoader fetches and collates records. The arguments decide the path:

    | data set | arguments | path | order and ranks | state |
    | --- | --- | --- | --- | --- |
    | `tiercache.Dataset` | no sampler | native | tiercache's | tiercache's |
    | the same | a plain sequence, or a sampler of torch or torchdata | native | the sampler's | torchdata's form |
    | the same, not a mixture | the user's own sampler or batch sampler | torch's | the sampler's | torchdata's |
    | a mixture | any sampler | torch's | the sampler's | torchdata's |
    | any other | any | torch's | torch's | torchdata's |

    A `tiercache.Dataset` with a `collate_fn` but no transform, with `batch_size=None`, or of a class that overrides how
    records are read always takes torch's path; without a sampler, it keeps tiercache's order, ranks and state there.

    On the native path a batch is a dict by column: tensors [n, ...] of the column's dtype; lists for bytes, str, JSON
    and encoded images; a list of tensors for ragged columns; `<column>.valid`, bool[n], beside a nullable column. The
    arguments of the data set change this: `decode=` turns images into one tensor [n, 3, height, width], or what
    `DecodeImage` requests; `layouts=` and `fill_nulls=` set the layout of columns of varying length and the values that
    replace nulls. The consumer owns a batch and may write to it. Each iter() begins the next epoch. state_dict() covers
    the batches that were handed out, and a resumed loader does not read them again.

    Args:
        dataset: Any torch data set, or a `tiercache.Dataset`.
        batch_size: Number of records per batch. None: single records, which take torch's path.
        shuffle: Whether to serve the records in a new random order in each epoch.
        sampler: Iterable of record numbers, as in torch. It replaces `shuffle` and the split of records among ranks.
        batch_sampler: Iterable of lists of record numbers, one list per batch, as in torch.
        num_workers: Number of worker processes, on torch's path and for transforms. Without transforms the native path
            starts none, but draws from torch's random numbers as if it did.
        collate_fn: Function from a list of records to a batch. If the data set has no transform, any function but None
            and `tiercache.collate` takes torch's path.
        pin_memory: Whether to copy each batch into pinned memory of the accelerator. It has no further effect with
            `LoaderOptions(device=...)`, which gathers batches in pinned memory.
        drop_last: Whether to drop the last batch of an epoch if it is shorter than `batch_size`.
        timeout: Seconds to wait for a batch before a RuntimeError; 0 waits without a limit.
        worker_init_fn: Function that each worker process calls with its number before its first batch.
        multiprocessing_context: Start method of the worker processes.
        generator: torch.Generator of the order's seed and of the random numbers that the loader draws. None: torch's
            own.
        prefetch_factor: Number of batches that each worker process loads ahead. None: 2.
        persistent_workers: Whether the worker processes live from one epoch to the next.
        pin_memory_device: Device of the pinned memory; deprecated by torch, which uses the current accelerator.
        in_order: Whether worker processes must deliver batches in order. The native path always does.
        snapshot_every_n_steps: Number of batches between two snapshots of the workers' states, as in torchdata.
        options: Seed, ranks and shuffle quality, and the resources of the native path.

    Raises:
        TypeError: `options` is not a LoaderOptions.
        ValueError: An argument that torch refuses, or an option that has no effect on this loader.
    """

    def __init__(
        self,
        dataset: TorchDataset[Any] | NativeDataset,
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Sampler[int] | Iterable[int] | None = None,
        batch_sampler: Sampler[list[int]] | Iterable[Sequence[int]] | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: str | BaseContext | None = None,
        generator: torch.Generator | None = None,
        *,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
        in_order: bool = True,
        snapshot_every_n_steps: int = 1,
        options: LoaderOptions | None = None,
    ) -> None:
        access = native_access(dataset)
        batch_transforms = _batch_transforms(access, options, collate_fn)
        if isinstance(collate_fn, TransformedCollate):
            collate_fn = collate_fn.collate_fn
        path = _choose_path(dataset, access, batch_size, sampler, batch_sampler, collate_fn)
        has_transform = access is not None and access.transform is not None
        # Whether the native path runs functions of the user.
        self._runs_functions = has_transform or (access is not None and bool(batch_transforms))
        if access is not None or batch_transforms:
            collate_fn = _collate_of(access, collate_fn, batch_transforms, is_batched=batch_size is not None)
        self._has_sampler, self._is_mixture = path.has_sampler, path.is_mixture
        self._starts_workers = path.name == "torch" or self._runs_functions
        shuffled = bool(shuffle)
        records: Any = dataset  # torch's stub of a data set has no length
        is_empty = shuffled and path.is_ordered and not len(records)
        if is_empty:
            shuffle = None  # torch's RandomSampler raises an error for an empty data set.
        if not self._has_sampler and not isinstance(dataset, IterableDataset):
            if shuffled and not is_empty:
                kind = ShuffledOrder if path.is_ordered else RandomSampler
                shuffle, sampler = None, kind(records, generator=generator)
            elif path.is_ordered:
                sampler = StoredOrder(records)
        with warnings.catch_warnings():
            # torchdata calls a function that torch 2.13 deprecated; neither its users nor this library can change that.
            warnings.filterwarnings("ignore", message=".*set_vital.*", category=UserWarning)
            super().__init__(
                dataset,
                batch_size,
                shuffle,
                sampler,
                batch_sampler,
                num_workers,
                collate_fn,
                pin_memory,
                drop_last,
                timeout,
                worker_init_fn,
                multiprocessing_context,
                generator,
                prefetch_factor=prefetch_factor,
                persistent_workers=persistent_workers,
                pin_memory_device=pin_memory_device,
                in_order=in_order or path.name == "native",  # torchdata warns about workers that do not exist here
                snapshot_every_n_steps=snapshot_every_n_steps,
            )
        if type(self.batch_sampler) is torchdata_samplers.BatchSampler and batch_sampler is None:
            self.batch_sampler.__class__ = BatchSampler  # torchdata creates it, and torch forbids replacing it later
        self.in_order = in_order
        has_state = isinstance(dataset, Stateful)
        _check_options(options, path.reason, is_ordered=path.is_ordered, has_state=has_state)
        self._is_split = False
        self._native: OrderEngine | SamplerEngine | None = None
        self._indexed: TorchPathEngine | None = None
        if access is not None and (path.is_ordered or not path.reason):
            transforms = self._transform_settings()
            arguments = LoaderArguments(
                library=TorchLibrary(),
                batch_size=int(batch_size or 1),
                shuffle=shuffled,
                drop_last=drop_last,
                timeout_s=timeout,
                pin_memory=pin_memory,
                generator=generator,
                options=options or LoaderOptions(),
                output_spec=access.output_spec if transforms is None else transforms.function.gathered_spec,
                num_workers=num_workers,
                persistent_workers=persistent_workers,
            )
            if not path.reason:
                self._native = self._make_engine(arguments)
            elif has_state:  # torchdata keeps the data set's state beside the sampler's
                self._is_split = arguments.options.split_ranks
            else:
                self._indexed = TorchPathEngine(records, arguments, is_batched=batch_size is not None)
        self._bind_sampler()
        # Set when a mid-epoch state in torchdata's form, which earlier releases saved, is loaded:
        self._resumes_in_torchdata = False  # The next iter() continues that epoch in torchdata.
        self._torchdata_serves_rest = False  # torchdata serves the epoch to its end. Still set when that iter() began.
        self._served_batch_sampler = self.batch_sampler
        self._newest_torch_iterator: Any = None
        if self._native is not None and num_workers:
            given = {
                "worker_init_fn": worker_init_fn is not None,
                "multiprocessing_context": multiprocessing_context is not None,
                "prefetch_factor": prefetch_factor is not None,
                "persistent_workers": persistent_workers,
                "in_order": not in_order,
                "snapshot_every_n_steps": snapshot_every_n_steps != 1,
            }
            ignored = [name for name, is_given in given.items() if is_given]
            _log_ignored(num_workers, ignored, runs_functions=self._runs_functions)

    def __iter__(self) -> Any:
        if self.batch_sampler is not self._served_batch_sampler:
            self._replace_batch_sampler(self.batch_sampler)
        if self._native is None:
            if self._indexed is not None and not self._resumes_in_torchdata:
                return self._iterate_indexed(self._indexed)
            self._resumes_in_torchdata = False
            access = native_access(self.dataset)
            if access is not None:
                self._check_unsplit()
                access.source.storage.prepare_reading(np.flatnonzero(access.source.shard_records))
            with self._torchdata_iterator():
                return super().__iter__()
        if self.pin_memory and self.pin_memory_device and hasattr(torch, "accelerator"):  # 2.6 and later
            warnings.warn(_NO_PIN_DEVICE.format(self.pin_memory_device), stacklevel=2)
        self._native.transforms = self._transform_settings()
        return self._native.iterate()

    def check_worker_number_rationality(self) -> None:
        """Warn as torch does if there are more worker processes than cores, unless the loader starts none."""
        if self._starts_workers:
            super().check_worker_number_rationality()

    def __len__(self) -> int:
        engine = self._native or self._indexed
        return super().__len__() if engine is None else engine.n_batches()

    def state_dict(self) -> dict[str, Any]:
        """Return the loader's position as plain values for a checkpoint.

        Over a tiercache data set the state is equal on all ranks. With a sampler it has torchdata's form and belongs to
        one rank.
        """
        engine = self._order_engine
        if engine is not None:
            return engine.state().to_dict()
        state: dict[str, Any]
        if isinstance(self._native, SamplerEngine):
            state = self._native.state()
        else:
            with self._torchdata_iterator():
                state = super().state_dict()
        if isinstance(self.sampler, RandomSampler) and state["_iterator_finished"]:
            draws_base_seed = not (self.persistent_workers and self.num_workers)
            state = {**state, NEXT_EPOCH: self.sampler.next_epoch(draws_base_seed=draws_base_seed)}
        epoch = get_sampler_epoch(self._index_sampler)
        return settled(state if epoch is None else {**state, SAMPLER_EPOCH: epoch})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state, on any number of ranks.

        Args:
            state_dict: Value that state_dict() returned.

        Raises:
            TypeError: `state_dict` is not a dict.
            ValueError: The state is of another kind of loader; or this loader's options differ from it; or it was saved
                with another number of workers over a data set in which each worker has its own position.
            ObjectChanged: The data set differs from the one that the state was saved on.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"load_state_dict() takes the dict that state_dict() returned, got {state_dict!r}")
        state_dict = self._for_own_workers(state_dict)
        if SAMPLER_EPOCH in state_dict:  # The sampler must know the epoch before it makes its iterator.
            set_sampler_epoch(self._index_sampler, state_dict[SAMPLER_EPOCH])
        is_ordered = {"parts", "offset"} <= state_dict.keys()
        if is_ordered and (self._has_sampler or (self._native is None and self._indexed is None)):
            raise ValueError(
                "the state was saved by a loader over a tiercache.Dataset without a sampler, and this loader has a "
                f"sampler or another data set: {self!r}. Load it into a loader without sampler= and batch_sampler="
            )
        # torchdata's state of a loader that has not begun
        if state_dict == {} and (self._native or self._indexed) is not None:
            return
        if self._indexed is not None and (is_ordered or _is_over(state_dict)):
            self._forget_torch_iterator()
            if is_ordered:
                self._indexed.load(RunState.from_dict(state_dict))
        elif self._native is None:
            self._resumes_in_torchdata = self._torchdata_serves_rest = self._indexed is not None
            with self._torchdata_iterator():
                super().load_state_dict(loadable(state_dict))
            if NEXT_EPOCH in state_dict and isinstance(self.sampler, RandomSampler):
                self.sampler.load_next_epoch(state_dict[NEXT_EPOCH])
        elif isinstance(self._native, OrderEngine):
            self._native.load(RunState.from_dict(state_dict))
        else:
            self._native.load(loadable(state_dict))

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` the next epoch. A state that was loaded for that epoch keeps its position.

        Args:
            epoch: Number of the epoch, 0 or more.
        """
        engine = self._native or self._indexed
        if engine is not None:
            engine.set_epoch(epoch)
        else:
            set_sampler_epoch(self._index_sampler, epoch)

    def stats(self, *, across_ranks: bool = False) -> dict[str, Any]:
        """Return the counters of the native path and its bottleneck (docs/guide/loader.md); {} on torch's path.

        Args:
            across_ranks: Whether `exposed_wait_s` also tells of the slowest rank. Then the call is a collective of
                torch.distributed: all ranks must make it.
        """
        return {} if self._native is None else self._native.stats(across_ranks=across_ranks)

    @property
    def _is_accelerate_prepared(self) -> bool:
        """False. Accelerate's prepare() reads it, and then splits the batch sampler among its processes itself."""
        if isinstance(self.sampler, OrderSampler):
            self.sampler.is_split_by_others = True
        return False

    @property
    def native_rank(self) -> Rank | None:
        """Rank whose share of each epoch the native path serves, and the origin of that rank; None on torch's path."""
        return None if self._native is None else self._native.rank()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickling: the copy continues at this loader's position, with its own threads."""
        engines = {name: getattr(self, name) for name in ("_native", "_indexed")}
        rebuilt = {name: None if engine is None else engine.rebuild_arguments for name, engine in engines.items()}
        state = {**vars(self), **rebuilt}
        newest = self._newest_iterator
        if newest is not None and self._order_engine is None:
            state |= {"next_iter_state": newest.state_dict(), "_resumes_in_torchdata": self._torchdata_serves_rest}
        return {**state, "_iterator": None, "_newest_torch_iterator": None, "_initial_iter_for_state_dict": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.sampler, OrderSampler):  # An OrderSampler is bound to one loader.
            sampler, batch_sampler = copy(self.sampler), copy(self.batch_sampler)
            is_own = self.batch_sampler is self._served_batch_sampler  # otherwise a user replaced it later
            if is_own and batch_sampler is not None:
                batch_sampler.sampler = sampler
                self._served_batch_sampler = batch_sampler
            self.__dict__.update(sampler=sampler, batch_sampler=batch_sampler)  # torch forbids setting them
        if state["_native"] is not None:
            arguments, position = state["_native"]
            self._native = self._make_engine(arguments)
            if position is not None and self._native is not None:
                self._native.load(position)
        if state["_indexed"] is not None:
            arguments, position = state["_indexed"]
            self._indexed = TorchPathEngine(self.dataset, arguments, is_batched=self.batch_size is not None)
            if position is not None:
                self._indexed.load(position)
        self._bind_sampler()

    def __repr__(self) -> str:
        path = "torch's path"
        if self._indexed is not None:
            path += f", {self._indexed.rank()}"
        elif self._native is not None:
            path = str(self._native.rank())
        facts = [repr(self.dataset), f"batch_size={self.batch_size}"]
        if (engine := self._native or self._indexed) is not None:
            facts += [f"{name}=True" for name in ("shuffle", "drop_last") if getattr(engine.arguments, name)]
            facts += [] if engine.arguments.options == LoaderOptions() else [short_repr(engine.arguments.options)]
        return f"{type(self).__name__}({', '.join(facts)}, {path})"

    @property
    def _index_sampler(self) -> Any:
        """Sampler that torch's iterators ask for indices."""
        indexed = vars(self).get("_indexed")  # None while torchdata's constructor runs
        if indexed is None:
            return with_state(super()._index_sampler)
        if not self._torchdata_serves_rest:
            return indexed.sampler
        sampler = copy(self.sampler)  # A copy is bound to no loader, so it behaves as torch's sampler.
        return with_state(BatchSampler(sampler, self.batch_size, self.drop_last) if self._auto_collation else sampler)

    def _bind_sampler(self) -> None:
        """Let the loader's own sampler return this loader's order."""
        engine = self._native or self._indexed
        if isinstance(self.sampler, OrderSampler) and isinstance(engine, OrderEngine):
            self.sampler.engine = engine

    @property
    def _order_engine(self) -> OrderEngine | None:
        """Engine of tiercache's own order, whose state is a RunState; None: a sampler or torchdata has the state."""
        if self._indexed is None:
            return self._native if isinstance(self._native, OrderEngine) else None
        iterator: Any = self._newest_iterator
        is_over = iterator is not None and iterator._finished  # noqa: SLF001 -- torchdata's
        return None if self._torchdata_serves_rest and not is_over else self._indexed

    def _iterate_indexed(self, engine: TorchPathEngine) -> Any:
        """Return torch's iterator over the next epoch of tiercache's order."""
        is_resumed = engine.begin()
        if self._torchdata_serves_rest:
            self._forget_torch_iterator()
        random_state = torch.get_rng_state()
        own_state = None if self.generator is None else self.generator.get_state()
        # The iterator takes the loader's data set, which torch forbids setting.
        dataset, self.__dict__["dataset"] = self.dataset, engine.fetched_dataset
        try:
            with self._torchdata_iterator():
                iterator = super().__iter__()
        finally:
            self.__dict__["dataset"] = dataset
        if is_resumed:
            torch.set_rng_state(random_state)
            if self.generator is not None:
                self.generator.set_state(own_state)
        engine.set_iterator(iterator)
        return iterator

    def _get_iterator(self) -> Any:
        state = self.next_iter_state
        if state is None:
            return super()._get_iterator()
        if state.get("_iterator_finished") and not isinstance(self.dataset, (IterableDataset, Stateful)):
            # torchdata makes another iterator for the next epoch. This one must not draw what decides the next epoch's
            # order: the user may have reseeded after the state was loaded.
            with RandomGenerators(self.sampler).replaying(with_own=NEXT_EPOCH in state):
                iterator = super()._get_iterator()
        else:
            random_state = torch.get_rng_state()
            own_state = None if self.generator is None else self.generator.get_state()
            iterator = super()._get_iterator()
            self._restore_random_numbers(random_state)
            # load_state_dict() set it, or the user did after that
            if NEXT_EPOCH in state and self.generator is not None:
                self.generator.set_state(own_state)
        # With workers, torchdata's iterator skips these batches itself.
        if self.num_workers == 0 and STEPS_SINCE in state:
            for _ in range(state[STEPS_SINCE]):
                next(iterator)
            iterator._finished = state["_iterator_finished"]  # noqa: SLF001 -- torchdata does the same
        return iterator

    def _restore_random_numbers(self, random_state: torch.Tensor) -> None:
        """Undo the iterator's draw of a base seed, so that later draws equal those after the state was saved.

        random_state: torch's random state before the iterator was made.
        """
        # The epoch drew a base seed before its state was saved. If more than that changed, the data set restored a
        # state of its own, which stays.
        drawn = torch.Generator().set_state(random_state)
        torch.empty((), dtype=torch.int64).random_(generator=drawn)
        if torch.equal(torch.get_rng_state(), drawn.get_state()):
            torch.set_rng_state(random_state)

    def _forget_torch_iterator(self) -> None:
        """Drop torch's iterator and its state, so that the next iter() makes a new one."""
        self._iterator = self._newest_torch_iterator = None
        self.next_iter_state: Any = None
        self._initial_iter_for_state_dict = self._resumes_in_torchdata = self._torchdata_serves_rest = False

    def _check_unsplit(self) -> None:
        """Warn, or raise ValueError, if torchdata serves all records to every rank although ranks share the epochs."""
        rank = find_rank(LoaderOptions())
        if rank.world_size == 1:
            return
        if self._is_split:
            raise ValueError(
                f"a data set with a state_dict() of its own cannot be split among ranks, and this is {rank}: give a "
                "sampler (torch's DistributedSampler), or LoaderOptions(split_ranks=False)"
            )
        if self._torchdata_serves_rest:
            warnings.warn(
                f"the state was saved by a loader that served all records to every rank: until this epoch ends, {rank} "
                "is served all records too",
                RuntimeWarning,
                stacklevel=3,  # the caller of iter(loader)
            )

    @property
    def _keeps_workers(self) -> bool:
        return bool(self.persistent_workers and self.num_workers)

    @property
    def _newest_iterator(self) -> Any:
        """Iterator that the last iter() made on torch's path; None: there is none."""
        return self._iterator if self._keeps_workers else self._newest_torch_iterator

    @contextmanager
    def _torchdata_iterator(self) -> Iterator[None]:
        """Put the newest iterator into `_iterator`, where torchdata's methods keep it for the state.

        Outside of this context torch's rule holds: `_iterator` is None unless workers persist. Frameworks end the
        workers of an iterator that they find there.
        """
        if not self._keeps_workers:
            self._iterator = self._newest_torch_iterator
        try:
            yield
        finally:
            if not self._keeps_workers:
                self._newest_torch_iterator, self._iterator = self._iterator, None

    def _for_own_workers(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Convert the state of a loader with another number of workers. Raises ValueError if that is impossible."""
        n_workers = 0 if self._native is not None else self.num_workers
        is_iterable = isinstance(self.dataset, IterableDataset)
        base_seed = next_seed(self.generator, after_begin=True)
        converted = state_for_workers(state, n_workers, base_seed, is_iterable=is_iterable)
        if self._native is not None and STEPS_SINCE in converted:
            raise ValueError(
                f"the state's snapshot is {converted[STEPS_SINCE]} batches older than the position to resume, because "
                "snapshot_every_n_steps was above 1 when it was saved: only a loader on torch's path (with a "
                "collate_fn=) can resume from it"
            )
        return converted

    def _replace_batch_sampler(self, batch_sampler: Any) -> None:
        """Serve a batch sampler that replaced the loader's own after the loader was made.

        torch's loader asks whichever batch sampler it has at iter(). MultiEpochsDataLoader (timm and others) installs
        one that never ends, so that worker processes live from epoch to epoch.
        """
        native, self._served_batch_sampler = self._native, batch_sampler
        self._has_sampler, self._native, self._indexed = True, None, None
        if native is not None:
            arguments, _ = native.rebuild_arguments
            self._native = self._make_engine(replace(arguments, shuffle=False))
        self._starts_workers = self._native is None or self._runs_functions

    def _transform_settings(self) -> TransformSettings | None:
        """Return the user's functions of the native path, and their processes; None: there are no such functions.

        It is made for each epoch, because frameworks set worker_init_fn and others after the loader was made.
        """
        if not self._runs_functions:
            return None
        access = self.dataset.__tiercache__()
        collate_fn: Any = self.collate_fn
        batch_transforms: tuple[Callable[[Any], Any], ...] = ()
        if isinstance(collate_fn, TransformedCollate):
            collate_fn, batch_transforms = collate_fn.collate_fn, collate_fn.batch_transforms
        function = BatchFunction(
            dataset=self.dataset,
            columns=access.output_spec.schema(access.source.schema).columns,
            output_spec=access.output_spec,
            collate_fn=None if access.transform is None else collate_fn,
            batch_transforms=batch_transforms,
        )
        return TransformSettings(
            function=function,
            n_workers=self.num_workers,
            context=self.multiprocessing_context,
            worker_init_fn=self.worker_init_fn,
            prefetch_factor=self.prefetch_factor or 2,
            keeps_workers=self._keeps_workers,
        )

    def _make_engine(self, arguments: LoaderArguments) -> OrderEngine | SamplerEngine | None:
        """Return the engine of the native path; None: torch's path serves the sampler."""
        source = self.dataset.__tiercache__().source
        if not self._has_sampler:
            return OrderEngine(source, arguments)
        _check_sampler_options(arguments.options)
        index_sampler = super()._index_sampler
        known = is_known_batch_sampler(index_sampler) and not self._is_mixture
        options, defaults = arguments.options, LoaderOptions()
        for name in ("on_corrupt", "device"):
            value = find_device(options.device) if name == "device" else getattr(options, name)
            if not known and value != getattr(defaults, name):
                raise ValueError(
                    f"{name}={value!r} applies only to the native path, and torch's path serves your own samplers and "
                    f"mixtures, here {index_sampler!r}: {_instead_of(name)}, or give a known sampler"
                )
        return SamplerEngine(source, arguments, index_sampler) if known else None


@dataclass(frozen=True, slots=True)
class _Path:
    """How a loader serves its data set, as far as its arguments decide it.

    Attributes:
        name: Path that serves the loader.
        reason: Reason why a loader over this data set takes torch's path, whatever its sampler; "" if there is none.
        has_sampler: Whether the caller gave a sampler or a batch sampler.
        is_ordered: Whether the order is tiercache's own, on either path.
        is_mixture: Whether the data set is a mixture. A record of a mixture has no fixed number: which record of a part
            comes next depends on the epoch.
    """

    name: Literal["native", "torch"]
    reason: str
    has_sampler: bool
    is_ordered: bool
    is_mixture: bool


def _choose_path(
    dataset: Any, access: NativeAccess | None, batch_size: int | None, sampler: Any, batch_sampler: Any, collate_fn: Any
) -> _Path:
    """Return the path for the loader's arguments. access: None for a data set of another library."""
    reason = _NOT_OURS.format(dataset)
    if access is not None:
        reason = _reason_for_torch(access, batch_size, collate_fn, batch_sampler)
    has_sampler = sampler is not None or batch_sampler is not None
    is_mixture = access is not None and access.source.mixture is not None
    is_known_sampler = is_known(sampler) if batch_sampler is None else is_known_batch_sampler(batch_sampler)
    takes_torch_path = bool(reason) or (has_sampler and (is_mixture or not is_known_sampler))
    name: Literal["native", "torch"] = "torch" if takes_torch_path else "native"
    return _Path(name, reason, has_sampler, access is not None and not has_sampler, is_mixture)


def _reason_for_torch(access: NativeAccess, batch_size: int | None, collate_fn: Any, batch_sampler: Any) -> str:
    """Return the reason why a tiercache data set takes torch's path with any sampler; "" if there is none."""
    if batch_size is None and batch_sampler is None:
        return "batch_size=None asks for single records"
    if access.overrides_access:
        return "the data set's class overrides how records are read"
    return "" if collate_fn in (None, collate) or access.transform is not None else "collate_fn= was given"


def _batch_transforms(access: NativeAccess | None, options: Any, collate_fn: Any) -> tuple[Callable[[Any], Any], ...]:
    """Return the functions that are applied to each batch: that of the data set, then that of the options.

    A loader that a framework rebuilds from another loader's attributes keeps that loader's functions.
    """
    if isinstance(collate_fn, TransformedCollate):
        return collate_fn.batch_transforms
    if access is None:
        return ()
    given = access.batch_transform, options.batch_transform if isinstance(options, LoaderOptions) else None
    return tuple(function for function in given if function is not None)


def _collate_of(
    access: NativeAccess | None,
    collate_fn: Callable[[list[Any]], Any] | None,
    batch_transforms: tuple[Callable[[Any], Any], ...],
    *,
    is_batched: bool,
) -> Callable[[list[Any]], Any] | None:
    """Return the collate function of a loader over a tiercache data set; None: torch's for single records."""
    if collate_fn is None and is_batched and access is not None:
        collate_fn = collate if access.is_plain else default_collate
    if not batch_transforms:
        return collate_fn
    if collate_fn is None:
        raise ValueError("batch_transform= needs batches, and batch_size=None asks for single records")
    return TransformedCollate(collate_fn, batch_transforms)


@dataclass(frozen=True, slots=True)
class TransformedCollate:
    """The collate function of a loader with batch transforms, on torch's path; the native path runs its parts."""

    collate_fn: Callable[[list[Any]], Any]
    batch_transforms: tuple[Callable[[Any], Any], ...]

    def __call__(self, records: list[Any]) -> Any:
        """Return the batch of some records."""
        with use_fresh_key():
            batch = self.collate_fn(records)
            for function in self.batch_transforms:
                batch = function(batch)
        return batch


def _is_over(state: Mapping[str, Any]) -> bool:
    """Whether a torchdata state is of an epoch that was served to its end."""
    return bool(state.get("_iterator_finished"))


def _log_ignored(num_workers: int, names: list[str], *, runs_functions: bool) -> None:
    """Log which of torch's options for worker processes have no effect."""
    if runs_functions:
        without_effect = " and ".join(name for name in names if name in ("in_order", "snapshot_every_n_steps"))
        if without_effect:
            logger.info("%s has no effect on tiercache's native path, which runs the transforms", without_effect)
        return
    ignored = f", so that {', '.join(names)} {'is' if len(names) == 1 else 'are'} ignored" if names else ""
    logger.info(
        "num_workers=%d starts no worker processes%s: this loader takes tiercache's native path, whose threads gather "
        "batches ahead (LoaderOptions(threads=, memory_bytes=)); only a transform=, batch_transform= or collate_fn= "
        "runs in worker processes",
        num_workers,
        ignored,
    )


def _check_options(options: Any, reason: str, *, is_ordered: bool, has_state: bool) -> None:
    """Raise TypeError or ValueError for `options` of a wrong type or without an effect.

    reason: see _Path; is_ordered: whether the order is tiercache's own, also on torch's path; has_state: whether the
    data set has a state of its own.
    """
    if options is None:
        return
    if not isinstance(options, LoaderOptions):
        raise TypeError(f"options= takes a tiercache.LoaderOptions(...), got {options!r}")
    if reason and not is_ordered:
        raise ValueError(f"options= {_OF_NATIVE_PATH} {reason}: remove options=")
    native_only = ("memory_bytes", "threads", "on_corrupt", "device")
    without_effect: Sequence[str] = native_only if reason else ()
    if reason and has_state:
        without_effect = [field.name for field in fields(LoaderOptions) if field.name != "split_ranks"]
    defaults = LoaderOptions()
    for name in without_effect:
        value = getattr(options, name)
        if name == "device":
            value = find_device(value)  # None for the CPU, where batches are anyway
        if value != getattr(defaults, name):
            raise ValueError(f"{name}={value!r} {_OF_NATIVE_PATH} {reason}: {_instead_of(name)}")


def _instead_of(name: str) -> str:
    """Return what to do about an option of the native path."""
    if name == "device":
        return "remove device=, give pin_memory=True, and move each batch with .to(device, non_blocking=True)"
    return f"remove {name}="


def _check_sampler_options(options: LoaderOptions) -> None:
    """Raise ValueError for options of the order, which a sampler decides."""
    defaults = LoaderOptions()
    for name in ("rank", "world_size", "shuffle_streams", "placement", "shuffle_group_bytes"):
        value = getattr(options, name)
        if value != getattr(defaults, name):
            raise ValueError(
                f"{name}={value!r} applies only to a loader without a sampler; here the sampler decides the order and "
                "which records a rank is served (torch's DistributedSampler splits records by rank): remove "
                f"{name}=, or the sampler"
            )
