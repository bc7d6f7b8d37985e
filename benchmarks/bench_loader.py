"""Loaders on records of fixed shape, local, warm, fully shuffled: tiercache, torch's DataLoader and a plain C gather.

    python benchmarks/bench_loader.py [--repetitions 5] [--workload tokens] [--quick]

The part of the comparison with other libraries (`make bench-peers`) that needs no other environment, with the same
arguments. torch's loader reads a map-style data set in memory with the best of several numbers of workers.
"""

from __future__ import annotations

import sys

from peers.__main__ import main
from rows import OUT

CONTENDERS = ("tiercache", "torch_map", "c_floor")

if __name__ == "__main__":
    given = sys.argv[1:]
    what = ["--only", *CONTENDERS, "--workload", "tokens", "tensors", "--shuffle", "full"]
    main([*what, "--workers", "0", "1", "2", "4", "--folder", str(OUT / "loader"), *given])
