"""Planning of range requests: validates the caller's spans and coalesces them into requests. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tiercache.model import ByteRange
from tiercache.store.contract import Span


def check_spans(spans: Sequence[Span]) -> None:
    """Check that each range can be read into its buffer.

    Raises:
        ValueError: A buffer is read-only, is not contiguous bytes, or differs in length from its range.
    """
    for span, buffer in spans:
        if buffer.nbytes != span.n_bytes:
            raise ValueError(
                f"the buffer of [{span.start}, {span.end}) has {buffer.nbytes} bytes, expected {span.n_bytes}"
            )
        if buffer.readonly or not buffer.c_contiguous or buffer.itemsize != 1 or buffer.ndim != 1:
            raise ValueError(f"the buffer of [{span.start}, {span.end}) must be writable, contiguous, flat bytes")


@dataclass(frozen=True, slots=True)
class Request:
    """One range request.

    Attributes:
        range: Byte range of the object.
        pieces: Destinations of the answer, as (offset in the answer, buffer).
    """

    range: ByteRange
    pieces: tuple[tuple[int, memoryview], ...]


@dataclass(frozen=True, slots=True)
class RequestSizes:
    """Limits of request planning.

    Attributes:
        gap_bytes: Largest gap between two spans that is read and discarded in order to save a request.
        part_bytes: Maximum size of a request.
    """

    gap_bytes: int = 64 << 10
    part_bytes: int = 8 << 20

    def __post_init__(self) -> None:
        if self.gap_bytes < 0 or self.part_bytes <= 0:
            raise ValueError(f"gap_bytes must be at least 0 and part_bytes at least 1, got {self}")


def plan_requests(spans: Sequence[Span], sizes: RequestSizes) -> tuple[Request, ...]:
    """Coalesce neighbouring spans and split long ones. Each byte of each span is in exactly one piece of one request.

    Spans may overlap and come in any order; the overlap is read more than once. An empty span needs no request.
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
    """Return the non-empty spans, split into spans of nearly equal length of at most part_bytes."""
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
