"""Adds the root of the repository to sys.path, so that a benchmark can import the servers of tests.support."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
