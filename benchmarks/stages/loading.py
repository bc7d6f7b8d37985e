"""What a batch costs beyond its copy: a ready one for the consumer, a small one for the whole pipeline."""

from __future__ import annotations

import statistics
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

import tiercache as tc
from floor import Floor
from peers.job import cores
from stages import stored
from stages.turns import Case, in_turns, row_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stages.turns import Effort

COLUMNS = (1, 2, 4, 8, 16)
BATCH_ROWS = 16
N_CALLS = 1000
# Longer than the gathering of a batch of so few rows takes, so that the next one is ready when it is asked for.
PAUSE_S = 60e-6
OVERHEAD_RECORDS, SHORTEST = 1 << 18, 1 << 12


def assembly(effort: Effort, folder: Path, scale: float) -> list[dict[str, Any]]:
    """Microseconds of the consumer's thread for a batch that is ready, by the number of int64 columns."""
    n_calls = max(int(N_CALLS * scale), 20)
    paths = {n: stored.wide(folder / f"wide{n}", (n_calls + 64) * BATCH_ROWS, n) for n in COLUMNS}
    found: dict[int, list[float]] = {n: [] for n in COLUMNS}
    for _ in range(effort.repetitions):
        for n, path in paths.items():
            with _loader(path, BATCH_ROWS) as loader:
                found[n].append(_ready_us(iter(loader), n_calls))
    rows = [row_of("a ready batch", f"{n} int64 columns", "us a batch", values) for n, values in found.items()]
    few, many = found[COLUMNS[0]], found[COLUMNS[-1]]
    slopes = [(b - a) / (COLUMNS[-1] - COLUMNS[0]) for a, b in zip(few, many, strict=True)]
    return [*rows, row_of("a ready batch", "each further column", "us", slopes)]


def _ready_us(batches: Iterator[Any], n_calls: int) -> float:
    """The median time of taking a batch, with a pause before each in which the threads get ahead."""
    clock, took_s = time.perf_counter, []
    for _ in range(n_calls):
        until_s = clock() + PAUSE_S
        while clock() < until_s:
            pass
        asked = clock()
        batch = next(batches)
        took_s.append(clock() - asked)
    del batch
    return statistics.median(took_s) * 1e6


def overhead(effort: Effort, folder: Path, scale: float) -> list[dict[str, Any]]:
    """Batches a second where there is next to nothing to copy: two int64 columns, 16 records."""
    n = max(int(OVERHEAD_RECORDS * scale), SHORTEST)
    path, column = stored.wide(folder / "small", n, 2), np.arange(n, dtype=np.int64)
    floor = Floor({"c0": column, "c1": column.copy()}, BATCH_ROWS, cores(), folder)
    rng, amount, unit, baseline = np.random.default_rng(4), n / BATCH_ROWS / 1e3, "k batches/s", "C floor, shuffled"
    stage = f"pipeline, batches of {BATCH_ROWS} small records"
    with _loader(path, BATCH_ROWS) as stored_order, _loader(path, BATCH_ROWS, shuffle=True) as shuffled:
        cases = [
            Case(stage, baseline, lambda: _exhaust(floor.epoch(rng.permutation(n))), amount, unit),
            Case(stage, "DataLoader, shuffled", lambda: _exhaust(shuffled), amount, unit, baseline),
            Case(stage, "DataLoader, stored order", lambda: _exhaust(stored_order), amount, unit, baseline),
        ]
        rows = in_turns(cases, effort)
    floor.close()
    return rows


def first_epoch(effort: Effort, folder: Path, scale: float) -> list[dict[str, Any]]:
    """The first epoch, which checks what it reads, beside later ones, and all beside a Dataset that never does.

    The rows' baseline is the same epoch without checks: what is missing to 1 is the checksums' share.
    """
    n = max(int((1 << 17) * scale), SHORTEST)
    path, found = stored.tokens(folder / "tokens", n), {}
    for _ in range(effort.repetitions):
        for shuffle in (False, True):
            for verify in ("never", "first"):
                with _loader(path, 64, shuffle=shuffle, verify=verify) as loader:
                    for epoch in ("first", "second", "third"):
                        started = time.perf_counter()
                        _exhaust(loader)
                        rate = n / 1e3 / (time.perf_counter() - started)
                        found.setdefault((shuffle, verify, epoch), []).append(rate)
    return [
        row_of(
            f"first epochs, tokens, {'shuffled' if shuffle else 'stored order'}",
            f"{epoch} epoch, verify={verify}",
            "k samples/s",
            values,
            found[shuffle, "never", epoch],
        )
        for (shuffle, verify, epoch), values in found.items()
    ]


@contextmanager
def _loader(path: Path, batch_size: int, *, shuffle: bool = False, **arguments: Any) -> Iterator[Any]:
    options = tc.LoaderOptions(seed=5, shuffle_group_bytes="all", shuffle_window_bytes="all")
    yield tc.DataLoader(tc.Dataset(path, **arguments), batch_size=batch_size, shuffle=shuffle, options=options)


def _exhaust(batches: Any) -> None:
    for _ in batches:
        pass
