"""A footer that was read before its shard is opened saves the request, not the check."""

from dataclasses import replace

import numpy as np
import pytest
from tests.support.stores import CountingStore

from tiercache.errors import CorruptShard
from tiercache.shard.reader import FooterCache, ShardReader
from tiercache.shard.schema import Schema
from tiercache.shard.writer import ShardOptions, ShardWriter
from tiercache.store.local import LocalFolder
from tiercache.store.memory import MemoryStore


def fill(store):
    with ShardWriter(store, Schema.of({"x": "int64"}), ShardOptions(), writer_id="w") as writer:
        writer.write_batch({"x": np.arange(1000)})
    return writer.finish()[0]


def footer_of(store, info):
    with ShardReader(store, info.name, info=info) as reader:
        return reader.footer


def test_a_known_footer_saves_the_request_but_not_the_check():
    store = CountingStore(MemoryStore("footers"))
    info = fill(store)
    footer = footer_of(store, info)
    before = store.n_calls("read_into")
    with ShardReader(store, info.name, info=info, footer=footer) as reader:
        assert (store.n_calls("read_into"), reader.n_records) == (before, 1000)
    with pytest.raises(CorruptShard, match="states ffff"):
        ShardReader(store, info.name, info=replace(info, shard_id="ff" * 16), footer=footer)


def test_the_footer_of_a_local_copy_is_always_read(tmp_path):
    store = LocalFolder(tmp_path)
    info = fill(store)
    footer = footer_of(store, info)
    assert ShardReader(store, info.name, info=info, footer=footer).footer is not footer


def test_the_footer_cache_gives_each_footer_once_and_has_a_limit():
    store = MemoryStore("footers-kept")
    footer = footer_of(store, fill(store))
    kept = FooterCache(limit_bytes=2 * footer.nbytes)
    for shard in range(3):
        kept.put(shard, footer)
    assert [kept.take(shard) is footer for shard in (2, 0, 0, 1)] == [False, True, False, True]
    kept.put(3, footer)
    assert kept.take(3) is footer
