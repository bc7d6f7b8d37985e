"""A process that may be forked from: one thread, and whatever must stand before libc."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Libraries that start threads when they are imported, unless they are told not to: numpy's BLAS, Arrow's jemalloc.
WITHOUT_THREADS = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}


def run_warm(arguments: list[str], *, timeout_s: float = 150.0, more: Mapping[str, str] | None = None):
    """Run Python with these arguments from the repository's root; the finished process, its output as text."""
    environment = {**os.environ, **WITHOUT_THREADS, **(more or {})}
    command = [sys.executable, "-W", "error", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=timeout_s, cwd=ROOT, env=environment
    )
