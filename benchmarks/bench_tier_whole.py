"""The whole of `tiercache tier plan --out`: seconds and memory for many objects, in one process.

    python benchmarks/bench_tier_whole.py [--objects 1000000] [--rules 20] [--only files folders named books]

It runs the command's functions for inventory, decision, plan, plan file and output, on stores that list from memory.
files: each object is a group. folders: checkpoints of ten objects each, with numbered shards. named: checkpoints of one
file each, with a metric in the name that a rule uses. books: files, all of which are in a SQLite catalog. Most files
move; of the checkpoints in folders, those that keep lists do not name. `listing_s` is the time of the stores' listing
(including Python objects of a million keys), and `rest_s` that of everything else, which must be below 10 s;
`peak_bytes`, the peak memory of the process, must be below 1 GiB. Each repetition is a process of its own. The rows are
written to tier_whole.jsonl. --quick uses small data.
"""

from __future__ import annotations

import io
import json
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_tier_plan import DAY_S, NOW_S, TIERS
from cases import Bench, asked, mib, peak_bytes
from rows import spread
from tiercache.cli.common import Output
from tiercache.cli.tier import OpenTiers, plan_facts, plan_text, plan_tiers, print_plan
from tiercache.keep import BestMetric, KeepList
from tiercache.model import ObjectInfo
from tiercache.store import MemoryStore
from tiercache.tier.journal import CatalogEntry, TierCatalog
from tiercache.tier.listing import list_tiers
from tiercache.tier.plans import write_plan
from tiercache.tier.rules import Rule, RuleFile, Tier
from tiercache.tier.stores import Stores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

LIMIT_S, LIMIT_BYTES = 10.0, 1 << 30
SHOWN = 20
CASES: dict[str, Callable[[int], str]] = {
    "files": lambda i: f"users/team-{i % 50}/results/{i // 1000}/file-{i}.{('bin', 'csv', 'npz')[i % 3]}",
    "folders": lambda i: f"runs/run-{i // 1000}/checkpoint-{i // 10 % 100}/model-{i % 10 + 1:05d}-of-00010.safetensors",
    "named": lambda i: f"runs/run-{i // 1000}/epoch={i % 1000}-step={i}-val_loss={i % 97 / 50}.ckpt",
    "books": lambda i: f"users/team-{i % 50}/results/{i // 1000}/file-{i}.bin",
}
MEASURED = ("seconds", "listing_s", "rest_s", "cpu_s")


class MadeStore(MemoryStore):
    """A store that lists the objects first, first + 1, ..., which do not exist."""

    def __init__(self, name: str, case: str, numbers: range) -> None:
        super().__init__(name)
        self.case, self.numbers = case, numbers

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:  # noqa: ARG002 - all is asked for
        """Yield all objects."""
        name = CASES[self.case]
        for i in self.numbers:
            yield ObjectInfo(name(i), 1_000_000 + i % 7, f'"{i:032x}"', modified_s=NOW_S - DAY_S - 1000 + i % 1000)


def ranges_of(n: int) -> dict[str, range]:
    """Return the numbers of the objects in each tier: 70% in standard, 20% in archive, 10% in hot and in standard."""
    return {"hot": range(n // 10), "standard": range(n * 7 // 10), "archive": range(n * 8 // 10, n)}


def made_file(n_rules: int) -> RuleFile:
    """Return rules for files of teams and sets, for checkpoints, and for the rest."""
    tiers = tuple(Tier(**(tier.model_dump() | {"url": f"memory://{tier.name}"})) for tier in TIERS)
    rules = [
        Rule(
            name=f"r{i}",
            match=(f"datasets/set-{i}/**", f"**/team-{i}/**/*.{{bin,npz}}"),
            exclude=("**/*.keep",),
            to="archive",
            after_s=DAY_S / 2,
        )
        for i in range(n_rules - 2)
    ]
    best = (BestMetric("val_loss", n=2, mode="min"),)
    keep = {"hot": KeepList(last=2), "standard": KeepList(last=10, every_steps=5000, best=best)}
    rules.append(Rule(name="ckpt", match=("runs/**",), keep=keep, then="archive", after_s=DAY_S / 2))
    rules.append(Rule(name="rest", match=("**",), to="archive", after_s=DAY_S / 2))
    return RuleFile(path=Path("tiercache.toml"), sha256="0" * 64, tiers=tiers, rules=tuple(rules))


def fill(path: Path, file: RuleFile, n: int) -> None:
    """Put all objects into a catalog."""
    with TierCatalog(path, {tier.name: tier.url for tier in file.tiers}) as catalog:
        for tier, numbers in ranges_of(n).items():
            name = CASES["books"]
            catalog.record((tier, name(i), CatalogEntry(1_000_000 + i % 7, f'"{i:032x}"', i)) for i in numbers)


def planned(tiers: OpenTiers, path: Path) -> dict[str, Any]:
    """Do what the command does once its tiers are open. Return the summary that it prints."""
    output = Output(as_json=False, quiet=True)
    with redirect_stdout(io.StringIO()):
        made = plan_tiers(output, tiers)
        write_plan(made, path)
        print_plan(output, made, SHOWN)
        output.summary(plan_facts(made), plan_text(made))
    return plan_facts(made)


def once(case: str, options: Mapping[str, int], folder: Path) -> dict[str, Any]:
    """Run one case once, in this process."""
    file, n = made_file(options["rules"]), options["objects"]
    made = {name: MadeStore(name, case, numbers) for name, numbers in ranges_of(n).items()}
    places = {tier.name: tier.url for tier in file.tiers}
    with Stores(file, stores=made) as stores, TierCatalog(folder / "tiers.sqlite", places) as catalog:
        tiers = OpenTiers(file, stores, catalog, file.prices)
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        facts = planned(tiers, folder / "plan.jsonl")
        seconds, cpu_s, peak = time.perf_counter() - start_s, time.process_time() - start_cpu_s, peak_bytes()
        start_s = time.perf_counter()
        objects = len(list_tiers(file, stores, now_s=NOW_S))
        listing_s = time.perf_counter() - start_s
    return {
        "objects": objects,
        "moves": facts["n_moves"],
        "refusals": facts["n_refused"],
        "plan_bytes": (folder / "plan.jsonl").stat().st_size,
        "seconds": seconds,
        "listing_s": listing_s,
        "rest_s": seconds - listing_s,
        "cpu_s": cpu_s,
        "peak_bytes": peak,
    }


def measure(case: str, options: Mapping[str, int]) -> dict[str, Any]:
    """Measure one case: one process fills the catalog, then each repetition runs in a process of its own."""
    numbers = [str(options["objects"]), str(options["rules"])]
    with tempfile.TemporaryDirectory() as folder:
        if case == "books":
            asked([__file__, "--fill", folder, case, *numbers])
        found = [asked([__file__, "--once", folder, case, *numbers]) for _ in range(options["repetitions"])]
    peak = max(row["peak_bytes"] for row in found)
    figures = {name: spread([row[name] for row in found]) for name in MEASURED}
    within = statistics.median(row["rest_s"] for row in found) < LIMIT_S and peak < LIMIT_BYTES
    more = {"peak_bytes": peak, "rules": options["rules"], "within": within}
    return {"benchmark": "tier_whole", "case": case} | found[0] | figures | more


def cells(row: Mapping[str, Any]) -> Sequence[str]:
    """Return the printed cells of a row."""
    counts = [f"{row[name]:,}" for name in ("objects", "rules", "moves", "refusals")]
    times = [f"{row[name]['median']:.2f}" for name in MEASURED]
    return [*counts, *times, mib(row["peak_bytes"]), mib(row["plan_bytes"])]


BENCH = Bench(
    name="tier_whole",
    script=__file__,
    doc=str(__doc__),
    cases=CASES,
    options={"objects": 1_000_000, "rules": 20, "repetitions": 3},
    measure=measure,
    titles=["objects", "rules", "moves", "refused", "s", "listing", "rest", "CPU s", "peak MiB", "plan MiB"],
    cells=cells,
)


def main() -> None:
    """Run the benchmark, or one of the processes that it starts."""
    if sys.argv[1:2] not in (["--once"], ["--fill"]):
        BENCH.main()
        return
    what, folder, case, objects, rules = sys.argv[1:]
    options = {"objects": int(objects), "rules": int(rules)}
    if what == "--fill":
        fill(Path(folder) / "tiers.sqlite", made_file(options["rules"]), options["objects"])
        print("{}")
    else:
        print(json.dumps(once(case, options, Path(folder))))


if __name__ == "__main__":
    main()
