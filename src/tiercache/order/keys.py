"""Derivation of the keys of permutations from their use. The keys are part of a run's state and must never change."""

from __future__ import annotations

import hashlib
import operator
from typing import TYPE_CHECKING

import numpy as np

from tiercache._native.permute import permute

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PERSON = b"tiercache.order1"  # 16 bytes of BLAKE2b personalisation: no other use of the hash yields the same keys


def derive_key(seed: int, *parts: int | str | bytes) -> bytes:
    """Return a 16-byte key for one use of a seed: personalised BLAKE2b-128 of seed and parts in canonical form.

    Each value is encoded as a tag ("i", "s" or "b"), the length of its payload as 8 bytes little-endian, and the
    payload: an integer as little-endian two's complement of bit_length // 8 + 1 bytes, text as UTF-8, bytes as they
    are. Therefore no two lists of values share an encoding, and any integer (also of numpy) may be a seed.

    Args:
        seed: Seed of the run.
        parts: Values that name the use.

    Raises:
        TypeError: A value is of another type. bool is refused, because True would equal 1.
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
        raise TypeError("a key is derived from values of type int, str or bytes, got a bool")
    number = operator.index(value)
    return b"i", number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)


def permutation(key: bytes, n: int) -> NDArray[np.int64]:
    """Return the whole permutation of [0, n) as int64[n]; n may be 0."""
    out = np.empty(n, np.uint64)
    if n:
        permute(key, n, 0, out)
    return out.view(np.int64)
