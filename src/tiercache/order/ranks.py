"""What a rank takes of the global order: batches as runs of positions, as functions of their number."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankPlan:
    """Batches of one rank from an offset to the end of an epoch. Ranks share one stream; nothing is kept per batch.

    A global batch is world_size * batch_size positions; of each, rank r takes the r-th run of batch_size. Every rank
    has the same number of batches. What is left after the last full global batch, counted from the offset, is dropped
    with drop_last; otherwise it makes one more global batch, split evenly (runs differ by one at most), and a rank that
    it leaves empty-handed takes the record at the start of the stream: padding, no part of the global sequence.

    Attributes:
        offset: records of the epoch that were served before.
        world_size, rank: 0 <= rank < world_size.
        batch_size: of one rank.
        drop_last: as above.
        n_records: of the epoch.
    """

    offset: int
    world_size: int
    rank: int
    batch_size: int
    drop_last: bool
    n_records: int

    def __post_init__(self) -> None:
        """Check the values. Raises ValueError naming the one that is out of range."""
        if self.world_size < 1 or self.batch_size < 1:
            raise ValueError(f"world_size and batch_size are 1 or more, got {self.world_size} and {self.batch_size}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be in [0, {self.world_size}), got {self.rank}")
        if not 0 <= self.offset <= self.n_records:
            raise ValueError(f"offset must be in [0, {self.n_records}], got {self.offset}")

    @property
    def global_batch(self) -> int:
        """Records of a full global batch."""
        return self.world_size * self.batch_size

    @property
    def n_full(self) -> int:
        """Full global batches."""
        return (self.n_records - self.offset) // self.global_batch

    @property
    def n_left(self) -> int:
        """Records after the last full global batch that are served (0 with drop_last)."""
        return 0 if self.drop_last else (self.n_records - self.offset) % self.global_batch

    @property
    def n_batches(self) -> int:
        """Batches of this rank, the same for all ranks."""
        return self.n_full + (self.n_left > 0)

    @property
    def padded(self) -> int:
        """Records of this rank that are padding: 0, or 1 in its last batch."""
        return int(0 < self.n_left <= self.rank)

    @property
    def n_served(self) -> int:
        """Records of all this rank's batches, padding included."""
        last = sum(stop - start for start, stop in self._last()) if self.n_left else 0
        return self.n_full * self.batch_size + last

    def batch(self, i: int) -> tuple[tuple[int, int], ...]:
        """Batch i as half-open runs (start, stop) of positions in the epoch, in order.

        Raises:
            IndexError: there is no such batch.
        """
        if not 0 <= i < self.n_batches:
            raise IndexError(f"batch {i} of {self.n_batches}")
        if i == self.n_full:
            return self._last()
        start = self.offset + i * self.global_batch + self.rank * self.batch_size
        return ((start, start + self.batch_size),)

    def offset_after(self, n_batches: int) -> int:
        """The epoch's offset once every rank has served so many batches of this plan: where a resumed run begins.

        Raises:
            ValueError: there are not so many batches.
        """
        if not 0 <= n_batches <= self.n_batches:
            raise ValueError(f"{n_batches} batches of {self.n_batches}")
        return min(self.offset + n_batches * self.global_batch, self.n_records)

    def _last(self) -> tuple[tuple[int, int], ...]:
        if self.padded:
            return ((0, 1),)
        share, longer = divmod(self.n_left, self.world_size)
        start = self.n_records - self.n_left + self.rank * share + min(self.rank, longer)
        return ((start, start + share + (self.rank < longer)),)
