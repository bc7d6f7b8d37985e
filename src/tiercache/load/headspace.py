"""The stage of `LoaderOptions(headspace=True)`: one batch again and again, as a loader that needs no time serves."""

from __future__ import annotations

import copy
import threading
import time
from typing import TYPE_CHECKING, Any

from tiercache.load.pipeline import ClosingPipeline

if TYPE_CHECKING:
    from tiercache.load.pipeline import PipelineInputs


class HeadspacePipeline(ClosingPipeline):
    """Serves the first batch of another pipeline as every batch of the epoch, and ends that pipeline after it.

    One thread at a time calls take(); any thread may call close() and figures().
    """

    def __init__(self, inputs: PipelineInputs, before: Any) -> None:
        self._before = before
        self._waits = inputs.waits
        self._n_taken, self._n_batches = inputs.first_batch, inputs.share.rank_plan.n_batches
        self._batch: Any = None
        self._first: dict[str, float] = {}  # figures of the first batch
        self._n_served = 0
        self._begin_s = self._end_s = 0.0
        self._taking = threading.RLock()
        self._register()

    def take(self, timeout_s: float = -1.0) -> Any | None:
        """Return the batch; None at the end of the epoch. The first call raises as that of the stage before."""
        if self.is_forked_copy:
            raise RuntimeError("this iterator was made before a fork: call iter(loader) again")
        with self._taking:
            if self._n_taken >= self._n_batches:
                self.close()
                return None
            if self._n_served == 0:
                self._batch = self._before.take(timeout_s)
                if self._batch is None:
                    return None
                self._first = self._before.figures()
                self._before.close()
                self._begin_s = time.perf_counter()
            elif self._batch is None:
                raise RuntimeError("this iterator is closed: call iter(loader) again")
            else:
                self._waits.add_zero()
            self._end_s = time.perf_counter()
            self._n_served += 1
            self._n_taken += 1
            return copy.copy(self._batch)

    @property
    def fast_take(self) -> None:
        """None: batches are returned by take() only. See Pipeline.fast_take."""

    @property
    def n_taken(self) -> int:
        """See Pipeline.n_taken."""
        return self._n_taken

    @property
    def corrupt_shard(self) -> int | None:  # type: ignore[override]
        """See ClosingPipeline."""
        shard: int | None = self._before.corrupt_shard
        return shard

    def figures(self) -> dict[str, float]:
        """Return the figures of the batches served; headspace_s and headspace_samples of those after the first."""
        figures: dict[str, float] = {**(self._first or self._before.figures())}
        if self._n_served > 1:
            n_rows = figures["samples"]
            for name in ("samples", "batches", "bytes_served"):
                figures[name] *= self._n_served
            figures["headspace_samples"] = n_rows * (self._n_served - 1)
            figures["headspace_s"] = self._end_s - self._begin_s
        return figures

    def close(self) -> None:
        """Drop the batch and end the stage before. See Pipeline.close."""
        if self.is_forked_copy:
            return
        self._before.close()
        with self._taking:
            self._batch = None
        self._unregister()
