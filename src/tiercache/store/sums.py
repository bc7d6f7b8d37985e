"""S3's text forms of checksums: a CRC-32C is base64 of its four bytes, an ETag is made of MD5 digests. Pure."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from typing import Any

from tiercache.store.contract import Buffer

# Type of a checksum over part checksums. It cannot compare copies that have other part sizes.
_OF_PARTS = "COMPOSITE"
_NAME = "Checksum"


def crc32c_to_text(crc: int) -> str:
    """Return the CRC-32C in S3's text form."""
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


def crc32c_from_text(text: str | None) -> int | None:
    """Return the CRC-32C of S3's text form, or None if the text is invalid."""
    try:
        data = base64.b64decode(text or "", validate=True)
    except binascii.Error:
        return None
    return int.from_bytes(data, "big") if len(data) == 4 else None


def whole_object_checksums(answer: Mapping[str, Any]) -> dict[str, str]:
    """Return the checksums over the whole object in a HEAD's answer, by S3's names such as "ChecksumCRC64NVME"."""
    if answer.get("ChecksumType") == _OF_PARTS:
        return {}
    return {
        name: str(text)
        for name, text in answer.items()
        if name.startswith(_NAME) and name not in ("ChecksumType", "ChecksumAlgorithm") and "-" not in str(text)
    }


def is_md5_of(etag: str | None, data: Buffer) -> bool:
    """Return whether an ETag is the MD5 of data: S3's ETag of an object written by one request without KMS keys."""
    return (etag or "").strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest()


class PartsEtag:
    """The ETag that S3 computes for an upload in parts of one length, the last part being shorter. Not thread-safe."""

    def __init__(self, part_bytes: int) -> None:
        self._part_bytes = part_bytes
        self._digests: list[bytes] = []
        self._part = hashlib.md5(usedforsecurity=False)
        self._n_bytes = 0

    def add(self, data: Buffer) -> None:
        """Append bytes, without the GIL."""
        flat = memoryview(data).cast("B")
        while flat.nbytes:
            some = flat[: self._part_bytes - self._n_bytes]
            self._part.update(some)
            self._n_bytes += some.nbytes
            if self._n_bytes == self._part_bytes:
                self._end_part()
            flat = flat[some.nbytes :]

    def _end_part(self) -> None:
        self._digests.append(self._part.digest())
        self._part, self._n_bytes = hashlib.md5(usedforsecurity=False), 0

    def matches(self, etag: str | None) -> bool:
        """Return whether an ETag matches all bytes added. Nothing may be added afterwards."""
        if self._n_bytes:
            self._end_part()
        whole = hashlib.md5(b"".join(self._digests), usedforsecurity=False).hexdigest()
        return (etag or "").strip('"') == f"{whole}-{len(self._digests)}"
