"""Checks of the destination of a copy, made directly before it is published: an object of somebody else stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiercache.errors import NotFound, ObjectChanged

if TYPE_CHECKING:
    from tiercache.tier.stores import Stores


def check_absent(stores: Stores, tier: str, key: str) -> None:
    """Raise ObjectChanged if the destination has an object."""
    try:
        info = stores.head(tier, key)
    except NotFound:
        return
    # The object may be our own, if the answer of the store was lost: the next attempt compares it.
    message = "the destination was created concurrently: it is not overwritten"
    url = f"{stores.store(tier).url}/{key}"
    raise ObjectChanged(message, url=url, expected="nothing", found=f"{info.n_bytes} bytes")


def check_over(stores: Stores, tier: str, key: str, etag: str) -> None:
    """Raise ObjectChanged if the destination does not have the object with this ETag."""
    try:
        found = stores.head(tier, key).etag
    except NotFound:
        found = None
    if found != etag:
        message = "the object to replace was changed concurrently: it is not overwritten"
        raise ObjectChanged(message, url=f"{stores.store(tier).url}/{key}", expected=etag, found=found)
