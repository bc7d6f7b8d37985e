"""What the benchmarks of the cache are made of."""
