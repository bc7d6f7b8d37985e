"""The tier inventory: seconds and memory to classify many objects in three tiers.

    python benchmarks/bench_tier_inventory.py [--objects 1000000] [--only files folders named books] [--repetitions 3]

files: each object is a group. folders: checkpoints of ten objects each, with numbered shards. named: checkpoints of one
file each, with a metric in the name that a rule uses. books: files, all of which are in the catalog. The stores list
from memory, so that our own code is measured: `listing_s` is the part of `seconds` that builds the columns, including
the stores' Python objects. Each case runs in a process of its own; `peak_bytes` is the peak memory of the process. The
rows are written to tier_inventory.jsonl. --quick uses small data.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from cases import Bench, mib, peak_bytes
from rows import spread
from tiercache.catalog.tiers import entry_table
from tiercache.model import ObjectInfo
from tiercache.store import MemoryStore
from tiercache.tier.inventory.groups import take_inventory
from tiercache.tier.inventory.listing import list_tiers
from tiercache.tier.rules import BestMetric, KeepList, Rule, RuleFile, Tier
from tiercache.tier.stores import Stores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

NOW_S, DAY_S = 1_790_000_000.0, 86_400.0
LIMIT_BYTES = 1 << 30
NAMES = ("hot", "standard", "archive")
CASES: dict[str, Callable[[int], str]] = {
    "files": lambda i: f"users/team-{i % 50}/results/{i // 1000}/file-{i}.{('bin', 'csv', 'npz')[i % 3]}",
    "folders": lambda i: f"runs/run-{i // 1000}/checkpoint-{i // 10 % 100}/model-{i % 10 + 1:05d}-of-00010.safetensors",
    "named": lambda i: f"runs/run-{i // 1000}/epoch={i % 1000}-step={i}-val_loss={i % 97 / 50}.ckpt",
    "books": lambda i: f"users/team-{i % 50}/results/{i // 1000}/file-{i}.bin",
}


class MadeStore(MemoryStore):
    """A store that lists the objects first, first + 1, ..., which do not exist."""

    def __init__(self, name: str, case: str, numbers: range) -> None:
        super().__init__(name)
        self.case, self.numbers = case, numbers

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:  # noqa: ARG002 - all is asked for
        """Yield all objects."""
        name = CASES[self.case]
        for i in self.numbers:
            yield ObjectInfo(name(i), 1_000_000 + i % 7, f'"{i:032x}"', modified_s=NOW_S - DAY_S - i % 1000)


class Books:
    """A catalog that has every object of a case, or none."""

    def __init__(self, case: str, ranges: Mapping[str, range]) -> None:
        self._known = {
            tier: entry_table([[(CASES[case](i), 1_000_000 + i % 7, f'"{i:032x}"', i, True, None) for i in numbers]])
            for tier, numbers in (ranges.items() if case == "books" else ())
        }

    def checksums(self, tier: str, /) -> pa.Table:
        """See TierCatalog.checksums()."""
        return self._known.get(tier, entry_table([]))


def ranges_of(n: int) -> dict[str, range]:
    """Return the numbers of the objects in each tier: 70% in standard, 20% in archive, 10% in hot and in standard."""
    return {"hot": range(n // 10), "standard": range(n * 7 // 10), "archive": range(n * 8 // 10, n)}


def measure(case: str, options: Mapping[str, int]) -> dict[str, Any]:
    """Measure one case in this process."""
    ranges, repetitions = ranges_of(options["objects"]), options["repetitions"]
    keep = {"hot": KeepList(best=(BestMetric(metric="val_loss", n=2, mode="min"),))}
    tiers = tuple(Tier(name=name, role=name, url=f"memory://{name}") for name in NAMES)
    file = RuleFile(
        path=Path("tiercache.toml"), sha256="0" * 64, tiers=tiers, rules=(Rule(name="r", match=("**",), keep=keep),)
    )
    stores = Stores(file, stores={name: MadeStore(name, case, numbers) for name, numbers in ranges.items()})
    books = Books(case, ranges)
    before, times, listing = peak_bytes(), [], []
    for _ in range(repetitions):
        start_s = time.perf_counter()
        found = take_inventory(file, stores, books, now_s=NOW_S)
        times.append(time.perf_counter() - start_s)
        groups, copies, complete = found.snapshot.n_groups, found.snapshot.n_copies, int(found.snapshot.complete.sum())
        del found
    peak = peak_bytes()
    for _ in range(repetitions):
        start_s = time.perf_counter()
        objects = len(list_tiers(file, stores, now_s=NOW_S))
        listing.append(time.perf_counter() - start_s)
    return {
        "benchmark": "tier_inventory",
        "case": case,
        "objects": objects,
        "groups": groups,
        "copies": copies,
        "complete": complete,
        "seconds": spread(times),
        "listing_s": spread(listing),
        "peak_bytes": peak,
        "made_bytes": peak - before,
        "within": peak < LIMIT_BYTES,
    }


def cells(row: Mapping[str, Any]) -> Sequence[str]:
    """Return the printed cells of a row."""
    counts = [f"{row[name]:,}" for name in ("objects", "groups", "copies")]
    times = [f"{row[name]['median']:.2f}" for name in ("seconds", "listing_s")]
    return [*counts, *times, mib(row["peak_bytes"]), mib(row["made_bytes"])]


BENCH = Bench(
    name="tier_inventory",
    script=__file__,
    doc=str(__doc__),
    cases=CASES,
    options={"objects": 1_000_000, "repetitions": 3},
    measure=measure,
    titles=["objects", "groups", "copies", "s", "of it listing", "peak MiB", "made MiB"],
    cells=cells,
)

if __name__ == "__main__":
    BENCH.main()
