"""What lies where a copy is to go, asked directly before it is published: what somebody has written there stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiercache.errors import NotFound, ObjectChanged

if TYPE_CHECKING:
    from tiercache.tier.stores import Stores


def check_absent(stores: Stores, tier: str, key: str) -> None:
    """Raise ObjectChanged where something lies."""
    try:
        info = stores.head(tier, key)
    except NotFound:
        return
    # Or we have written it, and the answer was lost: the next try compares it.
    message = "it has been written since it was looked whether it is there: it is not overwritten"
    url = f"{stores.store(tier).url}/{key}"
    raise ObjectChanged(message, url=url, expected="nothing", found=f"{info.n_bytes} bytes")


def check_over(stores: Stores, tier: str, key: str, etag: str) -> None:
    """Raise ObjectChanged where what lies there is not what has the ETag."""
    try:
        found = stores.head(tier, key).etag
    except NotFound:
        found = None
    if found != etag:
        message = "what it was to replace is another by now: it is not overwritten"
        raise ObjectChanged(message, url=f"{stores.store(tier).url}/{key}", expected=etag, found=found)
