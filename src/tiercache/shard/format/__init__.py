"""The bytes of a shard: layout of head, footer and tail, codecs, statistics, and which releases can read a file."""
