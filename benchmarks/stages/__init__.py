"""Benchmarks of single stages, each compared with the plain baseline of the same run; `bench_stages.py` runs them."""
