"""The drop-in DataLoader: torch's constructor and behaviour, and a native path for tiercache data sets."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from functools import cache, partial
from multiprocessing.context import BaseContext
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils import dlpack
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset, Sampler, default_collate
from torchdata.stateful_dataloader import StatefulDataLoader

from tiercache._native.ring import RowType, Slot
from tiercache.data.output_spec import NativeAccess, NativeDataset, native_access
from tiercache.load.batch import ArrayLibrary
from tiercache.load.collate import TORCH_DTYPES, CutMix, MixUp, TransformedCollate, collate
from tiercache.load.device import find_device, make_batch_device
from tiercache.load.engine import LoaderArguments, OrderEngine
from tiercache.load.epoch import RunState, epoch_records
from tiercache.load.loader_options import LoaderOptions, Rank, checks_arguments
from tiercache.load.samplers import (
    OrderSampler,
    SamplerEngine,
    ShuffledOrder,
    StoredOrder,
    get_sampler_epoch,
    is_known,
    is_known_batch_sampler,
    set_sampler_epoch,
)
from tiercache.load.transform import BatchFunction
from tiercache.load.transform_workers import WorkerSettings
from tiercache.shard.conversion import bfloat16_tensor

# torch.from_dlpack examines its argument for 0.1 us, and then calls this.
_from_dlpack: Callable[[object], torch.Tensor] = getattr(torch._C, "_from_dlpack", dlpack.from_dlpack)  # noqa: SLF001


@cache
def _dlpack_code(dtype: str) -> int | None:
    """Return DLPack's number of a kind of dtype; None if this torch does not import it."""
    if dtype == "bfloat16":
        return 4
    array = np.zeros(1, dtype)
    try:
        _from_dlpack(array.__dlpack__())
    except (RuntimeError, BufferError):
        return None
    return {"i": 0, "u": 1, "f": 2, "b": 6}[array.dtype.kind]


class TorchLibrary(ArrayLibrary):
    """Batches of torch tensors on the CPU."""

    profiler = torch.autograd.profiler
    from_dlpack = staticmethod(_from_dlpack)
    nested = staticmethod(torch.nested.nested_tensor_from_jagged)

    def row_type(self, dtype: str, shape: tuple[int, ...]) -> RowType | None:
        """See ArrayLibrary. None if rows have no elements, or this torch cannot import them by DLPack."""
        code = None if 0 in shape else _dlpack_code(dtype)
        return None if code is None else RowType(code, 8 * TORCH_DTYPES[dtype].itemsize, shape)

    def rows_over(self, dtype: str, shape: tuple[int, ...] = ()) -> Callable[[Slot, int, int], torch.Tensor]:
        """See ArrayLibrary.

        Through DLPack it takes 0.35 us here; a NumPy array plus a tensor takes 0.55, torch.frombuffer plus view 1.1.
        """
        # An empty tensor would have the address of the next stream, and torch.save refuses two dtypes at one address.
        if 0 in shape:
            return lambda _slot, _offset, n: self.empty((n, *shape), dtype)
        if (row_type := self.row_type(dtype, shape)) is None:
            over = super().rows_over(dtype, shape)
            return lambda slot, offset, n: torch.from_numpy(over(slot, offset, n))
        return lambda slot, offset, n: _from_dlpack(slot.tensor(row_type, offset, n))

    def over(self, memory: Any, dtype: str, shape: tuple[int, ...], offset: int = 0) -> torch.Tensor:
        """See ArrayLibrary."""
        flat = torch.frombuffer(memory, dtype=TORCH_DTYPES[dtype], count=math.prod(shape), offset=offset)
        return flat if len(shape) == 1 else flat.view(shape)

    def empty(self, shape: Sequence[int], dtype: str) -> torch.Tensor:
        """See ArrayLibrary."""
        return torch.empty(tuple(shape), dtype=TORCH_DTYPES[dtype], device="cpu")

    def split(self, array: Any, sizes: list[int]) -> Sequence[torch.Tensor]:
        """See ArrayLibrary."""
        parts: Sequence[torch.Tensor] = torch.split(array, sizes)
        return parts

    def from_numpy(self, stored: Any, dtype: str) -> torch.Tensor:
        """See ArrayLibrary."""
        tensor: torch.Tensor = bfloat16_tensor(stored) if dtype == "bfloat16" else torch.from_numpy(stored)
        return tensor


T_co = TypeVar("T_co", covariant=True)  # The type of a batch, as in torch: `DataLoader[Batch]` is a type.

_NO_PIN_DEVICE = (  # The wording is torch's.
    "pin_memory_device is deprecated, the current accelerator will be used as the device,ignore pin_memory_device='{}'."
)

_SAMPLER_EPOCH = "_tiercache_sampler_epoch"  # beside torchdata's keys: the epoch of a sampler that has set_epoch()

_ORDER_KEYS = {"parts", "offset"}


class DataLoader(StatefulDataLoader[T_co]):  # type: ignore[misc]  # torchdata ships no types
    """torch's DataLoader with a resumable state and a native path for `tiercache.Dataset`.

    The loader honours torch's arguments (and torchdata's `snapshot_every_n_steps`) as torch does; only `options` is
    new. On the native path, threads gather batches without Python. The transforms of the data set and of the options
    are applied to these batches: in next(), or by `num_workers` processes, which only run the user's functions. On
    torch's path, torchdata's StatefulDataLoader fetches and collates records. The arguments decide the path:

    | data set | arguments | path | order and ranks |
    | --- | --- | --- | --- |
    | `tiercache.Dataset` | no sampler | native | tiercache's |
    | the same | a plain sequence, or a sampler of torch or torchdata | native | the sampler's |
    | the same | the user's own sampler or batch sampler | torch's | the sampler's |
    | a mixture | any sampler | torch's | the sampler's |
    | any other | any | torch's | torch's |

    A `tiercache.Dataset` with `batch_size=None`, or of a class that overrides how records are read, always takes
    torch's path; without a sampler, it keeps tiercache's order and ranks there. On torch's path the state is
    torchdata's.

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
            starts none.
        collate_fn: Function from a list of records to a batch. It runs where transforms run.
        pin_memory: Whether to copy each batch into pinned memory of the accelerator. It has no further effect with
            `LoaderOptions(device=...)`, which gathers batches in pinned memory.
        drop_last: Whether to drop the last batch of an epoch if it is shorter than `batch_size`.
        timeout: Seconds to wait for a batch before a RuntimeError; 0 waits without a limit.
        worker_init_fn: Function that each worker process calls with its number before its first batch.
        multiprocessing_context: Start method of the worker processes. None: multiprocessing's own, but "forkserver"
            for workers that read from a remote store, whose connections do not survive a fork.
        generator: torch.Generator from which a run without `LoaderOptions(seed=)` draws its seed when it begins. None:
            torch's own.
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

    @checks_arguments
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
        if options is not None and not isinstance(options, LoaderOptions):
            raise TypeError(f"options= takes a tiercache.LoaderOptions(...), got {options!r}")
        access = native_access(dataset)
        if num_workers and prefetch_factor == 0:  # torch would serve no batch at all
            raise ValueError(
                "prefetch_factor must be 1 or more, or None for 2, got 0: a worker loads its batches ahead"
            )
        records: Any = dataset  # torch's stub of a data set has no length
        has_sampler = sampler is not None or batch_sampler is not None
        # Whether the order is tiercache's own, on either path. A class with a length of its own numbers other records.
        has_order = (
            access is not None
            and not has_sampler
            and (not access.overrides_access or len(records) == epoch_records(access.source))
        )
        reason = _reason_for_torch(dataset, access, batch_size, sampler, batch_sampler)
        if options is not None:
            _check_options(options, reason, has_sampler=has_sampler, has_order=has_order)
        if access is not None:
            collate_fn = _collate_of(
                access, options, collate_fn, is_batched=batch_size is not None or batch_sampler is not None
            )
            storage = access.source.storage
            if reason and num_workers and multiprocessing_context is None:
                multiprocessing_context = "forkserver" if storage.has_cache or storage.sends_requests else None
        is_shuffled = bool(shuffle)
        if access is not None and has_order:
            if access.source.mixture is not None and reason and is_shuffled:
                raise ValueError(f"a mixture is shuffled only on the native path; here {reason}")
            # torch's RandomSampler raises an error for an empty data set.
            sampler = ShuffledOrder(records, generator=generator) if shuffle and len(records) else StoredOrder(records)
            shuffle = None
        # Set first, because torch's constructor calls check_worker_number_rationality().
        self._is_native, self._reason_for_torch, self._has_sampler = not reason, reason, has_sampler
        # Whether the native path runs functions of the user.
        self._runs_functions = (
            access is not None and not reason and (access.transform is not None or collate_fn is not collate)
        )
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
                in_order=in_order or not reason,  # torchdata warns about workers that do not exist here
                snapshot_every_n_steps=snapshot_every_n_steps,
            )
        self.in_order = in_order
        # The engine of the native path; on torch's path, that of tiercache's order, which the sampler returns.
        self._engine: OrderEngine | SamplerEngine | None = None
        self._own_batch_sampler = self.batch_sampler
        if isinstance(self.sampler, OrderSampler) and self.batch_sampler is not None:
            setattr(self.batch_sampler, "set_epoch", self.sampler.set_epoch)  # noqa: B010 - Trainer, after it skipped
        if access is None or (reason and not has_order):
            return
        function, device = self._batch_function(), find_device(options.device if options else None)
        arguments = LoaderArguments(
            library=TorchLibrary(),
            batch_size=int(batch_size or 1),
            shuffle=is_shuffled,
            drop_last=drop_last,
            timeout_s=timeout,
            draw_seed=partial(_draw_seed, generator),
            options=options or LoaderOptions(),
            pin_function=_pin_function if pin_memory and device is None else None,
            batch_device=None if device is None else partial(make_batch_device, device, options or LoaderOptions()),
            output_spec=access.output_spec if function is None else function.gathered_spec,
            num_workers=num_workers,
        )
        self._start_engine(arguments, None)

    def __iter__(self) -> Any:
        if not self._is_native or self._engine is None:
            access = native_access(self.dataset)
            if access is not None:
                access.source.storage.prepare_reading(np.flatnonzero(access.source.shard_records))
            return super().__iter__()
        if self.batch_sampler is not self._own_batch_sampler:
            raise RuntimeError(
                "the loader's batch_sampler was replaced after the loader was made: give batch_sampler= to the "
                "constructor. Workers live from epoch to epoch with persistent_workers=True"
            )
        if self.pin_memory and self.pin_memory_device and hasattr(torch, "accelerator"):  # 2.6 and later
            warnings.warn(_NO_PIN_DEVICE.format(self.pin_memory_device), stacklevel=2)
        # Made for each epoch, because frameworks set worker_init_fn and others after the loader was made.
        self._engine.function = function = self._batch_function()
        self._engine.worker_settings = None if function is None else self._worker_settings(function)
        return self._engine.iterate()

    def check_worker_number_rationality(self) -> None:
        """Warn, as torch does, about more workers than cores; not if the native path starts no processes."""
        if not self._is_native or self._runs_functions:
            super().check_worker_number_rationality()

    def __len__(self) -> int:
        """Return the number of batches of an epoch on this rank; the length of an IterableDataset as torch does."""
        return super().__len__() if self._engine is None or not self._is_native else self._engine.n_batches()

    def state_dict(self) -> dict[str, Any]:
        """Return the loader's position as plain values for a checkpoint.

        Over a tiercache data set the state is equal on all ranks. With a sampler it belongs to one rank, and it may
        hold the state of the sampler's generator. On torch's path it has torchdata's form.
        """
        state: dict[str, Any]
        if not self._is_native or self._engine is None:
            state = super().state_dict()
            epoch = get_sampler_epoch(self._index_sampler)
            return state if epoch is None else {**state, _SAMPLER_EPOCH: epoch}
        if isinstance(self._engine, OrderEngine):
            return self._engine.state().to_dict()
        return self._engine.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state, on any number of ranks.

        Args:
            state_dict: Value that state_dict() returned.

        Raises:
            TypeError: `state_dict` is not a dict.
            ValueError: The state is of another kind of loader; or this loader's options differ from it.
            ObjectChanged: The data set differs from the one that the state was saved on.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"load_state_dict() takes the dict that state_dict() returned, got {state_dict!r}")
        is_ordered = state_dict.keys() >= _ORDER_KEYS
        if is_ordered and (not self._is_native or not isinstance(self._engine, OrderEngine)):
            raise ValueError(
                "the state was saved by a loader over a tiercache.Dataset without a sampler on the native path, and "
                f"this is another kind of loader: {self!r}. Load it into a loader with the arguments of the first one"
            )
        if not self._is_native or self._engine is None:
            if _SAMPLER_EPOCH in state_dict:  # The sampler must know the epoch before it makes its iterator.
                set_sampler_epoch(self._index_sampler, state_dict[_SAMPLER_EPOCH])
            super().load_state_dict({key: value for key, value in state_dict.items() if key != _SAMPLER_EPOCH})
        elif not state_dict:  # torchdata's state of a loader that has not begun
            return
        elif isinstance(self._engine, OrderEngine):
            self._engine.load(RunState.from_dict(state_dict))
        else:
            self._engine.load(state_dict)

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` the next epoch. A state that was loaded for that epoch keeps its position.

        Args:
            epoch: Number of the epoch, 0 or more.
        """
        if self._engine is not None:
            self._engine.set_epoch(epoch)
        else:
            set_sampler_epoch(self._index_sampler, epoch)

    def stats(self, *, across_ranks: bool = False) -> dict[str, Any]:
        """Return the counters of the native path and its bottleneck (docs/guide/loader.md); {} on torch's path.

        Args:
            across_ranks: Whether `exposed_wait_s` also tells of the slowest rank. Then the call is a collective of
                torch.distributed: all ranks must make it.
        """
        return {} if self._engine is None or not self._is_native else self._engine.stats(across_ranks=across_ranks)

    @property
    def _is_accelerate_prepared(self) -> bool:
        """False. Accelerate's prepare() reads it, and then splits the batch sampler among its processes itself."""
        if isinstance(self.sampler, OrderSampler):
            self.sampler.is_split_by_others = True
        return False

    @property
    def native_rank(self) -> Rank | None:
        """Rank whose share of each epoch the native path serves, and the origin of that rank; None on torch's path."""
        return self._engine.rank() if self._is_native and self._engine is not None else None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickling: the copy continues at this loader's position, with its own threads."""
        rebuilt = None if self._engine is None else self._engine.rebuild_arguments
        return {**vars(self), "_engine": rebuilt, "_iterator": None, "_initial_iter_for_state_dict": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["sampler"], OrderSampler):  # It is bound to one loader.
            sampler, batch_sampler = copy(state["sampler"]), copy(state["batch_sampler"])
            if batch_sampler is not None:
                batch_sampler.sampler, batch_sampler.set_epoch = sampler, sampler.set_epoch
            state = {**state, "sampler": sampler, "batch_sampler": batch_sampler, "_own_batch_sampler": batch_sampler}
        for name, value in state.items():  # in torch's order, which sets the samplers before it forbids that
            setattr(self, name, value)
        if state["_engine"] is not None:
            self._start_engine(*state["_engine"])

    def __repr__(self) -> str:
        facts = [repr(self.dataset), f"batch_size={self.batch_size}"]
        if self._engine is not None:
            facts += self._engine.facts()
        facts += [f"torch's path ({self._reason_for_torch})" if self._reason_for_torch else "native path"]
        if self._engine is not None:
            facts += [self._engine.describe_position(), str(self._engine.rank())]
        else:
            # torch's own batch sampler, or torchdata's, only groups what the sampler returns.
            own = self.sampler if type(self.batch_sampler).__name__ == "BatchSampler" else self._index_sampler
            is_iterable = isinstance(self.dataset, IterableDataset)
            facts += [f"the order of {'the data set' if is_iterable else f'its {type(own).__name__}'}"]
        return f"{type(self).__name__}({', '.join(facts)})"

    def _start_engine(self, arguments: LoaderArguments, position: Any) -> None:
        source = self.dataset.__tiercache__().source
        if self._has_sampler:
            self._engine = SamplerEngine(source, arguments, self.batch_sampler)
        else:
            self._engine = OrderEngine(source, arguments)
            self.sampler.engine = self._engine
        if position is not None:
            self._engine.load(position)

    def _batch_function(self) -> BatchFunction | None:
        """Return the user's functions of the native path; None: there are no such functions."""
        if not self._runs_functions:
            return None
        access = self.dataset.__tiercache__()
        collate_fn: Any = self.collate_fn
        batch_transforms: tuple[Callable[[Any], Any], ...] = ()
        if isinstance(collate_fn, TransformedCollate):
            collate_fn, batch_transforms = collate_fn.collate_fn, collate_fn.batch_transforms
        if collate_fn is collate and access.transform is None:
            collate_fn = None
        return BatchFunction(
            dataset=self.dataset,
            columns=access.output_spec.schema(access.source.schema).columns,
            output_spec=access.output_spec,
            collate_fn=collate_fn,
            batch_transforms=batch_transforms,
            is_own=collate_fn is None and all(type(one) in (MixUp, CutMix) for one in batch_transforms),
        )

    def _worker_settings(self, function: BatchFunction) -> WorkerSettings | None:
        """Return the processes that run the user's functions; None: the consumer's thread does."""
        if not self.num_workers:
            return None
        return WorkerSettings(
            function=function,
            n_workers=self.num_workers,
            context=self.multiprocessing_context,
            worker_init_fn=self.worker_init_fn,
            prefetch_factor=2 if self.prefetch_factor is None else self.prefetch_factor,
            keeps_workers=bool(self.persistent_workers),
        )


def _draw_seed(generator: torch.Generator | None) -> int:
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator))


def _pin_function() -> Callable[[Any], Any] | None:
    """Return the function that pins a batch; None, with torch's warning, if there is no accelerator."""
    pin: Callable[[Any], Any] = torch.utils.data._utils.pin_memory.pin_memory  # noqa: SLF001 -- also nested batches
    accelerator = getattr(torch, "accelerator", None)
    if accelerator is None:  # torch before 2.6 supports only CUDA here and does not warn
        return pin if torch.cuda.is_available() else None
    if not accelerator.is_available():
        warnings.warn(
            "'pin_memory' argument is set as true but no accelerator is found, "
            "then device pinned memory won't be used.",
            stacklevel=5,  # the caller of iter(loader)
        )
        return None
    return pin


def _reason_for_torch(
    dataset: object, access: NativeAccess | None, batch_size: int | None, sampler: Any, batch_sampler: Any
) -> str:
    if access is None:
        return f"the data set is a {type(dataset).__name__}, not a tiercache.Dataset"
    if batch_size is None and batch_sampler is None:
        return "batch_size=None asks for single records"
    if access.overrides_access:
        return "the data set's class overrides how records are read"
    if sampler is None and batch_sampler is None:
        return ""
    if access.source.mixture is not None:
        # Which record of a part comes next depends on the epoch.
        return "the records of a mixture have no fixed numbers, and a sampler was given"
    known = is_known(sampler) if batch_sampler is None else is_known_batch_sampler(batch_sampler)
    own = sampler if batch_sampler is None else batch_sampler
    return "" if known else f"the sampler, a {type(own).__name__}, is neither torch's nor torchdata's"


def _collate_of(
    access: NativeAccess, options: LoaderOptions | None, given: Any, *, is_batched: bool
) -> Callable[[list[Any]], Any] | None:
    """Return the collate function of a loader over a tiercache data set; None: torch's for single records.

    It has the batch transforms: that of the data set, then that of the options. A loader that a framework rebuilds from
    another loader's attributes keeps that loader's functions.
    """
    if isinstance(given, TransformedCollate):
        return given
    if given is None and is_batched:
        given = collate if access.is_plain else default_collate
    own = access.batch_transform, None if options is None else options.batch_transform
    batch_transforms = tuple(function for function in own if function is not None)
    if not batch_transforms:
        collate_fn: Callable[[list[Any]], Any] | None = given
        return collate_fn
    if given is None:
        raise ValueError("batch_transform= needs batches, and batch_size=None asks for single records")
    return TransformedCollate(given, batch_transforms)


_OF_ORDER = ("rank", "world_size", "mesh", "dims", "shuffle_streams", "placement", "shuffle_group_bytes")

_OF_NATIVE_PATH = ("memory_bytes", "threads", "on_corrupt", "device")


def _check_options(options: LoaderOptions, reason: str, *, has_sampler: bool, has_order: bool) -> None:
    """Raise ValueError for options without an effect.

    reason: why torch's path serves the loader, or ""; has_order: whether the order is tiercache's own, on either path.
    """
    needs = f"applies only to a tiercache.Dataset on the native path; here {reason}"
    if reason and not has_order and not has_sampler:
        raise ValueError(f"options= {needs}: remove options=")
    defaults = LoaderOptions()
    for name in (*(_OF_ORDER if has_sampler else ()), *(_OF_NATIVE_PATH if reason else ())):
        value = getattr(options, name)
        if name == "device":
            value = find_device(value)  # None for the CPU, where batches are anyway
        if value == getattr(defaults, name):
            continue
        if name in _OF_ORDER:
            raise ValueError(
                f"{name}={value!r} applies only to a loader without a sampler; here the sampler decides the order and "
                "which records a rank is served (torch's DistributedSampler splits records by rank): remove "
                f"{name}=, or the sampler"
            )
        instead = f"remove {name}="
        if name == "device":
            instead += ", give pin_memory=True, and move each batch with .to(device, non_blocking=True)"
        raise ValueError(f"{name}={value!r} {needs}: {instead}")
