"""The options of the loader beyond torch's own arguments."""

from __future__ import annotations

import operator
from dataclasses import InitVar, dataclass
from typing import Literal

from tiercache.errors import renamed_argument
from tiercache.model import parse_bytes
from tiercache.order import MAX_STREAMS

ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderOptions:
    """Options of `DataLoader(options=...)`. The defaults suit most runs.

    Attributes:
        seed: Seed of the order of all epochs, any integer. None: each iter() draws a seed from the loader's generator
            or torch's, as torch's samplers do; ranks that share epochs use the seed that rank 0 draws at the first
            iter().
        rank: Number of this process among the ranks that share the epoch. None: torch.distributed's rank, else that of
            the environment variables, else 0.
        world_size: Number of ranks that share the epoch; given together with `rank`. None: from the same origin as
            `rank`.
        split_ranks: Whether ranks share the records of an epoch. False: every rank is served all records.
        shuffle_streams: Number of streams of the shuffled order. The streams are read side by side, each by one rank or
            by some neighbouring ranks. None: the number of ranks at the start of the run. It is part of the state: a
            resumed run keeps the number that it began with.
        placement: "sticky": a stream, and so a rank, reads the same shards in all epochs of a run, so that the ranks'
            caches together hold the data set. "global": a rank reads other shards in each epoch.
        shuffle_group_bytes: Stored bytes of the shards that are read at a time (int, "4GiB" or "all").
        shuffle_window_bytes: Raw bytes of the blocks over which rows are mixed (int, "256MiB" or "all"), i.e. how much
            is in memory at a time.
        memory_bytes: Memory of the batches that are gathered ahead (int or "256MiB"). None: 1/32 of the memory limit,
            shared by the ranks of the machine, at most 256 MiB.
        threads: Number of gather threads, including the consumer's own thread while it waits. None: the number of the
            machine's cores, shared by its ranks.
        on_corrupt: What to do with a record that is corrupt in the store, or an image that cannot be decoded: "raise"
            CorruptShard, or serve the "previous" record of this rank's sequence instead.
        streams: Old name of shuffle_streams; deprecated.
    """

    seed: int | None = None
    rank: int | None = None
    world_size: int | None = None
    split_ranks: bool = True
    shuffle_streams: int | None = None
    placement: Literal["sticky", "global"] = "sticky"
    shuffle_group_bytes: int | str = "4GiB"
    shuffle_window_bytes: int | str = "256MiB"
    memory_bytes: int | str | None = None
    threads: int | None = None
    on_corrupt: Literal["raise", "previous"] = "raise"
    streams: InitVar[int | None] = None

    def __post_init__(self, streams: int | None) -> None:
        """Check the values."""
        given = renamed_argument("LoaderOptions", "streams", streams, "shuffle_streams", self.shuffle_streams)
        object.__setattr__(self, "shuffle_streams", given)
        for name in ("seed", "rank", "world_size", "shuffle_streams", "threads"):
            self._as_int(name)
        if (self.rank is None) != (self.world_size is None):
            raise ValueError(f"rank and world_size go together, got rank={self.rank}, world_size={self.world_size}")
        if self.rank is not None and self.world_size is not None and not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be in [0, world_size), got rank={self.rank}, world_size={self.world_size}")
        if self.shuffle_streams is not None and not 1 <= self.shuffle_streams <= MAX_STREAMS:
            raise ValueError(f"shuffle_streams must be 1 to {MAX_STREAMS}, got {self.shuffle_streams}")
        if self.placement not in ("sticky", "global"):
            raise ValueError(f"placement must be 'sticky' or 'global', got {self.placement!r}")
        if self.on_corrupt not in ("raise", "previous"):
            raise ValueError(f"on_corrupt must be 'raise' or 'previous', got {self.on_corrupt!r}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be 1 or more, got {self.threads}")
        for name in ("shuffle_group_bytes", "shuffle_window_bytes", "memory_bytes"):
            size = getattr(self, name)
            if size is not None and size != ALL and parse_bytes(size) < 1:
                raise ValueError(f"{name} must be 1 byte or more, got {size!r}")
        if self.memory_bytes == ALL:
            raise ValueError("memory_bytes must be a size such as '256MiB', got 'all'")

    def _as_int(self, name: str) -> None:
        """Convert any kind of integer to int, because the state holds plain values."""
        value = getattr(self, name)
        if value is not None:
            try:
                object.__setattr__(self, name, operator.index(value))
            except TypeError as error:
                raise TypeError(f"{name} must be an integer, got {value!r}") from error

    @property
    def group_bytes(self) -> int | None:
        """shuffle_group_bytes in bytes; None for "all"."""
        return None if self.shuffle_group_bytes == ALL else parse_bytes(self.shuffle_group_bytes)

    @property
    def window_bytes(self) -> int | None:
        """shuffle_window_bytes in bytes; None for "all"."""
        return None if self.shuffle_window_bytes == ALL else parse_bytes(self.shuffle_window_bytes)
