"""Shards and versions: the record format, its writers and its readers.

The package uses stores, not the cache or loader.

Writing: `Writer` (`dataset_writer`) -> `ShardWriter` (`writer`) -> `cutter` (records to blocks) -> `shard_file` (blocks
to bytes, `codec`) -> `uploading` -> `commit` (shards to a version). Reading: `manifest` (the newest version) ->
`segments` (its shards) -> `readers` (open shards) -> `reader` -> `chunks` or `pages` (checked bytes) -> `values`
(arrays and objects).
"""
