"""Three tiers in a folder, what people do to them, and the library's own doings, each with the oracle looking on."""

import json
import random
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
from tests.support.clock import JumpingClock
from tests.support.disk_bucket import (
    DiskBucket,
    Script,
    about_now,
    file_name,
    flipped,
    is_readable,
    key_of,
    read_object,
    write_object,
)
from tests.support.tier_oracle import DAY_S, Group, Oracle, Picture, Seen

import tiercache as tc
from tiercache import store as stores_of_urls
from tiercache.data.dataset import Dataset  # now: what is imported while a world is entered would keep its open_store
from tiercache.shard.schema import Schema
from tiercache.tier import mover
from tiercache.tier import stores as tier_stores
from tiercache.tier.deletions import run_due_deletions
from tiercache.tier.inventory import take_inventory
from tiercache.tier.journal import TierCatalog
from tiercache.tier.lock import BootClock
from tiercache.tier.mover import open_mover, run_once
from tiercache.tier.moves import apply_plan
from tiercache.tier.plans import Plan, make_plan
from tiercache.tier.policy import decide
from tiercache.tier.rules import RuleFile, load_rule_file
from tiercache.tier.stores import Stores

GRACE_S, SETTLE_S = DAY_S, 600.0
CLASSES = {"places": "GLACIER", "one_bucket": "GLACIER", "one_warm": "STANDARD_IA", "warm": "STANDARD_IA"}
PRICES = "{ store_gb_month = 0.01 }"
RULES = """
[[rules]]
match = "checkpoints/**"
keep_hot = { last = 1 }
keep_standard = { last = 2 }
then = "archive"
after = "2d"
delete_after = "30d"
max_delete = "100%"

[[rules]]
match = "files/**"
after = "1d"
to = "archive"

[[rules]]
match = "data/**"
after = "2d"
to = "archive"

[[rules]]
match = "scratch/**"
delete_after = "20d"
max_delete = "100%"
"""
DATA = "data"
N_RECORDS = 600
STEPS = (10, 20, 30, 100)


@dataclass(frozen=True)
class Place:
    """Where a bucket lies on the disk."""

    name: str
    url: str
    root: Path


@cache
def data_set() -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        schema = Schema.of({"id": "int64", "values": tc.Tensor("uint16", (16,))})
        with tc.Writer(folder, schema=schema, shard_size="10KiB", block_size="4KiB", compression="none") as writer:
            writer.write_batch(records())
        root = Path(folder)
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def records() -> dict[str, np.ndarray]:
    ids = np.arange(N_RECORDS)
    return {"id": ids, "values": (ids[:, None] * 31 + np.arange(16)).astype(np.uint16)}


def content(key: str, version: int, n_bytes: int) -> bytes:
    return random.Random(f"{key}/{version}").randbytes(n_bytes)


def pool() -> list[Group]:
    """All groups that people write here but the shards."""
    found = []
    for step in STEPS:
        name = f"checkpoints/run/step-{step}"
        parts = tuple(f"{name}/{part}" for part in ("__0_0.distcp", "__1_0.distcp", ".metadata"))
        found.append(Group(name, parts, parts[-1], "checkpoints/run", step, 30 * DAY_S, 2))
        name = f"checkpoints/solo/step-{step}.pt"
        found.append(Group(name, (name,), "", "checkpoints/solo", step, 30 * DAY_S, 2))
    found += [Group(f"files/{name}.bin", (f"files/{name}.bin",)) for name in "abc"]
    found += [Group(f"scratch/{name}", (f"scratch/{name}",), delete_after_s=20 * DAY_S) for name in "xy"]
    return found


SIZES = (20_000, 700, 300)  # of the parts of a checkpoint, the last of which makes it whole


class World:
    """One folder with all of it. `with world.entered():` round whatever asks the library.

    shape: One of CLASSES. clock: jumps.
    """

    def __init__(self, root: Path, shape: str, *, jobs: int = 2) -> None:
        """jobs: Of the mover. The tiers are empty, but for the data set."""
        self.root, self.shape, self.jobs = root, shape, jobs
        self.script = Script()
        self.clock = JumpingClock()
        self.slept_s = 0.0
        self.pins: tuple[str, ...] = ()
        self.places = {place.name: place for place in self._places()}
        self.oracle = Oracle(GRACE_S, SETTLE_S)
        self.groups = pool()
        self.rules_path = root / "tiercache.toml"
        for group in self.groups:
            self.oracle.knows(group)
        self.write_rules()
        self._lay_data_set()

    @property
    def is_one(self) -> bool:
        return self.shape.startswith("one_")

    def _places(self) -> list[Place]:
        names = ("hot", "home") if self.is_one else ("hot", "home", "cold")
        return [Place(name, f"s3://{name}/train", self.root / name) for name in names]

    def write_rules(self) -> None:
        cold = self.places["home" if self.is_one else "cold"]
        text = f"state_dir = {json.dumps(str(self.root / 'state'))}\n{RULES}"
        for name, place in (("hot", self.places["hot"]), ("standard", self.places["home"]), ("archive", cold)):
            text += f"\n[tiers.{name}]\nurl = {json.dumps(place.url)}\nprices = {PRICES}\n"
            if name == "archive":
                text += f"storage_class = {json.dumps(CLASSES[self.shape])}\n"
        text += "".join(f"\n[[pins]]\nmatch = {json.dumps(pin)}\n" for pin in self.pins)
        self.rules_path.write_text(text)

    def _lay_data_set(self) -> None:
        for key, data in data_set().items():
            whole = f"{DATA}/{key}"
            if _is_books(whole):
                self.lay("home", whole, data)
                continue
            self.oracle.knows(Group(whole, (whole,)))
            self.write("home", whole, data)

    def begin_job(self) -> None:
        """All that is done from now on is asked for now."""
        self.oracle.asked(self.oracle.groups, time.time())
        self.oracle.begins(self.picture(), time.time())

    # -- what people do ---------------------------------------------------------------------------------------------

    def write(self, place: str, key: str, data: bytes) -> None:
        self.lay(place, key, data)
        self.oracle.wrote(place, key, data, time.time())
        self.by_hand(place, key)

    def write_group(self, place: str, name: str) -> None:
        for key, n_bytes in zip(self.oracle.groups[name].keys, SIZES, strict=False):
            self.write(place, key, content(key, 0, n_bytes))

    def fill(self) -> None:
        """Write checkpoints of two runs into hot, some of them also into home, and files; all of it three days old."""
        for step in (10, 20, 30):
            self.write_group("hot", f"checkpoints/run/step-{step}")
            self.write_group("hot" if step > 10 else "home", f"checkpoints/solo/step-{step}.pt")
        self.write_group("home", "checkpoints/run/step-10")
        for place, name in (
            ("hot", "files/a.bin"),
            ("home", "files/b.bin"),
            ("hot", "scratch/x"),
            ("home", "scratch/x"),
        ):
            self.write_group(place, name)
        self.days_pass(3)

    def lay(self, place: str, key: str, data: bytes) -> None:
        root = self.places[place].root
        root.mkdir(parents=True, exist_ok=True)
        write_object(root / file_name(key), about_now(data, ""), data)

    def remove(self, place: str, key: str) -> None:
        self.path(place, key).unlink()
        self.oracle.removed(place, key)
        self.by_hand(place, key)

    def rot(self, place: str, key: str) -> None:
        """A bit turns.

        Of the copy in the coldest place, the one that stays, a bucket says so by another ETag: it was written anew,
        wrongly. Of any other copy nothing is to be seen: it must not take the place of the right one.
        """
        path, picture = self.path(place, key), self.picture()
        is_last = not any(key in picture[other] for other in [*picture][[*picture].index(place) + 1 :])
        about, data = read_object(path)
        spoilt = self._spoilt(key, data)
        write_object(path, about_now(spoilt, about["class"]) if is_last else about, spoilt)
        self.oracle.rotted(place, key, spoilt)
        self.by_hand(place, key)

    def _spoilt(self, key: str, data: bytes) -> bytes:
        """With one bit turned, which makes of it what it never was: one that turns twice would mend it."""
        turned = (data[:-1] + bytes([data[-1] ^ 1 << bit]) for bit in range(8))
        return next((one for one in turned if one not in self.oracle.ever[key]), flipped(data))

    def pin(self, *names: str) -> None:
        self.pins = names
        self.write_rules()
        self.oracle.pins(key for name in names for key in self.oracle.groups[name].keys)

    def by_hand(self, place: str, key: str) -> None:
        """Somebody has done something to an object: what lies there now is what people have made."""
        picture = self.picture()
        self.oracle.begins(picture, time.time())
        self.oracle.note_parts(place, key, picture)

    def days_pass(self, days: float) -> None:
        self.clock.jump(days * DAY_S)

    def path(self, place: str, key: str) -> Path:
        return self.places[place].root / file_name(key)

    # -- looking ----------------------------------------------------------------------------------------------------

    def picture(self) -> Picture:
        return {name: dict(self._objects(place)) for name, place in self.places.items()}

    def _objects(self, place: Place) -> Iterator[tuple[str, Seen]]:
        for path in sorted(place.root.rglob("*")) if place.root.exists() else ():
            key = key_of(path.name)
            if path.is_file() and not path.name.startswith(".") and not _is_books(key):
                about, data = read_object(path)
                yield key, Seen(data, about["class"], is_readable(about))

    def look(self) -> list[str]:
        return self.oracle.look(self.picture(), time.time())

    # -- what the library does --------------------------------------------------------------------------------------

    @contextmanager
    def entered(self) -> Iterator[None]:
        """URLs of this world open its buckets, and its clock is the time."""
        really, really_archive = stores_of_urls.open_store, tier_stores._s3_classes

        def open_store(url, **options):
            return self.bucket(str(url)) or really(url, **options)

        def archive_of(tier, store):
            return store if isinstance(store, DiskBucket) else really_archive(tier, store)

        with ExitStack() as stack:
            for name, module in [*sys.modules.items()]:
                if name.startswith("tiercache") and getattr(module, "open_store", None) is really:
                    stack.enter_context(patch.object(module, "open_store", open_store))
            stack.enter_context(patch.object(tier_stores, "_s3_classes", archive_of))
            stack.enter_context(patch.object(mover, "JOBS", self.jobs))
            stack.enter_context(patch.object(BootClock, "monotonic", lambda clock: time.monotonic() + self.slept_s))
            stack.enter_context(patch.object(BootClock, "sleep", lambda clock, s, cancel=None: self._sleep(s)))
            stack.enter_context(self.clock)
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", RuntimeWarning)
            yield

    def _sleep(self, span_s: float) -> None:
        """Who watches a lock waits in no time."""
        self.slept_s += span_s

    def bucket(self, url: str) -> DiskBucket | None:
        for place in self.places.values():
            if f"{url}/".startswith(f"{place.url}/"):
                below = url[len(place.url) + 1 :].strip("/")
                prefix = f"{below}/" if below else ""
                return DiskBucket(place.root, url, self.script, prefix, says_sums=place.name != "hot")
        return None

    def file(self) -> RuleFile:
        return load_rule_file(self.rules_path)

    @contextmanager
    def opened(self) -> Iterator[tuple[RuleFile, Stores, TierCatalog]]:
        file = self.file()
        with Stores(file) as stores, TierCatalog(self.root / "state" / "tiers.sqlite") as catalog:
            yield file, stores, catalog

    def plan(self) -> Plan:
        with self.opened() as (file, stores, catalog):
            inventory = take_inventory(file, stores, catalog, now_s=time.time())
            prices = file.prices
            capacity = [stores.capacity(tier.name) for tier in file.tiers]
            decisions = decide(inventory.snapshot, file, prices, capacity_bytes=capacity)
            return make_plan(decisions, inventory, file, prices)

    def apply(self, plan: Plan):
        self.oracle.asked([move.path for move in plan.moves], time.time())
        with self.opened() as opened, open_mover(*opened) as context:
            return apply_plan(context, plan)

    def run_due_deletions(self):
        with self.opened() as opened, open_mover(*opened) as context:
            return run_due_deletions(context)

    def run_once(self):
        self.oracle.asked(self.oracle.groups, time.time())
        return run_once(self.file())

    def read_data_set(self) -> str:
        """What is wrong with the records; "" where nothing is, or where shards must be restored first."""
        wanted, home = records(), self.places["home"].url
        with closing(Dataset(f"{home}/{DATA}", cache=False)) as data:
            found = data[:]
        wrong = [name for name, column in wanted.items() if not np.array_equal(found[name], column)]
        return f"wrong records: columns {', '.join(wrong)}" if wrong else ""


def _is_books(key: str) -> bool:
    """Whether the library keeps it beside the data: versions of a data set are what people have written."""
    return "_tiercache/" in key and "_tiercache/versions/" not in key and "_tiercache/segments/" not in key
