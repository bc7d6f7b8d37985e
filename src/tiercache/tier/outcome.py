"""What came of moves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiercache.catalog.tiers import JournalRow


@dataclass(frozen=True, slots=True)
class Stopped:
    """A move that was not made. plan, number: which; reason: what was expected, and what was found."""

    number: int
    reason: str
    path: str = ""
    plan: str = ""


@dataclass(frozen=True, slots=True)
class Applied:
    """What was done.

    Attributes:
        done: moves that are as their plan wants them, now or before.
        stopped: those that are not, and why.
        waiting_drops: how many deletions wait for their grace, of all plans.
        n_bytes: that were copied; by settle(): that were dropped.
        proof_bytes: of copies in folders, that settle() read back before it dropped what they were made from.
    """

    done: int = 0
    stopped: tuple[Stopped, ...] = ()
    waiting_drops: int = 0
    n_bytes: int = 0
    proof_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a plan, or the deletions that are due, are. n_moves, n_bytes: of all of it; of deletions: read back."""

    done_moves: int
    n_moves: int
    done_bytes: int
    n_bytes: int


@dataclass(slots=True)
class Settled:
    """Deletions as they come about. proof_bytes: of copies, read back; stopped: what was kept or cancelled, and why."""

    n_done: int = 0
    n_waiting: int = 0
    n_bytes: int = 0
    proof_bytes: int = 0
    stopped: list[tuple[JournalRow, str]] = field(default_factory=list)
