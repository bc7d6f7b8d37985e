"""What can be set about loading beyond torch's own arguments."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Literal

from tiercache.model import parse_bytes
from tiercache.order import MAX_STREAMS

ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderOptions:
    """Options of `DataLoader(options=...)`. Every default needs no thought.

    Attributes:
        seed: Seed of the order of all epochs, any integer. None: each iter() draws one from the loader's generator or
            torch's, as torch's samplers do; ranks that share epochs take the one that rank 0 draws at the first.
        rank, world_size: this process among those that share the epoch; None: torch.distributed, else its environment,
            else one rank.
        split_ranks: False: every rank is served everything.
        streams: of the shuffled order, read side by side, each by a rank (or some neighbours) of its own; None: as many
            as there are ranks when the run starts. Part of the state: a run goes on with those that it began with.
        placement: "sticky": a stream, and so a rank, reads the same shards in all epochs of a run, and the ranks'
            caches together hold the data set; "global": other shards in each epoch.
        shuffle_group_bytes: stored bytes of the shards that are read at a time (int, "4GiB" or "all").
        shuffle_window_bytes: raw bytes of the blocks that rows are mixed over (int, "256MiB" or "all"): what is in
            memory at a time.
        memory_bytes: of batches gathered ahead; None: a thirty-second of the memory limit, shared by the machine's
            ranks, 256 MiB at most.
        threads: that gather, the consumer's own among them while it waits; None: the machine's cores, shared by its
            ranks.
        on_corrupt: what becomes of a record that is damaged at its source, an image that cannot be decoded among them:
            "raise" CorruptShard, or serve the "previous" record of this rank's sequence in its place.
    """

    seed: int | None = None
    rank: int | None = None
    world_size: int | None = None
    split_ranks: bool = True
    streams: int | None = None
    placement: Literal["sticky", "global"] = "sticky"
    shuffle_group_bytes: int | str = "4GiB"
    shuffle_window_bytes: int | str = "256MiB"
    memory_bytes: int | str | None = None
    threads: int | None = None
    on_corrupt: Literal["raise", "previous"] = "raise"

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError, TypeError: naming the option, what it takes and what was given.
        """
        for name in ("seed", "rank", "world_size", "streams", "threads"):
            self._as_int(name)
        if (self.rank is None) != (self.world_size is None):
            raise ValueError(f"rank and world_size go together, got rank={self.rank}, world_size={self.world_size}")
        if self.rank is not None and self.world_size is not None and not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be in [0, world_size), got rank={self.rank}, world_size={self.world_size}")
        if self.streams is not None and not 1 <= self.streams <= MAX_STREAMS:
            raise ValueError(f"streams must be 1 to {MAX_STREAMS}, got {self.streams}")
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
        """Take any kind of integer as int: the state is plain values."""
        value = getattr(self, name)
        if value is not None:
            try:
                object.__setattr__(self, name, operator.index(value))
            except TypeError as error:
                raise TypeError(f"{name} must be an integer, got {value!r}") from error

    @property
    def group_bytes(self) -> int | None:
        """shuffle_group_bytes in bytes, None for all."""
        return None if self.shuffle_group_bytes == ALL else parse_bytes(self.shuffle_group_bytes)

    @property
    def window_bytes(self) -> int | None:
        """shuffle_window_bytes in bytes, None for all."""
        return None if self.shuffle_window_bytes == ALL else parse_bytes(self.shuffle_window_bytes)
