"""Shards and versions: the record format, its writers and its readers.

The package uses stores; it does not know the cache or the loader. A written record goes from `write/` (ingest, column
data, shard file) through `versions/commit` into a version. A read goes from `versions/manifest` (which shards there
are) through `read/shard_reader` to blocks and values. `format/` has the bytes of both; `schema`, `column_types` and
`conversion` say what a column holds.
"""
