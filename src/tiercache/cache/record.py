"""The identity of a copy: its name, its specification, and the record file beside it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiercache.model import ObjectInfo, ShardIdentity

NAME = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Record:
    """The source of a copy and how it is verified.

    Attributes:
        source: URL without credentials.
        n_bytes: Size of the object.
        crc32c: CRC-32C of the whole object; None for a partial copy of an object with unknown checksum.
        dataset_id: Identifier of the data set; None for an object without identity.
        shard_id: Identifier of the shard; None for an object without identity.
        etag: ETag of an object without identity.
    """

    source: str
    n_bytes: int
    crc32c: int | None = None
    dataset_id: str | None = None
    shard_id: str | None = None
    etag: str | None = None

    def to_json(self) -> str:
        """Return the record as one line of JSON."""
        return json.dumps({"format": 0} | {k: v for k, v in asdict(self).items() if v is not None})

    @classmethod
    def from_json(cls, text: str) -> Record | None:
        """Return the record; None if the text is torn by a power failure, or belongs to another release."""
        try:
            fields = json.loads(text)
            if fields.pop("format") != 0:
                return None
            record = cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None
        facts: tuple[object, ...] = (record.source, record.n_bytes, record.crc32c or 0)
        return record if [type(fact) for fact in facts] == [str, int, int] else None


@dataclass(frozen=True, slots=True)
class CopySpec:
    """The specification of a copy: its name and all that is needed to fetch and verify it.

    Attributes:
        name: Name of the copy, 40 hexadecimal digits.
        key: Key of the object in its store.
        source: URL of the object without credentials.
        n_bytes: Size of the object.
        crc32c: CRC-32C of the whole object; None if unknown.
        identity: Identity of a shard or segment; None for an object of no data set.
        etag: ETag of an object without identity.
    """

    name: str
    key: str
    source: str
    n_bytes: int
    crc32c: int | None
    identity: ShardIdentity | None = None
    etag: str | None = None

    @property
    def if_match(self) -> str | None:
        """ETag that guards reads; None for a weak ETag, which promises nothing about the bytes."""
        return None if self.etag is None or self.etag.startswith("W/") else self.etag

    def record(self, crc32c: int | None) -> Record:
        """Return the record to write beside the copy."""
        identity = self.identity
        dataset_id, shard_id = (None, None) if identity is None else (identity.dataset_id, identity.shard_id)
        return Record(self.source, self.n_bytes, crc32c, dataset_id, shard_id, self.etag)


def name_of_identity(identity: ShardIdentity) -> str:
    """Return the name of a copy with an identity, which is the same for all mirrors."""
    parts = ("identity", identity.dataset_id, identity.shard_id, str(identity.n_bytes), str(identity.crc32c))
    return _hash(parts)


def name_of_object(url: str, info: ObjectInfo) -> str | None:
    """Return the name of a copy of an object without identity; None: nothing identifies its version.

    A weak ETag may be the same for two versions of an object, so it counts only together with a date.

    Args:
        url: URL without credentials.
        info: Attributes of the object.
    """
    dated = None if info.modified_s is None else f"{info.etag or ''} {info.modified_s}"
    state = info.version or (dated if (info.etag or "W/").startswith("W/") else info.etag)
    return None if state is None else _hash(("object", url, state, str(info.n_bytes)))


def _hash(parts: tuple[str, ...]) -> str:
    # JSON keeps the parts apart: no part can contain text that reads as two parts.
    return blake2b(json.dumps(parts).encode(), digest_size=20).hexdigest()
