"""Checks of a footer's tables, vectorised by column. Pure functions: each returns a description of the error, or "".

Arithmetic is on uint64 and cannot wrap around: only numbers that are known to be below 2**62 are added.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tiercache.shard import codec
from tiercache.shard.spec import Kind
from tiercache.shard.types import Column, Schema

U64: TypeAlias = npt.NDArray[np.uint64]
Table: TypeAlias = npt.NDArray[Any]
HEAD_BYTES = TAIL_BYTES = 64
ALIGN_BYTES = 64
PAGE_BYTES = 65536
_MOST = np.uint64(1 << 62)


def n_pages(raw_bytes: Table, codecs: Table) -> U64:
    """Return the number of page checksums of each chunk: one per 64 KiB of a raw chunk, none for other chunks."""
    pages = (raw_bytes + np.uint64(PAGE_BYTES - 1)) // np.uint64(PAGE_BYTES)
    return np.where(codecs == codec.RAW, pages, np.uint64(0))


def check_chunks(chunks: Table, pages: Table, footer_offset: int) -> str:
    """Check that chunks follow one another between head and footer, with consistent codecs, lengths and pages.

    Raises:
        UnknownCodecError: This release does not know a codec.
    """
    flat = chunks.ravel()
    offset, stored, raw, codecs = flat["offset"], flat["stored"], flat["raw"], flat["codec"]
    limit = np.uint64(footer_offset)
    if (offset > limit).any() or (stored > limit - np.minimum(offset, limit)).any():
        return "a chunk ends beyond the footer's start"
    if (
        (offset % np.uint64(ALIGN_BYTES)).any()
        or (offset[:1] < HEAD_BYTES).any()
        or (offset[1:] < (offset + stored)[:-1]).any()
    ):
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
