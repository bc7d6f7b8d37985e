"""Parts of the cache benchmarks."""
