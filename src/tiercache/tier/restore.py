"""Restores of archived objects: their cost and duration, the requests, and the wait until the objects can be read."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from tiercache.errors import NotFound, StoreError
from tiercache.prices import SPEEDS, Speed
from tiercache.tier.costs import RESTORE_DAYS, restore_dollars, restored_home_dollars
from tiercache.tier.model import ARCHIVED, RESTORED, RESTORING
from tiercache.tier.stores import CLASSES_TO_RESTORE, Stores, state_of
from tiercache.waiting import SYSTEM_CLOCK, Clock, wait_for

if TYPE_CHECKING:
    from tiercache.prices import Prices
    from tiercache.store.archive import RestoreState
    from tiercache.tier.rules import RuleFile

A = TypeVar("A")
B = TypeVar("B")

_N_THREADS = 16
_LONGEST_POLL_S = 60.0
_SHARD_SUFFIX = ".tcs"
_MOST_NAMES = 20  # in a command line


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
    def unrequested(self) -> tuple[ArchivedObject, ...]:
        """Objects that need a request: nobody has made one."""
        return tuple(one for one in self.objects if one.state == ARCHIVED)


def plan_restore(
    file: RuleFile,
    stores: Stores,
    keys: Iterable[str],
    prices: Sequence[Prices | None],
    *,
    speed: Speed = "standard",
    days: int | None = None,
    to: str | None = None,
) -> RestorePlan:
    """Plan the restore of some objects. Asks every tier for every key; changes nothing.

    keys: Relative to the URLs of the tiers. prices: Of each tier; None where they are unknown. days: See RestorePlan.
    to: Name of the tier to which the objects are copied afterwards; None: the home tier.

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
    found = _in_parallel(lambda key: _copies_of(file, stores, key), wanted)
    objects, readable = [], []
    for key, copies in zip(wanted, found, strict=True):
        if not copies:
            names = ", ".join(tier.name for tier in file.tiers)
            raise NotFound(f"{key} is in none of the tiers {names}", url=stores.store(file.home_tier.name).url)
        if any(copy.state not in _NEARER for copy in copies):
            readable.append(key)
        else:
            objects.append(max(copies, key=lambda copy: _NEARER[copy.state]))
    by_name = dict(zip((tier.name for tier in file.tiers), prices, strict=True))
    cost, hours = _estimate(file, objects, by_name, speed, days, to or file.home_tier.name)
    command = _command(file, [one.key for one in objects], speed, days)
    return RestorePlan(tuple(objects), tuple(readable), speed, days, cost, hours, command)


_NEARER = {ARCHIVED: 0, RESTORING: 1, RESTORED: 2}


def _copies_of(file: RuleFile, stores: Stores, key: str) -> list[ArchivedObject]:
    """Return the copies of a key, in the order of the tiers."""
    copies = []
    for name in (tier.name for tier in file.tiers):
        with suppress(NotFound):
            info = stores.head(name, key)
            if stores.tier_of(stores.sharing(name), info) == name:
                facts = info.n_bytes, state_of(info), info.etag, info.storage_class, info.modified_s
                copies.append(ArchivedObject(name, key, *facts))
    return copies


def _estimate(
    file: RuleFile,
    objects: Sequence[ArchivedObject],
    prices: Mapping[str, Prices | None],
    speed: Speed,
    days: int | None,
    to: str,
) -> tuple[float | None, float | None]:
    """Return the dollars for requests that are not made yet, and the hours until all objects can be read.

    Each is None where a price is unknown. days: None: copied to the tier `to` as well.
    """
    cost: float | None = 0.0
    hours: float | None = 0.0
    for name in {one.tier: None for one in objects}:
        archive, target = prices[name], prices[to]
        price = None if archive is None else archive.restore.get(speed)
        if archive is not None and archive.restore and price is None:
            speeds = ", ".join(archive.restore)
            raise ValueError(f"tiers.{name}: {archive.name} has no speed {speed!r} for restores; it has {speeds}")
        states = {one.state for one in objects if one.tier == name}
        n_bytes = np.array([o.n_bytes for o in objects if (o.tier, o.state) == (name, ARCHIVED)], np.int64)
        if states != {RESTORED}:
            hours = None if price is None or hours is None else max(hours, price.hours)
        if not len(n_bytes) or cost is None:
            continue
        if archive is None or price is None:
            cost = None
        elif days is not None or name == to:
            cost += float(restore_dollars(archive, price, n_bytes, RESTORE_DAYS if days is None else days).sum())
        elif target is None:
            cost = None
        else:
            urls = file.tier(name).url, file.tier(to).url
            cost += float(restored_home_dollars(archive, price, target, n_bytes, urls=urls).sum())
    return cost, hours


def _command(file: RuleFile, keys: Sequence[str], speed: Speed, days: int | None) -> str:
    """Return the command line of the restore."""
    options = ["--rules", str(file.path), "--speed", speed]
    options += ["--days", str(days)] if days is not None else []
    return command_line("tier get", keys, [*options, "--wait"])


def command_line(verb: str, names: Sequence[str], options: Sequence[str]) -> str:
    """Return a command line of tiercache that people can run. Of very many names it has the first ones, and a comment.

    Args:
        verb: Words after "tiercache".
        names: Arguments.
        options: Options, with their values.
    """
    more = len(names) - _MOST_NAMES
    line = shlex.join(["tiercache", *verb.split(), *names[:_MOST_NAMES], *options])
    return f"{line}  # and {more} more" if more > 0 else line


def request_restore(stores: Stores, plan: RestorePlan) -> Counter[RestoreState]:
    """Request the restore of all objects without a request, and extend restored copies to the days of the plan.

    Repeatable: a running restore is not requested again. The result counts the answers of the stores.

    Raises:
        StoreError: .unable where a store cannot restore at all; otherwise the first error. Requests made before it
            stand: call again.
    """
    days = RESTORE_DAYS if plan.days is None else plan.days

    def request(one: ArchivedObject) -> RestoreState:
        if one.state == RESTORING:
            return "running"
        archive = stores.s3_classes(one.tier)
        if archive is None:
            url = stores.store(one.tier).url
            raise StoreError(f"{one.key}: the tier {one.tier} cannot restore", url=url, unable=True)
        takes_days = one.storage_class in CLASSES_TO_RESTORE
        return archive.restore(one.key, days=days if takes_days else None, speed=plan.speed)

    return Counter(_in_parallel(request, plan.objects))


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

    The stores are asked at most once a minute, about 16 of the missing objects. deadline_s: Maximum wait; None: no
    limit. on_progress: Receives the number of readable objects, and of all objects.

    Raises:
        NotFound: An object is gone.
        StoreError: .archived: an object is neither restored nor being restored: request it again. Otherwise a store
            failed.
    """
    waiting = [one for one in plan.objects if one.state != RESTORED]

    def is_done() -> bool:
        while waiting:
            some = waiting[:_N_THREADS]
            answers = _in_parallel(lambda one: _is_restored(stores, one), some)
            left = [one for one, done in zip(some, answers, strict=True) if not done]
            waiting[: len(some)] = left
            if on_progress is not None:
                on_progress(len(plan.objects) - len(waiting), len(plan.objects))
            if left:
                return False
        return True

    wait_for(is_done, deadline_s, clock, longest_poll_s=_LONGEST_POLL_S, cancel=cancel)
    return tuple(waiting)


def _is_restored(stores: Stores, one: ArchivedObject) -> bool:
    info = stores.head(one.tier, one.key)
    state = state_of(info)
    if state == ARCHIVED:
        message = "it is neither restored nor being restored: request it again: tiercache tier get"
        raise StoreError(message, url=f"{stores.store(one.tier).url}/{one.key}", archived=True)
    return state != RESTORING


def _in_parallel(work: Callable[[A], B], items: Sequence[A]) -> list[B]:
    """Return the results in order. The first error ends the work."""
    with ThreadPoolExecutor(_N_THREADS, thread_name_prefix="tiercache-restore") as pool:
        return list(pool.map(work, items))
