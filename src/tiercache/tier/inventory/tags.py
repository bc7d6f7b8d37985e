"""Tags and pins of the checkpoints of tc.Checkpoints: the file tags.json in the folder of each."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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

TAGS_NAME = "tags.json"
_THREADS = 16


@dataclass(frozen=True, slots=True)
class Tags:
    """Tags of a checkpoint, and whether it is pinned: the contents of its tags.json."""

    tags: frozenset[str] = frozenset()
    is_pinned: bool = False

    def __or__(self, other: Tags) -> Tags:
        return Tags(self.tags | other.tags, self.is_pinned or other.is_pinned)

    def encode(self) -> bytes:
        """Return the text of tags.json."""
        return json.dumps({"pinned": self.is_pinned, "tags": sorted(self.tags)}).encode() + b"\n"

    @classmethod
    def parse(cls, data: bytes) -> Tags:
        """Return the tags in a text of tags.json. A text that cannot be read counts as a pin: nothing is deleted."""
        try:
            body = json.loads(data)
            tags, is_pinned = frozenset(body["tags"]), body["pinned"]
        except (ValueError, TypeError, KeyError):
            return cls(is_pinned=True)
        is_valid = type(is_pinned) is bool and all(isinstance(tag, str) for tag in tags)
        return cls(tags, is_pinned) if is_valid else cls(is_pinned=True)


def read_own_tags(file: RuleFile, stores: Stores, listed: Listing, grouped: Grouped, copies: Copies) -> dict[str, Any]:
    """Return the tags and the pins of our own checkpoints, of all their copies: `tags` and `pinned` of a Snapshot.

    A file that cannot be read counts as a pin, so that nothing is deleted.
    """
    is_own = grouped.from_layout(grouped.layout.own, otherwise=False)
    at = np.flatnonzero(np.repeat(is_own[copies.group], np.diff(copies.start)))
    keys = listed.keys.take(pa.array(copies.row[at]))
    hits = at[match_regex(keys, rf"/{TAGS_NAME}$")] if len(at) else at
    copy_of = np.searchsorted(copies.start, hits, side="right") - 1

    def read(hit: int, copy: int) -> Tags:
        key = listed.keys[int(copies.row[hit])].as_py()
        try:
            return Tags.parse(stores.store(file.tiers[int(copies.tier[copy])].name).get(key))
        except NotFound:  # deleted since it was listed
            return Tags()
        except StoreError as error:
            if error.retryable:
                raise
            return Tags(is_pinned=True)

    found: dict[int, Tags] = {}
    with ThreadPoolExecutor(_THREADS, "tiercache-tags") as pool:
        for copy, tags in zip(copy_of.tolist(), pool.map(read, hits.tolist(), copy_of.tolist()), strict=True):
            group = int(copies.group[copy])
            found[group] = found.get(group, Tags()) | tags
    return {
        "tags": {group: one.tags for group, one in found.items() if one.tags},
        "pinned": frozenset(group for group, one in found.items() if one.is_pinned),
    }
