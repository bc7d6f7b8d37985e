"""`CopyNames`: the names of the copies of a version's shards, computed in bulk.

Reading plans are published with them.
"""

from __future__ import annotations

import json
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from tiercache.cache.names import NAME_BYTES
from tiercache.cache.record import name_of_identity
from tiercache.model import NEVER, ReadingPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from tiercache.shard.versions.manifest import Version
    from tiercache.shard.versions.segments import ShardTable


class CopyNames:
    """The names of the copies of one version's shards and segments.

    Each name is computed once and takes 2 us. Safe from any thread.
    """

    def __init__(self, version: Version, table: ShardTable) -> None:
        self._dataset_id = version.dataset_id
        self._segments = version.segments
        self._table = table
        self._names = np.zeros((len(table), NAME_BYTES), np.uint8)  # zeros: not computed yet

    def of_shards(self, shards: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the names of the copies of these shards, uint8[m, 20]."""
        unknown = shards[~self._names[shards].any(axis=1)]
        if len(unknown):
            self._names[unknown] = names_of(self._dataset_id, *self._table.identities(unknown))
        return self._names[shards]

    def planned(self, plan: ReadingPlan) -> tuple[NDArray[np.uint8], ReadingPlan]:
        """Return the names of a reading plan's rows, and the plan, both with the segments, which are always in use."""
        n = len(self._segments)
        identities = [segment.identity(self._dataset_id) for segment in self._segments]
        segments = np.array([list(bytes.fromhex(name_of_identity(one))) for one in identities], np.uint8)
        whole = ReadingPlan(
            plan.owner,
            np.concatenate([plan.shards, len(self._table) + np.arange(n)]),
            np.concatenate([plan.first, np.zeros(n, np.int64)]),
            np.concatenate([plan.last, np.full(n, NEVER - 1)]),
            np.concatenate([plan.then, np.full(n, NEVER)]),
            plan.reader,
        )
        return np.concatenate([self.of_shards(plan.shards), segments.reshape(-1, NAME_BYTES)]), whole


def names_of(
    dataset_id: str, shard_ids: Sequence[str], n_bytes: Sequence[int], sums: Sequence[int]
) -> NDArray[np.uint8]:
    """Return the names of the copies of a data set's shards, uint8[n, 20], each as name_of_identity returns it."""
    # The text that json.dumps writes: ids are hexadecimal, so nothing needs escaping. With ShardIdentity, a name takes
    # 7 us.
    begin = json.dumps(["identity", dataset_id])[:-1]
    rows = zip(shard_ids, n_bytes, sums, strict=True)
    digests = [blake2b(f'{begin}, "{i}", "{n}", "{c}"]'.encode(), digest_size=NAME_BYTES).digest() for i, n, c in rows]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, NAME_BYTES)
