"""What the pipelines of a run have in common, as it follows from the columns and how they are served alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tiercache._native import gather
from tiercache.load.assemble import Assembler
from tiercache.load.streams import form_table, slot_bytes

if TYPE_CHECKING:
    from tiercache.load.serving import Serving
    from tiercache.load.source import Source


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a batch: rows; memory that a slot is made with; about what the records take as stored.

    The last is the measure for columns whose records differ in length.
    """

    rows: int
    expected_bytes: int
    about_bytes: int


class Fitted:
    """What the pipelines of a source and a serving have in common. Any thread: two would make the same.

    stored_bytes, largest_bytes: of all shards and of the largest; forms: as `form_table`.
    """

    def __init__(self, source: Source, serving: Serving) -> None:
        self.source, self.serving = source, serving
        self.assembler = Assembler(source.schema, serving)
        self._varies = bool((self.assembler.streams[:, 0] & 0xFF == gather.VAR).any())
        self.stored_bytes = int(source.shard_bytes.sum())
        self.largest_bytes = int(source.shard_bytes.max(initial=1))
        self.forms = form_table(source.schema, serving)
        self._sizes: dict[tuple[int, int], Sizes] = {}

    def sizes(self, batch_size: int, n_records: int) -> Sizes:
        """Of the batches of an epoch of so many records."""
        found = self._sizes.get((batch_size, n_records))
        if found is None:
            rows = min(batch_size, max(n_records, 1))
            expected_bytes = slot_bytes(self.assembler.streams, rows)
            about_bytes = self.stored_bytes // max(n_records, 1) * rows
            if self._varies:  # with room for a batch that is longer than most
                expected_bytes = max(expected_bytes, about_bytes + about_bytes // 8)
            found = self._sizes[batch_size, n_records] = Sizes(rows, expected_bytes, about_bytes)
        return found


class Fittings:
    """What a pipeline leaves to the next one of its run, which mostly serves the same source in the same way.

    Made anew it took 0.3 ms of an epoch's begin, by when the batches have pushed all of it out of the processor's
    caches (0.03 ms if they have not).
    """

    def __init__(self) -> None:
        self._last: Fitted | None = None

    def of(self, source: Source, serving: Serving) -> Fitted:
        """What fits this source and serving."""
        last = self._last
        if last is None or last.source is not source or last.serving is not serving:
            last = self._last = Fitted(source, serving)
        return last
