"""Head, tail and footer of a shard: packing, parsing and checks. No I/O. docs/format.md is the byte table.

Parsing checks every number before any code adds, multiplies or indexes with it. Arithmetic is on uint64 and cannot wrap
around.

It also says which releases can read a file (feature names and bits).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from tiercache._native.checksum import crc32c
from tiercache.distribution import UPGRADE_COMMAND, __version__
from tiercache.errors import CorruptShard, SchemaError, UnsupportedFormat
from tiercache.shard import codec
from tiercache.shard.codec import ALIGN_BYTES, align
from tiercache.shard.schema import Column, Kind, Schema, UnknownKindError

FORMAT_VERSION = 1
SOFTWARE = f"tiercache {__version__}"
# First release that reads the files that this one writes: (major, minor).
RELEASE = (0, 1)
RELEASE_TEXT = "{}.{}".format(*RELEASE)
# Features that this release supports: names in version files, bits in shards.
FEATURES: frozenset[str] = frozenset()
# The chunks of some columns lie together behind the chunks of all blocks.
GROUPED_COLUMNS = 1 << 0
SHARD_FEATURES = GROUPED_COLUMNS


def check_format(found: int, release: str, *, what: str, url: str) -> None:
    """Raise UnsupportedFormat unless this release reads the format. release: The first that does, "" if unknown."""
    if found == FORMAT_VERSION:
        return
    raise _unsupported(f"the {what} has format {found}, which {_who(release)}", url=url, found=found, release=release)


def check_features(needed: Collection[str], release: str, *, what: str, url: str, doing: str = "reading") -> None:
    """Raise UnsupportedFormat, with .needs, if this release lacks features. release: The first that has them, or ""."""
    missing = tuple(sorted(set(needed) - FEATURES))
    if missing:
        raise _unsupported(
            f"{doing} this {what} needs {', '.join(missing)}, which {_who(release)}",
            url=url,
            release=release,
            needs=missing,
        )


def names_of_bits(bits: int) -> list[str]:
    unknown = bits & ~SHARD_FEATURES
    return [f"feature bit {bit}" for bit in range(unknown.bit_length()) if unknown >> bit & 1]


def _who(release: str) -> str:
    newer = f"tiercache {release} and later know" if release else "a later tiercache knows"
    return f"{newer}; this is {__version__}: {UPGRADE_COMMAND}"


def _unsupported(message: str, *, url: str, found: int = FORMAT_VERSION, **facts: Any) -> UnsupportedFormat:
    return UnsupportedFormat(message, url=url, found=found, supported=FORMAT_VERSION, **facts)


U64: TypeAlias = npt.NDArray[np.uint64]
Table: TypeAlias = npt.NDArray[Any]
HEAD_BYTES = TAIL_BYTES = 64
PAGE_BYTES = 65536
_MOST = np.uint64(1 << 62)


def n_pages(raw_bytes: Table, codecs: Table) -> U64:
    """Return the number of page checksums of each chunk: one per 64 KiB of a raw chunk, none for other chunks."""
    pages = (raw_bytes + np.uint64(PAGE_BYTES - 1)) // np.uint64(PAGE_BYTES)
    return np.where(codecs == codec.RAW, pages, np.uint64(0))


def check_chunks(chunks: Table, pages: Table, footer_offset: int, features: int = 0) -> str:
    """Check that chunks lie between head and footer and agree with codecs, lengths and pages. Returns the problem."""
    flat = chunks.ravel()
    offset, stored, raw, codecs = flat["offset"], flat["stored"], flat["raw"], flat["codec"]
    limit = np.uint64(footer_offset)
    if (offset > limit).any() or (stored > limit - np.minimum(offset, limit)).any():
        return "a chunk ends beyond the footer's start"
    places = np.argsort(offset, kind="stable") if features & GROUPED_COLUMNS else slice(None)
    begins, ends = offset[places], (offset + stored)[places]
    if (begins % np.uint64(ALIGN_BYTES)).any() or (begins[:1] < HEAD_BYTES).any() or (begins[1:] < ends[:-1]).any():
        return "chunks are not aligned, or overlap"
    if not np.isin(codecs, codec.CODECS).all():
        unknown = sorted(set(codecs.tolist()) - set(codec.CODECS))
        raise codec.UnknownCodecError(f"codec {', '.join(map(str, unknown))}")
    if ((codecs == codec.RAW) & (raw != stored)).any():
        return "a raw chunk has a stored length that differs from its decoded length"
    if ((codecs == codec.ZSTD) & (raw > np.uint64(codec.ZSTD_LIMIT_BYTES))).any():
        return "a compressed chunk is longer than the limit"
    if ((codecs == codec.ZSTD) & (raw // np.uint64(codec.MAX_ZSTD_RATIO) > stored)).any():
        return "a compressed chunk is longer than its frame can hold"
    return _check_numbering("page", flat["first_page"], n_pages(raw, codecs), len(pages))


def check_nodes(schema: Schema, chunks: Table, nodes: U64, block_records: U64) -> str:
    """Check that each chunk has the nodes of its type, the first as long as the block, and no forbidden nulls."""
    counts = np.array([column.layout()[0] for column in schema.columns], np.uint64)
    problem = _check_numbering("node", chunks["first_node"].ravel(), np.tile(counts, len(chunks)), len(nodes))
    if problem:
        return problem
    if (nodes >= _MOST).any() or (nodes[:, 1] > nodes[:, 0]).any():
        return "a node has more nulls than values"
    for number, column in enumerate(schema.columns):
        first = nodes[chunks["first_node"][:, number]]
        if (first[:, 0] != block_records).any():
            return f"column {column.name!r} has another number of records than its block"
        if not column.nullable and first[:, 1].any():
            return f"column {column.name!r} has nulls, which its type does not allow"
    return ""


def check_buffers(schema: Schema, chunks: Table, nodes: U64, buffers: U64) -> str:
    """Check that buffers are inside their chunk, aligned and in order, and have the lengths that their records need."""
    counts = np.array([column.layout()[1] for column in schema.columns], np.uint64)
    per_chunk = np.tile(counts, len(chunks))
    problem = _check_numbering("buffer", chunks["first_buffer"].ravel(), per_chunk, len(buffers))
    if problem:
        return problem
    raw = np.repeat(chunks["raw"].ravel(), per_chunk.astype(np.int64))
    offset, length = buffers[:, 0], buffers[:, 1]
    if (offset > raw).any() or (length > raw - np.minimum(offset, raw)).any() or (raw >= _MOST).any():
        return "a buffer ends beyond its chunk"
    if (offset % np.uint64(ALIGN_BYTES)).any():
        return "a buffer is not aligned"
    filled = np.flatnonzero(length)
    of_chunk = np.repeat(np.arange(len(per_chunk)), per_chunk.astype(np.int64))[filled]
    follows = of_chunk[1:] == of_chunk[:-1]
    if (follows & (offset[filled[1:]] < offset[filled[:-1]] + length[filled[:-1]])).any():
        return "a buffer begins before the one before it ends"
    for number, column in enumerate(schema.columns):
        if column.kind is not Kind.ARROW and _lengths_differ(column, chunks[:, number], nodes, buffers):
            return f"column {column.name!r} has buffers that do not fit its type and records"
    return ""


def _lengths_differ(column: Column, chunks: Table, nodes: U64, buffers: U64) -> bool:
    """Return whether a buffer of a column (not ARROW) has another length than its records need."""
    records, nulls = nodes[chunks["first_node"]].T
    first = chunks["first_buffer"]

    def length(buffer: int) -> U64:
        found: U64 = buffers[first + np.uint64(buffer), 1]
        return found

    def bits(count: U64) -> U64:
        return (count + np.uint64(7)) // np.uint64(8)

    wrong = np.where(nulls > 0, length(0) != bits(records), length(0) != 0).any()
    for stream in column.streams(0):
        found = length(stream.values_buffer)
        if stream.role == "valid":
            continue
        if stream.offsets_buffer is not None:
            wrong |= (length(stream.offsets_buffer) != (records + np.uint64(1)) * np.uint64(8)).any()
            wrong |= (found % np.uint64(stream.width_bytes)).any()
        elif column.kind is Kind.BOOL:
            wrong |= (found != bits(records)).any()
        else:
            # There are fewer than 2**32 records, and a row has fewer than 2**31 bytes, so the product does not wrap.
            wrong |= (found != records * np.uint64(stream.width_bytes)).any()
    return bool(wrong) or _children_differ(column, chunks, nodes, buffers)


def _children_differ(column: Column, chunks: Table, nodes: U64, buffers: U64) -> bool:
    """Return whether an inner node of a tensor or ragged column has nulls or another length than its parent implies."""
    first = chunks["first_node"]
    records = nodes[first, 0]
    if column.kind is Kind.TENSOR:
        expected = {1: records * np.uint64(column.n_elements)}
    elif column.kind is Kind.RAGGED:
        elements = buffers[chunks["first_buffer"] + np.uint64(4), 1] // np.uint64(column.stored.itemsize)
        expected = {1: records, 2: elements, 3: records, 4: records * np.uint64(len(column.shape))}
    else:
        return False
    return any(
        (nodes[first + np.uint64(node), 0] != length).any() or nodes[first + np.uint64(node), 1].any()
        for node, length in expected.items()
    )


def _check_numbering(what: str, first: Table, counts: Table, n_rows: int) -> str:
    """Check that the table rows of each chunk follow those of the previous chunk, and that the last end the table."""
    if (counts > np.uint64(n_rows)).any():
        return f"a chunk has more {what} rows than the footer"
    ends = np.cumsum(counts, dtype=np.uint64)
    total = int(ends[-1]) if len(ends) else 0
    if total != n_rows or (first != ends - counts).any():
        return f"the {what} rows of the chunks do not follow one another"
    return ""


HEAD_MAGIC = b"\x89TCSHRD\n"
TAIL_MAGIC = b"TCSEND\r\n"
# A reader holds the whole footer in memory. With blocks of 1 MiB and one column, this is a shard of about 10 TiB; the
# writer starts a new shard long before.
FOOTER_LIMIT_BYTES = 1 << 30
# The padding bytes (x) are zero and are not checked: a later release may store there what this one may ignore.
_HEAD = struct.Struct("<8sI4x16s28xI")
_TAIL = struct.Struct("<QQQIIQIHH4xI8s")
_PREFIX = struct.Struct("<16sQQII")
_SECTION = struct.Struct("<QQ")
_SECTIONS = ("json", "schema", "blocks", "chunks", "nodes", "buffers", "pages")
# Largest number of sections. Sections of later releases follow the ones above, and are ignored.
_MAX_SECTIONS = 1024
CHUNK_ROW = np.dtype(
    [
        ("offset", "<u8"),
        ("stored", "<u8"),
        ("raw", "<u8"),
        ("codec", "<u4"),
        ("crc", "<u4"),
        ("first_node", "<u8"),
        ("first_buffer", "<u8"),
        ("first_page", "<u8"),
    ]
)


def pack_head(shard_id: bytes) -> bytes:
    body = _HEAD.pack(HEAD_MAGIC, FORMAT_VERSION, shard_id, 0)[:-4]
    return body + struct.pack("<I", crc32c(body))


def parse_head(data: bytes, url: str) -> bytes:
    """Return the shard id in the first 64 bytes of a shard. Raises CorruptShard and UnsupportedFormat."""
    if len(data) != HEAD_BYTES or data[:8] != HEAD_MAGIC:
        raise CorruptShard(
            f"does not begin with {HEAD_MAGIC!r}: not a shard, or its first bytes are damaged", url=url, part="head"
        )
    _, version, shard_id, crc = _HEAD.unpack(data)
    if crc != crc32c(data[:-4]):
        raise CorruptShard("CRC-32C does not match", url=url, part="head")
    check_format(version, "", what="shard", url=url)
    return bytes(shard_id)


@dataclass(frozen=True, slots=True)
class Tail:
    """Tail of a shard: position, lengths (stored, and before compression) and CRC-32C of the footer."""

    footer_offset: int
    footer_bytes: int
    footer_raw_bytes: int
    footer_crc: int
    features: int = 0

    @property
    def file_bytes(self) -> int:
        return self.footer_offset + self.footer_bytes + TAIL_BYTES

    def pack(self) -> bytes:
        fields = (
            self.footer_offset,
            self.footer_bytes,
            self.footer_raw_bytes,
            self.footer_crc,
            FORMAT_VERSION,
            self.file_bytes,
            self.features,
            *RELEASE,
        )
        body = _TAIL.pack(*fields, 0, TAIL_MAGIC)[:-12]
        return body + struct.pack("<I", crc32c(body)) + TAIL_MAGIC

    @staticmethod
    def parse(data: bytes, file_bytes: int, url: str) -> Tail:
        """Return the tail of an object of file_bytes bytes. Raises CorruptShard and UnsupportedFormat."""
        if len(data) != TAIL_BYTES or data[-8:] != TAIL_MAGIC:
            raise CorruptShard(
                "does not end as a shard: it is not a shard, or it was truncated or appended to", url=url, part="tail"
            )
        offset, stored, raw, footer_crc, version, n_bytes, features, major, minor, crc, _ = _TAIL.unpack(data)
        if crc != crc32c(data[:-12]):
            raise CorruptShard("CRC-32C does not match", url=url, part="tail")
        release = f"{major}.{minor}" if major or minor else ""
        check_format(version, release, what="shard", url=url)
        check_features(names_of_bits(features), release, what="shard", url=url)
        tail = Tail(offset, stored, raw, footer_crc, features)
        if n_bytes != file_bytes or tail.file_bytes != file_bytes:
            raise CorruptShard(f"states a shard of {n_bytes} bytes, but it has {file_bytes}", url=url, part="tail")
        if offset < HEAD_BYTES or offset % ALIGN_BYTES or raw > FOOTER_LIMIT_BYTES or stored > FOOTER_LIMIT_BYTES:
            raise CorruptShard(
                f"states an invalid footer: {stored} bytes at {offset} ({raw} decoded)", url=url, part="tail"
            )
        return tail


@dataclass(frozen=True)
class Footer:
    """Footer of a shard: schema, positions and checksums of all blocks.

    Immutable; arrays are read-only views of a buffer.

    Attributes:
        shard_id: Random id of the shard, 16 bytes.
        block_first: uint64[n_blocks + 1], first record of each block; the last entry is n_records.
        chunks: CHUNK_ROW[n_blocks, n_columns].
        nodes: uint64[., 2], (length, nulls) of the Arrow nodes, depth first, block by block.
        buffers: uint64[., 2], (offset in the decoded chunk, length) of the Arrow buffers, depth first, block by block.
        pages: uint32[.], CRC-32C of each 64 KiB page of each raw chunk.
        n_later_sections: Number of sections of a later release, which are ignored and not packed again.
    """

    schema: Schema
    shard_id: bytes
    n_records: int
    n_blocks: int
    block_first: U64
    chunks: npt.NDArray[np.void]
    nodes: U64
    buffers: U64
    pages: npt.NDArray[np.uint32]
    n_later_sections: int = 0

    @cached_property
    def block_records(self) -> U64:
        return np.diff(self.block_first)

    @cached_property
    def block_raw_bytes(self) -> U64:
        """Number of decoded bytes of each block, over all columns: uint64[n_blocks]."""
        total: U64 = self.chunks["raw"].sum(axis=1, dtype=np.uint64)
        return total

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.block_first, self.chunks, self.nodes, self.buffers, self.pages))

    def pack(self) -> tuple[bytes, int]:
        """Return the compressed footer, and its length in bytes before compression."""
        facts = {"statistics": {}, "metadata": {}, "software": SOFTWARE}
        sections = [
            json.dumps(facts, sort_keys=True, separators=(",", ":")).encode(),
            self.schema.to_bytes(),
            *(
                np.ascontiguousarray(a).tobytes()
                for a in (self.block_first, self.chunks, self.nodes, self.buffers, self.pages)
            ),
        ]
        prefix = [_PREFIX.pack(self.shard_id, self.n_records, self.n_blocks, len(self.schema), len(sections))]
        offset = align(_PREFIX.size + _SECTION.size * len(sections))
        for section in sections:
            prefix.append(_SECTION.pack(offset, len(section)))
            offset = align(offset + len(section))
        parts = [b"".join(prefix), *sections]
        raw = b"".join(part.ljust(align(len(part)), b"\0") for part in parts)
        return codec.compress(raw, codec.FOOTER_LEVEL), len(raw)

    @staticmethod
    def parse(stored: bytes | memoryview, tail: Tail, url: str) -> Footer:
        """Return the footer, each number checked against the others. Raises CorruptShard and UnsupportedFormat."""
        if len(stored) != tail.footer_bytes or crc32c(stored) != tail.footer_crc:
            raise CorruptShard("CRC-32C does not match", url=url, part="footer")
        try:
            raw = codec.decompress(stored, tail.footer_raw_bytes)
            return _Sections(raw, tail).footer()
        except (codec.UnknownCodecError, UnknownKindError) as error:
            # The checksums match, so nothing is damaged; the writer should have set a feature bit in the tail.
            check_features([error.needed], "", what="shard", url=url)
            raise
        except (codec.CodecError, SchemaError, _BadFooter) as error:
            raise CorruptShard(str(error), url=url, part="footer") from error


class _BadFooter(ValueError): ...


class _Sections:
    def __init__(self, raw: memoryview, tail: Tail) -> None:
        if len(raw) < _PREFIX.size:
            self.fail("it is too short")
        self.raw = raw
        self._tail = tail
        self.shard_id, self.n_records, self.n_blocks, self.n_columns, n_sections = _PREFIX.unpack_from(raw)
        table_end = _PREFIX.size + _SECTION.size * n_sections
        if not len(_SECTIONS) <= n_sections <= _MAX_SECTIONS or table_end > len(raw):
            self.fail(f"it has {n_sections} sections, expected {len(_SECTIONS)} or (of a later release) more")
        self.n_later = n_sections - len(_SECTIONS)
        found = [self._section(i, table_end) for i in range(n_sections)]
        self.sections = dict(zip(_SECTIONS, found, strict=False))

    @staticmethod
    def fail(message: str) -> NoReturn:
        raise _BadFooter(message)

    def _section(self, number: int, table_end: int) -> memoryview:
        offset, length = _SECTION.unpack_from(self.raw, _PREFIX.size + _SECTION.size * number)
        if offset < table_end or offset % ALIGN_BYTES or offset > len(self.raw) or length > len(self.raw) - offset:
            name = _SECTIONS[number] if number < len(_SECTIONS) else number
            self.fail(f"section {name!r} [{offset}, +{length}) is not inside its {len(self.raw)} bytes")
        return self.raw[offset : offset + length]

    def _array(self, name: str, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Return a section as an array; -1 in shape is computed from the length of the section."""
        section, item = self.sections[name], np.dtype(dtype).itemsize
        row = item * int(np.prod([d for d in shape if d >= 0], dtype=object))
        fits = len(section) == row if -1 not in shape else len(section) % row == 0
        if not fits:
            self.fail(f"section {name!r} has {len(section)} bytes, which is not {shape} rows of {item}")
        return np.frombuffer(section, dtype=dtype).reshape(shape)

    def footer(self) -> Footer:
        schema = Schema.from_bytes(bytes(self.sections["schema"]))
        if len(schema) != self.n_columns or not len(schema):
            self.fail(f"its schema has {len(schema)} columns, not {self.n_columns}")
        footer = Footer(
            schema=schema,
            shard_id=self.shard_id,
            n_records=self.n_records,
            n_blocks=self.n_blocks,
            block_first=self._array("blocks", "<u8", (self.n_blocks + 1,)),
            chunks=self._array("chunks", CHUNK_ROW, (self.n_blocks, self.n_columns)),
            nodes=self._array("nodes", "<u8", (-1, 2)),
            buffers=self._array("buffers", "<u8", (-1, 2)),
            pages=self._array("pages", "<u4", (-1,)),
            n_later_sections=self.n_later,
        )
        self._check(footer)
        return footer

    def _check(self, footer: Footer) -> None:
        first = footer.block_first
        rising = bool((first[1:] > first[:-1]).all())
        if first[0] != 0 or not rising or int(first[-1]) != footer.n_records or footer.n_records >= 2**62:
            self.fail("its block table does not cover all records in ascending order")
        if footer.n_blocks and int(footer.block_records.max()) >= 2**32:
            self.fail("a block has 2**32 records or more")
        problem = (
            check_chunks(footer.chunks, footer.pages, self._tail.footer_offset, self._tail.features)
            or check_nodes(footer.schema, footer.chunks, footer.nodes, footer.block_records)
            or check_buffers(footer.schema, footer.chunks, footer.nodes, footer.buffers)
        )
        if problem:
            self.fail(problem)
