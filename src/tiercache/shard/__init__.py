"""Shards and versions: the record format, its writers and its readers.

The package uses stores; it does not know the cache or the loader. A written record goes from `writer` (by `ingest` and
`shard_file`) through `commit` into a version. A read goes from `versions` (which shards there are) through `reader` to
`blocks` and `values`. `layout` and `codec` have the bytes of both; `schema` and `conversion` say what a column holds.
"""
