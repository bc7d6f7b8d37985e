"""The names of the copies of a data set."""

from __future__ import annotations

import numpy as np

import tiercache as tc
from tiercache.cache.names import name_of_identity
from tiercache.data.opened_version import CopyNames, DatasetLocation, OpenedVersion
from tiercache.model import NEVER, ReadingPlan


def test_the_names_of_many_shards_equal_those_of_their_identities(tmp_path):
    for first in range(0, 90, 30):  # three versions, so three segments
        with tc.Writer(
            tmp_path / "d", schema={"i": "int64"}, shard_size="4KiB", mode="append" if first else "create"
        ) as w:
            w.write_batch({"i": np.arange(first * 100, (first + 30) * 100)})
    opened = OpenedVersion(DatasetLocation(str(tmp_path / "d")), None, None)
    names, n = CopyNames(opened.manifest, opened.table), len(opened.table)
    shards = np.array([n - 1, 0, 2, 1], np.int64)
    for _ in range(2):
        found = [bytes(name).hex() for name in names.of_shards(shards)]
        assert found == [
            name_of_identity(opened.table.info(shard).identity(opened.manifest.dataset_id)) for shard in shards.tolist()
        ]
    some = np.array([1], np.int64)
    rows, plan = names.planned(ReadingPlan("me", some, some, some, some))
    segments = [segment.identity(opened.manifest.dataset_id) for segment in opened.manifest.segments]
    assert [bytes(row).hex() for row in rows[1:]] == [name_of_identity(one) for one in segments]
    assert len(plan.shards) == len(rows) == 1 + len(segments)
    assert plan.last[1:].tolist() == [NEVER - 1] * len(segments)
    opened.close()
