"""What a copy is and where it came from: its name, and the small file beside it."""

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
    """Where a copy came from and how it is checked.

    source: without credentials; crc32c: of the whole file, None while there is only a part of what nobody knows the sum
    of; dataset_id, shard_id: of what has an identity; etag: of what
    has none.
    """

    source: str
    n_bytes: int
    crc32c: int | None = None
    dataset_id: str | None = None
    shard_id: str | None = None
    etag: str | None = None

    def to_json(self) -> str:
        """One line."""
        return json.dumps({"format": 0} | {k: v for k, v in asdict(self).items() if v is not None})

    @classmethod
    def from_json(cls, text: str) -> Record | None:
        """The record, None if text is not one (torn by a power failure, or of another release)."""
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
class Wanted:
    """A copy that is asked for: its name and all that is needed to fetch and check it.

    crc32c: None where nobody knows it; if_match: a strong ETag, for objects without identity.
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
        """The ETag to read under; a weak one promises nothing about bytes and is never sent."""
        return None if self.etag is None or self.etag.startswith("W/") else self.etag

    def record(self, crc32c: int | None) -> Record:
        """What is to be written beside the copy."""
        identity = self.identity
        dataset_id, shard_id = (None, None) if identity is None else (identity.dataset_id, identity.shard_id)
        return Record(self.source, self.n_bytes, crc32c, dataset_id, shard_id, self.etag)


def name_of_identity(identity: ShardIdentity) -> str:
    """Name of a copy with an identity: the same for every mirror."""
    parts = ("identity", identity.dataset_id, identity.shard_id, str(identity.n_bytes), str(identity.crc32c))
    return _hash(parts)


def name_of_object(url: str, info: ObjectInfo) -> str | None:
    """Name of a copy of an object without identity; None: nothing tells this object from a later one under its name.

    url: redacted. A weak ETag may be the same for two states of an object: it counts only beside a date.
    """
    dated = None if info.modified_s is None else f"{info.etag or ''} {info.modified_s}"
    state = info.version or (dated if (info.etag or "W/").startswith("W/") else info.etag)
    return None if state is None else _hash(("object", url, state, str(info.n_bytes)))


def _hash(parts: tuple[str, ...]) -> str:
    # JSON, so that no part can be written in a way that makes it pass for two.
    return blake2b(json.dumps(parts).encode(), digest_size=20).hexdigest()
