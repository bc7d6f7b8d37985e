"""The drop-in DataLoader: torch's constructor and behaviour, the native path for our own data sets."""

from __future__ import annotations

import warnings
from typing import Any

from torch.utils.data import default_collate
from torchdata.stateful_dataloader import StatefulDataLoader

from tiercache.load.collate import collate
from tiercache.load.options import LoaderOptions
from tiercache.load.run import Asked, NativeRun
from tiercache.load.source import Source
from tiercache.load.state import RunState


class DataLoader(StatefulDataLoader):  # type: ignore[misc]  # torchdata ships no types
    """torch's DataLoader with a state, and with a native path for `tiercache.Dataset`.

    The arguments are torch's (and torchdata's `snapshot_every_n_steps`), honoured as torch does; `options` is ours. A
    `tiercache.Dataset` without a sampler, a batch sampler, a transform or a collate function of the user's takes the
    native path: threads gather batches without Python, and `num_workers` starts no process. Everything else is
    torchdata's StatefulDataLoader.

    On the native path a batch is a dict by column: tensors [n, ...] of the column's dtype; lists for bytes, str, JSON
    and encoded images; a list of tensors for ragged columns; `<column>.valid`, bool[n], beside a nullable column. The
    data set may ask for more: `decode=` makes of images one tensor [n, 3, height, width], or as `DecodeImage` says,
    `forms=` and `nulls=` say what columns of varied length and nulls are. The consumer owns a batch and may write to
    it. Each iter() begins the next epoch; state_dict() covers the batches handed out, and resuming takes no replay.

    Args:
        dataset: any torch data set, or a `tiercache.Dataset`.
        options: seed, ranks, shuffle quality and resources of the native path.

    Raises:
        ValueError: arguments that torch refuses; options for a loader that does not take the native path.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Any = None,
        batch_sampler: Any = None,
        num_workers: int = 0,
        collate_fn: Any = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Any = None,
        multiprocessing_context: Any = None,
        generator: Any = None,
        *,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
        in_order: bool = True,
        snapshot_every_n_steps: int = 1,
        options: LoaderOptions | None = None,
    ) -> None:
        source = getattr(dataset, "source", None)
        ours = isinstance(source, Source)
        why_not = f"the data set is a {type(dataset).__name__}, not a tiercache.Dataset"
        if ours:
            why_not = _why_not_native(
                dataset, batch_size=batch_size, collate_fn=collate_fn, sampler=sampler, batch_sampler=batch_sampler
            )
        if options is not None and why_not:
            raise ValueError(f"options= is of the native path, which this loader does not take: {why_not}")
        if ours and collate_fn is None and batch_size is not None:
            collate_fn = collate if dataset.is_plain else default_collate
        with warnings.catch_warnings():
            # torchdata calls a function that torch 2.13 deprecated; nothing that its user or ours could change.
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
                in_order=in_order,
                snapshot_every_n_steps=snapshot_every_n_steps,
            )
        self._native: NativeRun | None = None
        if isinstance(source, Source) and not why_not:
            asked = Asked(
                batch_size=int(batch_size or 1),
                shuffle=bool(shuffle),
                drop_last=drop_last,
                timeout_s=timeout,
                pin_memory=pin_memory,
                generator=generator,
                options=options or LoaderOptions(),
                serving=dataset.serving,
            )
            self._native = NativeRun(source, asked)

    def __iter__(self) -> Any:
        return super().__iter__() if self._native is None else self._native.iterate()

    def __len__(self) -> int:
        return super().__len__() if self._native is None else self._native.n_batches()

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: plain values, for a checkpoint; on the native path equal on every rank."""
        return super().state_dict() if self._native is None else self._native.state().to_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a state was taken, on any number of ranks.

        Raises:
            ValueError: not a state of this kind of loader, or options that differ from it.
            ObjectChanged: the data set is not the one that the state was taken on.
        """
        if self._native is None:
            super().load_state_dict(state_dict)
        elif state_dict != {}:  # as torchdata: of a loader that has not begun
            self._native.load(RunState.from_dict(state_dict))

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` (0, 1, ...) the next one; a state that was loaded for that epoch keeps its place in it."""
        if self._native is not None:
            self._native.set_epoch(epoch)
        elif hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def stats(self) -> dict[str, Any]:
        """What the native path has done so far, and what bounds it (docs/guide/loader.md). Empty on torch's path."""
        return {} if self._native is None else self._native.stats()

    def __getstate__(self) -> dict[str, Any]:
        """For pickling: the copy goes on where this loader stands, with threads of its own."""
        return {**vars(self), "_native": None if self._native is None else self._native.recipe}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if state["_native"] is not None:
            asked, begun = state["_native"]
            self._native = NativeRun(self.dataset.source, asked)
            if begun is not None:
                self._native.load(begun)

    def __repr__(self) -> str:
        path = "torch's path" if self._native is None else str(self._native.rank())
        return f"{type(self).__name__}({self.dataset!r}, batch_size={self.batch_size}, {path})"


def _why_not_native(dataset: Any, *, batch_size: int | None, collate_fn: Any, **chosen: Any) -> str:
    """Why a loader of this data set of ours does not take the native path; "" if it does."""
    given = [name for name, value in chosen.items() if value is not None]
    if given:
        return f"{given[0]}= was given"
    if batch_size is None:
        return "batch_size=None asks for single records"
    if not dataset.is_plain:
        return "the data set has a transform, or is of a subclass that says what a record is"
    return "" if collate_fn in (None, collate) else "collate_fn= was given"
