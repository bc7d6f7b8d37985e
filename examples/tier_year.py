"""A year of a 2 TB data set and three trainings in three tiers: bytes, dollars, restores. Sizes are simulated.

    python examples/tier_year.py [--shards 16000] [--into benchmarks/results/tier_year.md]

Each day the real policy (`tiercache.tier.policy.decide`) plans the moves; nothing else is
real. The bill is kept by this file from the price table, and not from what the policy says that its moves cost.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.tier.policy import decide
from tiercache.tier.rules import RuleFile, load_rule_file
from tiercache.tier.snapshot import (
    ARCHIVED,
    CHECKPOINT,
    COPY,
    DELETE,
    DROP,
    NO_RUN,
    NO_STEP,
    READABLE,
    SHARD,
    Decisions,
    Snapshot,
)

HEAD = """\
# A year of tiers

`python examples/tier_year.py --into benchmarks/results/tier_year.md` writes this page;
[the guide to tiers](../../docs/guide/tiers.md#a-year) describes the year.

"""
RULES = """\
[tiers.hot]
url = "/nvme/team"
capacity = "1TB"

[tiers.standard]
url = "s3://team/train"
prices = "aws:us-east-1:STANDARD"

[tiers.archive]
url = "s3://team-cold/train"
storage_class = "GLACIER"
prices = "aws:us-east-1:GLACIER"

[[rules]]
name = "checkpoints"
match = "checkpoints/**"
keep_hot = { last = 2 }
keep_standard = { last = 10, every_steps = 20000, best = "val_loss:2" }
then = "archive"
after = "14d"
delete_after = "730d"

[[rules]]
name = "cold data"
match = "datasets/**"
idle = "30d"
to = "archive"
"""
CLASSES = ("GLACIER_IR", "GLACIER", "DEEP_ARCHIVE")

START_S = 1_767_225_600.0  # 2026-01-01
DAY_S = 86_400.0
N_DAYS = 360  # months of 30 days, as the price table has them
SET_BYTES = 2_000_000_000_000
CHECKPOINT_BYTES, CHECKPOINT_OBJECTS = 12_000_000_000, 8
CHECKPOINTS_A_DAY, STEPS = 4, 1000
PART_BYTES = 8 << 20  # of a request that reads or uploads
GB = 1 << 30  # as it is billed
TEMPORARY_DAYS = 3  # of a restored copy that is copied home


@dataclass(frozen=True)
class Training:
    """Reads the first `share` of the shards, all of them every day, and writes checkpoints."""

    name: str
    first_day: int
    days: int
    share: float


TRAININGS = (Training("base", 0, 45, 1.0), Training("english", 150, 15, 0.4), Training("final", 300, 30, 1.0))
# Somebody evaluates three old checkpoints of the first training again.
EVALUATED_DAY, EVALUATED = 220, tuple(f"checkpoints/base/step-{step * STEPS}" for step in (61, 62, 63))


@dataclass
class Bill:
    """Dollars by month and what they are for; what was restored."""

    dollars: dict[tuple[int, str], float] = field(default_factory=lambda: defaultdict(float))
    restores: list[tuple[int, float, float, float]] = field(default_factory=list)  # day, bytes, dollars, hours

    def of(self, *what: str, month: int | None = None) -> float:
        """Dollars for some things, of a month or of the year."""
        return sum(d for (m, w), d in self.dollars.items() if w in what and month in (None, m))


@dataclass(frozen=True)
class ShardGroups:
    """All that there will be within the year, by the time it is written: shards first, then checkpoints."""

    paths: pa.Array
    born_s: NDArray[np.float64]
    kind: NDArray[np.uint8]
    step: NDArray[np.int64]
    run: NDArray[np.int32]
    n_objects: NDArray[np.int32]
    n_bytes: NDArray[np.int64]
    loss: NDArray[np.float64]


def make_groups(n_shards: int, trainings: Sequence[Training]) -> ShardGroups:
    """The data set, and what the trainings write, with a validation loss that falls and trembles."""
    random = np.random.default_rng(7)
    rows: list[tuple[float, str, int, int, float]] = []
    for run, training in enumerate(trainings):
        for number in range(training.days * CHECKPOINTS_A_DAY):
            born_s = START_S + (training.first_day + (number + 1) / CHECKPOINTS_A_DAY) * DAY_S
            step = (number + 1) * STEPS
            loss = 2 + 3 / np.sqrt(number + 1) + random.normal(0, 0.05)
            rows.append((born_s, f"checkpoints/{training.name}/step-{step}", step, run, loss))
    born, paths, steps, run_of, losses = zip(*rows, strict=True)
    n = len(rows)
    return ShardGroups(
        paths=pa.array([f"datasets/web/{i:06d}.tcs" for i in range(n_shards)] + list(paths)),
        born_s=np.array([START_S] * n_shards + list(born)),
        kind=np.array([SHARD] * n_shards + [CHECKPOINT] * n, np.uint8),
        step=np.array([NO_STEP] * n_shards + list(steps)),
        run=np.array([NO_RUN] * n_shards + list(run_of), np.int32),
        n_objects=np.array([1] * n_shards + [CHECKPOINT_OBJECTS] * n, np.int32),
        n_bytes=np.array([SET_BYTES // n_shards] * n_shards + [CHECKPOINT_BYTES] * n),
        loss=np.array([np.nan] * n_shards + list(losses)),
    )


class World:
    """Which copies there are, and what they cost. Copies are flags of groups by tier."""

    def __init__(self, file: RuleFile, n_shards: int, *, born_in: str) -> None:
        self.file, self.n_shards = file, n_shards
        self.groups = make_groups(n_shards, TRAININGS)
        self.bill = Bill()
        self.promised = 0.0  # what the policy said that its moves cost, all together
        self.n_moves = 0
        self.day = 0
        n = len(self.groups.born_s)
        self.present = np.zeros((n, len(file.tiers)), bool)
        self.since_s = np.zeros((n, len(file.tiers)))
        self._prices = file.prices
        self._capacity = [tier.capacity_bytes(None) for tier in file.tiers]
        self._is_local = ["://" not in tier.url for tier in file.tiers]
        self._archived = np.array([bool(prices.restore) for prices in self._prices])
        self._last_use_s = self.groups.born_s.copy()
        self._in_use = np.zeros(n, bool)
        self._due: list[tuple[int, int]] = []  # copies that go when their grace of a day is over
        self._born_in = file.index(born_in)
        self._home = file.index(file.home_tier.name)
        self._n_alive = 0

    @property
    def now_s(self) -> float:
        """When the day begins."""
        return START_S + self.day * DAY_S

    def begin(self, day: int) -> None:
        """A day comes: what was written since is there, what was due goes."""
        self.day = day
        alive = int(np.searchsorted(self.groups.born_s, self.now_s, "right"))
        new = np.arange(self._n_alive, alive)
        tier = np.where(self.groups.kind[new] == CHECKPOINT, self._born_in, self._home)
        self.present[new, tier] = True
        self.since_s[new, tier] = self.groups.born_s[new]
        self._n_alive = alive
        self._pay_uploads(new[self.present[new, self._home]])
        for group, place in self._due:
            self._drop(group, place)
        self._due = []

    def use(self) -> None:
        """What the trainings of this day read, and write."""
        self._in_use[:] = False
        for training in TRAININGS:
            if training.first_day <= self.day < training.first_day + training.days:
                self._read(np.arange(int(self.n_shards * training.share)), fetch=self.day == training.first_day)
        if self.day == EVALUATED_DAY:
            names = self.groups.paths.to_pylist()
            self._read(np.array([names.index(path) for path in EVALUATED]), fetch=True)

    def _read(self, groups: NDArray[np.int64], *, fetch: bool) -> None:
        readable = self.present[groups] & ~self._archived
        self._restore(groups[~readable.any(axis=1)])
        if fetch:  # once a training: then the machines have them in their caches
            nearest = np.argmax(self.present[groups] & ~self._archived, axis=1)
            for tier, prices in enumerate(self._prices):
                n_bytes = int(self.groups.n_bytes[groups[nearest == tier]].sum())
                self._pay("reads", n_bytes / PART_BYTES * prices.get_1000 / 1000 + n_bytes / GB * prices.retrieve_gb)
        self._last_use_s[groups] = self.now_s
        self._in_use[groups] = True

    def _restore(self, groups: NDArray[np.int64]) -> None:
        """`tiercache tier get --wait`: asks for the archived copies, and copies them home."""
        if not len(groups):
            return
        tier = int(np.argmax(self.present[groups[0]]))
        speed = self._prices[tier].restore["standard"]
        n_bytes, n_objects = int(self.groups.n_bytes[groups].sum()), int(self.groups.n_objects[groups].sum())
        requests = speed.per_1000 + self._prices[tier].get_1000 + self._prices[self._home].put_1000
        second_copy = self._prices[self._home].store_gb_month / 30 * TEMPORARY_DAYS
        dollars = n_bytes / GB * (speed.gb + second_copy) + n_objects / 1000 * requests
        self._pay("restores", dollars)
        self.bill.restores.append((self.day, float(n_bytes), float(dollars), speed.hours))
        self.present[groups, self._home] = True
        self.since_s[groups, self._home] = self.now_s

    def snapshot(self) -> Snapshot:
        """What the planner would see this evening."""
        n, all_of = self._n_alive, self.groups
        group, tier = np.nonzero(self.present[:n])
        n_bytes, n_objects = all_of.n_bytes[group], all_of.n_objects[group]
        everywhere = np.ones(len(group), bool)
        return Snapshot(
            now_s=self.now_s, tiers=tuple(one.name for one in self.file.tiers),
            classes=tuple(one.storage_class or "" for one in self.file.tiers),
            paths=all_of.paths.slice(0, n), kind=all_of.kind[:n], step=all_of.step[:n], run=all_of.run[:n],
            complete=np.ones(n, bool), created_s=all_of.born_s[:n], last_use_s=self._last_use_s[:n],
            uses_tracked_since_s=np.full(n, -np.inf), unreported=np.zeros(n, bool),
            in_use=self._in_use[:n],
            metrics={"val_loss": all_of.loss[:n]}, unread=np.zeros(n, bool),
            group=group.astype(np.int32), tier=tier.astype(np.int8), n_objects=n_objects, n_bytes=n_bytes,
            smallest_bytes=n_bytes // n_objects, modified_s=self.since_s[group, tier],
            storage_class=tier.astype(np.int16),
            state=np.where(self._archived[tier], ARCHIVED, READABLE).astype(np.uint8),
            whole=everywhere, verified=everywhere, links={},
        )  # fmt: skip

    def decide(self) -> Decisions:
        """What the rules say of it."""
        return decide(self.snapshot(), self.file, self._prices, capacity_bytes=self._capacity)

    def apply(self, decisions: Decisions) -> None:
        """Make the moves; a move's source goes tomorrow."""
        moves = decisions.moves
        self.promised += float(moves.once.sum())
        self.n_moves += len(moves)
        columns = (moves.group.tolist(), moves.action.tolist(), moves.src.tolist(), moves.dst.tolist())
        for group, action, src, dst in zip(*columns, strict=True):
            if action == DROP:
                self._drop(group, src)
            elif action == DELETE:
                for tier in np.flatnonzero(self.present[group]).tolist():
                    self._end(group, tier)
            else:
                self._copy(group, src, dst)
                if action != COPY:
                    self._due.append((group, src))

    def _copy(self, group: int, src: int, dst: int) -> None:
        n_gb = self.groups.n_bytes[group] / GB
        streams = self._is_local[src] or self._is_local[dst]  # else the store itself copies, by a request an object
        n_reads = self._parts(np.array([group])) if streams else self.groups.n_objects[group]
        self._pay("moves", n_reads / 1000 * self._prices[src].get_1000)
        self._pay_writes("moves", np.array([group]), dst, streams=streams)
        self._pay("moves", n_gb * self._prices[src].retrieve_gb)
        self.present[group, dst] = True
        self.since_s[group, dst] = self.now_s

    def _drop(self, group: int, tier: int) -> None:
        if self.present[group].sum() < 2:
            raise AssertionError(f"the last copy of {self.groups.paths[group]} would go")
        self._end(group, tier)

    def _end(self, group: int, tier: int) -> None:
        days = self._prices[tier].min_days - (self.now_s - self.since_s[group, tier]) / DAY_S
        self._pay("moves", self._dollars_day(np.array([group]), tier) * max(days, 0))
        self.present[group, tier] = False

    def _parts(self, groups: NDArray[np.int64]) -> int:
        """Requests that upload them, or read them."""
        each = self.groups.n_bytes[groups] / self.groups.n_objects[groups]
        return int((np.ceil(each / PART_BYTES) * self.groups.n_objects[groups]).sum())

    def _pay_uploads(self, groups: NDArray[np.int64]) -> None:
        self._pay_writes("writes", groups, self._home, streams=True)

    def _pay_writes(self, what: str, groups: NDArray[np.int64], tier: int, *, streams: bool) -> None:
        """A PUT an object; of larger ones a begin and each part beside it, at what the class asks for parts."""
        prices, n_objects = self._prices[tier], self.groups.n_objects[groups]
        is_large = streams & (self.groups.n_bytes[groups] / n_objects > PART_BYTES)
        n_parts = self._parts(groups[is_large]) + n_objects[is_large].sum()
        part_1000 = prices.put_1000 if prices.standard_put_1000 is None else prices.standard_put_1000
        self._pay(what, (n_objects.sum() * prices.put_1000 + n_parts * part_1000) / 1000)

    def _dollars_day(self, groups: NDArray[np.int64], tier: int) -> float:
        prices, n_objects = self._prices[tier], self.groups.n_objects[groups]
        each = np.maximum(self.groups.n_bytes[groups] / n_objects, prices.min_bytes) + prices.overhead_bytes
        standard = n_objects.sum() * prices.standard_overhead_bytes * (prices.standard_gb_month or 0.0)
        return float(((each * n_objects).sum() * prices.store_gb_month + standard) / GB / 30)

    def end(self) -> None:
        """Pay for the day's storage."""
        for tier in range(len(self.file.tiers)):
            self._pay("storage", self._dollars_day(np.flatnonzero(self.present[:, tier]), tier))

    def held_bytes(self) -> list[int]:
        """Bytes in each tier."""
        return [int(self.groups.n_bytes[self.present[:, tier]].sum()) for tier in range(len(self.file.tiers))]

    def _pay(self, what: str, dollars: float) -> None:
        self.bill.dollars[self.day // 30, what] += float(dollars)


@dataclass(frozen=True)
class Year:
    """How it went. held: bytes by tier at the end of each month."""

    world: World
    held: list[list[int]]

    @property
    def bill(self) -> Bill:
        """Its bill."""
        return self.world.bill


def live(storage_class: str | None, n_shards: int, n_days: int = N_DAYS) -> Year:
    """A year with an archive of this class; None: everything is written to standard, and stays there."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tiercache.toml")
        path.write_text(RULES.replace("GLACIER", storage_class or "GLACIER"))
        world = World(load_rule_file(path), n_shards, born_in="hot" if storage_class else "standard")
    held = []
    for day in range(n_days):
        world.begin(day)
        world.use()
        if storage_class:
            world.apply(world.decide())
        world.end()
        if day % 30 == 29:
            held.append(world.held_bytes())
    return Year(world, held)


def months(year: Year, plain: Year) -> str:
    """Month by month: what lies where, and what it costs."""
    titles = ("month", "hot", "standard", "archive", "storage", "moves", "restores", "bill", "everything in standard")
    lines = [titles, ("--:",) * len(titles)]
    everything = ("storage", "moves", "restores", "reads", "writes")
    for month, held in enumerate(year.held):
        figures = [year.bill.of(what, month=month) for what in ("storage", "moves", "restores")]
        totals = [one.bill.of(*everything, month=month) for one in (year, plain)]
        cells = [f"{n / 1e12:.2f} TB" for n in held] + [f"${dollars:,.2f}" for dollars in (*figures, *totals)]
        lines.append((str(month + 1), *cells))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ways(years: dict[str, Year]) -> str:
    """The year by class of the archive."""
    titles = ("archive", "storage", "moves", "reads", "writes", "restores", "bill", "restored", "longest wait")
    lines = [titles, (":--", *("--:",) * (len(titles) - 1))]
    for name, year in years.items():
        parts = [year.bill.of(what) for what in ("storage", "moves", "reads", "writes", "restores")]
        restores = year.bill.restores
        n_bytes, hours = sum(n for _, n, _, _ in restores), max((hours for *_, hours in restores), default=0.0)
        wait = f"{hours:g} h" if restores else "-"
        dollars = [f"${each:,.2f}" for each in (*parts, sum(parts))]
        lines.append((name, *dollars, f"{n_bytes / 1e12:.2f} TB, {len(restores)} times" if restores else "-", wait))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(n_shards: int) -> str:
    """The story's tables, in Markdown."""
    plain = live(None, n_shards)
    years = {name: live(name, n_shards) for name in CLASSES}
    shown = years["GLACIER"]
    restored = "\n".join(
        f"- day {day}: {n_bytes / 1e9:,.0f} GB asked for, ${dollars:,.2f}, within {hours:g} hours"
        for day, n_bytes, dollars, hours in shown.bill.restores
    )
    return "\n\n".join(
        [
            f"```toml\n{RULES}```",
            f"{shown.world.n_moves:,} moves in {N_DAYS} days. At the end of each month:",
            months(shown, plain),
            f"Restores:\n\n{restored}",
            "The same year with other classes in `[tiers.archive]`:",
            ways({"none: everything in standard": plain} | {f"`{name}`": year for name, year in years.items()}),
        ]
    )


def main() -> None:
    """Tell it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shards", type=int, default=16_000, help="that the 2 TB are in")
    parser.add_argument("--into", type=Path, help="the Markdown file to write")
    given = parser.parse_args()
    text = report(given.shards)
    print(text)
    if given.into:
        given.into.write_text(HEAD + text + "\n")


if __name__ == "__main__":
    main()
