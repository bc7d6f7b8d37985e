"""Accelerate: `prepare(loader)` in place of `accelerator.prepare(loader)` keeps the loader's native path and its state.

Accelerate's own `prepare` makes a plain torch DataLoader of the data set and splits its batch sampler. What that leaves
of the speed stands in docs/guide/frameworks.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import DataLoaderStateMixin
from accelerate.state import GradientState
from accelerate.utils import send_to_device, synchronize_rng_states

from tiercache.integrations.even import with_last_repeated
from tiercache.load.loader import DataLoader

# Processes along these dimensions of a device mesh work on the same batch.
_SAME_BATCH = ("tp", "cp", "sp")


def prepare(loader: DataLoader[Any], accelerator: Accelerator | None = None) -> PreparedLoader:
    """A loader for a loop under Accelerate that serves what `loader` would, from where it stands, by the native path.

    It does what Accelerate's own does: batches come on the accelerator's device, gradient accumulation sees the last
    batch, the last batches of all ranks are of one size (unless `even_batches=False`), `gather_for_metrics` drops what
    was repeated for that, and `accelerator.save_state` and `load_state` keep its place. `accelerator.prepare` hands it
    on as it is. Ranks share an epoch as the loader says. `loader` itself stays as it was.

    Args:
        loader: of a `tiercache.Dataset`, on the native path.
        accelerator: None: one like those made before in this process; `save_state` then needs
            `accelerator.prepare(prepared)` to know of it.

    Raises:
        TypeError: not a `tiercache.DataLoader`.
        ValueError: it does not take the native path, or a sampler says its order; `split_batches` or
            `dispatch_batches`; ranks that are not those of Accelerate's device mesh.
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(f"prepare(loader, accelerator) takes a tiercache.DataLoader, got a {type(loader).__name__}")
    accelerator = Accelerator() if accelerator is None else accelerator
    _check(loader, accelerator)
    prepared = PreparedLoader.__new__(PreparedLoader)
    prepared.take_over(loader, accelerator)
    accelerator.prepare_data_loader(prepared)  # knows it for a prepared one, and remembers it for save_state
    return prepared


class PreparedLoader(DataLoaderStateMixin, DataLoader[Any]):  # type: ignore[misc]  # accelerate ships no types
    """A `tiercache.DataLoader` as a loop under Accelerate wants it; made by `prepare`.

    Attributes:
        end_of_dataloader: whether the batch that was handed out last is the epoch's last.
        remainder: how many of the last batches' records, all ranks together, are no repetition; 0: all.
    """

    end_of_dataloader = False
    remainder = -1
    # Accelerate asks for these two: hand it on as it is; keep its state_dict.
    _is_accelerate_prepared = True
    use_stateful_dataloader = True

    def take_over(self, loader: DataLoader[Any], accelerator: Accelerator) -> None:
        """Go on where loader stands, as accelerator says."""
        state = loader.__getstate__()
        asked, begun = state["_native"]
        self.__setstate__({**state, "_native": (replace(asked, fills_first=accelerator.even_batches), begun)})
        # torch forbids to set a batch sampler, and this one is for those who ask Accelerate's loaders for theirs.
        batches = _NativeBatches(self, _n_data_ranks(accelerator), accelerator.even_batches)
        self.__dict__["batch_sampler"] = self._run_of = batches
        on_device = accelerator.device_placement and accelerator.device.type != "cpu"
        self.device = accelerator.device if on_device else None
        self._non_blocking = accelerator.non_blocking
        self._rng_types = [kind for kind in accelerator.rng_types if str(kind) != "generator"]  # there is no sampler's
        self._n_repeated = 0

    @property
    def gradient_state(self) -> GradientState:
        """What all loaders and optimizers of the process share."""
        return GradientState()

    @property
    def total_batch_size(self) -> int:
        """Records of all ranks' batches of a step."""
        return int(self.batch_sampler.batch_size * self.batch_sampler.num_processes)

    @property
    def total_dataset_length(self) -> int:
        """Records of an epoch, all ranks together."""
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
            next(batches, None)  # so that the next epoch is what follows
        finally:
            self.end()

    def stats(self) -> dict[str, Any]:
        """As `DataLoader.stats`; `padded` counts what was repeated to make the last batches of one size too."""
        found = super().stats()
        return {**found, "padded": found["padded"] + self._n_repeated}

    def _last(self, batch: Any, n_global: int) -> Any:
        """The epoch's last batch, as large as the other ranks', and what is to be known of it.

        n_global: records of all ranks' last batches, without padding.
        """
        self.end_of_dataloader = True
        self.remainder = n_global % self.total_batch_size
        if self.batch_sampler.even_batches:
            # gather_for_metrics cuts what was gathered, rank after rank, at its end: the first ranks have full shares
            # (`fills_first`), so what is repeated stands there.
            batch, n_repeated = with_last_repeated(batch, math.ceil(n_global / self.batch_sampler.num_processes))
            self._n_repeated += n_repeated
        return batch


class _NativeBatches:
    """In the place of a batch sampler: what Accelerate asks one for, but no indices, which the native path has not."""

    split_batches = False

    def __init__(self, loader: DataLoader[Any], n_ranks: int, even_batches: bool) -> None:
        self.batch_size = loader.batch_size
        self.drop_last = loader.drop_last
        self.sampler = loader.sampler
        self.num_processes = n_ranks
        self.even_batches = even_batches

    def __iter__(self) -> Iterator[list[int]]:
        raise RuntimeError(
            "a loader prepared by tiercache.integrations.accelerate has no batch sampler to skip or split, as "
            "Accelerate's skip_first_batches needs one: give its state_dict() to load_state_dict(), or use "
            "accelerator.save_state and load_state, and it goes on without reading what was served"
        )


def _check(loader: DataLoader[Any], accelerator: Accelerator) -> None:
    rank = loader.native_rank
    if rank is None or rank.origin == "sampler":
        why = "does not take the native path" if rank is None else "has a sampler, which Accelerate splits among ranks"
        raise ValueError(f"{loader!r} {why}: accelerator.prepare(loader) is for it")
    n_ranks = _n_data_ranks(accelerator)
    if accelerator.split_batches and n_ranks > 1:
        raise ValueError(
            f"split_batches=True would split batches of {loader.batch_size} among {n_ranks} ranks: leave it out and "
            f"make the loader with batch_size={max(1, loader.batch_size // n_ranks)}, which is what one rank is served"
        )
    if accelerator.dispatch_batches:
        raise ValueError("dispatch_batches=True reads on one rank alone: leave it out, for each rank reads its own")
    index = accelerator.process_index // (accelerator.num_processes // n_ranks)
    if rank.origin != "options" and (rank.rank, rank.world_size) != (index, n_ranks):
        raise ValueError(
            f"the loader serves {rank}, Accelerate's mesh makes this process {index} of {n_ranks} that take different "
            f"batches: give LoaderOptions(rank={index}, world_size={n_ranks}, seed=...) and Dataset(version=...)"
        )


def _n_data_ranks(accelerator: Accelerator) -> int:
    """How many different batches the processes take at a step."""
    mesh = getattr(accelerator, "torch_device_mesh", None)  # older releases have none
    if mesh is None:
        return int(accelerator.num_processes)
    n_same = math.prod(mesh[name].size() for name in mesh.mesh_dim_names if name in _SAME_BATCH)
    return int(accelerator.num_processes // n_same)
