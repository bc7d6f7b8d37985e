"""Frozen values of tiering: the snapshot of all copies, moves as columns, the plan with its moves, lazy sequences.

A *group* is the unit of a move: a file, a shard or a checkpoint. Its path is relative to the URLs of the tiers. A
*copy* is a group in one tier. Columns refer to tiers and groups by number; values for people contain names.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeAlias, TypeVar, overload

import numpy as np

from tiercache.catalog.tiers import PlannedObject as PlannedObject

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray


T = TypeVar("T")

# Size of the parts in which larger objects are copied.
PART_BYTES = 8 << 20
# Number of elements that an iteration creates at a time; a larger number is not faster.
AT_A_TIME = 1 << 14


class LazySequence(Sequence[T], Generic[T]):
    """A sequence that behaves as a tuple and creates its elements on access. Immutable; safe from any thread."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]

    @abstractmethod
    def create(self, start: int, end: int) -> Iterator[T]:
        """Create the elements from start to end; both are in range."""

    @overload
    def __getitem__(self, at: int) -> T: ...

    @overload
    def __getitem__(self, at: slice) -> tuple[T, ...]: ...

    def __getitem__(self, at: int | slice) -> T | tuple[T, ...]:
        if not isinstance(at, slice):
            place = range(len(self))[at]  # accepts numpy integers and negative indices, as a tuple does
            return next(self.create(place, place + 1))
        start, end, step = at.indices(len(self))
        if step == 1:
            return tuple(self.create(start, max(start, end)))
        return tuple(self[i] for i in range(start, end, step))

    def __iter__(self) -> Iterator[T]:
        for start, end in self.parts():
            yield from self.create(start, end)

    def parts(self) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of successive parts that cover the sequence."""
        for start in range(0, len(self), AT_A_TIME):
            yield start, min(start + AT_A_TIME, len(self))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other, strict=True))

    def __repr__(self) -> str:
        return repr(tuple(self))


Kind: TypeAlias = Literal["file", "shard", "checkpoint"]
KINDS: tuple[Kind, ...] = ("file", "shard", "checkpoint")
FILE, SHARD, CHECKPOINT = range(3)

Action: TypeAlias = Literal["copy", "move", "drop", "reclass", "delete"]
# In execution order: actions that free room come first, and of these the ones that transfer no bytes.
ACTIONS: tuple[Action, ...] = ("delete", "drop", "reclass", "move", "copy")
DELETE, DROP, RECLASS, MOVE, COPY = range(5)

# States of a copy. READABLE; ARCHIVED: must be restored first; RESTORING: a restore is in progress;
# RESTORED: readable until the restored copy expires.
READABLE, ARCHIVED, RESTORING, RESTORED = range(4)

NO_STEP = -1
NO_SERIES = -1


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """The input of the policy: all groups and their copies. Immutable; row g of a group column is group g.

    Attributes:
        now_s: Time of the snapshot, in seconds since the epoch.
        tiers: Names of the tiers, from the fastest to the coldest, as in the rule file.
        classes: Names of the storage classes of copies; "" is the store's default.
        paths: pa.StringArray or LargeStringArray[n_groups], unique.
        kind: uint8[n_groups], indices of KINDS.
        step: int64[n_groups], training step of a checkpoint; NO_STEP for other groups.
        series: int32[n_groups], number of the run that a checkpoint belongs to; NO_SERIES for other groups.
        complete: bool[n_groups], whether a checkpoint is whole in some tier; True for other groups.
        created_s: float64[n_groups], time when the group was first written, in any tier; a move does not change it.
        last_use_s: float64[n_groups], time of the last use; the date of the oldest copy if no use is known.
        uses: int64[n_groups], number of known uses.
        uses_recorded_since_s: float64[n_groups], time since which uses are recorded. For a shard: since its data set is
            managed by tiers; for other groups: since the last use through a cache of this machine. inf: uses are not
            recorded.
        unreported: bool[n_groups], whether a machine that may have used the group has not reported, so that the group
            does not count as idle.
        in_use: bool[n_groups], whether a job is reading the group now.
        metrics: Name to float64[n_groups], NaN where a checkpoint does not have the metric.
        unread: bool[n_groups], whether a checkpoint has files that may hold metrics, none of which can be read, and was
            not put where it lies by the mover.
        tags: Group to its tags, for groups that have tags.
        group: int32[n_copies], ascending, the group of each copy; row c of this and the following columns is copy c.
        tier: int8[n_copies], ascending within a group.
        n_objects: int32[n_copies], number of objects of the copy.
        n_bytes: int64[n_copies], total size of its objects.
        smallest_bytes: int64[n_copies], size of its smallest object.
        modified_s: float64[n_copies], time when its newest object was written, by the store's clock.
        storage_class: int16[n_copies], indices of `classes`.
        state: uint8[n_copies], READABLE, ARCHIVED, RESTORING or RESTORED.
        whole: bool[n_copies], whether the copy has all objects of the group, with the same sizes as the other copies.
        verified: bool[n_copies], whether its bytes were compared with checksums and have not changed since.
        links: Copy to a symbolic link in its tier that points to the copy or into it, for copies that have such a link:
            it would dangle without the copy.
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
    uses_recorded_since_s: NDArray[np.float64]
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
        """Number of groups."""
        return len(self.kind)

    @property
    def n_copies(self) -> int:
        """Number of copies of all groups."""
        return len(self.group)


@dataclass(frozen=True, slots=True)
class MoveCost:
    """The cost of a move and its effect on the monthly cost, in US dollars.

    Attributes:
        once: One-time cost: requests, retrieval, egress and early-deletion fee.
        saving_month: Storage cost saved per month; negative: the move makes storage dearer.
        break_even_days: Days until the savings exceed `once`; None: never.
    """

    once: float = 0.0
    saving_month: float = 0.0
    break_even_days: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class MoveColumns:
    """Moves that a rule proposes, that the policy has decided, or that it rejects; row i of every column is one.

    Attributes:
        group: int64[n], number of the group.
        action: int8[n], indices of ACTIONS.
        src: int8[n], tier that is read, or from which the copy is dropped.
        dst: int8[n], tier that receives the copy, or (drop) holds the other copy; -1: delete.
        rule: int16[n], number of the rule, or -1 - tier for the watermark of a tier.
        reason: object[n], reason for people, with the figures behind the decision. Of a rejected move: why it is
            rejected.
        once: float64[n], one-time cost in US dollars: requests, retrieval, egress and early-deletion fee.
        saving_month: float64[n], storage cost saved per month in US dollars; negative: the move makes storage dearer.
    """

    group: NDArray[np.int64]
    action: NDArray[np.int8]
    src: NDArray[np.int8]
    dst: NDArray[np.int8]
    rule: NDArray[np.int16]
    reason: NDArray[np.object_]
    once: NDArray[np.float64]
    saving_month: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.group)

    @classmethod
    def of(cls, group: NDArray[np.int64], action: Any, src: Any, dst: Any, rule: Any, reason: Any) -> MoveColumns:
        """Return moves without costs. Each argument after `group` is a column, or one value for all rows."""
        n = len(group)
        numbers = (np.full(n, action, np.int8), np.full(n, src, np.int8), np.full(n, dst, np.int8))
        return cls(
            group, *numbers, np.full(n, rule, np.int16), np.full(n, reason, np.object_), np.zeros(n), np.zeros(n)
        )

    @classmethod
    def concat(cls, parts: Iterable[MoveColumns]) -> MoveColumns:
        """Concatenate the parts."""
        parts = [NO_MOVES, *parts]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__slots__))

    def take(self, chosen: NDArray[Any]) -> MoveColumns:
        """Return the rows that a boolean mask, or an array of row numbers, selects."""
        return MoveColumns(*(getattr(self, name)[chosen] for name in MoveColumns.__slots__))


NO_MOVES = MoveColumns.of(np.empty(0, np.int64), 0, 0, -1, 0, "")


@dataclass(frozen=True, slots=True, eq=False)
class Decisions:
    """The output of the policy for one snapshot.

    Attributes:
        moves: Moves in execution order; at most one per group.
        refusals: Rejected moves; at most one per group, and none for groups that are moved.
        rules: Names of rules, then of the watermarks from the last tier to the first: the numbers of watermarks are
            negative and count from the end.
    """

    moves: MoveColumns = NO_MOVES
    refusals: MoveColumns = NO_MOVES
    rules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Move:
    """A move of a plan, with names and with every object, the objects that complete the group last.

    Attributes:
        number: Number within the plan, from 1.
        path: Path of the group.
        kind: Kind of the group.
        action: Action.
        src: Name of the source tier.
        dst: Name of the destination tier; None: delete.
        rule: Name of the rule, or of the watermark.
        reason: Reason for people.
        objects: Objects of the copy in src.
        money: Cost and savings.
        seconds: Estimated duration.
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
    money: MoveCost = field(default_factory=MoveCost)
    seconds: float = 0.0

    @property
    def n_bytes(self) -> int:
        """Total size of the objects."""
        return sum(one.n_bytes for one in self.objects)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A move that a rule proposes and that is not planned, with the reason. n_bytes: Size of the copy in src."""

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
    """A tier as it was when the plan was made: `tier apply` stops if the rule file has changed it since."""

    name: str
    role: str
    url: str
    storage_class: str | None = None
    prices: str = ""


@dataclass(frozen=True, slots=True)
class TierTotals:
    """Totals of one tier: bytes, objects and monthly cost in US dollars."""

    n_bytes: int = 0
    n_objects: int = 0
    dollars_month: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """The exact moves to execute. docs/reference/tiers.md describes the plan file.

    Attributes:
        id: Identifier, computed from the content.
        made_s: Time of the snapshot, in seconds since the epoch.
        rules: Path of the rule file.
        rules_sha256: SHA-256 of the rule file, in hex.
        tiers: Tiers of the rule file.
        moves: Moves in execution order.
        refusals: Rejected moves.
        before: Tier name to its totals before the plan is executed.
        after: Tier name to its totals afterwards.
    """

    id: str
    made_s: float
    rules: str
    rules_sha256: str
    tiers: tuple[PlannedTier, ...]
    moves: Sequence[Move]
    refusals: Sequence[Refusal] = ()
    before: Mapping[str, TierTotals] = field(default_factory=dict)
    after: Mapping[str, TierTotals] = field(default_factory=dict)
