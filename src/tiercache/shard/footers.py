"""Footers: keeps footers that were read ahead until their shards are opened, which saves a request per shard."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiercache.shard.layout import Footer

# A shuffle group has about a hundred shards with footers of a few KiB to 100 KiB each. A footer that does not fit is
# read again, which is one more request for a shard that is read by ranges.
LIMIT_BYTES = 32 << 20


class FooterCache:
    """Footers by shard number; each is taken once. Thread-safe.

    There is no lock, because a fork could leave it locked. Concurrent threads may miscount the bytes; put() counts them
    again before it refuses a footer.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._kept: dict[int, Footer] = {}
        self._n_bytes = 0

    def put(self, shard: int, footer: Footer) -> None:
        """Keep a footer if it fits within the limit."""
        if self._n_bytes + footer.nbytes > self._limit_bytes:
            self._n_bytes = sum(kept.nbytes for kept in list(self._kept.values()))
        if shard not in self._kept and self._n_bytes + footer.nbytes <= self._limit_bytes:
            self._kept[shard] = footer
            self._n_bytes += footer.nbytes

    def take(self, shard: int) -> Footer | None:
        """Remove and return the footer of a shard; None if there is none."""
        footer = self._kept.pop(shard, None)
        if footer is not None:
            self._n_bytes = max(self._n_bytes - footer.nbytes, 0)
        return footer
