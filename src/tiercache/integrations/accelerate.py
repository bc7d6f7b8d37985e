"""Accelerate: `prepare(loader)` keeps the native path and the state of a loader, unlike `accelerator.prepare(loader)`.

Accelerate's own `prepare` makes a plain torch DataLoader of the data set and splits its batch sampler.
docs/guide/frameworks.md gives the resulting speeds.

save_state() and load_state() do what the methods of Accelerator do, with `tc.Checkpoints`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderStateMixin
from accelerate.state import GradientState
from accelerate.utils import send_to_device, synchronize_rng_states

from tiercache.checkpoint.checkpoints import Checkpoints, SaveHandle
from tiercache.data.output_spec import Buffer
from tiercache.load.loader import DataLoader
from tiercache.load.loader_options import mesh_rank


def pad_batch(batch: Any, n: int) -> tuple[Any, int]:
    """Return (the batch padded to n records by repeating the last one, number of repeated records).

    The batch is a dict or, with `as_tuple`, a list of columns: tensors, jagged nested tensors, lists or `Buffer`s. A
    value of another type stays as it is.
    """
    found = [_column(value, n) for value in (batch.values() if isinstance(batch, Mapping) else batch)]
    values, n_repeated = [value for value, _ in found], max((m for _, m in found), default=0)
    return (dict(zip(batch, values, strict=True)) if isinstance(batch, Mapping) else values), n_repeated


def _column(value: Any, n: int) -> tuple[Any, int]:
    if not isinstance(value, torch.Tensor | list | Buffer) or not 0 < _length(value) < n:
        return value, 0
    n_missing = n - _length(value)
    return _longer(value, n_missing), n_missing


def _length(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.size(0) if value.dim() else 0
    return len(value)


def _longer(value: Any, n_more: int) -> Any:
    if isinstance(value, list):
        return value + value[-1:] * n_more
    if isinstance(value, Buffer):
        return _longer_buffer(value, n_more)
    if value.is_nested:
        tensors = value.unbind()
        return torch.nested.nested_tensor([*tensors, *tensors[-1:] * n_more], layout=value.layout)
    return torch.cat([value, *[value[-1:]] * n_more])


def _longer_buffer(buffer: Buffer, n_more: int) -> Buffer:
    start, stop = buffer.offsets[-2], buffer.offsets[-1]
    values = torch.cat([buffer.values, *[buffer.values[int(start) : int(stop)]] * n_more])
    steps = torch.arange(1, n_more + 1, dtype=buffer.offsets.dtype)
    offsets = torch.cat([buffer.offsets, stop + steps * (stop - start)])
    shapes = None if buffer.shapes is None else torch.cat([buffer.shapes, *[buffer.shapes[-1:]] * n_more])
    return Buffer(values, offsets, shapes)


# Dimensions of a device mesh along which all processes work on the same batch.
_SAME_BATCH = ("tp", "cp", "sp")


def prepare(loader: DataLoader[Any], accelerator: Accelerator | None = None) -> PreparedLoader:
    """Return a loader for a training loop under Accelerate that continues where `loader` stands, on the native path.

    The returned loader does what Accelerate's own loaders do: it moves batches to the accelerator's device and marks
    the last batch for gradient accumulation. It makes the last batches of all ranks equal in size (unless
    `even_batches=False`), and `gather_for_metrics` drops the records repeated for this. `accelerator.save_state` and
    `load_state` save and restore its position. `accelerator.prepare` returns it unchanged. The options of `loader`
    decide which rank serves which records. `loader` itself does not change.

    Args:
        loader: Loader of a `tiercache.Dataset`, on the native path.
        accelerator: Accelerator of the loop. None: a new Accelerator, which shares the state of earlier ones in this
            process; `save_state` of another Accelerator then needs `accelerator.prepare(prepared)` to include the
            loader.

    Raises:
        TypeError: loader is not a `tiercache.DataLoader`.
        ValueError: The loader is not on the native path or has a sampler, `split_batches` or `dispatch_batches` is set,
            or the loader's ranks are not those of Accelerate's device mesh.
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(f"prepare(loader, accelerator) takes a tiercache.DataLoader, got a {type(loader).__name__}")
    accelerator = Accelerator() if accelerator is None else accelerator
    _check(loader, accelerator)
    prepared = PreparedLoader.__new__(PreparedLoader)
    prepared.take_over(loader, accelerator)
    accelerator.prepare_data_loader(prepared)  # registers the prepared loader for save_state
    return prepared


class PreparedLoader(DataLoaderStateMixin, DataLoader[Any]):  # type: ignore[misc]  # accelerate ships no types
    """A `tiercache.DataLoader` for a training loop under Accelerate, created by `prepare`.

    Attributes:
        end_of_dataloader: Whether the last delivered batch is the last one of the epoch.
        remainder: Number of records in the last batches of all ranks together that are not repeated; 0 if none is
            repeated, -1 before the end of the first epoch.
    """

    end_of_dataloader = False
    remainder = -1
    # Accelerate reads these two: return the loader unchanged from prepare(), and use its state_dict().
    _is_accelerate_prepared = True
    use_stateful_dataloader = True

    def take_over(self, loader: DataLoader[Any], accelerator: Accelerator) -> None:
        """Continue where loader stands, with the settings of accelerator."""
        state = loader.__getstate__()
        arguments, position = state["_engine"]
        engine = replace(arguments, fills_first=accelerator.even_batches), position
        batches = _NativeBatches(loader, _data_rank(accelerator)[1], accelerator.even_batches)
        self.__setstate__({**state, "_engine": engine, "batch_sampler": batches})
        on_device = accelerator.device_placement and accelerator.device.type != "cpu"
        self.device = accelerator.device if on_device else None
        self._non_blocking = accelerator.non_blocking
        self._rng_types = [
            kind for kind in accelerator.rng_types if str(kind) != "generator"
        ]  # no sampler has one here
        self._n_repeated = 0

    @property
    def gradient_state(self) -> GradientState:
        """State that all loaders and optimizers of the process share."""
        return GradientState()

    @property
    def total_batch_size(self) -> int:
        """Number of records in one step's batches of all ranks."""
        return int(self.batch_sampler.batch_size * self.batch_sampler.num_processes)

    @property
    def total_dataset_length(self) -> int:
        """Number of records in an epoch, over all ranks."""
        return len(self.dataset)

    def __iter__(self) -> Iterator[Any]:
        if self._rng_types:
            synchronize_rng_states(self._rng_types)
        self.begin()
        try:
            batches = super().__iter__()
            for number in range(n_batches := len(batches)):
                is_last = number == n_batches - 1
                offset = self.state_dict()["offset"] if is_last else 0
                batch = next(batches)
                if is_last:
                    batch = self._last(batch, self.state_dict()["offset"] - offset)
                if self.device is not None:
                    batch = send_to_device(batch, self.device, non_blocking=self._non_blocking)
                yield batch
            next(batches, None)  # ends the epoch, so that the next one follows
        finally:
            self.end()

    def stats(self, *, across_ranks: bool = False) -> dict[str, Any]:
        """Return the counters of `DataLoader.stats`.

        `padded` also counts the records that were repeated to make the last batches of all ranks equal in size.

        Args:
            across_ranks: Whether to add the exposed waits of the slowest rank; then all ranks must call this method.
        """
        found = super().stats(across_ranks=across_ranks)
        return {**found, "padded": found["padded"] + self._n_repeated}

    def _last(self, batch: Any, n_global: int) -> Any:
        """Return this rank's last batch, padded to the size of the others'. n_global: records of all last batches."""
        self.end_of_dataloader = True
        self.remainder = n_global % self.total_batch_size
        if self.batch_sampler.even_batches:
            # gather_for_metrics concatenates the batches by rank and cuts off the end. The first ranks have full shares
            # (`fills_first`), so the repeated records are at the end.
            batch, n_repeated = pad_batch(batch, math.ceil(n_global / self.batch_sampler.num_processes))
            self._n_repeated += n_repeated
        return batch


class _NativeBatches:
    """Stand-in for a batch sampler with the attributes that Accelerate reads.

    The native path has no indices to iterate over.
    """

    split_batches = False

    def __init__(self, loader: DataLoader[Any], n_ranks: int, even_batches: bool) -> None:
        self.batch_size = loader.batch_size
        self.drop_last = loader.drop_last
        self.sampler = loader.sampler
        self.num_processes = n_ranks
        self.even_batches = even_batches

    def __iter__(self) -> Iterator[list[int]]:
        raise RuntimeError(
            "a loader prepared by tiercache.integrations.accelerate has no batch sampler, which Accelerate's "
            "skip_first_batches needs: pass the loader's state_dict() to load_state_dict(), or use "
            "accelerator.save_state and load_state; the loader then continues without reading served batches again"
        )


def _check(loader: DataLoader[Any], accelerator: Accelerator) -> None:
    rank = loader.native_rank
    if rank is None or rank.origin == "sampler":
        reason = "is not on the native path" if rank is None else "has a sampler, which Accelerate splits among ranks"
        raise ValueError(f"{loader!r} {reason}: use accelerator.prepare(loader) instead")
    index, n_ranks = _data_rank(accelerator)
    if accelerator.split_batches and n_ranks > 1:
        raise ValueError(
            f"split_batches=True would split batches of {loader.batch_size} among {n_ranks} ranks: remove it and "
            f"create the loader with batch_size={max(1, loader.batch_size // n_ranks)}, the batch size of one rank"
        )
    if accelerator.dispatch_batches:
        raise ValueError(
            "dispatch_batches=True reads on one rank only: remove it, because each rank reads its own batches"
        )
    if rank.origin != "options" and (rank.rank, rank.world_size) != (index, n_ranks):
        raise ValueError(
            f"the loader serves {rank}, but for Accelerate this process is rank {index} of {n_ranks} data ranks: pass "
            f"LoaderOptions(rank={index}, world_size={n_ranks}, seed=...) and Dataset(version=...)"
        )


def _data_rank(accelerator: Accelerator) -> tuple[int, int]:
    """Return the number of the batch that this process takes in one step, and the number of different batches."""
    mesh: Any = getattr(accelerator, "torch_device_mesh", None)  # missing in older releases
    if mesh is None:
        return int(accelerator.process_index), int(accelerator.num_processes)
    return mesh_rank(mesh, tuple(name for name in mesh.mesh_dim_names if name not in _SAME_BATCH))


# -- checkpoints -----------------------------------------------------------------------------------------------------


def save_state(
    accelerator: Accelerator,
    checkpoints: Checkpoints,
    step: int,
    *,
    metrics: Mapping[str, float] | None = None,
    note: Any = None,
) -> SaveHandle:
    """Save what `accelerator.save_state` saves, with `tc.Checkpoints`, while training goes on. All processes call it.

    Models, optimizers, schedulers, tiercache's loaders, the gradient scaler and registered objects are saved; the
    random generators are not.

    Args:
        accelerator: Accelerator of the loop.
        checkpoints: Checkpoints.
        step: Step of the training run.
        metrics: Metrics by name, for the rules of retention.
        note: JSON value that list() returns.

    Raises:
        ValueError: The models are sharded.
        StoreError: An earlier save failed.
    """
    return checkpoints.save(step, _objects(accelerator), metrics=metrics, note=note)


def load_state(accelerator: Accelerator, checkpoints: Checkpoints, which: str | int = "latest") -> None:
    """Load what save_state() saved into the prepared objects of an accelerator. All processes call it.

    Args:
        accelerator: Accelerator whose objects are prepared and registered as they were at the save.
        checkpoints: Checkpoints.
        which: "latest", "best:METRIC", a step or a name.

    Raises:
        NotFound, ValueError, CorruptCheckpoint, StoreError: As Checkpoints.load().
    """
    checkpoints.load(which, into=_objects(accelerator))


def _objects(accelerator: Accelerator) -> dict[str, dict[str, Any]]:
    """Return the objects of an accelerator by kind and number."""
    if str(accelerator.distributed_type) in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise ValueError(
            f"the models are sharded ({accelerator.distributed_type}): save them with torch.distributed.checkpoint and "
            "Checkpoints.dcp_writer()"
        )
    kinds = {
        "models": [accelerator.unwrap_model(model) for model in accelerator._models],  # noqa: SLF001 - no other way
        "optimizers": accelerator._optimizers,  # noqa: SLF001
        "schedulers": accelerator._schedulers,  # noqa: SLF001
        "loaders": [one for one in accelerator._dataloaders if isinstance(one, DataLoader)],  # noqa: SLF001
        "objects": accelerator._custom_objects,  # noqa: SLF001
        "scaler": [] if accelerator.scaler is None else [accelerator.scaler],
    }
    return {kind: {str(number): one for number, one in enumerate(found)} for kind, found in kinds.items()}
