"""Milliseconds from the construction of Dataset to the first batch, in fresh processes; also their main program."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.turns import row_of

if TYPE_CHECKING:
    from stages.turns import Effort

N_RECORDS = 1 << 20
FEWEST = 1 << 12
BATCH_ROWS = 64
STAGE = "first batch, ms"


def measure(effort: Effort, folder: Path, scale: float) -> list[dict[str, Any]]:
    """Return rows for the stored order, the default and the full shuffle, with all modules imported, and without."""
    # Here, because the child processes must not import anything that they do not time.
    from stages import stored

    n = max(int(N_RECORDS * scale), FEWEST)
    path, found = stored.small_rows(folder / "rows", n), {}
    for file in path.rglob("*"):  # Read the files into the page cache, because large parts are written past it.
        if file.is_file():
            file.read_bytes()
    for _ in range(effort.repetitions):
        for shuffle in ("none", "default", "full"):
            for imported in ("imported", "lazy"):
                for name, took_ms in _child(path, shuffle, imported).items():
                    found.setdefault((shuffle, name), []).append(took_ms)
    return [
        row_of(f"{STAGE}, {n:,} records, shuffle {shuffle}", name, "ms", values)
        for (shuffle, name), values in found.items()
    ]


def _child(path: Path, shuffle: str, imported: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "stages.first_batch", str(path), shuffle, imported],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    return json.loads(done.stdout.splitlines()[-1])


def _first_batch_ms(path: str, shuffle: str) -> float:
    import tiercache as tc

    started = time.perf_counter()
    dataset = tc.Dataset(path)
    full = {"shuffle_group_bytes": "all", "shuffle_window_bytes": "all"} if shuffle == "full" else {}
    options = tc.LoaderOptions(seed=6, **full)
    next(iter(tc.DataLoader(dataset, batch_size=BATCH_ROWS, shuffle=shuffle != "none", options=options)))
    return (time.perf_counter() - started) * 1e3


def _figures(path: str, shuffle: str, imported: str) -> dict[str, float]:
    """Return the figures of one process.

    imported: "lazy": the time includes the import of torch and of the library. "imported": it does not, and a second
    open is timed as well.
    """
    if imported == "lazy":
        return {"with torch and all that is imported lazily": _first_batch_ms(path, shuffle)}
    import tiercache as tc

    _ = tc.Dataset, tc.DataLoader, tc.LoaderOptions  # imported now, and torch with them
    return {
        "modules imported": _first_batch_ms(path, shuffle),
        "again in the same process": _first_batch_ms(path, shuffle),
    }


if __name__ == "__main__":
    print(json.dumps(_figures(*sys.argv[1:])))
