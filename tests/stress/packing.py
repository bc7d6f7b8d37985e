"""A packing to be killed: `python -m tests.stress.packing PROGRESS SOURCE URL [POINT NTH [split]]` appends the source.

With a point, it kills itself when it reaches the point for the n-th time. With "split" there are two data sets.
"""

import os
import signal
import sys
from itertools import count
from pathlib import Path

from tiercache.crash_points import set_hook
from tiercache.packer import tables
from tiercache.packer.pack import pack

N_FILES, N_LINES = 12, 150
OPTIONS = {"mode": "append", "shard_size": "8KiB", "block_size": "1KiB", "compression": "none"}
SCHEMA = {"x": "int64", "text": "str"}
SHARES = {"train": 0.7, "val": 0.3}


def record(number: int) -> dict[str, object]:
    return {"x": number, "text": f"record {number} " * (number % 7)}


def write_source(folder: Path) -> list[dict[str, object]]:
    """Write JSON lines, and return their records."""
    folder.mkdir()
    for file in range(N_FILES):
        numbers = range(file * N_LINES, (file + 1) * N_LINES)
        lines = (f'{{"x": {i}, "text": "{record(i)["text"]}"}}\n' for i in numbers)
        (folder / f"{file:02}.jsonl").write_text("".join(lines))
    return [record(i) for i in range(N_FILES * N_LINES)]


def main(progress: str, source: str, url: str, point: str = "", nth: str = "1", split: str = "") -> None:
    tables.SPLIT_BYTES = 3000
    hits = count(1)

    def strike(name: str) -> None:
        if name == point and next(hits) == int(nth):
            os.kill(os.getpid(), signal.SIGKILL)

    set_hook(strike)
    with Path(progress).open("a") as file:
        print("begin", file=file, flush=True)
        pack(source, url, schema=SCHEMA, split=SHARES if split else None, **OPTIONS)
        print("end", file=file, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
