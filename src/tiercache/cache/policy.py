"""Policies: a snapshot in, an order of victims out. Pure functions; deleting, and what may not be, is not theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Resident:
    """A copy as a policy sees it. last_use: a count that grows with every use; pinned: by a person."""

    name: str
    charge_bytes: int
    last_use: int
    pinned: bool = False


Policy: TypeAlias = Callable[[Iterable[Resident]], tuple[str, ...]]


def resident(copies: Iterable[Resident]) -> tuple[str, ...]:
    """Admit until full, then never replace: the best that can be done for one scan an epoch in an unknown order."""
    del copies
    return ()


def lru(copies: Iterable[Resident]) -> tuple[str, ...]:
    """Least recently used first, ties by name; pinned copies never."""
    return tuple(c.name for c in sorted(copies, key=lambda c: (c.last_use, c.name)) if not c.pinned)


# `plan` is told of no reading order yet, and is `resident` without one.
POLICIES: dict[str, Policy] = {"plan": resident, "resident": resident, "lru": lru}


def replaces(policy: str) -> bool:
    """Whether the policy ever makes room: if not, a full cache can say so without being asked for victims."""
    return POLICIES[policy] is not resident
