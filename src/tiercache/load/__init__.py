"""The loaders of tiercache: from shards to batches. docs/architecture.md describes the modules and the data path."""
