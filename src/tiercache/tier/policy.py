"""The policy: a pure function from a snapshot, rules, prices and capacities to moves and refusals.

The policy works on columns, so that it sorts and compares a million groups without a loop over them.
docs/reference/tiers.md defines the rules. A group gets at most one move. Steps, in this order:

1. Each rule proposes moves (wishes.py). Moves of protected groups, unprofitable moves and moves without room are
   rejected (refusing.py).
2. A tier that would still be above `high` of its capacity sends its least recently used groups down until `low`.
3. Groups that were used since they came to a colder tier are copied up where their rule promotes and the hot tier has
   room below `low`; a higher limit would evict what the watermark has just left there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tiercache.tier.decided import CostColumns, MoveColumns, MoveDecisionTable, MoveRejectionTable
from tiercache.tier.model import CHECKPOINT, Decisions, Snapshot
from tiercache.tier.refusing import (
    CapacityLedger,
    MoveCosts,
    bytes_of,
    compute_costs,
    keep_newest,
    keep_symlink_targets,
    reject_protected,
    reject_unavailable,
    reject_unprofitable,
)
from tiercache.tier.view import Rows, SnapshotIndex
from tiercache.tier.wishes import (
    COPY,
    MOVE,
    Proposals,
    RuleProposals,
    ago,
    column,
    droppable,
    format_reasons,
    hours,
    propose,
    propose_move,
    propose_moves,
)

if TYPE_CHECKING:
    from tiercache.prices import Prices
    from tiercache.tierfile import RuleFile


def decide(
    snapshot: Snapshot,
    file: RuleFile,
    prices: Sequence[Prices | None],
    *,
    capacity_bytes: Sequence[int | None],
    missing: Mapping[str, str] | None = None,
) -> Decisions:
    """Return the moves and refusals for a snapshot. Deterministic: equal inputs give equal decisions.

    Args:
        snapshot: Snapshot of the tiers of the rule file.
        file: Rule file, for its tiers, rules, pins and tags.
        prices: Prices of each tier; None: unknown, and costs are not considered for moves of this tier.
        capacity_bytes: Capacity of each tier in bytes; None: unlimited.
        missing: Name of each tier that may not be mounted, and the reason (see marks.py). The policy moves nothing to
            such a tier, and deletes nothing while there is one.

    Raises:
        ValueError: The snapshot has other tiers than the file, prices or capacities do not have one entry per tier, or
            a glob is malformed.
    """
    for name, values in (("prices", prices), ("capacity_bytes", capacity_bytes)):
        if len(values) != len(file.tiers):
            raise ValueError(f"expected {name} of {len(file.tiers)} tiers, got {len(values)}")
    return _Deciding(SnapshotIndex.of(snapshot, file, prices), capacity_bytes, missing or {}).all()


class _Deciding:
    """Collects the moves of one plan. moving: bool[n_groups], whether the group has a move already."""

    def __init__(self, view: SnapshotIndex, capacity_bytes: Sequence[int | None], missing: Mapping[str, str]) -> None:
        self.view, self.room, self.missing = view, CapacityLedger(view, capacity_bytes), missing
        self.moving = np.zeros(view.snapshot.n_groups, np.bool_)
        self.moves: list[tuple[Proposals, MoveCosts]] = []
        self.refused: list[Proposals] = []

    def all(self) -> Decisions:
        """Run the three steps of the policy."""
        rules = [propose(self.view, rule, number) for number, rule in enumerate(self.view.file.rules)]
        for rule in rules:
            self.refused.append(reject_protected(self.view, rule.refused, self.refused))
            wishes = keep_newest(self.view, reject_protected(self.view, rule.wanted, self.refused), self.refused)
            wishes = keep_symlink_targets(self.view, wishes, self.refused)
            wishes = reject_unavailable(self.view, wishes, self.refused, self.missing)
            self._make(*reject_unprofitable(self.view, wishes, self.refused))
        for tier in range(self.view.n_tiers - 1):
            self._keep_below_high(tier, rules)
        for number, rule in enumerate(rules):
            if self.view.hot is not None and self.view.file.rules[number].promote == "on_access":
                self._promote(self.view.hot, rule, number)
        return self._decisions()

    def _make(self, wishes: Proposals, dollars: MoveCosts, share: float = 1.0) -> None:
        fits = self.room.admit(wishes, self.refused, share)
        self.moving[wishes.group[fits]] = True
        self.moves.append((wishes.take(fits), dollars.take(fits)))

    # -- watermarks --------------------------------------------------------------------------------------------------

    def _keep_below_high(self, tier: int, rules: Sequence[RuleProposals]) -> None:
        limit = self.room.limits[tier]
        used = int(self.room.there[tier] + self.room.coming[tier] - self.room.going[tier])
        what = self.view.file.tiers[tier]
        if limit is None or used <= limit * what.high:
            return
        rows = self._may_go(tier, rules)
        wanted, stuck = self._sent_down(tier, rows, f"{what.name} is {used / max(limit, 1):.1%} full")
        passed = [stuck]
        wanted = reject_unavailable(self.view, wanted, passed, self.missing)
        wishes = wanted.take(np.lexsort((wanted.group, -self.view.unused_s[wanted.group])))
        dollars = compute_costs(self.view, wishes)
        freed = np.cumsum(np.where(self.room.fitting(wishes), bytes_of(self.view, wishes), 0))
        n = int(np.searchsorted(freed, used - int(limit * what.low))) + 1
        # Report only those rejected groups that the watermark would have chosen: unused for at least as long.
        last_s = self.view.unused_s[wishes.group[n - 1]] if n <= len(wishes) else -np.inf
        over = Proposals.all(passed)
        self.refused.append(over.take(self.view.unused_s[over.group] >= last_s))
        self._make(wishes.take(np.arange(len(wishes))[:n]), dollars.take(np.arange(len(wishes))[:n]))

    def _may_go(self, tier: int, rules: Sequence[RuleProposals]) -> Rows:
        """Return the groups whose copy in the tier the watermark may send down.

        A move of its own, a pin, a reader, an incomplete or newest checkpoint, a symbolic link and a keep list hold a
        copy.
        """
        view = self.view
        held = self.moving | view.snapshot.in_use | (view.pin >= 0) | (view.at[tier] < 0)
        held |= (view.snapshot.kind == CHECKPOINT) & (~view.snapshot.complete | view.newest)
        linked = [copy for copy in view.snapshot.links if view.snapshot.tier[copy] == tier]
        held[view.snapshot.group[linked]] = True
        for rule in rules:
            if rule.kept is not None:
                held[rule.rows[rule.kept[tier]]] = True
        return np.flatnonzero(~held)

    def _sent_down(self, tier: int, rows: Rows, full: str) -> tuple[Proposals, Proposals]:
        """Propose to drop copies that a lower tier holds verified, and to move the others to the next tier."""
        dst = column(len(rows), tier + 1, np.int8)
        for lower in range(self.view.n_tiers - 1, tier, -1):
            dst[droppable(self.view, rows, tier, lower)] = lower
        high = f"(high = {self.view.file.tiers[tier].high:.0%}), and this was not used for"
        text = format_reasons(lambda unused: f"{full} {high} {ago(unused)}", hours(self.view.unused_s[rows]))
        return propose_moves(self.view, rows, tier, dst, (-1 - tier, text))

    # -- promotion ---------------------------------------------------------------------------------------------------

    def _promote(self, hot: int, rule: RuleProposals, number: int) -> None:
        """Copy up the groups that were used since they came to a lower tier, unless a rule sends them down.

        The most recently used groups come first.
        """
        view = self.view
        rows = rule.rows[rule.stays & ~self.moving[rule.rows] & (view.pin[rule.rows] < 0) & ~view.has(hot, rule.rows)]
        rows = rows[view.snapshot.complete[rows] & ~view.snapshot.in_use[rows]]
        sources = view.at[:, rows] >= 0
        sources[: hot + 1] = False
        came_s = np.full(len(rows), -np.inf)
        for tier in range(view.n_tiers - 1, hot, -1):
            lies = sources[tier]
            came_s[lies] = view.snapshot.modified_s[view.at[tier, rows[lies]]]
        used = sources.any(axis=0) & (view.snapshot.last_use_s[rows] > came_s)
        rows, sources = rows[used], sources[:, used]
        order = np.lexsort((rows, view.unused_s[rows]))
        rows, sources = rows[order], sources[:, order]
        unused = hours(view.unused_s[rows])
        text = format_reasons(lambda unused: f"used {ago(unused)} ago, since it lies below {view.name(hot)}", unused)
        wanted, stuck = propose_move(view, rows, sources, hot, (number, text))
        self.refused.append(_copies(stuck))
        wishes = reject_unavailable(view, _copies(wanted), self.refused, self.missing)
        self._make(wishes, compute_costs(view, wishes), view.file.tiers[hot].low)

    # -- decisions ---------------------------------------------------------------------------------------------------

    def _decisions(self) -> Decisions:
        wishes = Proposals.all(part for part, _ in self.moves)
        dollars = MoveCosts.all(part for _, part in self.moves)
        order = np.argsort(wishes.action, kind="stable")
        refused = Proposals.all(self.refused)
        _, first = np.unique(refused.group, return_index=True)
        first = first[~self.moving[refused.group[first]]]
        moves = MoveDecisionTable(self._ways(wishes.take(order)), _dollars(dollars.take(order)))
        return Decisions(moves, MoveRejectionTable(self._ways(refused.take(first))))

    def _ways(self, wishes: Proposals) -> MoveColumns:
        rules = [rule.name for rule in self.view.file.rules]
        # The rule number of a watermark is -1 - tier, so that the names of watermarks are indexed from the end.
        rules += [f"tiers.{name}.high" for name in reversed(self.view.snapshot.tiers)]
        return MoveColumns(wishes.group, wishes.action, wishes.src, wishes.dst, wishes.rule, wishes.text, rules)


def _dollars(dollars: MoveCosts) -> CostColumns:
    return CostColumns(dollars.once, dollars.saving_month, dollars.break_even_days)


def _copies(wishes: Proposals) -> Proposals:
    """Turn moves into copies: a promotion leaves the lower copy. A change of class within one URL stays as it is."""
    action = np.where(wishes.action == MOVE, COPY, wishes.action).astype(np.int8)
    return Proposals(wishes.group, action, wishes.src, wishes.dst, wishes.rule, wishes.text)
