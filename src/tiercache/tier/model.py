"""Frozen values of tiering: what there is (Snapshot), what should be done (Move, Refusal), and a plan of it.

A *group* is what is moved as one: a file, a shard, a checkpoint. Its path is relative to the URLs of the tiers; a copy
is a group in one tier. Tiers and groups are numbers in the columns, names in what people see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

Kind: TypeAlias = Literal["file", "shard", "checkpoint"]
KINDS: tuple[Kind, ...] = ("file", "shard", "checkpoint")
FILE, SHARD, CHECKPOINT = range(3)

Action: TypeAlias = Literal["copy", "move", "drop", "reclass", "delete"]

# Of a copy. HERE can be read; ARCHIVED must be restored first; RESTORING is on its way; RESTORED can be read a while.
HERE, ARCHIVED, RESTORING, RESTORED = range(4)

NO_STEP = -1
NO_SERIES = -1


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """What there is, as the planner sees it. Nothing in it is changed; row g of a column of groups is group g.

    Attributes:
        now_s: when it was taken, seconds since the epoch.
        tiers: names, from the fastest to the coldest, as the rule file has them.
        classes: names of storage classes that copies have; "" is the store's own.
        paths: pa.StringArray or LargeStringArray[n_groups], no two alike.
        kind: uint8[n_groups], numbers of KINDS.
        step: int64[n_groups], of checkpoints; NO_STEP.
        series: int32[n_groups], a number for each run that checkpoints belong to; NO_SERIES for all else.
        complete: bool[n_groups], a checkpoint that is whole in some tier; True for all else.
        created_s: float64[n_groups], when it was written first, wherever that was: a move makes nothing younger.
        last_use_s: float64[n_groups], when it was used last; where nothing is known of it, the date of its oldest copy.
        uses: int64[n_groups], how often, as far as is known.
        counted_since_s: float64[n_groups], from when on its uses are known: of a shard, since tiers look after its data
            set; of anything else, since its last use through a cache of this machine. inf: nobody counts them.
        unreported: bool[n_groups], a machine that may have used it has not reported: it is not idle.
        in_use: bool[n_groups], somebody reads it now.
        metrics: name -> float64[n_groups], NaN where a checkpoint has not got it.
        unread: bool[n_groups], a checkpoint with files that may hold metrics, none of which can be read, where no mover
            has put it there.
        tags: group -> its tags, of those that have some.
        group: int32[n_copies], rising: whose copy; row c of the columns below is copy c.
        tier: int8[n_copies], rising within a group.
        n_objects: int32[n_copies]; n_bytes: int64[n_copies], of all its objects together.
        smallest_bytes: int64[n_copies], its smallest object.
        modified_s: float64[n_copies], when its youngest object was written, by the store's clock.
        storage_class: int16[n_copies], numbers of `classes`.
        state: uint8[n_copies], HERE and so on.
        whole: bool[n_copies], all objects of the group are in this copy, with the sizes they have elsewhere.
        links: copy -> a symbolic link in its tier that leads to it, of those that have one: it would lead nowhere.
        verified: bool[n_copies], its bytes were compared with checksums when it was made, and it has not changed since.
    """

    now_s: float
    tiers: tuple[str, ...]
    classes: tuple[str, ...]
    paths: pa.Array
    kind: NDArray[np.uint8]
    step: NDArray[np.int64]
    series: NDArray[np.int32]
    complete: NDArray[np.bool_]
    created_s: NDArray[np.float64]
    last_use_s: NDArray[np.float64]
    uses: NDArray[np.int64]
    counted_since_s: NDArray[np.float64]
    unreported: NDArray[np.bool_]
    in_use: NDArray[np.bool_]
    metrics: Mapping[str, NDArray[np.float64]]
    unread: NDArray[np.bool_]
    tags: Mapping[int, frozenset[str]]
    group: NDArray[np.int32]
    tier: NDArray[np.int8]
    n_objects: NDArray[np.int32]
    n_bytes: NDArray[np.int64]
    smallest_bytes: NDArray[np.int64]
    modified_s: NDArray[np.float64]
    storage_class: NDArray[np.int16]
    state: NDArray[np.uint8]
    whole: NDArray[np.bool_]
    verified: NDArray[np.bool_]
    links: Mapping[int, str]

    @property
    def n_groups(self) -> int:
        """How many groups there are."""
        return len(self.kind)

    @property
    def n_copies(self) -> int:
        """How many copies there are of them."""
        return len(self.group)


@dataclass(frozen=True, slots=True)
class Money:
    """What a move costs and brings, in dollars.

    once: requests, retrieval, egress, early-deletion fee; saving_month: what keeping costs less in a month from then on
    (negative: more); break_even_days: until `once` is earned back; None: never.
    """

    once: float = 0.0
    saving_month: float = 0.0
    break_even_days: float | None = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """A move as the policy decides it: of a group by its number, tiers by theirs.

    src: the tier that it is read from, or dropped from; dst: the tier that gets it, or (drop) has it; None: delete.
    reason: for people, with the figures that decided it.
    """

    group: int
    action: Action
    src: int
    dst: int | None
    rule: str
    reason: str
    money: Money = field(default_factory=Money)


@dataclass(frozen=True, slots=True)
class Declined:
    """A move that a rule asks for and that is not made, with the reason."""

    group: int
    action: Action
    src: int
    dst: int | None
    rule: str
    reason: str


@dataclass(frozen=True, slots=True)
class Decisions:
    """What the policy says of a snapshot. Moves in the order in which they are to be made; a group has one at most."""

    moves: Sequence[Chosen] = ()
    refusals: Sequence[Declined] = ()


@dataclass(frozen=True, slots=True)
class PlannedObject:
    """An object of a move, as it was seen: what is no longer so is not moved.

    key: relative to the tier's URL. crc32c: where the manifest or the catalog knows it.
    """

    key: str
    n_bytes: int
    etag: str | None = None
    modified_s: float | None = None
    crc32c: int | None = None


@dataclass(frozen=True, slots=True)
class Move:
    """A move as a plan has it: with names, and every object that it is about, those that make it whole last.

    number: within the plan; objects: of the copy in src; seconds: about how long.
    """

    number: int
    path: str
    kind: Kind
    action: Action
    src: str
    dst: str | None
    rule: str
    reason: str
    objects: tuple[PlannedObject, ...]
    money: Money = field(default_factory=Money)
    seconds: float = 0.0

    @property
    def n_bytes(self) -> int:
        """Of all its objects."""
        return sum(one.n_bytes for one in self.objects)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A move that is asked for and not planned, with the reason."""

    path: str
    kind: Kind
    action: Action
    src: str
    dst: str | None
    rule: str
    reason: str
    n_bytes: int = 0


@dataclass(frozen=True, slots=True)
class PlannedTier:
    """A tier as a plan was made for it: apply stops where the rule file says otherwise by now."""

    name: str
    role: str
    url: str
    storage_class: str | None = None
    prices: str = ""


@dataclass(frozen=True, slots=True)
class Holding:
    """What lies in a tier."""

    n_bytes: int = 0
    n_objects: int = 0
    dollars_month: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done, exactly; see docs/reference/tiers.md for its file.

    made_s: seconds since the epoch; rules: the rule file's path, rules_sha256: of its bytes; before, after: by tier.
    """

    id: str
    made_s: float
    rules: str
    rules_sha256: str
    tiers: tuple[PlannedTier, ...]
    moves: Sequence[Move]
    refusals: Sequence[Refusal] = ()
    before: Mapping[str, Holding] = field(default_factory=dict)
    after: Mapping[str, Holding] = field(default_factory=dict)

    def of(self, numbers: Sequence[int]) -> tuple[Move, ...]:
        """The moves of these numbers, in the plan's order."""
        wanted = set(numbers)
        return tuple(move for move in self.moves if move.number in wanted)
