"""Versions of a data set: manifests, segments (immutable lists of shards), and the commit of a new version."""
