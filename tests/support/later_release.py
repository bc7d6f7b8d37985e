"""Files as a later release may write them within format version 1: with parts that this one does not know.

What may be passed by: other bytes where zeros are called for, more sections and keys, chunks that are aligned to 4096
with other bytes between them, more columns in a segment, other kinds of versions. What must not be:
see test_forward_compatibility.py.
"""

import json
import struct
from dataclasses import asdict
from typing import Any

from tiercache._native.checksum import crc32c
from tiercache.model import ShardInfo
from tiercache.shard import codec
from tiercache.shard.codec import align
from tiercache.shard.footer import Footer, Tail

SECTIONS = 7
MORE_SECTIONS = (b"", b"a bloom filter", bytes(range(256)))


def resum_tail(tail: bytes | bytearray) -> bytes:
    """A tail with the CRC-32C of what it holds."""
    return bytes(tail[:52]) + struct.pack("<I", crc32c(tail[:52])) + bytes(tail[56:])


def resum_head(head: bytes | bytearray) -> bytes:
    """The same of a head."""
    return bytes(head[:60]) + struct.pack("<I", crc32c(head[:60]))


def sealed(chunks: bytes, footer: Footer, name: str, raw: bytes | None = None) -> tuple[dict[str, Any], bytes]:
    """(row, bytes) of a shard of head and chunks, and a footer; raw: the footer's content, if not as packed today."""
    stored, raw_bytes = footer.pack() if raw is None else (codec.compress(raw, 3), len(raw))
    tail = Tail(len(chunks), len(stored), raw_bytes, crc32c(stored))
    data = chunks + stored + tail.pack()
    info = ShardInfo(name, footer.shard_id.hex(), footer.n_records, len(data), crc32c(data), len(chunks), len(stored))
    return asdict(info), data


def content_with(footer: Footer, facts: dict[str, Any], more: tuple[bytes, ...]) -> bytes:
    """A footer's content with more keys in its JSON section, and more sections behind its own."""
    stored, raw_bytes = footer.pack()
    raw = bytes(codec.decompress(stored, raw_bytes))
    rows = [struct.unpack_from("<QQ", raw, 40 + 16 * i) for i in range(SECTIONS)]
    sections = [raw[offset : offset + length] for offset, length in rows]
    known = json.loads(sections[0]) | facts
    sections[0] = json.dumps(known).encode()
    sections += more
    out = bytearray(raw[:36] + struct.pack("<I", len(sections)))
    offset = align(40 + 16 * len(sections))
    for section in sections:
        out += struct.pack("<QQ", offset, len(section))
        offset = align(offset + len(section))
    for section in sections:
        out += bytes(align(len(out)) - len(out)) + section
    return bytes(out) + bytes(align(len(out)) - len(out))


def version_text(body: dict[str, Any]) -> bytes:
    """The text of a version, by docs/format.md alone."""
    body = {key: value for key, value in body.items() if key != "crc32c"}
    body["crc32c"] = crc32c(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode() + b"\n"
