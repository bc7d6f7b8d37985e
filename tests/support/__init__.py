"""Tools of the tests and benchmarks: servers, clocks, kill points, failing system calls, checks of a cache folder."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
