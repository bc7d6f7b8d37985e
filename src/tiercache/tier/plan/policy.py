"""The policy: a pure function from a snapshot, rules, prices and capacities to moves and refusals.

The policy works on columns, so that it sorts and compares a million groups without a loop over them.
docs/reference/tiers.md defines the rules. A group gets at most one move. Steps, in this order:

1. Each rule proposes moves (proposals.py). Moves of protected groups, unprofitable moves and moves without room are
   rejected.
2. A tier that would still be above `high` of its capacity sends its least recently used groups down until `low`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tiercache.model import format_bytes
from tiercache.tier.costs import (
    DAY_S,
    Sizes,
    break_even_days,
    copy_dollars,
    early_dollars,
    month_dollars,
    reclass_dollars,
)
from tiercache.tier.model import CHECKPOINT, READABLE, Decisions, Snapshot
from tiercache.tier.plan.proposals import (
    COPY,
    DELETE,
    DROP,
    MOVE,
    RECLASS,
    Flags,
    Proposals,
    Rows,
    RuleProposals,
    SnapshotIndex,
    Texts,
    ago,
    append_to_reasons,
    column,
    droppable,
    format_reasons,
    hours,
    one_text,
    propose,
    propose_moves,
    span,
)
from tiercache.tier.plan.tables import CostColumns, MoveColumns, MoveDecisionTable, MoveRejectionTable
from tiercache.tier.stores import deletion_block_reason

if TYPE_CHECKING:
    from tiercache.prices import Prices
    from tiercache.tier.rules import RuleFile


Dollars = NDArray[np.float64]

_NOT_WHOLE = "no copy of it is whole: it is not complete yet, or two copies differ: remove or rename one of the two"


@dataclass(frozen=True, slots=True, eq=False)
class MoveCosts:
    """Costs of proposed moves in US dollars; one row per move: one-time cost, and savings per month."""

    once: Dollars
    saving_month: Dollars

    @property
    def break_even_days(self) -> Dollars:
        """Days until break-even of each move; inf: never."""
        return break_even_days(self.once, self.saving_month)

    @classmethod
    def all(cls, parts: Iterable[MoveCosts]) -> MoveCosts:
        """Concatenate the parts."""
        parts = [cls(*(np.zeros(0) for _ in cls.__slots__)), *parts]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__slots__))

    def take(self, chosen: NDArray[Any]) -> MoveCosts:
        """Return the rows that a boolean mask, or an array of row numbers, selects."""
        return MoveCosts(self.once[chosen], self.saving_month[chosen])


def compute_costs(view: SnapshotIndex, wishes: Proposals) -> MoveCosts:
    """Return the costs of proposed moves; zero where a tier has no prices."""
    out = MoveCosts(np.zeros(len(wishes)), np.zeros(len(wishes)))
    stays_s = _stays_s(view, wishes)
    code = (wishes.action.astype(np.int64) * 256 + wishes.src) * 256 + (wishes.dst + 1)
    for one in np.unique(code).tolist():
        rows = np.flatnonzero(code == one)
        action, src, dst = one >> 16, one >> 8 & 255, (one & 255) - 1
        if action != DELETE:
            _add(view, wishes, out, rows, (action, src, dst), stays_s)
            continue
        for tier in range(view.n_tiers):
            _add(view, wishes, out, rows[view.has(tier, wishes.group[rows])], (DROP, tier, -1), stays_s)
    return out


def _add(
    view: SnapshotIndex,
    wishes: Proposals,
    out: MoveCosts,
    rows: NDArray[np.int64],
    way: tuple[int, int, int],
    stays_s: Dollars,
) -> None:
    """Add the costs of one (action, src, dst) to rows of the bill. stays_s: See _stays_s(), for all proposed moves."""
    action, src, dst = way
    copies = view.at[src, wishes.group[rows]].astype(np.int64)
    sizes = Sizes.of(view.snapshot, copies)
    old, new = view.prices[src], view.prices[dst] if action in (MOVE, COPY, RECLASS) else None
    if old is None or (new is None and action in (MOVE, COPY, RECLASS)):
        return
    if action != COPY:
        out.once[rows] += early_dollars(old, sizes, view.snapshot.now_s - view.snapshot.modified_s[copies])
        out.saving_month[rows] += month_dollars(old, sizes)
    if new is not None:
        out.saving_month[rows] -= month_dollars(new, sizes)
        # The rule may delete the group before the minimum storage duration of dst ends, which costs the early fee.
        out.once[rows] += early_dollars(new, sizes, stays_s[rows])
        if action == RECLASS:
            out.once[rows] += reclass_dollars(old, new, sizes)
        else:
            leaves, streams = bool(view.leaves[src, dst]), bool(view.streams[src, dst])
            out.once[rows] += copy_dollars(old, new, sizes, leaves=leaves, streams=streams)


def _stays_s(view: SnapshotIndex, wishes: Proposals) -> NDArray[np.float64]:
    """Return the seconds from now until the rule of each proposed move deletes its group; inf: never."""
    limits = [np.inf if rule.delete_after_s is None else rule.delete_after_s for rule in view.file.rules]
    by_rule = np.array([*limits, np.inf])[np.where(wishes.rule < 0, len(limits), wishes.rule)]
    by_rule[view.newest[wishes.group] | view.tagged[wishes.group]] = np.inf  # never deleted
    return np.asarray(np.maximum(by_rule - view.age_s[wishes.group], 0.0), np.float64)


# -- rejections ------------------------------------------------------------------------------------------------------


def reject(wishes: Proposals, refused: list[Proposals], mask: Flags, text: Texts) -> Proposals:
    """Reject the proposed moves of a mask, and return the others. text: Reason of each rejected move."""
    if not mask.any():
        return wishes
    refused.append(wishes.take(mask).saying(text))
    return wishes.take(~mask)


def reject_protected(view: SnapshotIndex, wishes: Proposals, refused: list[Proposals]) -> Proposals:
    """Reject moves of groups that are pinned, in use or incomplete, and deletions of tagged groups."""
    whys = [f": {pin.why}" if pin.why else "" for pin in view.file.pins]
    pinned = view.pin[wishes.group]
    text = format_reasons(lambda pin: f"pinned (pins[{pin + 1}]){whys[pin]}", pinned[pinned >= 0])
    wishes = reject(wishes, refused, pinned >= 0, text)
    in_use = view.snapshot.in_use[wishes.group]
    wishes = reject(wishes, refused, in_use, one_text("in use", in_use))
    partial = ~view.snapshot.complete[wishes.group] & (view.snapshot.kind[wishes.group] == CHECKPOINT)
    whole = view.whole[:, wishes.group[partial]].any(axis=0)
    wishes = reject(wishes, refused, partial, np.where(whole, "not complete yet", _NOT_WHOLE).astype(np.object_))
    tagged = view.tagged[wishes.group] & (wishes.action == DELETE)
    return reject(wishes, refused, tagged, _tagged(view, wishes.take(tagged)))


def keep_newest(view: SnapshotIndex, wishes: Proposals, refused: list[Proposals]) -> Proposals:
    """Reject moves that would remove the newest complete checkpoint of a run.

    The checkpoint may be copied, and dropped where another copy is readable. A move of it becomes a copy, so that a
    later plan drops the source once the new copy is known to be verified.
    """
    of_newest = view.newest[wishes.group]
    lasts = of_newest & ((wishes.action == DELETE) | (wishes.action == RECLASS))
    lasts |= of_newest & (wishes.action == DROP) & ~_readable_elsewhere(view, wishes)
    what = "the newest complete checkpoint of a run is never deleted, and keeps at least one readable copy"
    wishes = reject(wishes, refused, lasts, one_text(what, lasts))
    becomes = view.newest[wishes.group] & (wishes.action == MOVE)
    action = np.where(becomes, COPY, wishes.action).astype(np.int8)
    text = append_to_reasons(wishes.text, becomes, "; copied only: it is the newest complete checkpoint of its run")
    return Proposals(wishes.group, action, wishes.src, wishes.dst, wishes.rule, text)


def keep_symlink_targets(view: SnapshotIndex, wishes: Proposals, refused: list[Proposals]) -> Proposals:
    """Reject moves that would remove a copy to which a symbolic link points. A move of such a copy becomes a copy."""
    links = view.snapshot.links
    if not links:
        return wishes
    has_link = np.zeros(view.snapshot.n_copies + 1, np.bool_)  # index -1 (no copy) is the last entry
    has_link[[*links]] = True
    takes = has_link[view.at[wishes.src, wishes.group]]
    deletes = wishes.action == DELETE
    takes |= deletes & has_link[view.at[:, wishes.group]].any(axis=0)
    stays = takes & (deletes | (wishes.action == DROP))
    text = np.empty(int(stays.sum()), np.object_)
    for row, group in enumerate(wishes.group[stays].tolist()):
        link = next(links[copy] for copy in view.at[:, group].tolist() if copy in links)
        text[row] = f"the symbolic link {link} points to it and would dangle"
    wishes, takes = reject(wishes, refused, stays, text), takes[~stays]
    becomes = takes & (wishes.action == MOVE)
    action = np.where(becomes, COPY, wishes.action).astype(np.int8)
    text = append_to_reasons(wishes.text, becomes, "; copied only: a symbolic link points to it")
    return Proposals(wishes.group, action, wishes.src, wishes.dst, wishes.rule, text)


def reject_unavailable(
    view: SnapshotIndex, wishes: Proposals, refused: list[Proposals], missing: Mapping[str, str]
) -> Proposals:
    """Reject moves to tiers that may not be mounted, and all deletions while there is such a tier (see marks.py)."""
    if why := deletion_block_reason(missing):
        deletes = wishes.action == DELETE
        wishes = reject(wishes, refused, deletes, one_text(why, deletes))
    for name, why in missing.items():
        there = wishes.dst == view.file.index(name)
        wishes = reject(wishes, refused, there, one_text(f"nothing goes to tier {name}: {why}", there))
    return wishes


def _readable_elsewhere(view: SnapshotIndex, wishes: Proposals) -> Flags:
    """Return whether another tier than src holds a verified copy that stays readable; bool[n_rows]."""
    found = np.zeros(len(wishes), np.bool_)
    for tier in range(view.n_tiers):
        copies = view.at[tier, wishes.group]
        here = (
            view.ok[tier, wishes.group] & (view.snapshot.state[copies] == READABLE) if view.snapshot.n_copies else found
        )
        found |= here & (wishes.src != tier)
    return found


def _tagged(view: SnapshotIndex, wishes: Proposals) -> Texts:
    out = np.empty(len(wishes), np.object_)
    out[:] = [f"tagged {', '.join(sorted(view.snapshot.tags[group]))}" for group in wishes.group.tolist()]
    return out


def reject_unprofitable(
    view: SnapshotIndex, wishes: Proposals, refused: list[Proposals]
) -> tuple[Proposals, MoveCosts]:
    """Reject moves that do not pay back within max_break_even, or before their rule deletes the group.

    The costs include minimum sizes and durations, overheads, requests and fees. A rule with even_if_dearer = true is
    exempt. The policy does not apply this check to moves of a watermark, whose purpose is room.
    """
    dollars = compute_costs(view, wishes)
    limit_s = view.file.tiering.max_break_even_s
    stays_s = _stays_s(view, wishes)
    may_lose = np.array([rule.even_if_dearer for rule in view.file.rules], np.bool_)[wishes.rule]
    late = dollars.break_even_days * DAY_S > np.minimum(limit_s, stays_s)
    late &= _earns(view, wishes) & ~may_lose
    left = reject(wishes, refused, late, _too_late(dollars.take(late), limit_s, stays_s[late]))
    return left, dollars.take(~late)


def _earns(view: SnapshotIndex, wishes: Proposals) -> Flags:
    """Return whether each move is about cost: storage in src has a price.

    A local disk has none, and costs are not compared.
    """
    paid = np.array([price is not None and price.store_gb_month > 0 for price in view.prices], np.bool_)
    known = np.array([price is not None for price in view.prices], np.bool_)
    moves = (wishes.action == MOVE) | (wishes.action == RECLASS)
    return np.asarray(moves & paid[wishes.src] & known[wishes.dst], np.bool_)


def _too_late(dollars: MoveCosts, limit_s: float, stays_s: NDArray[np.float64]) -> Texts:
    def words(once: float, saving: float, days: float, stays_days: int) -> str:
        when = "never earned back" if np.isinf(days) else f"earned back in {days:.3g} days"
        what = f"costs {format_dollars(once)} once and saves {format_dollars(saving)} a month: {when}"
        if stays_days >= 0:
            limit = f", and it is deleted in {stays_days} days (delete_after)"
        else:
            limit = f" (max_break_even = {span(limit_s)})"
        return f"{what}{limit}; use larger files, another class, or `even_if_dearer = true` in the rule"

    stays_days = np.where(stays_s < limit_s, np.minimum(stays_s, limit_s) // DAY_S, -1).astype(np.int64)
    return format_reasons(
        words, figures(dollars.once), figures(dollars.saving_month), figures(dollars.break_even_days), stays_days
    )


def figures(values: NDArray[Any]) -> Dollars:
    """Round to three significant digits, so that more rows share one text."""
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values) & (values != 0)
    scale = np.ones(len(values))
    scale[finite] = 10.0 ** (2 - np.floor(np.log10(np.abs(values[finite]))))
    rounded = np.where(finite, np.round(np.where(finite, values, 0.0) * scale) / scale, values)
    return np.asarray(rounded, np.float64)


def format_dollars(dollars: float) -> str:
    """Format US dollars for people."""
    sign = "-" if dollars < 0 else ""
    return f"{sign}${abs(dollars):,.2f}" if abs(dollars) >= 1 else f"{sign}${abs(dollars):.3g}"


class CapacityLedger:
    """Bytes in each tier: present, arriving and leaving.

    Leaving bytes still occupy the tier until the grace period is over.
    """

    def __init__(self, view: SnapshotIndex, capacity_bytes: Sequence[int | None]) -> None:
        snapshot = view.snapshot
        self._view, self.limits = view, tuple(capacity_bytes)
        there = np.bincount(snapshot.tier, weights=snapshot.n_bytes.astype(np.float64), minlength=view.n_tiers)
        self.there = there.astype(np.int64)
        self.coming, self.going = np.zeros_like(self.there), np.zeros_like(self.there)

    def fitting(self, wishes: Proposals) -> Flags:
        """Return which proposed moves fit, in their order; bool[n]."""
        fits = np.ones(len(wishes), np.bool_)
        for tier, limit in enumerate(self.limits):
            rows = np.flatnonzero((wishes.dst == tier) & (wishes.action >= RECLASS))
            if limit is not None and len(rows):
                left_bytes = limit - int(self.there[tier] + self.coming[tier])
                fits[rows] = _fits(bytes_of(self._view, wishes.take(rows)), left_bytes)
        return fits

    def admit(self, wishes: Proposals, refused: list[Proposals]) -> Flags:
        """Return which proposed moves fit, as fitting(). Counts these, and rejects the others."""
        fits = self.fitting(wishes)
        full = [f"no room in {name}: its capacity is {format_bytes(limit or 0)}" for name, limit in self._limits()]
        reject(wishes, refused, ~fits, np.array([*full, ""], np.object_)[wishes.dst[~fits]])
        self._count(wishes.take(fits))
        return fits

    def _limits(self) -> list[tuple[str, int | None]]:
        return [(self._view.name(tier), limit) for tier, limit in enumerate(self.limits)]

    def _count(self, wishes: Proposals) -> None:
        n_bytes = bytes_of(self._view, wishes)
        for tier in range(self._view.n_tiers):
            goes = (wishes.src == tier) & (wishes.action != COPY) & (wishes.action != DELETE)
            self.going[tier] += n_bytes[goes].sum()
            self.coming[tier] += n_bytes[(wishes.dst == tier) & (wishes.action >= RECLASS)].sum()
            deleted = self._view.at[tier, wishes.group[wishes.action == DELETE]]
            self.going[tier] += self._view.snapshot.n_bytes[deleted[deleted >= 0]].sum()


def bytes_of(view: SnapshotIndex, wishes: Proposals) -> NDArray[np.int64]:
    """Return the size in bytes of each move's copy in src; int64[n]."""
    return view.snapshot.n_bytes[view.at[wishes.src, wishes.group]]


def _fits(n_bytes: NDArray[np.int64], left_bytes: int) -> Flags:
    """Return which sizes fit into left_bytes, in order; a size that does not fit is skipped."""
    if int(n_bytes.sum()) <= left_bytes:
        return np.ones(len(n_bytes), np.bool_)
    fits = []
    for size in n_bytes.tolist():
        fits.append(size <= left_bytes)
        left_bytes -= size if fits[-1] else 0
    return np.array(fits, np.bool_)


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
        """Run both steps of the policy."""
        rules = [propose(self.view, rule, number) for number, rule in enumerate(self.view.file.rules)]
        for rule in rules:
            self.refused.append(reject_protected(self.view, rule.refused, self.refused))
            wishes = keep_newest(self.view, reject_protected(self.view, rule.wanted, self.refused), self.refused)
            wishes = keep_symlink_targets(self.view, wishes, self.refused)
            wishes = reject_unavailable(self.view, wishes, self.refused, self.missing)
            self._make(*reject_unprofitable(self.view, wishes, self.refused))
        for tier in range(self.view.n_tiers - 1):
            self._keep_below_high(tier, rules)
        return self._decisions()

    def _make(self, wishes: Proposals, dollars: MoveCosts) -> None:
        fits = self.room.admit(wishes, self.refused)
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
