"""Cache of what the pipelines of a run have in common: values that follow from the columns and how they are served."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tiercache._native import gather
from tiercache.load.assemble import Assembler
from tiercache.load.streams import layout_table, slot_bytes

if TYPE_CHECKING:
    from tiercache.load.serving import OutputSpec
    from tiercache.load.source import Source


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a batch.

    rows: Number of rows; expected_bytes: memory of a new slot; about_bytes: estimate from the stored size of the
    records, for columns of varying length.
    """

    rows: int
    expected_bytes: int
    about_bytes: int


class PipelineSetup:
    """Values that the pipelines of one source and serving share. Thread-safe: two threads compute equal values.

    stored_bytes, largest_bytes: size of all shards and of the largest; forms: see `layout_table`.
    """

    def __init__(self, source: Source, serving: OutputSpec) -> None:
        self.source, self.serving = source, serving
        self.assembler = Assembler(source.schema, serving)
        self._varies = bool((self.assembler.streams[:, 0] & 0xFF == gather.VAR).any())
        self.stored_bytes = int(source.shard_bytes.sum())
        self.largest_bytes = int(source.shard_bytes.max(initial=1))
        self.forms = layout_table(source.schema, serving)
        self._sizes: dict[tuple[int, int], Sizes] = {}

    def sizes(self, batch_size: int, n_records: int) -> Sizes:
        """Return the sizes of the batches of an epoch with n_records."""
        found = self._sizes.get((batch_size, n_records))
        if found is None:
            rows = min(batch_size, max(n_records, 1))
            expected_bytes = slot_bytes(self.assembler.streams, rows)
            about_bytes = self.stored_bytes // max(n_records, 1) * rows
            if self._varies:  # with room for a batch that is longer than most
                expected_bytes = max(expected_bytes, about_bytes + about_bytes // 8)
            found = self._sizes[batch_size, n_records] = Sizes(rows, expected_bytes, about_bytes)
        return found


class PipelineCache:
    """Keeps the shared values of a run's last pipeline for the next one, which usually serves the same source.

    Computing them took 0.3 ms of an epoch's start, because the batches evict the code from the processor's caches (0.03
    ms if they do not).
    """

    def __init__(self) -> None:
        self._last: PipelineSetup | None = None

    def of(self, source: Source, serving: OutputSpec) -> PipelineSetup:
        """Return the values for this source and serving."""
        last = self._last
        if last is None or last.source is not source or last.serving is not serving:
            last = self._last = PipelineSetup(source, serving)
        return last
