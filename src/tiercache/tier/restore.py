"""Archived objects back: what it costs and how long it takes, asking for it, and waiting, by the store's own word."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa

from tiercache.errors import NotFound, StoreError
from tiercache.model import ObjectInfo
from tiercache.store.archive import SPEEDS, Speed
from tiercache.tier.costs import PROMOTION_DAYS, restore_dollars, restored_home_dollars
from tiercache.tier.layouts import recognise
from tiercache.tier.model import ARCHIVED, RESTORED, RESTORING, Action, Kind, Move, Plan, PlannedObject, PlannedTier
from tiercache.tier.stores import RESTORED_FIRST, Stores, state_of
from tiercache.waiting import SYSTEM_CLOCK, Clock, wait_for

if TYPE_CHECKING:
    from tiercache.prices import Prices, RestorePrice
    from tiercache.tier.copies import Book
    from tiercache.tierfile import TierFile

# Of a tier: key -> what is known of its bytes; TierCatalog.checksums is one.
Books: TypeAlias = "Callable[[str], Book]"
A = TypeVar("A")
B = TypeVar("B")

_AT_ONCE = 16
_LONGEST_POLL_S = 60.0
_SHARD_SUFFIX = ".tcs"
_NAMED = 20


@dataclass(frozen=True, slots=True)
class Archived:
    """An archived object, as the store spoke of it. state: ARCHIVED, RESTORING or RESTORED."""

    tier: str
    key: str
    n_bytes: int
    state: int
    etag: str | None = None
    storage_class: str | None = None
    modified_s: float | None = None


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """What restoring would do.

    Attributes:
        objects: all that must be restored, in the order of their keys; each once, from the first tier that has it.
        here: keys that can be read already, in some tier: nothing is done for them.
        speed: "expedited", "standard" or "bulk".
        days: for how long the temporary copies stay and are all that there is; None: they are copied home, and go.
        cost: dollars of what is not on its way yet: retrieval, the temporary copies in the standard class, and where
            they are copied home, the requests of that; None where no price is known.
        hours: until the last can be read, at most, as the price table has it; None where it does not say.
        command: what a person would type.
    """

    objects: tuple[Archived, ...]
    here: tuple[str, ...]
    speed: Speed
    days: int | None
    cost: float | None
    hours: float | None
    command: str

    @property
    def names(self) -> tuple[str, ...]:
        """Keys of all objects."""
        return tuple(one.key for one in self.objects)

    @property
    def n_bytes(self) -> int:
        """Of all objects."""
        return sum(one.n_bytes for one in self.objects)

    @property
    def asked(self) -> tuple[Archived, ...]:
        """Those that a request is due for: nobody has made one."""
        return tuple(one for one in self.objects if one.state == ARCHIVED)


@dataclass(frozen=True, slots=True)
class Requested:
    """What the stores answered. started: now; running: somebody had asked; done: can be read."""

    started: int = 0
    running: int = 0
    done: int = 0


def plan_restore(
    file: TierFile,
    stores: Stores,
    keys: Iterable[str],
    prices: Sequence[Prices | None],
    *,
    speed: Speed = "standard",
    days: int | None = None,
) -> RestorePlan:
    """What must be restored of some objects, and what that costs. Asks every tier for every key; changes nothing.

    Args:
        file: the rule file.
        stores: its stores.
        keys: of objects, relative to the tiers' URLs.
        prices: of each tier, as far as they are known.
        speed: "expedited", "standard" or "bulk".
        days: keep temporary copies for so long, and copy nothing home.

    Raises:
        NotFound: a key that is in no tier.
        ValueError: a speed that there is not, or that the class does not have; fewer days than 1.
        StoreError: a tier could not be asked.
    """
    if speed not in SPEEDS:
        raise ValueError(f"no such speed: {speed!r}; there are {', '.join(SPEEDS)}")
    if days is not None and days < 1:
        raise ValueError(f"copies are restored for 1 day at least, got {days}")
    wanted = sorted(dict.fromkeys(keys))
    names = [tier.name for tier in file.tiers]
    found = _side_by_side(lambda key: _found(stores, names, key), wanted)
    objects, here = [], []
    for key, copies in zip(wanted, found, strict=True):
        if not copies:
            raise NotFound(f"{key} is in none of the tiers {', '.join(names)}", url=stores.store(file.home.name).url)
        if any(info.state not in (ARCHIVED, RESTORING, RESTORED) for info in copies):
            here.append(key)
        else:
            objects.append(max(copies, key=lambda one: _NEARER[one.state]))
    by_name = dict(zip(names, prices, strict=True))
    cost, hours = _cost(file, objects, by_name, speed, days), _hours(objects, by_name, speed)
    command = _command(file, [one.key for one in objects], speed, days)
    return RestorePlan(tuple(objects), tuple(here), speed, days, cost, hours, command)


_NEARER = {ARCHIVED: 0, RESTORING: 1, RESTORED: 2}


def _found(stores: Stores, names: Sequence[str], key: str) -> list[Archived]:
    """Copies of a key, in the order of the tiers."""
    copies = []
    for name in names:
        sharing = stores.sharing(name)
        try:
            info = stores.head(name, key)
        except NotFound:
            continue
        if len(sharing) == 1 or stores.tier_of(sharing, info) == name:
            copies.append(_archived(name, info))
    return copies


def _archived(name: str, info: ObjectInfo) -> Archived:
    return Archived(name, info.key, info.n_bytes, state_of(info), info.etag, info.storage_class, info.modified_s)


def _speed_price(one: Archived, known: Prices | None, speed: Speed) -> RestorePrice | None:
    """The price of one speed; None: it is not known. Raises ValueError where the class has no such speed."""
    if known is None or not known.restore:
        return None
    if speed not in known.restore:
        speeds = ", ".join(known.restore)
        raise ValueError(f"tiers.{one.tier}: {known.name} has no speed {speed!r} for restores; it has {speeds}")
    return known.restore[speed]


def _cost(
    file: TierFile, objects: Sequence[Archived], prices: Mapping[str, Prices | None], speed: Speed, days: int | None
) -> float | None:
    """Dollars of what is not on its way yet; None where a price is not known. days: None: it is copied home, too."""
    asked: dict[str, list[Archived]] = {}
    for one in objects:
        _speed_price(one, prices.get(one.tier), speed)
        if one.state == ARCHIVED:
            asked.setdefault(one.tier, []).append(one)
    cost, home = 0.0, file.home
    for name, some in asked.items():
        archive, to = prices.get(name), prices.get(home.name)
        price = _speed_price(some[0], archive, speed)
        if archive is None or price is None:
            return None
        n_bytes = np.array([one.n_bytes for one in some], np.int64)
        if days is not None or name == home.name:
            dollars = restore_dollars(archive, price, n_bytes, PROMOTION_DAYS if days is None else days)
        elif to is None:
            return None
        else:
            urls = file.tier(name).url, home.url
            dollars = restored_home_dollars(archive, price, to, n_bytes, urls=urls)
        cost += float(dollars.sum())
    return cost


def _hours(objects: Sequence[Archived], prices: Mapping[str, Prices | None], speed: Speed) -> float | None:
    """Hours until all can be read, at most; None where the price table does not say."""
    waited = [_speed_price(one, prices.get(one.tier), speed) for one in objects if one.state != RESTORED]
    known = [price.hours for price in waited if price is not None]
    return None if len(known) < len(waited) else max(known, default=0.0)


def _command(file: TierFile, keys: Sequence[str], speed: Speed, days: int | None) -> str:
    """The command that does it; of very many keys it names the first, and says how many more there are."""
    words = ["tiercache", "restore", *keys[:_NAMED], "--rules", str(file.path), "--speed", speed]
    words += ["--days", str(days)] if days is not None else []
    words.append("--wait")
    more = len(keys) - _NAMED
    return shlex.join(words) + (f"  # and {more} more" if more > 0 else "")


def request(stores: Stores, plan: RestorePlan) -> Requested:
    """Ask for all that nobody has asked for yet, and for what is restored to stay as long as the plan says.

    Repeatable: what is on its way is not asked for again.

    Raises:
        StoreError: .unable where a store cannot restore at all; the first error otherwise. What was asked for before it
            is on its way: call again.
    """
    days = PROMOTION_DAYS if plan.days is None else plan.days

    def ask(one: Archived) -> str:
        if one.state == RESTORING:
            return "running"
        archive = stores.archive(one.tier)
        if archive is None:
            raise StoreError(f"{one.key}: the tier {one.tier} cannot restore", url=stores.store(one.tier).url)
        takes_days = one.storage_class in RESTORED_FIRST
        return archive.restore(one.key, days=days if takes_days else None, speed=plan.speed)

    answers = _side_by_side(ask, plan.objects)
    return Requested(*(answers.count(answer) for answer in ("started", "running", "done")))


def wait(
    stores: Stores,
    plan: RestorePlan,
    *,
    clock: Clock = SYSTEM_CLOCK,
    deadline_s: float | None = None,
    cancel: Event | None = None,
    on_progress: Callable[[int, int], object] | None = None,
) -> tuple[Archived, ...]:
    """Wait until all of a plan can be read: what could not be by the deadline, or when cancelled; () when all can.

    The stores are asked once a minute at most, about 16 objects of those that are awaited.

    Args:
        stores: of the rule file.
        plan: whose requests were made.
        clock: whose time it is.
        deadline_s: seconds from now; None: for ever.
        cancel: ends the wait when set.
        on_progress: called with how many can be read, and how many there are.

    Raises:
        NotFound: an object is gone.
        StoreError: .archived: one is neither restored nor on its way any more: ask again; or a store failed.
    """
    waiting = [one for one in plan.objects if one.state != RESTORED]

    def is_done() -> bool:
        while waiting:
            some = waiting[:_AT_ONCE]
            answers = _side_by_side(lambda one: _is_restored(stores, one), some)
            left = [one for one, done in zip(some, answers, strict=True) if not done]
            waiting[: len(some)] = left
            if on_progress is not None:
                on_progress(len(plan.objects) - len(waiting), len(plan.objects))
            if left:
                return False
        return True

    wait_for(is_done, deadline_s, clock, longest_poll_s=_LONGEST_POLL_S, cancel=cancel)
    return tuple(waiting)


def promotion(
    file: TierFile, plan: RestorePlan, *, made_s: float, to: str | None = None, known: Books | None = None
) -> Plan:
    """A plan that copies what was restored home, for the mover; the archived copies stay until a rule deletes them.

    Objects of one checkpoint are one move, so that it appears whole. Where the archive is only another class of home,
    the class is changed.

    Args:
        file: the rule file.
        plan: all of which can be read.
        made_s: now, in seconds since the epoch.
        to: name of the tier that gets them; None: home.
        known: of a tier, what the catalog knows of its objects: checksums that the copies are held to.
    """
    books = {tier: known(tier) for tier in {one.tier for one in plan.objects}} if known is not None else {}
    target = file.home if to is None else file.tier(to)
    tiers = tuple(PlannedTier(tier.name, tier.role, tier.url, tier.storage_class) for tier in file.tiers)
    moves: list[Move] = []
    for path, kind, objects in _groups([one for one in plan.objects if one.tier != target.name]):
        src = objects[0].tier
        planned = tuple(_planned(one, books.get(src, {})) for one in objects)
        action: Action = "reclass" if file.tier(src).url == target.url else "copy"
        reason = f"restored from {src} ({objects[0].storage_class})"
        moves.append(Move(len(moves), path, kind, action, src, target.name, "restore", reason, planned))
    return Plan(secrets.token_hex(8), made_s, str(file.path), file.sha256, tiers, tuple(moves))


def _planned(one: Archived, book: Book) -> PlannedObject:
    n_bytes, etag, crc32c, *_ = book.get(one.key, (-1, None, None, False, None))
    is_it = n_bytes == one.n_bytes and etag is not None and etag == one.etag
    return PlannedObject(one.key, one.n_bytes, one.etag, one.modified_s, crc32c if is_it else None)


def _groups(objects: Sequence[Archived]) -> list[tuple[str, Kind, list[Archived]]]:
    """What is moved as one: path, kind, and its objects of one tier, those that make it whole last."""
    layout = recognise(pa.array([one.key for one in objects], pa.large_string()))
    found: dict[tuple[int, str], list[int]] = {}
    for i, one in enumerate(objects):
        found.setdefault((int(layout.group[i]), one.tier), []).append(i)
    groups: list[tuple[str, Kind, list[Archived]]] = []
    for (number, _), rows in found.items():
        rows.sort(key=lambda i: int(layout.rank[i]))
        if number < 0:  # no group's, such as what an unfinished write left: each for itself
            groups += [(objects[i].key, "file", [objects[i]]) for i in rows]
            continue
        path = layout.paths[number].as_py()
        single: Kind = "shard" if path.endswith(_SHARD_SUFFIX) else "file"
        groups.append((path, "checkpoint" if layout.checkpoint[number] else single, [objects[i] for i in rows]))
    return groups


def _is_restored(stores: Stores, one: Archived) -> bool:
    info = stores.head(one.tier, one.key)
    state = state_of(info)
    if state == ARCHIVED:
        message = "it is neither restored nor on its way any more: ask for it again: tiercache restore"
        raise StoreError(message, url=f"{stores.store(one.tier).url}/{one.key}", archived=True)
    return state != RESTORING


def _side_by_side(work: Callable[[A], B], items: Iterable[A]) -> list[B]:
    """Results in order, 16 at a time; the first error ends it."""
    wanted = list(items)
    if len(wanted) <= 1:
        return [work(one) for one in wanted]
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="tiercache-restore") as pool:
        futures = [pool.submit(work, one) for one in wanted]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
