"""The events that the demo yields, its messages to and from training processes, and the claims that it checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Step:
    """A new step of the story begins."""

    title: str


@dataclass(frozen=True, slots=True)
class Note:
    """A sentence about the current step."""

    text: str


@dataclass(frozen=True, slots=True)
class PackedDataSet:
    """A packed data set.

    Attributes:
        name: Name of the data set.
        url: URL of the data set.
        columns: Names of its columns.
        n_records: Number of records.
        n_shards: Number of shards.
        raw_bytes: Bytes of the input.
        stored_bytes: Bytes of the shards.
    """

    name: str
    url: str
    columns: str
    n_records: int
    n_shards: int
    raw_bytes: int
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class Epoch:
    """An epoch, or a part of one, over a data set; with training, except for "loader only".

    Attributes:
        task: Name of the model and its data set.
        epoch: Epoch, counted from 1.
        how: "cold", "warm", "loader only", "whole", "stopped", "resumed" or "moved".
        n_samples: Number of records.
        elapsed_s: Duration in seconds.
        wait_share: Fraction of the duration spent waiting for the loader.
        served_bytes: Bytes of the batches.
        fetched_bytes: Bytes fetched from the store.
        hits: Number of cache hits.
        misses: Number of cache misses.
        loss: Mean loss over the training records; None without training.
        accuracy: Accuracy on held-out records; None without such records.
        digests: SHA-256 of each training batch, in order.
        weights: SHA-256 of the model after the epoch.
    """

    task: str
    epoch: int
    mode: str
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
        """Return the fraction of cache requests that were hits; 1.0 without requests."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 1.0


@dataclass(frozen=True, slots=True)
class Claim:
    """A promise of tiercache, whether it held, and what was found."""

    text: str
    holds: bool
    found: str


@dataclass(frozen=True, slots=True)
class TierContents:
    """The contents of a tier and their monthly cost.

    Attributes:
        when: "before" or "after" the moves.
        tier: Name of the tier.
        n_bytes: Bytes in the tier.
        n_objects: Number of objects in the tier.
        dollars_month: Cost in dollars per month.
    """

    when: str
    tier: str
    n_bytes: int
    n_objects: int
    dollars_month: float


Event: TypeAlias = Step | Note | PackedDataSet | Epoch | Claim | TierContents
EVENTS: dict[str, type[Step | Note | PackedDataSet | Epoch | Claim | TierContents]] = {
    kind.__name__.lower(): kind for kind in (Step, Note, PackedDataSet, Epoch, Claim, TierContents)
}
