"""Pins of the checkpoints of tc.Checkpoints: the file tags.json in the folder of each."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from tiercache.errors import NotFound, StoreError
from tiercache.tier.text_columns import match_regex

if TYPE_CHECKING:
    from tiercache.tier.inventory.groups import Copies, Grouped
    from tiercache.tier.inventory.listing import Listing
    from tiercache.tier.rules import RuleFile
    from tiercache.tier.stores import Stores

PIN_NAME = "tags.json"
UNREADABLE_PIN = f"its {PIN_NAME} cannot be read"
"""Reason of the pin of a checkpoint of which it cannot be known whether it is pinned: nothing is deleted."""
_THREADS = 16


def encode_pin(why: str | None) -> bytes:
    """Return the text of tags.json. why: Reason of the pin, for people; None: the checkpoint is not pinned."""
    return json.dumps({"pinned": why is not None, "why": why or ""}).encode() + b"\n"


def parse_pin(data: bytes) -> str | None:
    """Return the reason of the pin in a text of tags.json; None if there is no pin.

    A text that cannot be read counts as a pin. So do tags, which checkpoints could have before they had reasons.
    """
    try:
        body = json.loads(data)
        is_pinned, why, tags = body["pinned"], body.get("why", ""), body.get("tags", [])
    except (ValueError, TypeError, KeyError, AttributeError):
        return UNREADABLE_PIN
    is_valid = type(is_pinned) is bool and isinstance(why, str) and isinstance(tags, list)
    if not is_valid or not all(isinstance(tag, str) for tag in tags):
        return UNREADABLE_PIN
    if tags:
        return why or f"tagged {', '.join(tags)}"
    return why if is_pinned else None


def read_own_tags(file: RuleFile, stores: Stores, listed: Listing, grouped: Grouped, copies: Copies) -> dict[str, Any]:
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
