"""Restores of archived objects: their cost and duration, the requests, and the wait until the objects can be read."""

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
from tiercache.prices import SPEEDS, Speed
from tiercache.tier.costs import PROMOTION_DAYS, restore_dollars, restored_home_dollars
from tiercache.tier.inventory.layouts import group_keys
from tiercache.tier.model import ARCHIVED, RESTORED, RESTORING, Action, Kind, Move, Plan, PlannedObject, PlannedTier
from tiercache.tier.stores import RESTORED_FIRST, Stores, state_of
from tiercache.waiting import SYSTEM_CLOCK, Clock, wait_for

if TYPE_CHECKING:
    from tiercache.prices import Prices, RestorePrice
    from tiercache.tier.inventory.groups import ChecksumTable
    from tiercache.tier.rules import RuleFile

# Name of a tier -> catalog entries of its objects, by key. TierCatalog.checksums is such a function.
Books: TypeAlias = "Callable[[str], ChecksumTable]"
A = TypeVar("A")
B = TypeVar("B")

_AT_ONCE = 16
_LONGEST_POLL_S = 60.0
_SHARD_SUFFIX = ".tcs"
_NAMED = 20


@dataclass(frozen=True, slots=True)
class ArchivedObject:
    """An archived object, as the store describes it. state: ARCHIVED, RESTORING or RESTORED."""

    tier: str
    key: str
    n_bytes: int
    state: int
    etag: str | None = None
    storage_class: str | None = None
    modified_s: float | None = None


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """Plan of a restore.

    Attributes:
        objects: Objects that must be restored, sorted by key; each once, from the tier whose copy is readable soonest.
        readable_keys: Keys that can be read already in some tier; nothing is done for them.
        speed: "expedited", "standard" or "bulk".
        days: Days that the temporary copies stay, without a copy to the home tier. None: the objects are copied to the
            home tier, and the temporary copies expire.
        cost: Dollars for requests that are not made yet: retrieval, the temporary copies in the standard class, and the
            copy to the home tier if there is one. None if a price is unknown.
        hours: Maximum hours until the last object can be read, by the price table. None if it does not say.
        command: Command line that makes this restore.
    """

    objects: tuple[ArchivedObject, ...]
    readable_keys: tuple[str, ...]
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
        """Size of all objects, in bytes."""
        return sum(one.n_bytes for one in self.objects)

    @property
    def asked(self) -> tuple[ArchivedObject, ...]:
        """Objects that need a request: nobody has made one."""
        return tuple(one for one in self.objects if one.state == ARCHIVED)


@dataclass(frozen=True, slots=True)
class RequestCounts:
    """Answers of the stores. started: Requests made now. running: Requests made earlier. done: Readable objects."""

    started: int = 0
    running: int = 0
    done: int = 0


def plan_restore(
    file: RuleFile,
    stores: Stores,
    keys: Iterable[str],
    prices: Sequence[Prices | None],
    *,
    speed: Speed = "standard",
    days: int | None = None,
) -> RestorePlan:
    """Plan the restore of some objects. Asks every tier for every key; changes nothing.

    Args:
        file: Rule file.
        stores: Stores of the rule file.
        keys: Keys of the objects, relative to the URLs of the tiers.
        prices: Prices of each tier; None where they are unknown.
        speed: "expedited", "standard" or "bulk".
        days: Days that temporary copies stay; then nothing is copied to the home tier. None: see RestorePlan.

    Raises:
        NotFound: A key is in no tier.
        ValueError: An unknown speed, a speed that the storage class lacks, or days below 1.
        StoreError: A tier could not be asked.
    """
    if speed not in SPEEDS:
        raise ValueError(f"unknown speed {speed!r}; expected one of {', '.join(SPEEDS)}")
    if days is not None and days < 1:
        raise ValueError(f"expected days of at least 1, got {days}")
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


def _found(stores: Stores, names: Sequence[str], key: str) -> list[ArchivedObject]:
    """Return the copies of a key, in the order of the tiers."""
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


def _archived(name: str, info: ObjectInfo) -> ArchivedObject:
    return ArchivedObject(name, info.key, info.n_bytes, state_of(info), info.etag, info.storage_class, info.modified_s)


def _speed_price(one: ArchivedObject, known: Prices | None, speed: Speed) -> RestorePrice | None:
    """Return the price of one speed; None if unknown. Raises ValueError where the class does not have the speed."""
    if known is None or not known.restore:
        return None
    if speed not in known.restore:
        speeds = ", ".join(known.restore)
        raise ValueError(f"tiers.{one.tier}: {known.name} has no speed {speed!r} for restores; it has {speeds}")
    return known.restore[speed]


def _cost(
    file: RuleFile,
    objects: Sequence[ArchivedObject],
    prices: Mapping[str, Prices | None],
    speed: Speed,
    days: int | None,
) -> float | None:
    """Return the dollars for requests that are not made yet; None if a price is unknown. days: None: copy home too."""
    asked: dict[str, list[ArchivedObject]] = {}
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


def _hours(objects: Sequence[ArchivedObject], prices: Mapping[str, Prices | None], speed: Speed) -> float | None:
    """Return the maximum hours until all objects can be read; None where the price table does not say."""
    waited = [_speed_price(one, prices.get(one.tier), speed) for one in objects if one.state != RESTORED]
    known = [price.hours for price in waited if price is not None]
    return None if len(known) < len(waited) else max(known, default=0.0)


def _command(file: RuleFile, keys: Sequence[str], speed: Speed, days: int | None) -> str:
    """Return the command line of the restore. For very many keys it has the first ones, and a comment."""
    words = ["tiercache", "restore", *keys[:_NAMED], "--rules", str(file.path), "--speed", speed]
    words += ["--days", str(days)] if days is not None else []
    words.append("--wait")
    more = len(keys) - _NAMED
    return shlex.join(words) + (f"  # and {more} more" if more > 0 else "")


def request_restore(stores: Stores, plan: RestorePlan) -> RequestCounts:
    """Request the restore of all objects without a request, and extend restored copies to the days of the plan.

    Repeatable: a running restore is not requested again.

    Raises:
        StoreError: .unable where a store cannot restore at all; otherwise the first error. Requests made before it
            stand: call again.
    """
    days = PROMOTION_DAYS if plan.days is None else plan.days

    def ask(one: ArchivedObject) -> str:
        if one.state == RESTORING:
            return "running"
        archive = stores.archive(one.tier)
        if archive is None:
            raise StoreError(f"{one.key}: the tier {one.tier} cannot restore", url=stores.store(one.tier).url)
        takes_days = one.storage_class in RESTORED_FIRST
        return archive.restore(one.key, days=days if takes_days else None, speed=plan.speed)

    answers = _side_by_side(ask, plan.objects)
    return RequestCounts(*(answers.count(answer) for answer in ("started", "running", "done")))


def wait_restored(
    stores: Stores,
    plan: RestorePlan,
    *,
    clock: Clock = SYSTEM_CLOCK,
    deadline_s: float | None = None,
    cancel: Event | None = None,
    on_progress: Callable[[int, int], object] | None = None,
) -> tuple[ArchivedObject, ...]:
    """Wait until all objects of a plan can be read. Return those that cannot at the deadline, or when cancelled.

    The stores are asked at most once a minute, about 16 of the missing objects.

    Args:
        stores: Stores of the rule file.
        plan: Plan whose requests were made.
        clock: Clock of the wait.
        deadline_s: Maximum wait, in seconds. None: no limit.
        cancel: Event that ends the wait.
        on_progress: Function that receives the number of readable objects, and of all objects.

    Raises:
        NotFound: An object is gone.
        StoreError: .archived: an object is neither restored nor being restored: request it again. Otherwise a store
            failed.
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


def plan_copy_home(
    file: RuleFile, plan: RestorePlan, *, made_s: float, to: str | None = None, known: Books | None = None
) -> Plan:
    """Return a plan that copies restored objects to the home tier. The archived copies stay until a rule deletes them.

    Objects of one checkpoint are one move, so that it appears complete. Where the archive is only another storage class
    of the home, the class is changed.

    Args:
        file: Rule file.
        plan: Restore plan whose objects can all be read.
        made_s: Current time, in seconds since the epoch.
        to: Name of the destination tier. None: the home tier.
        known: Function that returns the catalog entries of a tier, whose checksums the copies must have. None: no
            entries.
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


def _planned(one: ArchivedObject, book: ChecksumTable) -> PlannedObject:
    n_bytes, etag, crc32c, *_ = book.get(one.key, (-1, None, None, False, None))
    is_it = n_bytes == one.n_bytes and etag is not None and etag == one.etag
    return PlannedObject(one.key, one.n_bytes, one.etag, one.modified_s, crc32c if is_it else None)


def _groups(objects: Sequence[ArchivedObject]) -> list[tuple[str, Kind, list[ArchivedObject]]]:
    """Return the groups that are moved as one: path, kind, and objects of one tier, the completing objects last."""
    layout = group_keys(pa.array([one.key for one in objects], pa.large_string()))
    found: dict[tuple[int, str], list[int]] = {}
    for i, one in enumerate(objects):
        found.setdefault((int(layout.group[i]), one.tier), []).append(i)
    groups: list[tuple[str, Kind, list[ArchivedObject]]] = []
    for (number, _), rows in found.items():
        rows.sort(key=lambda i: int(layout.rank[i]))
        if number < 0:  # in no group, for example a leftover of an unfinished write: each is a group of its own
            groups += [(objects[i].key, "file", [objects[i]]) for i in rows]
            continue
        path = layout.paths[number].as_py()
        single: Kind = "shard" if path.endswith(_SHARD_SUFFIX) else "file"
        groups.append((path, "checkpoint" if layout.checkpoint[number] else single, [objects[i] for i in rows]))
    return groups


def _is_restored(stores: Stores, one: ArchivedObject) -> bool:
    info = stores.head(one.tier, one.key)
    state = state_of(info)
    if state == ARCHIVED:
        message = "it is neither restored nor being restored: request it again: tiercache restore"
        raise StoreError(message, url=f"{stores.store(one.tier).url}/{one.key}", archived=True)
    return state != RESTORING


def _side_by_side(work: Callable[[A], B], items: Iterable[A]) -> list[B]:
    """Return the results in order, computed by 16 threads; the first error ends the work."""
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
