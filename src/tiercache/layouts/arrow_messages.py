"""The messages of an Arrow IPC stream or file: where they are, and where the buffers of their record batches are.

A message is a length, metadata in FlatBuffers, and a body. A stream is a schema, dictionaries and record batches; a
file is ARROW1, a stream, an index, and ARROW1 again. pyarrow reads metadata only together with its body.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tiercache.layouts.contract import FileBytes

_MAGIC = b"ARROW1"
_CONTINUATION = 0xFFFFFFFF
SCHEMA, DICTIONARY, BATCH = 1, 2, 3
# Bytes that are read at once in search of the next message.
_WINDOW_BYTES = 64 << 10
_INT64 = np.dtype("<i8")
_NO_PAIRS = np.zeros((0, 2), np.int64)


@dataclass(frozen=True)
class Message:
    """A message at [start, end) of a file. nodes: (length, nulls); buffers: [start, end) in the file."""

    kind: int
    start: int
    end: int
    n_records: int = 0
    is_compressed: bool = False
    nodes: NDArray[np.int64] = field(default_factory=lambda: _NO_PAIRS)
    buffers: NDArray[np.int64] = field(default_factory=lambda: _NO_PAIRS)


class _Table:
    """A table of FlatBuffers. Numbers outside of the data raise struct.error or ValueError."""

    def __init__(self, data: memoryview, at: int) -> None:
        self._data, self._at = data, at

    def _place(self, number: int) -> int:
        """Return where the value of a field is; 0: it has the default value."""
        (back,) = struct.unpack_from("<i", self._data, self._at)
        n_bytes, _ = struct.unpack_from("<HH", self._data, self._at - back)
        if 4 + 2 * number >= n_bytes:
            return 0
        (offset,) = struct.unpack_from("<H", self._data, self._at - back + 4 + 2 * number)
        return self._at + int(offset) if offset else 0

    def number(self, field: int, code: str) -> int:
        place = self._place(field)
        return int(struct.unpack_from(code, self._data, place)[0]) if place else 0

    def table(self, field: int) -> _Table | None:
        place = self._place(field)
        return _Table(self._data, place + struct.unpack_from("<I", self._data, place)[0]) if place else None

    def pairs(self, field: int) -> NDArray[np.int64]:
        """Return a vector of structs of two int64, [n, 2]."""
        place = self._place(field)
        if not place:
            return _NO_PAIRS
        place += struct.unpack_from("<I", self._data, place)[0]
        (n,) = struct.unpack_from("<I", self._data, place)
        return np.frombuffer(self._data, _INT64, 2 * n, place + 4).reshape(n, 2)


def _message(metadata: memoryview, start: int, body: int, limit: int) -> Message:
    """Return the message whose metadata this is. Raises struct.error or ValueError for one that is damaged."""
    top = _Table(metadata, *struct.unpack_from("<I", metadata))
    kind, n_bytes, header = top.number(1, "<B"), top.number(3, "<q"), top.table(2)
    if not 0 <= n_bytes <= limit - body or header is None:
        raise ValueError(f"a message of {n_bytes} bytes does not fit into the file")
    if kind != BATCH:
        return Message(kind, start, body + n_bytes)
    nodes, buffers = header.pairs(1), header.pairs(2)
    ends = buffers.sum(axis=1)
    if (buffers < 0).any() or (ends < 0).any() or (ends > n_bytes).any() or (nodes < 0).any():
        raise ValueError("a buffer lies beyond its record batch")
    n_records, is_compressed = header.number(0, "<q"), header.table(3) is not None
    spans = np.stack([buffers[:, 0], ends], axis=1) + body
    return Message(kind, start, body + n_bytes, n_records, is_compressed, nodes, spans)


def read_messages(data: FileBytes) -> Iterator[Message]:
    """Yield the messages of a file, of which only the metadata is read. Raises CorruptShard and SchemaError."""
    window, at = memoryview(b""), 0

    def get(start: int, n_bytes: int) -> memoryview:
        nonlocal window, at
        if start + n_bytes > limit or n_bytes < 0:
            raise data.damaged(f"it ends within the message at byte {start}; was it written whole?")
        if not at <= start <= start + n_bytes <= at + len(window):
            at, window = start, data.read_one(start, min(start + max(n_bytes, _WINDOW_BYTES), limit))
        return window[start - at : start - at + n_bytes]

    limit = data.n_bytes
    start = 8 if bytes(get(0, min(len(_MAGIC), limit))) == _MAGIC else 0
    if start:
        if limit < 24 or bytes(data.read_one(limit - 6, limit)) != _MAGIC:
            raise data.damaged("its last bytes are not ARROW1; was it written whole?")
        limit -= 10
    while start < limit:
        marker, n_bytes = struct.unpack("<Ii", get(start, 8))
        if marker == _CONTINUATION and n_bytes == 0:
            return
        if marker != _CONTINUATION:
            raise data.damaged(f"no message of Arrow at byte {start}; files of Arrow before 0.15 are not supported")
        body = start + 8 + n_bytes
        try:
            message = _message(get(start + 8, n_bytes), start, body, limit)
        except (struct.error, ValueError) as error:
            raise data.damaged(f"the message at byte {start} cannot be read: {error}") from error
        yield message
        start = message.end
