"""Results of moves: what was done, what was stopped, and the progress."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiercache.catalog.tiers import JournalRow


@dataclass(frozen=True, slots=True)
class StoppedMove:
    """A move that was not made. plan, number: Identify the move. reason: What was expected, and what was found."""

    number: int
    reason: str
    path: str = ""
    plan: str = ""


@dataclass(frozen=True, slots=True)
class ApplyResult:
    """Result of apply() or settle().

    Attributes:
        done: Number of moves that are now as their plan asks, whenever they were made.
        stopped: Moves that were not made, with reasons.
        waiting_drops: Number of deletions of all plans that wait for their grace period.
        n_bytes: Bytes that were copied; of settle(): bytes that were deleted.
        proof_bytes: Bytes of copies in local folders that settle() read back before it deleted their sources.
    """

    done: int = 0
    stopped: tuple[StoppedMove, ...] = ()
    waiting_drops: int = 0
    n_bytes: int = 0
    proof_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a plan, or of the deletions that are due. done_bytes: Bytes copied; of deletions: bytes read back."""

    done_moves: int
    n_moves: int
    done_bytes: int
    n_bytes: int


@dataclass(slots=True)
class SettlementCounts:
    """Counts of one settlement, which grow as it runs. stopped: Moves that were kept or cancelled, with reasons."""

    n_done: int = 0
    n_waiting: int = 0
    n_bytes: int = 0
    proof_bytes: int = 0
    stopped: list[tuple[JournalRow, str]] = field(default_factory=list)
