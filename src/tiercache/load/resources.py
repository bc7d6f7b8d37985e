"""The threads and the memory that a loader may use."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from tiercache import config
from tiercache.load.pipeline import Resources
from tiercache.model import parse_bytes

if TYPE_CHECKING:
    from tiercache.load.options import LoaderOptions
    from tiercache.load.ranks import Rank

# Share of the memory limit for batches gathered ahead: enough for 32 batches of 8 MiB, and little beside a model.
_MEMORY_SHARE, _MEMORY_MAX_BYTES = 32, 256 << 20


class ResourceBudget:
    """The machine's cores and memory, divided among its ranks by the loader's options."""

    def __init__(self, options: LoaderOptions) -> None:
        self._options = options

    def resources(self, rank: Rank) -> Resources:
        """Return the resources of one of the machine's ranks."""
        options = self._options
        n_cpus, limit_bytes = self._limits
        n_threads = options.threads or max(1, n_cpus // rank.local_ranks)
        share_bytes = min(_MEMORY_MAX_BYTES, limit_bytes // _MEMORY_SHARE) // rank.local_ranks
        memory_bytes = share_bytes if options.memory_bytes is None else parse_bytes(options.memory_bytes)
        return Resources(n_threads, memory_bytes, limit_bytes // rank.local_ranks)

    @cached_property
    def _limits(self) -> tuple[int, int]:
        """Number of cores and bytes of memory.

        Cached: reading the cgroups takes 1.2 ms, which shows in short epochs.
        """
        return config.available_cpus(), config.memory_limit_bytes()
