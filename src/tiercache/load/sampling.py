"""What a user's sampler says: how far ahead it may be asked, and one way through it, as torch and torchdata go it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils import data as torch_data
from torchdata.stateful_dataloader import Stateful
from torchdata.stateful_dataloader import sampler as torchdata_samplers
from torchdata.stateful_dataloader.worker import try_to_deserialize, try_to_serialize

from tiercache._native.finder import wrapped
from tiercache.load.feed import Drawn, Feed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.load.source import Source

# Asked ahead of samplers that allow it: a window costs 1.5 ms and more, however few rows it has.
AHEAD_ROWS = 1 << 17
MIN_AHEAD, MAX_AHEAD = 8, 1 << 10

# torchdata's keys of a single-process iterator's state: a state of either kind of loader serves the other.
_INDEX_SAMPLER, _SAMPLER_ITER, _YIELDED, _N_YIELDED, _FINISHED = (
    "_index_sampler_state",
    "_sampler_iter_state",
    "_sampler_iter_yielded",
    "_num_yielded",
    "_iterator_finished",
)
STATE_KEYS = (_INDEX_SAMPLER, _SAMPLER_ITER, _YIELDED, _N_YIELDED, _FINISHED)
OURS = "_tiercache"  # beside them: what random crops are keyed by

_PLAIN = (list, tuple, range, np.ndarray, torch.Tensor)
_TORCH = (
    torch_data.SequentialSampler,
    torch_data.SubsetRandomSampler,
    torch_data.WeightedRandomSampler,
    torch_data.distributed.DistributedSampler,
    torchdata_samplers.StatefulDistributedSampler,
)
_RANDOM = (torch_data.RandomSampler, torchdata_samplers.RandomSampler)
_BATCH = (torch_data.BatchSampler, torchdata_samplers.BatchSampler)


def runs_ahead(sampler: Any) -> bool:
    """Whether nothing can tell how far ahead a sampler was asked: it draws what is random when it begins.

    Known are plain sequences, torch's own samplers and torchdata's, by their exact types; RandomSampler only where it
    draws one permutation and no more.
    """
    if type(sampler) in _BATCH:
        return runs_ahead(sampler.sampler)
    if type(sampler) in _RANDOM:
        return not sampler.replacement and sampler.num_samples <= len(sampler.data_source)
    return type(sampler) in _PLAIN or type(sampler) in _TORCH


def tell_epoch(index_sampler: Any, epoch: int) -> None:
    """Tell a batch sampler, and the sampler below it, which epoch comes, where they want to know."""
    for sampler in (index_sampler, getattr(index_sampler, "sampler", None)):
        set_epoch = getattr(sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)


@dataclass(frozen=True, slots=True)
class Lead:
    """How far ahead a sampler is asked, in batches. at_begin: by iter() already, as torch does to send to workers."""

    n_batches: int
    at_begin: int

    @staticmethod
    def of(sampler: Any, n_workers: int, prefetch_factor: int | None) -> Lead | None:
        """None: it must be asked for a batch when that batch is asked for, and not before."""
        at_begin = n_workers * max(prefetch_factor or 0, 1)
        if not runs_ahead(sampler):
            return Lead(at_begin, at_begin) if n_workers else None
        return Lead(max(min(AHEAD_ROWS // batch_rows(sampler), MAX_AHEAD), MIN_AHEAD, at_begin), at_begin)


def batch_rows(index_sampler: Any) -> int:
    """Rows of its batches, if it says so; else 1."""
    return int(index_sampler.batch_size) if says_size(index_sampler) else 1


def says_size(index_sampler: Any) -> bool:
    """Whether it says how many rows its batches have."""
    size = getattr(index_sampler, "batch_size", None)
    return isinstance(size, int) and size > 0


class SampledEpoch:
    """One way through a sampler: what it has said, where that stands, what has been handed out. One consumer thread.

    Attributes:
        feed: what was drawn, for the pipeline.
        n_yielded: batches handed out since it began or was resumed.
        finished: whether the end was reached.
    """

    def __init__(self, index_sampler: Any, feed: Feed, source: Source) -> None:
        self.feed = feed
        self.finished = False
        self._index_sampler = index_sampler
        self._iterator = iter(index_sampler)
        self._listed = source.listed
        self._n_records = int(source.shard_records.sum()) if self._listed is None else len(self._listed)
        self._n_before = self._n_handed = self._n_rows = self._first_row = 0
        self._ended = False
        self._has_state = isinstance(index_sampler, Stateful), isinstance(self._iterator, Stateful)
        self._snapshot = self._take_snapshot()

    @property
    def n_yielded(self) -> int:
        """See the class."""
        return self._n_handed

    @n_yielded.setter
    def n_yielded(self, n_batches: int) -> None:
        while self._n_handed < n_batches:
            drawn = self.feed.let_go()
            self._snapshot, self._first_row = drawn.snapshot, drawn.first_row + len(drawn.numbers)
            self._n_handed += 1

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken, as torchdata's loader does: by the sampler's own state, else by skipping."""
        self._n_before = state[_YIELDED]
        if any(self._has_state):
            self._index_sampler = try_to_deserialize(self._index_sampler, state[_INDEX_SAMPLER])
            self._iterator = iter(self._index_sampler)
            if state[_SAMPLER_ITER] is not None:
                self._iterator = try_to_deserialize(self._iterator, state[_SAMPLER_ITER])
        else:
            self._iterator = islice(self._index_sampler, self._n_before, None)
        self._has_state = isinstance(self._index_sampler, Stateful), isinstance(self._iterator, Stateful)
        self._n_rows = self._first_row = state.get(OURS, {}).get("rows", 0)
        self._snapshot = self._take_snapshot()
        self.finished = state[_FINISHED]

    def draw(self, n_batches: int) -> None:
        """Ask the sampler for so many batches more; what it raises, and its end, come in their places."""
        for _ in range(0 if self._ended else n_batches):
            try:
                numbers = self._numbers(next(self._iterator))
                snapshot = self._take_snapshot()
            except StopIteration:
                return self._end(None)
            except Exception as error:  # noqa: BLE001 -- the user's code: raised when its batch is asked for
                return self._end(error)
            self.feed.add(Drawn(numbers, self._n_rows, snapshot))
            self._n_rows += len(numbers)
        return None

    def state(self) -> dict[str, Any]:
        """After the batches handed out, whatever was drawn since; torchdata's keys."""
        index_sampler, sampler_iter = self._snapshot
        n_batches = self._n_before + self._n_handed
        return {
            _INDEX_SAMPLER: index_sampler,
            _SAMPLER_ITER: sampler_iter,
            _YIELDED: n_batches,
            _N_YIELDED: n_batches,
            "_IterableDataset_len_called": None,
            "_shared_seed": None,
            "fetcher_state": None,
            "dataset_state": None,
            _FINISHED: self.finished,
            OURS: {"epoch": self.feed.epoch, "seed": self.feed.seed, "rows": self._first_row},
        }

    def _end(self, error: Exception | None) -> None:
        self._ended = True
        self.feed.end(error)

    def _take_snapshot(self) -> tuple[Any, Any]:
        # Asking whether an object is Stateful takes 5 us, and torchdata asks for each.
        sampler = try_to_serialize(self._index_sampler) if self._has_state[0] else None
        return sampler, try_to_serialize(self._iterator) if self._has_state[1] else None

    def _numbers(self, indices: Any) -> NDArray[np.int64]:
        """Record numbers of what a sampler gave for a batch.

        Raises:
            IndexError: there is no such record.
            TypeError, ValueError: not integers, or none.
        """
        rows = np.asarray(indices)
        if rows.size == 0:
            raise ValueError("the batch sampler gave a batch of no records")
        if rows.dtype.kind not in "iu":
            raise TypeError(f"records are chosen by integers, the sampler gave {rows.dtype}")
        numbers = wrapped(np.ascontiguousarray(rows, np.int64).reshape(-1), self._n_records)
        return numbers if self._listed is None else self._listed[numbers]
