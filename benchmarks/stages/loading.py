"""Cost of a batch beyond its copy: a ready batch for the consumer, a small batch for the whole pipeline."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

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
# Longer than the gather of a batch of so few rows, so that the next batch is ready when it is requested.
PAUSE_S = 60e-6
OVERHEAD_RECORDS, SHORTEST = 1 << 18, 1 << 12
CHECKS = ("never", "first", "always")
Rates: TypeAlias = dict[tuple[str, str, str], list[float]]


def assembly(effort: Effort, folder: Path, scale: float) -> list[dict[str, Any]]:
    """Return the microseconds of the consumer's thread for a ready batch, by the number of int64 columns."""
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
    """Return the median time to take a batch, with a pause before each in which the threads get ahead."""
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
    """Return the batches per second with almost nothing to copy: two int64 columns, 16 records."""
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
    """Return the speed of the first epoch, of later epochs and of records by index, by `verify`, for data in memory.

    The baseline of each row is the same without checks (verify="never"). verify="always" shows the cost of checking
    each
    page once per epoch, and at each access by index.
    """
    n_tokens, n_tensors = (max(int(n * scale), SHORTEST) for n in (1 << 17, 1 << 14))
    paths = {
        "tokens": (stored.tokens(folder / "tokens", n_tokens), n_tokens),
        "tensors": (stored.tensors(folder / "tensors", n_tensors), n_tensors),
    }
    found: Rates = {}
    for repetition in range(effort.repetitions):
        for name, (path, n) in paths.items():
            for shuffle in (False, True):
                _checked_epochs(found, f"{name}, {'shuffled' if shuffle else 'stored order'}", path, n, shuffle=shuffle)
            for n_asked, n_times in ((1, 256), (256, 16)):
                rng = np.random.default_rng(repetition)
                asked = [rng.integers(0, n, n_asked).tolist() for _ in range(max(int(n_times * min(scale, 1.0)), 2))]
                _checked_records(found, f"{name}, records", path, asked)
    return [
        row_of(
            f"first epochs, {stage}",
            f"{case}, verify={verify}",
            "k samples/s",
            values,
            found[stage, case, "never"],
        )
        for (stage, case, verify), values in found.items()
    ]


def _checked_epochs(found: Rates, stage: str, path: Path, n: int, *, shuffle: bool) -> None:
    """Measure four epochs for each setting of `verify`, interleaved."""
    with ExitStack() as stack:
        loaders = {v: stack.enter_context(_loader(path, 64, shuffle=shuffle, verify=v)) for v in CHECKS}
        for case in ("first epoch", "later epochs", "later epochs", "later epochs"):
            for verify, loader in loaders.items():
                started = time.perf_counter()
                _exhaust(loader)
                rate = n / 1e3 / (time.perf_counter() - started)
                found.setdefault((stage, case, verify), []).append(rate)


def _checked_records(found: Rates, stage: str, path: Path, asked: list[list[int]]) -> None:
    """Measure several records by index for each setting of `verify`, interleaved, after they were read once."""
    datasets = {verify: tc.Dataset(path, verify=verify) for verify in CHECKS}
    for turn in range(5):
        for verify, dataset in datasets.items():
            started = time.perf_counter()
            for indices in asked:
                dataset[indices[0] if len(indices) == 1 else indices]
            rate = len(asked) * len(asked[0]) / 1e3 / (time.perf_counter() - started)
            if turn:
                found.setdefault((stage, f"{len(asked[0])} by index", verify), []).append(rate)
    for dataset in datasets.values():
        dataset.close()


@contextmanager
def _loader(path: Path, batch_size: int, *, shuffle: bool = False, **arguments: Any) -> Iterator[Any]:
    options = tc.LoaderOptions(seed=5, shuffle_group_bytes="all", shuffle_window_bytes="all")
    yield tc.DataLoader(tc.Dataset(path, **arguments), batch_size=batch_size, shuffle=shuffle, options=options)


def _exhaust(batches: Any) -> None:
    for _ in batches:
        pass
