"""Run by test_commit.py: append_in_a_process.py FOLDER NAME N appends N shards NAME-0, NAME-1, ... one by one."""

from __future__ import annotations

import sys

from tiercache.model import ShardInfo
from tiercache.shard.schema import Schema
from tiercache.shard.versions import commit
from tiercache.store import LocalFolder

folder, name, n_shards = sys.argv[1:]
schema = Schema.of({"tokens": "int64", "caption": "str"})
for n in range(int(n_shards)):
    info = ShardInfo(f"shards/{name}-{n}.tcs", f"{int(name) * 1000 + n:032x}", 10, 4096, 7, 3000, 1000)
    commit(LocalFolder(folder), [info], schema=schema, mode="append")
