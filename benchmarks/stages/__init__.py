"""Benchmarks of single stages, each beside the plain baseline of the same run; `bench_stages.py` runs them."""
