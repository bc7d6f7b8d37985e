"""Reading: sources of bytes, chunks, blocks, values, one open shard, and the pool of the open shards of a data set."""
