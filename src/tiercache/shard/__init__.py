"""Shards and versions: the record format, its writers and readers. Knows stores, not the cache or the loader."""
