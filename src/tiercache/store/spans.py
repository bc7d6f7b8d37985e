"""Pure planning of ranged reads: checks what the caller gave, joins spans into requests; back ends carry them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tiercache.model import ByteRange
from tiercache.store.contract import Span


def check_spans(spans: Sequence[Span]) -> None:
    """Refuse buffers that a range cannot be read into.

    Raises:
        ValueError: a buffer of another length than its range, read-only, or not contiguous bytes.
    """
    for span, buffer in spans:
        if buffer.nbytes != span.n_bytes:
            raise ValueError(f"the buffer of [{span.start}, {span.end}) has {buffer.nbytes} bytes, not {span.n_bytes}")
        if buffer.readonly or not buffer.c_contiguous or buffer.itemsize != 1 or buffer.ndim != 1:
            raise ValueError(f"the buffer of [{span.start}, {span.end}) must be writable, contiguous, flat bytes")


@dataclass(frozen=True, slots=True)
class Request:
    """One request: range, and the pieces of it that go to buffers, as (offset in the answer, buffer)."""

    range: ByteRange
    pieces: tuple[tuple[int, memoryview], ...]


@dataclass(frozen=True, slots=True)
class RequestSizes:
    """gap_bytes: bytes worth reading for nothing to save a request; part_bytes: the largest request."""

    gap_bytes: int = 64 << 10
    part_bytes: int = 8 << 20

    def __post_init__(self) -> None:
        if self.gap_bytes < 0 or self.part_bytes <= 0:
            raise ValueError(f"gap_bytes must be at least 0 and part_bytes at least 1, got {self}")


def plan_requests(spans: Sequence[Span], sizes: RequestSizes) -> tuple[Request, ...]:
    """Join neighbouring spans and cut long ones: every byte of every span is in exactly one piece of one request.

    Spans may overlap and come in any order; overlapping ones are read more than once. Empty spans need no request.
    """
    requests: list[Request] = []
    start = end = 0
    pieces: list[tuple[int, memoryview]] = []
    for piece, buffer in sorted(_cut(spans, sizes.part_bytes), key=lambda item: item[0].start):
        joins = pieces and end <= piece.start <= end + sizes.gap_bytes and piece.end - start <= sizes.part_bytes
        if not joins:
            if pieces:
                requests.append(Request(ByteRange(start, end), tuple(pieces)))
            start, pieces = piece.start, []
        pieces.append((piece.start - start, buffer))
        end = piece.end
    if pieces:
        requests.append(Request(ByteRange(start, end), tuple(pieces)))
    return tuple(requests)


def _cut(spans: Sequence[Span], part_bytes: int) -> list[Span]:
    """Spans of at most part_bytes each, of near equal length, without the empty ones."""
    parts: list[Span] = []
    for span, buffer in spans:
        n_parts = -(-span.n_bytes // part_bytes)
        if n_parts <= 1:
            parts.extend([(span, buffer)] if span.n_bytes else [])
            continue
        step = -(-span.n_bytes // n_parts)
        for offset in range(0, span.n_bytes, step):
            piece = buffer[offset : offset + step]
            parts.append((ByteRange(span.start + offset, span.start + offset + piece.nbytes), piece))
    return parts
