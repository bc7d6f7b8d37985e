"""Pins of the checkpoints of tc.Checkpoints: the file pin.json in the folder of each."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from tiercache.errors import NotFound, StoreError
from tiercache.keep import PIN_NAME, UNREADABLE_PIN, parse_pin
from tiercache.tier.text_columns import match_regex

if TYPE_CHECKING:
    from tiercache.tier.inventory.groups import Copies, Grouped
    from tiercache.tier.inventory.listing import Listing
    from tiercache.tier.rules import RuleFile
    from tiercache.tier.stores import Stores

_THREADS = 16


def read_own_pins(file: RuleFile, stores: Stores, listed: Listing, grouped: Grouped, copies: Copies) -> dict[str, Any]:
    """Return the pins of our own checkpoints: `pinned` of a Snapshot, the groups of which any copy is pinned.

    A file that cannot be read counts as a pin, so that nothing is deleted.
    """
    is_own = grouped.from_layout(grouped.layout.own, otherwise=False)
    at = np.flatnonzero(np.repeat(is_own[copies.group], np.diff(copies.start)))
    keys = listed.keys.take(pa.array(copies.row[at]))
    hits = at[match_regex(keys, rf"/{PIN_NAME}$")] if len(at) else at
    copy_of = np.searchsorted(copies.start, hits, side="right") - 1

    def read(hit: int, copy: int) -> str | None:
        key = listed.keys[int(copies.row[hit])].as_py()
        try:
            return parse_pin(stores.store(file.tiers[int(copies.tier[copy])].name).get(key))
        except NotFound:  # deleted since it was listed
            return None
        except StoreError as error:
            if error.retryable:
                raise
            return UNREADABLE_PIN

    with ThreadPoolExecutor(_THREADS, "tiercache-pins") as pool:
        pins = list(pool.map(read, hits.tolist(), copy_of.tolist()))
    groups = copies.group[copy_of].tolist()
    return {"pinned": frozenset(group for group, pin in zip(groups, pins, strict=True) if pin is not None)}
