"""Frozen values of tiering: the snapshot of all copies, moves as columns, the plan with its moves.

A *group* is the unit of a move: a file, a shard or a checkpoint. Its path is relative to the URLs of the tiers. A
*copy* is a group in one tier; the loading path uses the word for a cached object. A *move* is any change of where a
group lies, with one of five *actions*: copy, move, drop, reclass or delete. The action `move` copies a group and
deletes its source. Columns refer to tiers and groups by number; values for people contain names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.keep import CheckpointColumns
from tiercache.model import format_bytes
from tiercache.prices import Sizes

Kind: TypeAlias = Literal["file", "shard", "checkpoint"]
KINDS: tuple[Kind, ...] = ("file", "shard", "checkpoint")
FILE, SHARD, CHECKPOINT = range(3)

Action: TypeAlias = Literal["copy", "move", "drop", "reclass", "delete"]
# In the order of plans: actions that free room come first, and of these the ones that transfer no bytes.
ACTIONS: tuple[Action, ...] = ("delete", "drop", "reclass", "move", "copy")
DELETE, DROP, RECLASS, MOVE, COPY = range(5)

STANDARD = "STANDARD"  # storage class of S3 objects that name none

# States of a copy. READABLE; ARCHIVED: must be restored first; RESTORING: a restore is in progress;
# RESTORED: readable until the restored copy expires.
READABLE, ARCHIVED, RESTORING, RESTORED = range(4)

NO_STEP = -1
NO_RUN = -1


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot(CheckpointColumns):
    """The input of the policy: all groups and their copies. Immutable; row g of a group column is group g.

    Of groups that are no checkpoints, `run` is NO_RUN, `step` is NO_STEP and `complete` is True. `created_s` is when
    the newest object was written; the earliest such date of all copies, because a move keeps it. `unread` is False for
    what the mover moved, which was not among the best while its metrics were readable.
    """

    tiers: tuple[str, ...]  # names, from the fastest to the coldest, as in the rule file
    classes: tuple[str, ...]  # names of the storage classes of copies; "" is the store's default
    paths: pa.Array  # string or large_string, unique
    kind: NDArray[np.uint8]  # indices of KINDS
    last_use_s: NDArray[np.float64]  # time of the last use; the date of the oldest copy if no use is known
    # Time since which uses are tracked; inf: they are not. Of a shard: since its data set is tracked; of other groups:
    # since the last use through a cache of this machine.
    uses_tracked_since_s: NDArray[np.float64]
    # Whether a machine that may have used the group has not reported, so that the group does not count as idle.
    unreported: NDArray[np.bool_]
    in_use: NDArray[np.bool_]  # whether a job reads the shard now; False for other groups, whose readers are not known
    # From here on, row c is copy c.
    group: NDArray[np.int32]  # ascending
    tier: NDArray[np.int8]  # ascending within a group
    n_objects: NDArray[np.int32]
    n_bytes: NDArray[np.int64]  # total size of the objects
    smallest_bytes: NDArray[np.int64]  # size of the smallest object
    modified_s: NDArray[np.float64]  # when the newest object was written, by the store's clock
    storage_class: NDArray[np.int16]  # indices of `classes`
    state: NDArray[np.uint8]  # READABLE, ARCHIVED, RESTORING or RESTORED
    whole: NDArray[np.bool_]  # whether it has all objects of the group, with the same sizes as the other copies
    verified: NDArray[np.bool_]  # whether its bytes were compared with checksums and have not changed since
    # By copy: a symbolic link that points to the copy or into it, or that lies in its folder.
    links: Mapping[int, str]
    # By group: the reason for people why no move touches it: two tiers have different objects under its name
    # (listing.find_conflicts()), or it is a shard of a data set outside the home tier.
    immovable: Mapping[int, str] = field(default_factory=dict)
    # Groups that their own pin.json pins, or whose pin.json cannot be read.
    pinned: frozenset[int] = frozenset()
    # By group: the reason for people of a hold in force (stores.Hold), which protects the group like a pin.
    held: Mapping[int, str] = field(default_factory=dict)

    @property
    def n_groups(self) -> int:
        return len(self.kind)

    @property
    def n_copies(self) -> int:
        return len(self.group)

    def sizes(self, copies: NDArray[np.int64]) -> Sizes:
        return Sizes(self.n_objects[copies].astype(np.int64), self.n_bytes[copies], self.smallest_bytes[copies])


@dataclass(frozen=True, slots=True, eq=False)
class MoveColumns:
    """Moves that a rule proposes, that the policy has decided, or that it refuses; row i of every column is one."""

    group: NDArray[np.int64]
    action: NDArray[np.int8]  # indices of ACTIONS
    src: NDArray[np.int8]  # tier that is read, or from which the copy is dropped
    dst: NDArray[np.int8]  # tier that receives the copy, or (drop) holds the other copy; -1: delete
    rule: NDArray[np.int16]  # number of the rule, or -1 - tier for the watermark of a tier
    reason: NDArray[np.object_]  # for people: why it is moved, with the figures, or why it is refused
    once: NDArray[np.float64]  # one-time cost in US dollars: requests, retrieval, egress and early-deletion fee
    saving_month: NDArray[np.float64]  # US dollars of storage saved per month; negative: the move makes it dearer

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
        parts = [NO_MOVES, *parts]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__slots__))

    def take(self, chosen: NDArray[Any]) -> MoveColumns:
        return MoveColumns(*(getattr(self, name)[chosen] for name in MoveColumns.__slots__))


NO_MOVES = MoveColumns.of(np.empty(0, np.int64), 0, 0, -1, 0, "")


@dataclass(frozen=True, slots=True)
class ExceededLimit:
    rule: str
    n_bytes: int  # bytes that would be deleted
    matched_bytes: int  # bytes that the rule matches
    max_delete: str  # largest share or size that is deleted without a confirmation, as in the rule file

    @property
    def text(self) -> str:
        deleted, matched = format_bytes(self.n_bytes), format_bytes(self.matched_bytes)
        return f"{self.rule}: would delete {deleted} of {matched} for good, and its max_delete is {self.max_delete}"


@dataclass(frozen=True, slots=True, eq=False)
class Decisions:
    """The output of the policy: moves in execution order, at most one per group, and refused moves."""

    moves: MoveColumns = NO_MOVES
    refusals: MoveColumns = NO_MOVES  # at most one per group, and none for groups that are moved
    # Names of rules, then of the watermarks from the last tier to the first: numbers of watermarks are negative.
    rules: tuple[str, ...] = ()
    exceeded: tuple[ExceededLimit, ...] = ()  # rules whose deletions a person must confirm
