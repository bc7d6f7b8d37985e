"""What the demo says while it goes: plain frozen values, printed by the command or given as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Step:
    """A chapter begins."""

    title: str


@dataclass(frozen=True, slots=True)
class Note:
    """A sentence about what just happened."""

    text: str


@dataclass(frozen=True, slots=True)
class Packed:
    """A data set as it stands in the store. stored_bytes: of its shards; raw_bytes: of the input."""

    name: str
    url: str
    columns: str
    n_records: int
    n_shards: int
    raw_bytes: int
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class Epoch:
    """One pass, or a part of one, over a data set, training included; "loader only": passes without training.

    how: "cold", "warm", "loader only", "whole", "stopped", "resumed" or "moved". served_bytes: in batches;
    fetched_bytes: from the store. loss: mean over the training records; accuracy: on held-out records; both where
    there is one.
    wait_share: of the time, spent waiting for the loader.
    digests: SHA-256 of each training batch, in order. weights: SHA-256 of the model after it.
    """

    task: str
    epoch: int
    how: str
    n_samples: int
    elapsed_s: float
    wait_share: float
    served_bytes: int
    fetched_bytes: int
    hits: int
    misses: int
    loss: float | None
    accuracy: float | None
    digests: tuple[str, ...] = ()
    weights: str = ""

    @property
    def hit_ratio(self) -> float:
        """Share of the cache's answers that were hits; 1.0 where it was not asked: nothing was needed from it."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 1.0


@dataclass(frozen=True, slots=True)
class Claim:
    """Something that tiercache promises, and whether it held here."""

    text: str
    holds: bool
    found: str


@dataclass(frozen=True, slots=True)
class Held:
    """What lies in a tier, and what that costs a month. when: "before" its data is moved, or "after"."""

    when: str
    tier: str
    n_bytes: int
    n_objects: int
    dollars_month: float


Event: TypeAlias = Step | Note | Packed | Epoch | Claim | Held
EVENTS: dict[str, type[Step | Note | Packed | Epoch | Claim | Held]] = {
    kind.__name__.lower(): kind for kind in (Step, Note, Packed, Epoch, Claim, Held)
}
