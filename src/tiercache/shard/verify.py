"""Checks every byte of a shard, and that its values are what their columns hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from tiercache._native.checksum import crc32c, crc32c_pages
from tiercache.errors import CorruptShard, UnsupportedFormat
from tiercache.model import ShardIdentity, ShardInfo
from tiercache.shard import codec
from tiercache.shard.blocks import Blocks, check_offsets
from tiercache.shard.bounds import n_pages
from tiercache.shard.chunks import LoadedChunks
from tiercache.shard.layout import HEAD_BYTES, PAGE_BYTES, Footer, align, parse_head
from tiercache.shard.opening import check_identity, read_footer
from tiercache.shard.source import Bytes, Source, address_of, aligned_empty
from tiercache.shard.statistics import ColumnStatistics, problems_of
from tiercache.shard.types import VAR, Column, Kind
from tiercache.shard.values import gather_values
from tiercache.store.contract import Store

_PIECE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with a shard or, by a segment or version, with a data set.

    part: "head", "footer", "tail", "file", "chunk", "segment", "version"; block and column where known.
    """

    url: str
    part: str
    message: str
    block: int | None = None
    column: str | None = None


def finding_of(error: CorruptShard | UnsupportedFormat, part: str = "") -> Finding:
    """What an error says, as a finding. part: what is damaged where the error does not say."""
    facts = error.facts
    return Finding(facts["url"], facts.get("part") or part, facts["reason"], facts.get("block"), facts.get("column"))


def verify_shard(
    store: Store, key: str, info: ShardInfo | None = None, identity: ShardIdentity | None = None
) -> Iterator[Finding]:
    """Yield all that is wrong; nothing for a whole shard.

    Reads each byte once, in large requests; memory is bounded by a block.

    Checks head, tail and footer, each chunk and page checksum, that chunks decode to valid arrays of their columns
    and, with info or identity, that the shard is the one meant and its whole-file CRC-32C matches.

    Raises:
        NotFound: no such object.
        StoreError: the store failed.
    """
    source = Source(store, key, identity)
    try:
        yield from _Verification(source, info, identity).findings()
    finally:
        source.close()


class _Verification:
    def __init__(self, source: Source, info: ShardInfo | None, identity: ShardIdentity | None) -> None:
        self._source = source
        self._info = info
        self._identity = identity
        self._crc = self._position = self._file_bytes = 0
        self._ahead: Bytes = np.zeros(0, np.uint8)
        self._counted: dict[str, ColumnStatistics] = {}  # of columns without damage so far

    def findings(self) -> Iterator[Finding]:
        """All that is wrong, in the order of the file, the footer first: without it nothing can be said of the rest."""
        try:
            footer, tail = read_footer(self._source, None)
            self._file_bytes = tail.file_bytes
            check_identity(footer, self._info, self._identity, self._source.url)
        except (CorruptShard, UnsupportedFormat) as error:
            yield finding_of(error, "footer")
            return
        info = self._info
        if info is not None and (info.footer_offset, info.footer_bytes) != (tail.footer_offset, tail.footer_bytes):
            message = (
                f"its data set's row says 'footer_offset' {info.footer_offset} and 'footer_bytes' {info.footer_bytes}, "
                f"its tail {tail.footer_offset} and {tail.footer_bytes}"
            )
            yield Finding(self._source.url, "segment", message)
        try:
            head = parse_head(self._read_to(HEAD_BYTES).tobytes(), self._source.url)
            if head != footer.shard_id:
                yield Finding(self._source.url, "head", "head and footer name different shards")
        except (CorruptShard, UnsupportedFormat) as error:
            yield finding_of(error, "head")
        self._counted = {column.name: ColumnStatistics(column) for column in footer.schema.columns}
        for block in range(footer.n_blocks):
            yield from self._block(footer, block)
        yield from self._check_statistics(footer)
        yield from self._rest()

    def _read_to(self, end: int) -> Bytes:
        """The bytes from where the last call ended, which it adds to the file's sum; asks for _PIECE_BYTES or more."""
        n_bytes = end - self._position
        if n_bytes > len(self._ahead):
            start = self._position + len(self._ahead)
            stop = max(end, min(start + _PIECE_BYTES, self._file_bytes))
            self._ahead = np.concatenate([self._ahead, np.frombuffer(self._source.range(start, stop), np.uint8)])
        memory, self._ahead = self._ahead[:n_bytes], self._ahead[n_bytes:]
        self._crc = crc32c(memory.data, self._crc)
        self._position = end
        return memory

    def _block(self, footer: Footer, block: int) -> Iterator[Finding]:
        last = footer.chunks[block, -1]
        start, end = self._position, 0
        memory = self._read_to(align(int(last["offset"] + last["stored"])))
        for number, column in enumerate(footer.schema.columns):
            row = footer.chunks[block, number]
            first = int(row["offset"]) - start
            yield from self._gap(footer, block, memory[end:first])
            end = first + int(row["stored"])
            try:
                self._chunk(footer, block, number, memory[first : first + int(row["stored"])])
            except CorruptShard as error:
                self._counted.pop(column.name, None)
                yield replace(finding_of(error, "chunk"), block=block, column=column.name)
        yield from self._gap(footer, block, memory[end:])

    def _gap(self, footer: Footer, block: int, between: Bytes) -> Iterator[Finding]:
        """Bytes between chunks are zeros, unless a later release put there what a section of its own speaks of."""
        if not footer.n_later_sections and between.any():
            yield Finding(self._source.url, "chunk", "the bytes between chunks are not zeros", block)

    def _chunk(self, footer: Footer, block: int, number: int, stored: Bytes) -> None:
        row = footer.chunks[block, number]
        sums = np.zeros(int(n_pages(row["raw"], row["codec"])), np.uint32)
        paged = row["codec"] == codec.RAW
        crc = crc32c_pages(address_of(stored), len(stored), PAGE_BYTES, sums) if paged else crc32c(stored.data)
        first_page = int(row["first_page"])
        if crc != row["crc"] or (sums != footer.pages[first_page : first_page + len(sums)]).any():
            raise CorruptShard("CRC-32C does not match", url=self._source.url)
        raw = aligned_empty(int(row["raw"]))
        if row["codec"] == codec.RAW:
            raw[:] = stored
        else:
            try:
                codec.decompress_into(stored.data, raw.data)
            except codec.CodecError as error:
                raise CorruptShard(str(error), url=self._source.url) from error
        loaded = LoadedChunks(np.array([address_of(raw)], np.uint64), [raw])
        blocks = Blocks(footer, self._source.url, (block,), (number,), loaded)
        check_values(blocks, number)
        self._count(blocks.array(0, number), footer.schema.columns[number], row)

    def _count(self, array: pa.Array, column: Column, row: np.void) -> None:
        counted = self._counted.get(column.name)
        if counted is None:  # a block before was damaged
            return
        values = valid = None
        if column.kind is Kind.SCALAR:
            values = np.frombuffer(array.buffers()[1], column.stored, len(array))
            # Not to_numpy(): Arrow then imports pandas, if there is one.
            valid = np.frombuffer(array.is_valid().cast(pa.uint8()).buffers()[1], np.bool_, len(array))
        counted.add_values(values, valid, len(array), array.null_count, int(row["raw"]), int(row["stored"]))

    def _check_statistics(self, footer: Footer) -> Iterator[Finding]:
        """What footer and row say of columns is what their blocks hold; of damaged columns nothing is known."""
        yield from self._check_facts(footer.statistics, footer, "footer")
        if self._info is None:
            return
        try:
            facts = json.loads(self._info.stats_json or "{}")
        except (ValueError, RecursionError) as error:
            yield Finding(self._source.url, "segment", f"statistics of its data set's row: no JSON: {error}")
            return
        yield from self._check_facts(facts, footer, "segment")

    def _check_facts(self, facts: Any, footer: Footer, part: str) -> Iterator[Finding]:
        whose = "its data set's row: " if part == "segment" else ""
        bad = dict(problems_of(facts, footer.schema, footer.n_records))
        for column, problem in bad.items():
            yield Finding(self._source.url, part, f"{whose}{problem}", column=column or None)
        for column, counted in self._counted.items() if isinstance(facts, dict) else ():
            if column in facts and column not in bad and (difference := counted.difference(facts[column])):
                message = f"{whose}statistics of column {column!r}: {difference}"
                yield Finding(self._source.url, part, message, column=column)

    def _rest(self) -> Iterator[Finding]:
        """Footer and tail, which were checked already, for the file's sum."""
        end = self._file_bytes
        while self._position < end:
            self._read_to(min(self._position + _PIECE_BYTES, end))
        for named in (self._info, self._identity):
            if named is None:
                continue
            if named.n_bytes != end:
                yield Finding(self._source.url, "file", f"has {end} bytes, its data set says {named.n_bytes}")
            if named.crc32c != self._crc:
                message = f"CRC-32C of the file is {self._crc:08x}, its data set says {named.crc32c:08x}"
                yield Finding(self._source.url, "file", message)


def check_values(blocks: Blocks, number: int) -> None:
    """See that a loaded block's column holds values of its type.

    Raises:
        CorruptShard: offsets, text, JSON, shapes or nested buffers are not what they must be.
    """
    column = blocks.schema.columns[number]
    n = int(blocks.n_rows[0])
    for place, stream in enumerate(blocks.streams):
        if stream.kind == VAR:
            check_offsets(blocks, place, 0)
    if column.kind in (Kind.JSON, Kind.RAGGED):
        row = np.arange(n, dtype=np.uint32)
        # bfloat16 would need torch; its shapes are those of any other elements
        plain = replace(column, dtype="uint16") if column.dtype == "bfloat16" else column
        addresses = blocks.addresses[blocks.of_column(number)]
        gather_values(plain, addresses, np.zeros(n, np.uint32), row, url=blocks.url)
    try:
        blocks.array(0, number).validate(full=True)
    except pa.ArrowException as error:
        raise CorruptShard(str(error), url=blocks.url, column=column.name) from error
