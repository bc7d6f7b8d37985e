"""The names and specifications of copies, and tables of many names.

A copy of a shard is named by the hash of its identity, which is the same for all mirrors; a copy of another object by
the hash of its URL and version.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiercache.model import ObjectInfo, ShardIdentity
from tiercache.store import Store, check_key, redact

NAME = re.compile(r"[0-9a-f]{40}")
NAME_BYTES = 20


@dataclass(frozen=True, slots=True)
class CopySpec:
    """The specification of a copy: its name, and all that is needed to fetch and verify it. A part of it is its record.

    Attributes:
        source: URL of the object without credentials.
        crc32c: CRC-32C of the whole object; None if unknown.
        key: Key of the object in its store; "" in a specification that was read from a record.
        identity: Identity of a shard, a segment or a file of a layout; None for an object of no data set.
        section_sums: CRC-32C of each section of a complete copy, uint32; see copy_file.py. Only in a record.
    """

    name: str
    source: str
    n_bytes: int
    crc32c: int | None
    key: str = ""
    identity: ShardIdentity | None = None
    etag: str | None = None
    section_sums: bytes = b""

    @property
    def if_match(self) -> str | None:
        """ETag that guards reads; None for a weak ETag, which promises nothing about the bytes."""
        return None if self.etag is None or self.etag.startswith("W/") else self.etag

    @property
    def has_checksums(self) -> bool:
        """Whether the object has checksums inside, which its reader compares; otherwise its unit map has them."""
        return self.identity is not None and self.etag is None

    def to_json(self, crc32c: int | None) -> str:
        facts = {"source": self.source, "n_bytes": self.n_bytes, "crc32c": crc32c, "etag": self.etag}
        if self.identity is not None:
            facts |= {"dataset_id": self.identity.dataset_id, "shard_id": self.identity.shard_id}
        if self.section_sums:
            facts["section_sums"] = self.section_sums.hex()
        return json.dumps({"format": 0} | {name: fact for name, fact in facts.items() if fact is not None}) + "\n"

    @classmethod
    def from_json(cls, name: str, text: str) -> CopySpec | None:
        """Return what a record says; None if it is torn by a power failure, or belongs to another release."""
        try:
            facts = json.loads(text)
            source, n_bytes, crc32c = facts["source"], facts["n_bytes"], facts.get("crc32c")
            if facts["format"] != 0 or [type(fact) for fact in (source, n_bytes, crc32c or 0)] != [str, int, int]:
                return None
            identity = None
            if "shard_id" in facts:
                etag = facts.get("etag")
                known = crc32c if etag is None else None
                identity = ShardIdentity(facts["dataset_id"], facts["shard_id"], n_bytes, known, etag)
            section_sums = bytes.fromhex(facts.get("section_sums", ""))
        except (ValueError, TypeError, KeyError, AttributeError):
            return None
        return cls(name, source, n_bytes, crc32c, identity=identity, etag=facts.get("etag"), section_sums=section_sums)


def name_of_identity(identity: ShardIdentity) -> str:
    parts = ("identity", identity.dataset_id, identity.shard_id, str(identity.n_bytes), str(identity.crc32c))
    return _hash(parts)


def name_of_object(url: str, info: ObjectInfo) -> str | None:
    """Return the name of a copy of an object without identity; None: nothing identifies its version.

    A weak ETag may be the same for two versions of an object, so it counts only together with a date.
    """
    dated = None if info.modified_s is None else f"{info.etag or ''} {info.modified_s}"
    state = info.version or (dated if (info.etag or "W/").startswith("W/") else info.etag)
    return None if state is None else _hash(("object", url, state, str(info.n_bytes)))


def _hash(parts: tuple[str, ...]) -> str:
    # JSON keeps the parts apart: no part can contain text that reads as two parts.
    return blake2b(json.dumps(parts).encode(), digest_size=NAME_BYTES).hexdigest()


def copy_spec(store: Store, key: str, identity: ShardIdentity | None = None) -> CopySpec | None:
    """Return the specification of the copy of an object; None: nothing identifies the version of the object.

    Without an identity, the store is asked for the object's attributes. Raises NotFound.
    """
    check_key(key)
    source = f"{redact(store.url)}/{key}"
    if identity is not None:
        of_identity = name_of_identity(identity)
        return CopySpec(of_identity, source, identity.n_bytes, identity.crc32c, key, identity, identity.etag)
    info = store.head(key)
    name = name_of_object(source, info)
    return None if name is None else CopySpec(name, source, info.n_bytes, info.crc32c, key, etag=info.etag)


def names_of(
    dataset_id: str, shard_ids: Sequence[str], n_bytes: Sequence[int], sums: Sequence[int | None]
) -> NDArray[np.uint8]:
    # The text that json.dumps writes: ids are hexadecimal, so nothing needs escaping. With ShardIdentity, a name takes
    # 7 us.
    begin = json.dumps(["identity", dataset_id])[:-1]
    rows = zip(shard_ids, n_bytes, sums, strict=True)
    digests = [blake2b(f'{begin}, "{i}", "{n}", "{c}"]'.encode(), digest_size=NAME_BYTES).digest() for i, n, c in rows]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, NAME_BYTES)


@dataclass(frozen=True, slots=True, eq=False)
class NameTable:
    """An immutable table of names, uint8[n, 20], and their first 8 bytes as numbers, uint64[n], in the same order.

    Names are hashes, so the numbers nearly always differ, and they are found four times as fast as bytes.
    """

    raw: NDArray[np.uint8]
    heads: NDArray[np.uint64]

    @classmethod
    def of(cls, names: NDArray[np.uint8]) -> NameTable:
        raw = np.ascontiguousarray(names, dtype=np.uint8).reshape(-1, NAME_BYTES)
        return cls(raw, np.ascontiguousarray(raw[:, :8]).view(">u8").reshape(-1).astype(np.uint64))

    @classmethod
    def of_texts(cls, texts: Iterable[str]) -> NameTable:
        return cls.of(np.frombuffer(bytes.fromhex("".join(texts)), np.uint8))

    def __len__(self) -> int:
        return len(self.raw)

    @property
    def strings(self) -> NDArray[np.bytes_]:
        return self.raw.view(f"S{NAME_BYTES}").reshape(-1)

    def take(self, rows: NDArray[Any]) -> NameTable:
        return NameTable(self.raw[rows], self.heads[rows])

    def insert(self, places: NDArray[np.int64], names: NameTable) -> NameTable:
        return NameTable(np.insert(self.raw, places, names.raw, axis=0), np.insert(self.heads, places, names.heads))

    def order(self) -> NDArray[np.int64]:
        return np.argsort(self.strings, kind="stable")

    def is_new(self) -> NDArray[np.bool_]:
        new = np.ones(len(self), np.bool_)
        new[1:] = self.strings[1:] != self.strings[:-1]
        return new

    def text(self, row: int) -> str:
        return bytes(self.raw[row]).hex()

    def places_of(self, names: NameTable) -> NDArray[np.int64]:
        return np.searchsorted(self.heads, names.heads)

    def rows_of(self, names: NameTable) -> NDArray[np.int64]:
        """Return the row of each name in this sorted table, int64[len(names)]; -1: not in it."""
        if not len(self):
            return np.full(len(names), -1, np.int64)
        rows = np.minimum(self.places_of(names), len(self) - 1)
        rows[self.strings[rows] != names.strings] = -1
        return rows
