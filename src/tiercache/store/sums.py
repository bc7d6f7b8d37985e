"""S3's text of a CRC-32C: base64 of its four bytes. Pure."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

# Of parts, not of the object's bytes: useless for comparing copies that were cut otherwise.
_OF_PARTS = "COMPOSITE"
_NAME = "Checksum"


def sum_text(crc: int) -> str:
    """As S3 wants it."""
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


def sum_value(text: str | None) -> int | None:
    """The number of S3's text; None where it is none."""
    try:
        data = base64.b64decode(text or "", validate=True)
    except binascii.Error:
        return None
    return int.from_bytes(data, "big") if len(data) == 4 else None


def whole_sums(answer: Mapping[str, Any]) -> dict[str, str]:
    """The sums over all of an object that a HEAD names, by S3's names of them: "ChecksumCRC64NVME" and others."""
    if answer.get("ChecksumType") == _OF_PARTS:
        return {}
    return {
        name: str(text)
        for name, text in answer.items()
        if name.startswith(_NAME) and name not in ("ChecksumType", "ChecksumAlgorithm") and "-" not in str(text)
    }
