"""Footers that were read before their shards: kept until the shard is opened, so that it need not ask again."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiercache.shard.layout import Footer

# A group of an order has some hundred shards, whose footers are a few KiB to 100 KiB each. What does not fit is read
# again: one request of many for a shard that is read by ranges.
LIMIT_BYTES = 32 << 20


class Footers:
    """Footers by shard number, each for one opening. Safe from any thread.

    There is no lock, for a fork could leave it locked. Threads that meet may miscount; the count is made anew before
    anything is refused.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._kept: dict[int, Footer] = {}
        self._n_bytes = 0

    def put(self, shard: int, footer: Footer) -> None:
        """Keep a footer, if there is room."""
        if self._n_bytes + footer.nbytes > self._limit_bytes:
            self._n_bytes = sum(kept.nbytes for kept in list(self._kept.values()))
        if shard not in self._kept and self._n_bytes + footer.nbytes <= self._limit_bytes:
            self._kept[shard] = footer
            self._n_bytes += footer.nbytes

    def take(self, shard: int) -> Footer | None:
        """Give a footer away; None: it is not here."""
        footer = self._kept.pop(shard, None)
        if footer is not None:
            self._n_bytes = max(self._n_bytes - footer.nbytes, 0)
        return footer
