"""Writing: column data from a user's values, blocks of records, shard files, and `Writer`, which makes a version."""
