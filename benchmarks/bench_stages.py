"""Stages of the read path, each compared with the plain baseline of the same run.

    python benchmarks/bench_stages.py [--only checksum gather ...] [--repetitions 5] [--min-s 0.1] [--quick]

The stages are: checksum, gather by column kind, assembly of a ready batch, overhead of the pipeline, the first and
checking epoch, the first batch. Decoding, writing and single records have benchmarks of their own. The rows are written
to out/stages.jsonl.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rows import OUT, write_rows
from stages import checksum, first_batch, gathering, loading
from stages.turns import Effort, tables

if TYPE_CHECKING:
    from collections.abc import Callable

    DemoSetup = Callable[[Effort, Path, float], list[dict[str, Any]]]

STAGES: dict[str, DemoSetup] = {
    "checksum": checksum.measure,
    "gather": gathering.measure,
    "assembly": loading.assembly,
    "overhead": loading.overhead,
    "first_epoch": loading.first_epoch,
    "first_batch": first_batch.measure,
}
QUICK_SCALE = 1e-6


def main(given: list[str] | None = None) -> None:
    """Run the stages, print the tables, write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=[*STAGES], default=[*STAGES])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--min-s", type=float, default=0.1, help="Seconds of a repetition.")
    parser.add_argument("--folder", type=Path, default=OUT / "stages", help="Folder for data and rows.")
    parser.add_argument("--quick", action="store_true", help="Smoke test: little data, and no meaningful figures.")
    asked = parser.parse_args(given)
    effort = Effort(1, 0.0) if asked.quick else Effort(asked.repetitions, asked.min_s)
    data = asked.folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in asked.only:
        found = STAGES[name](effort, data, QUICK_SCALE if asked.quick else 1.0)
        print(f"{tables(found)}\n", flush=True)
        rows += found
    write_rows(asked.folder / "stages.jsonl", rows)
    shutil.rmtree(data)
    print(f"rows: {asked.folder / 'stages.jsonl'}")


if __name__ == "__main__":
    main()
