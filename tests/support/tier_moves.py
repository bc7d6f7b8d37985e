"""Three tiers in memory, or in buckets with storage classes, for tests of the mover, scripted faults, manual clock."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.support.disk_bucket import DiskBucket, Script
from tests.support.faults import Fault, FaultStore

from tiercache import crash_points
from tiercache._native.checksum import crc32c
from tiercache.errors import NotFound
from tiercache.store import MemoryStore, Store, placement_log
from tiercache.tier.context import MoveContext
from tiercache.tier.deletions import DeletionFacts, run_due_deletions
from tiercache.tier.journal import PlannedObject, TierCatalog
from tiercache.tier.lock import TierLock
from tiercache.tier.mover import open_mover
from tiercache.tier.moves import apply_plan
from tiercache.tier.plans import Move, Plan, PlannedTier
from tiercache.tier.rules import RuleFile, load_rule_file
from tiercache.tier.stores import Stores
from tiercache.waiting import SYSTEM_CLOCK

NOW_S = 1_800_000_000.0
GRACE_S = 86_400.0
TIERS = ("hot", "standard", "archive")
PRICES = "{ store_gb_month = 0.01 }"


class Killed(BaseException):
    """The process died at a crash point."""


def content(key: str, n_bytes: int = 1000) -> bytes:
    return Random(key).randbytes(n_bytes)


@dataclass
class World:
    """hot, standard (home) and archive. `now_s` is the wall clock. facts: What run_due_deletions() knows of them."""

    root: Path
    rules: str = '[[rules]]\nname = "cold"\nmatch = "**"\nto = "archive"\n'
    classes: bool = False
    now_s: float = NOW_S
    facts: DeletionFacts = field(default_factory=DeletionFacts)
    inner: dict[str, Store] = field(default_factory=dict)
    faulty: dict[str, FaultStore] = field(default_factory=dict)
    cold_class: str = "GLACIER"
    shared: bool = False

    def __post_init__(self) -> None:
        self.root.mkdir(exist_ok=True)
        for name in TIERS:
            self.inner[name] = self._inner(name)
            self.faulty[name] = FaultStore(self.inner[name])
        self.write_rules()

    def _inner(self, name: str) -> Store:
        if self.shared and name == "archive":
            return self.inner["standard"]
        if self.classes and name != "hot":
            return DiskBucket(self.root / name, self.url(name), Script(), says_sums=True)
        return MemoryStore(self.root.as_posix().strip("/").replace("/", "-"), name)

    def url(self, name: str) -> str:
        name = "standard" if self.shared and name == "archive" else name
        return f"memory://{self.root.as_posix().strip('/').replace('/', '-')}/{name}"

    def write_rules(self, more: str = "") -> None:
        text = f'state_dir = "{self.root / "state"}"\n'
        text += "".join(
            f'[tiers.{name}]\nurl = "{self.url(name)}"\nprices = {PRICES}\n'
            + (f'storage_class = "{self.cold_class}"\n' if self.classes and name == "archive" else "")
            for name in TIERS
        )
        text += f"\n{self.rules}\n{more}\n"
        (self.root / "tiercache.toml").write_text(text)

    @property
    def file(self) -> RuleFile:
        return load_rule_file(self.root / "tiercache.toml")

    @property
    def catalog_path(self) -> Path:
        return self.root / "state" / "tiers.sqlite"

    # -- objects ----------------------------------------------------------------------------------------------------

    def put(self, tier: str, *keys: str) -> None:
        for key in keys:
            self.inner[tier].put(key, content(key))

    def keys(self, tier: str) -> list[str]:
        return sorted(info.key for info in self.inner[tier].list() if "_tiercache/" not in info.key)

    def where(self, key: str) -> list[str]:
        found = []
        for name in TIERS:
            try:
                data = self._raw(name, key)
            except NotFound:
                continue
            if data == content(key):
                found.append(name)
        return found

    def _raw(self, name: str, key: str) -> bytes:
        store = self.inner[name]
        return store._found(key)[1] if isinstance(store, DiskBucket) else store.get(key)

    def row(self, key: str) -> placement_log.PlacementRow | None:
        found = placement_log.read_placement(self.inner["standard"])
        return None if found is None else found.find(key)

    # -- plans ------------------------------------------------------------------------------------------------------

    def move(
        self, path: str, src: str, dst: str | None, *, action="move", keys: Sequence[str] = (), kind="file", number=1
    ) -> Move:
        infos = [self.inner[src].head(key) for key in (keys or [path])]
        objects = tuple(PlannedObject(i.key, i.n_bytes, i.etag, i.modified_s, crc32c(content(i.key))) for i in infos)
        return Move(number, path, kind, action, src, dst, "cold", "because", objects)

    def plan(self, *moves: Move, name: str = "plan") -> Plan:
        file = self.file
        tiers = tuple(PlannedTier(tier.name, tier.url, tier.storage_class) for tier in file.tiers)
        return Plan(name, self.now_s, str(file.path), file.sha256, tiers, moves)

    # -- moving -----------------------------------------------------------------------------------------------------

    @contextmanager
    def opened(self, *, lock: TierLock | None = None) -> Iterator[MoveContext]:
        file = self.file
        archives = {name: self.inner[name] for name in TIERS if isinstance(self.inner[name], DiskBucket)}
        with (
            Stores(file, stores=self.faulty, s3_classes=archives) as stores,
            TierCatalog(self.catalog_path) as catalog,
            open_mover(file, stores, catalog, clock=lambda: self.now_s, lock=lock) as context,
        ):
            yield context

    def apply(self, plan: Plan, **kwargs):
        with self.opened() as context:
            return apply_plan(context, plan, **kwargs)

    def run_due_deletions(self, context: MoveContext | None = None, **kwargs):
        if context is not None:
            return run_due_deletions(context, facts=(self.facts, SYSTEM_CLOCK.monotonic()), **kwargs)
        with self.opened() as opened:
            return self.run_due_deletions(opened, **kwargs)

    def later(self, seconds: float = GRACE_S + 1) -> None:
        self.now_s += seconds

    def journal(self) -> Mapping[int, str]:
        with TierCatalog(self.catalog_path) as catalog:
            return {number: row.state for number, row in catalog.of_plan("plan").items()}

    def note(self) -> str:
        with TierCatalog(self.catalog_path) as catalog:
            (row,) = catalog.of_plan("plan").values()
        return row.note

    def lose_catalog(self) -> None:
        for path in self.catalog_path.parent.glob("tiers.sqlite*"):
            path.unlink()

    def fail(self, tier: str, *faults: Fault) -> None:
        self.faulty[tier].add(*faults)


class HookAt:
    """Calls `do`, or raises Killed, when a crash point is reached for the n-th time. reached: All names, in order."""

    def __init__(self, name: str = "", nth: int = 1, do=None) -> None:
        self.name, self.nth, self.do = name, nth, do
        self.reached: list[str] = []
        self.hit = False

    def __call__(self, name: str) -> None:
        self.reached.append(name)
        if name == self.name and self.reached.count(name) == self.nth:
            self.hit = True
            if self.do is None:
                raise Killed(name)
            self.do()

    def __enter__(self):
        self._before = crash_points.set_hook(self)
        return self

    def __exit__(self, *exc: object) -> None:
        crash_points.set_hook(self._before)


PARTS = ("ck/step-1/a", "ck/step-1/b", "ck/step-1/.metadata")


def moved_away(world, *keys):
    """Apply a plan that moves these keys from home to the archive; return both."""
    world.put("standard", *keys)
    plan = world.plan(*(world.move(key, "standard", "archive", number=n) for n, key in enumerate(keys, start=1)))
    return plan, world.apply(plan)


def checkpoint(world, src="standard", dst="archive", **kwargs):
    world.put(src, *PARTS)
    return world.plan(world.move("ck/step-1", src, dst, keys=PARTS, kind="checkpoint", **kwargs))
