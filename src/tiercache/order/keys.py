"""Keys of the permutations, derived from what they are for. Part of a run's state: stable for ever."""

from __future__ import annotations

import hashlib
import operator
from typing import TYPE_CHECKING

import numpy as np

from tiercache._native.permute import permute

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PERSON = b"tiercache.order1"  # blake2b's 16 bytes of personalisation: no other use of the hash gives the same keys


def derive_key(seed: int, *parts: int | str | bytes) -> bytes:
    """A key of 16 bytes for one use of a seed: BLAKE2b-128, personalised, over seed and parts in canonical form.

    Each value is encoded as a tag ("i", "s" or "b"), its payload's length as 8 bytes little-endian, and the payload:
    integers in little-endian two's complement of bit_length // 8 + 1 bytes, text as UTF-8, bytes as they are. So no two
    lists of values share an encoding, and any integer (numpy's too) serves as a seed.

    Raises:
        TypeError: a part is none of these (bool included: True would be 1).
    """
    digest = hashlib.blake2b(digest_size=16, person=_PERSON)
    for value in (seed, *parts):
        tag, payload = _encode(value)
        digest.update(tag + len(payload).to_bytes(8, "little") + payload)
    return digest.digest()


def _encode(value: int | str | bytes) -> tuple[bytes, bytes]:
    if isinstance(value, str):
        return b"s", value.encode()
    if isinstance(value, bytes):
        return b"b", value
    if isinstance(value, bool | np.bool_):
        raise TypeError("a key is derived from int, str and bytes, got a bool")
    number = operator.index(value)
    return b"i", number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)


def permutation(key: bytes, n: int) -> NDArray[np.int64]:
    """All of the permutation of [0, n) as int64[n]; n may be 0."""
    out = np.empty(n, np.uint64)
    if n:
        permute(key, n, 0, out)
    return out.view(np.int64)
