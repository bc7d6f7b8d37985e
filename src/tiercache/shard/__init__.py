"""Shards and versions: the record format, its writers and readers. Knows stores, but neither the cache nor the loader."""
