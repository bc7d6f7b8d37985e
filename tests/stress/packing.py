"""A packing to be killed: `python -m tests.stress.packing PROGRESS SOURCE URL [POINT NTH [HOW]]` appends the source.

With a point, it kills itself when it reaches the point for the n-th time. HOW names options of HOW: with "split" there
are two data sets, and with "sorted" several passes.
"""

import os
import signal
import sys
from itertools import count
from pathlib import Path

import tiercache as tc
from tiercache.crash_points import set_hook
from tiercache.packer import rearrange, tables
from tiercache.packer.pack import pack
from tiercache.shard.packings import list_packings
from tiercache.shard.verify import verify_dataset
from tiercache.store import open_store

N_FILES, N_LINES = 12, 150
OPTIONS = {"mode": "append", "shard_size": "8KiB", "block_size": "1KiB", "compression": "none"}
SCHEMA = {"x": "int64", "text": "str"}
SHARES = {"train": 0.7, "val": 0.3}
HOW = {"": {}, "split": {"split": SHARES}, "sorted": {"dedup": "text", "sort": "text", "split": SHARES}}


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


class Target:
    """A data set to which a source is appended again and again, and the records that it must have."""

    def __init__(self, folder: Path) -> None:
        self.source, self.url = folder / "source", folder / "set"
        self.records = write_source(self.source)
        self.n_packings = 0
        tc.Writer(self.url, schema=SCHEMA).close()

    def check(self, *, finished: bool) -> None:
        """Every version has whole packings; after a run that was not killed there is one more, and no record is left.

        What a killed run has committed counts as the next run's, which must not append it again; except if the kill
        came when all was done.
        """
        dataset, left = tc.Dataset(self.url), list(list_packings(open_store(self.url)))
        n_found, rest = divmod(len(dataset), len(self.records))
        assert rest == 0
        if finished:
            assert left == []
        self.n_packings += finished or (not left and n_found == self.n_packings + 1)
        assert n_found - self.n_packings in ({0, 1} if left else {0})
        found = dataset[:]
        assert found["x"].tolist() == [record["x"] for record in self.records] * n_found
        assert found["text"] == [record["text"] for record in self.records] * n_found
        dataset.close()
        assert list(verify_dataset(open_store(self.url))) == []


def main(progress: str, source: str, url: str, point: str = "", nth: str = "1", how: str = "") -> None:
    tables.SPLIT_BYTES = 3000
    rearrange.RUN_BYTES = 6000
    hits = count(1)

    def strike(name: str) -> None:
        if name == point and next(hits) == int(nth):
            os.kill(os.getpid(), signal.SIGKILL)

    set_hook(strike)
    with Path(progress).open("a") as file:
        print("begin", file=file, flush=True)
        pack(source, url, schema=SCHEMA, **HOW[how], **OPTIONS)
        print("end", file=file, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
