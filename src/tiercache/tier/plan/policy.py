"""The policy: a pure function from a snapshot, rules, prices and capacities to moves and refusals.

The policy works on columns, so that it sorts and compares a million groups without a loop over them.
docs/reference/tiers.md defines the rules. A group gets at most one move. Steps, in this order:

1. Each rule proposes moves. Moves of protected groups, unprofitable moves and moves without room are
   refused. If several checks refuse a move, the refusal gives the reason of the first.
2. A tier that would still be above HIGH of its capacity sends its least recently used groups down until LOW.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.keep import Flags, Rows
from tiercache.model import format_bytes, parse_bytes
from tiercache.prices import prices_if_known
from tiercache.tier.costs import (
    DAY_S,
    Sizes,
    break_even_days,
    early_dollars,
    month_dollars,
)
from tiercache.tier.model import (
    CHECKPOINT,
    COPY,
    DELETE,
    DROP,
    MOVE,
    READABLE,
    RECLASS,
    Decisions,
    ExceededLimit,
    MoveColumns,
    Snapshot,
)
from tiercache.tier.plan.proposals import (
    Reasons,
    RuleProposals,
    ago,
    append_to_reasons,
    format_reasons,
    hours,
    propose,
    propose_down,
    transfer_dollars,
)
from tiercache.tier.plan.selection import SnapshotIndex, largest_copies, rules_of
from tiercache.tier.stores import deletion_block_reason, unavailable_tiers
from tiercache.tier.text_columns import index_in

if TYPE_CHECKING:
    from tiercache.prices import Prices
    from tiercache.tier.journal import JournalRow, TierCatalog
    from tiercache.tier.rules import RuleFile
    from tiercache.tier.stores import Stores


Dollars = NDArray[np.float64]

# Above HIGH of its capacity, a tier sends its least recently used groups down until LOW is reached.
HIGH, LOW = 0.9, 0.75
# A move must be earned back within this time.
BREAK_EVEN_DAYS = 365.0
# Actions after which dst holds more bytes; for the others, dst is -1 or has the copy already.
_ADDS_BYTES_TO_DST = (RECLASS, MOVE, COPY)
_NOT_WHOLE = "no copy of it is whole: it is not complete yet, or objects of it are missing"


def with_costs(index: SnapshotIndex, moves: MoveColumns) -> MoveColumns:
    """Return the moves with their costs; zero where a tier has no prices."""
    once, saving_month = np.zeros(len(moves)), np.zeros(len(moves))
    deleted_in_s = _seconds_until_deletion(index, moves)

    def add(rows: NDArray[np.int64], action: int, src: int, dst: int) -> None:
        groups = moves.group[rows]
        copies = index.at[src, groups].astype(np.int64)
        sizes = Sizes.of(index.snapshot, copies)
        is_new = action in (MOVE, COPY, RECLASS)
        old, new = index.prices[src], index.prices[dst] if is_new else None
        if old is None or (is_new and new is None):
            return
        if action != COPY:
            once[rows] += early_dollars(old, sizes, index.snapshot.now_s - index.snapshot.modified_s[copies])
            saving_month[rows] += month_dollars(old, sizes)
        if new is not None:
            saving_month[rows] -= month_dollars(new, sizes)
            # The rule may delete the group before the minimum storage duration of dst ends, which costs the early fee.
            once[rows] += early_dollars(new, sizes, deleted_in_s[rows]) + transfer_dollars(index, groups, src, dst)

    route = (moves.action.astype(np.int64) * 256 + moves.src) * 256 + (moves.dst + 1)
    for number in np.unique(route).tolist():
        rows = np.flatnonzero(route == number)
        action, src, dst = number >> 16, number >> 8 & 255, (number & 255) - 1
        if action != DELETE:
            add(rows, action, src, dst)
            continue
        for tier in range(index.n_tiers):
            add(rows[index.has(tier, moves.group[rows])], DROP, tier, -1)
    return replace(moves, once=once, saving_month=saving_month)


def _seconds_until_deletion(index: SnapshotIndex, moves: MoveColumns) -> NDArray[np.float64]:
    """Return the seconds from now until the rule of each proposed move deletes its group; inf: never."""
    limits = [np.inf if rule.delete_after_s is None else rule.delete_after_s for rule in index.file.rules]
    by_rule = np.array([*limits, np.inf])[np.where(moves.rule < 0, len(limits), moves.rule)]
    by_rule[index.newest[moves.group]] = np.inf  # never deleted
    return np.asarray(np.maximum(by_rule - index.age_s[moves.group], 0.0), np.float64)


# -- refusals -----------------------------------------------------------------------------------------------------


def refuse(moves: MoveColumns, refused: list[MoveColumns], mask: Flags, text: Reasons | str) -> MoveColumns:
    """Refuse the proposed moves of a mask, and return the others. text: Reason of each refused move, or of all."""
    if not mask.any():
        return moves
    refused.append(replace(moves.take(mask), reason=np.full(int(mask.sum()), text, np.object_)))
    return moves.take(~mask)


def refuse_protected(index: SnapshotIndex, moves: MoveColumns, refused: list[MoveColumns]) -> MoveColumns:
    """Refuse moves of groups that are immovable, pinned, held, in use or incomplete."""
    immovable = np.isin(moves.group, [*index.snapshot.immovable])
    whys = [index.snapshot.immovable[group] for group in moves.group[immovable].tolist()]
    moves = refuse(moves, refused, immovable, np.array(whys, np.object_))
    whys = [f": {pin.why}" if pin.why else "" for pin in index.file.pins]
    pinned = index.pin[moves.group]
    text = format_reasons(lambda pin: f"pinned (pins[{pin + 1}]){whys[pin]}", pinned[pinned >= 0])
    moves = refuse(moves, refused, pinned >= 0, text)
    by_hold = _protected_by_hold(index)[moves.group]
    whys = [index.snapshot.held[group] for group in moves.group[by_hold].tolist()]
    moves = refuse(moves, refused, by_hold, np.array(whys, np.object_))
    in_file = np.isin(moves.group, sorted(index.snapshot.pinned))
    moves = refuse(moves, refused, in_file, "pinned in its pin.json, or that file cannot be read")
    in_use = index.snapshot.in_use[moves.group]
    moves = refuse(moves, refused, in_use, "in use")
    partial = ~index.snapshot.complete[moves.group] & (index.snapshot.kind[moves.group] == CHECKPOINT)
    whole = index.whole[:, moves.group[partial]].any(axis=0)
    return refuse(moves, refused, partial, np.where(whole, "not complete yet", _NOT_WHOLE).astype(np.object_))


def _protected_by_hold(index: SnapshotIndex) -> Flags:
    """Return whether a hold protects each group; bool[n_groups]."""
    found = np.zeros(index.snapshot.n_groups, np.bool_)
    found[[*index.snapshot.held]] = True
    return found


def keep_newest(index: SnapshotIndex, moves: MoveColumns, refused: list[MoveColumns]) -> MoveColumns:
    """Refuse moves that would remove the newest complete checkpoint of a run.

    The checkpoint may be copied, and dropped where another copy is readable. A move of it becomes a copy, so that a
    later plan drops the source once the new copy is known to be verified.
    """
    of_newest = index.newest[moves.group]
    lasts = of_newest & ((moves.action == DELETE) | (moves.action == RECLASS))
    lasts |= of_newest & (moves.action == DROP) & ~_readable_elsewhere(index, moves)
    what = "the newest complete checkpoint of a run is never deleted, and keeps at least one readable copy"
    moves = refuse(moves, refused, lasts, what)
    becomes = index.newest[moves.group] & (moves.action == MOVE)
    action = np.where(becomes, COPY, moves.action).astype(np.int8)
    text = append_to_reasons(moves.reason, becomes, "; copied only: it is the newest complete checkpoint of its run")
    return replace(moves, action=action, reason=text)


def refuse_linked(index: SnapshotIndex, moves: MoveColumns, refused: list[MoveColumns]) -> MoveColumns:
    """Refuse moves that would take away a copy to which a symbolic link points, or in whose folder one lies."""
    links = index.snapshot.links
    if not links:
        return moves
    has_link = np.zeros(index.snapshot.n_copies + 1, np.bool_)
    has_link[[*links]] = True  # index -1 (no copy) is the last entry
    takes = np.isin(moves.action, (MOVE, DROP)) & has_link[index.at[moves.src, moves.group]]
    takes |= (moves.action == DELETE) & has_link[index.at[:, moves.group]].any(axis=0)
    text = np.empty(int(takes.sum()), np.object_)
    for row, group in enumerate(moves.group[takes].tolist()):
        link = next(links[copy] for copy in index.at[:, group].tolist() if copy in links)
        text[row] = f"the symbolic link {link} needs it: a link is never moved, and neither is what it points to"
    return refuse(moves, refused, takes, text)


def refuse_unavailable(
    index: SnapshotIndex, moves: MoveColumns, refused: list[MoveColumns], unavailable: Mapping[str, str]
) -> MoveColumns:
    """Refuse moves to tiers that may not be mounted, and all deletions while there is such a tier."""
    if reason := deletion_block_reason(unavailable):
        moves = refuse(moves, refused, moves.action == DELETE, reason)
    for name, reason in unavailable.items():
        moves = refuse(moves, refused, moves.dst == index.file.index(name), f"nothing goes to tier {name}: {reason}")
    return moves


def _readable_elsewhere(index: SnapshotIndex, moves: MoveColumns) -> Flags:
    """Return whether another tier than src holds a verified copy that stays readable; bool[n_rows]."""
    found = np.zeros(len(moves), np.bool_)
    is_readable = np.append(index.snapshot.state == READABLE, False)  # index -1 (no copy) is the last entry
    for tier in range(index.n_tiers):
        found |= index.reliable[tier, moves.group] & is_readable[index.at[tier, moves.group]] & (moves.src != tier)
    return found


def refuse_unprofitable(index: SnapshotIndex, moves: MoveColumns, refused: list[MoveColumns]) -> MoveColumns:
    """Refuse moves that do not pay back within BREAK_EVEN_DAYS, or before their rule deletes the group.

    The costs include minimum sizes and durations, overheads, requests and fees. The policy does not apply this check to
    moves of a watermark, whose purpose is room.
    """
    moves = with_costs(index, moves)
    deleted_in_days = _seconds_until_deletion(index, moves) / DAY_S
    too_late = break_even_days(moves.once, moves.saving_month) > np.minimum(BREAK_EVEN_DAYS, deleted_in_days)
    too_late &= _is_about_cost(index, moves)
    return refuse(moves, refused, too_late, _unprofitable_reasons(moves.take(too_late), deleted_in_days[too_late]))


def _is_about_cost(index: SnapshotIndex, moves: MoveColumns) -> Flags:
    """Return whether each move is about cost: storage in src has a price.

    A local disk has none, and costs are not compared.
    """
    paid = np.array([price is not None and price.store_gb_month > 0 for price in index.prices], np.bool_)
    known = np.array([price is not None for price in index.prices], np.bool_)
    is_move = (moves.action == MOVE) | (moves.action == RECLASS)
    return np.asarray(is_move & paid[moves.src] & known[moves.dst], np.bool_)


def _unprofitable_reasons(too_late: MoveColumns, deleted_in_days: NDArray[np.float64]) -> Reasons:
    def words(once: float, saving: float, days: float, deleted_in: int) -> str:
        when = "never earned back" if np.isinf(days) else f"earned back in {days:.3g} days"
        what = f"costs {dollars_in_reason(once)} once and saves {dollars_in_reason(saving)} a month: {when}"
        if deleted_in >= 0:
            limit = f", and it is deleted in {deleted_in} days (delete_after)"
        else:
            limit = f" (at most {BREAK_EVEN_DAYS:g})"
        return f"{what}{limit}; use larger files or another class, or give no `prices` to ignore costs"

    deleted_in = np.where(deleted_in_days < BREAK_EVEN_DAYS, deleted_in_days, -1).astype(np.int64)
    days = break_even_days(too_late.once, too_late.saving_month)
    return format_reasons(words, figures(too_late.once), figures(too_late.saving_month), figures(days), deleted_in)


def figures(values: NDArray[Any]) -> Dollars:
    """Round to three significant digits, so that more rows share one text."""
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values) & (values != 0)
    scale = np.ones(len(values))
    scale[finite] = 10.0 ** (2 - np.floor(np.log10(np.abs(values[finite]))))
    rounded = np.where(finite, np.round(np.where(finite, values, 0.0) * scale) / scale, values)
    return np.asarray(rounded, np.float64)


def dollars_in_reason(dollars: float) -> str:
    """Format US dollars for reasons, which are part of the plan file: "$1.50", or "$0.00123" with three digits."""
    sign = "-" if dollars < 0 else ""
    return f"{sign}${abs(dollars):,.2f}" if abs(dollars) >= 1 else f"{sign}${abs(dollars):.3g}"


def _refuse_immovable(index: SnapshotIndex) -> MoveColumns:
    """Return a refusal for each group that no move may touch and that a rule applies to, with the reason."""
    groups = np.array(sorted(group for group in index.snapshot.immovable if index.rule[group] >= 0), np.int64)
    reasons = np.array([index.snapshot.immovable[group] for group in groups.tolist()], np.object_)
    lies = index.at[:, groups] >= 0
    src, dst = (np.argmax(lies, axis=0), index.n_tiers - 1 - np.argmax(lies[::-1], axis=0))
    return replace(MoveColumns.of(groups, MOVE, src, dst, index.rule[groups], ""), reason=reasons)


class CapacityLedger:
    """Bytes in each tier: stored, arriving and leaving.

    Leaving bytes still occupy the tier until the grace period is over.
    """

    def __init__(self, index: SnapshotIndex, capacity_bytes: Sequence[int | None]) -> None:
        snapshot = index.snapshot
        self._index, self.limits = index, tuple(capacity_bytes)
        stored = np.bincount(snapshot.tier, weights=snapshot.n_bytes.astype(np.float64), minlength=index.n_tiers)
        self.stored_bytes = stored.astype(np.int64)
        self.arriving_bytes, self.leaving_bytes = np.zeros_like(self.stored_bytes), np.zeros_like(self.stored_bytes)

    def fitting(self, moves: MoveColumns) -> Flags:
        """Return which proposed moves fit, in their order; bool[n]."""
        fits = np.ones(len(moves), np.bool_)
        for tier, limit in enumerate(self.limits):
            rows = np.flatnonzero((moves.dst == tier) & np.isin(moves.action, _ADDS_BYTES_TO_DST))
            if limit is not None and len(rows):
                left_bytes = limit - int(self.stored_bytes[tier] + self.arriving_bytes[tier])
                fits[rows] = _first_fit(bytes_of(self._index, moves.take(rows)), left_bytes)
        return fits

    def admit(self, moves: MoveColumns, refused: list[MoveColumns]) -> Flags:
        """Return which proposed moves fit, as fitting(). Counts these, and refuses the others."""
        fits = self.fitting(moves)
        capacities = zip(self._index.snapshot.tiers, self.limits, strict=True)
        full = [f"no room in {name}: its capacity is {format_bytes(limit or 0)}" for name, limit in capacities]
        refuse(moves, refused, ~fits, np.array([*full, ""], np.object_)[moves.dst[~fits]])
        moves = moves.take(fits)
        n_bytes = bytes_of(self._index, moves)
        for tier in range(self._index.n_tiers):
            leaves = (moves.src == tier) & ~np.isin(moves.action, (COPY, DELETE))
            self.leaving_bytes[tier] += n_bytes[leaves].sum()
            self.arriving_bytes[tier] += n_bytes[(moves.dst == tier) & np.isin(moves.action, _ADDS_BYTES_TO_DST)].sum()
            deleted = self._index.at[tier, moves.group[moves.action == DELETE]]
            self.leaving_bytes[tier] += self._index.snapshot.n_bytes[deleted[deleted >= 0]].sum()
        return fits


def bytes_of(index: SnapshotIndex, moves: MoveColumns) -> NDArray[np.int64]:
    """Return the size in bytes of each move's copy in src; int64[n]."""
    return index.snapshot.n_bytes[index.at[moves.src, moves.group]]


def _first_fit(n_bytes: NDArray[np.int64], left_bytes: int) -> Flags:
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
    unavailable: Mapping[str, str] | None = None,
) -> Decisions:
    """Return the moves and refusals for a snapshot. Deterministic: equal inputs give equal decisions.

    Args:
        snapshot: Snapshot of the tiers of the rule file.
        file: Rule file, for its tiers, rules and pins.
        prices: Prices of each tier; None: unknown, and costs are not considered for moves of this tier.
        capacity_bytes: Capacity of each tier in bytes; None: unlimited.
        unavailable: Name of each tier that is unavailable (perhaps not mounted), and the reason. Nothing moves to such
            a tier, and nothing is deleted while there is one.

    Raises ValueError if the snapshot has other tiers than the file, if prices or capacities do not have one entry per
    tier, or if a glob is malformed.
    """
    for name, values in (("prices", prices), ("capacity_bytes", capacity_bytes)):
        if len(values) != len(file.tiers):
            raise ValueError(f"expected {name} of {len(file.tiers)} tiers, got {len(values)}")
    return _Policy(SnapshotIndex.of(snapshot, file, prices), capacity_bytes, unavailable or {}).decide()


def decide_now(
    snapshot: Snapshot, file: RuleFile, stores: Stores, catalog: TierCatalog
) -> tuple[Decisions, Mapping[str, str]]:
    """Return the decisions for tiers as they are now, and the reason for each unavailable tier, by name.

    Unlike decide(), it asks the tiers for their capacity, and whether their copies can be seen, and finds the deletions
    that a person must confirm.

    Args:
        snapshot: Snapshot of the tiers, which was just taken.
        file: Rule file, for its tiers, rules, pins and prices.
        stores: Stores of its tiers.
        catalog: Catalog of this machine.
    """
    unavailable = unavailable_tiers(file, stores, catalog)
    prices = [prices_if_known(tier) for tier in file.tiers]
    capacity = [stores.capacity(tier.name) for tier in file.tiers]
    decisions = decide(snapshot, file, prices, capacity_bytes=capacity, unavailable=unavailable)
    journal = catalog.open_moves(file.home_tier.url, "waiting", "dropping")
    return replace(decisions, exceeded=exceeded_limits(decisions, snapshot, file, journal)), unavailable


def exceeded_limits(
    decisions: Decisions, snapshot: Snapshot, file: RuleFile, journal: Iterable[JournalRow]
) -> tuple[ExceededLimit, ...]:
    """Return the rules that delete more bytes than their `max_delete` allows, so that a person must confirm it.

    A mistake in a rule file (a wrong duration, a glob that matches too much) shows as a deletion of most of what a rule
    matches. A deletion counts in the run that plans it; when it becomes due after the grace period, nobody is asked.

    The bytes that a rule matches are those of the groups to which it applies, with keep lists only of checkpoints; of
    each group the largest copy. journal: Moves that wait in the journal. A deletion among them was accepted before.
    """
    deleted = decisions.moves.group[decisions.moves.action == DELETE]
    if not len(deleted):
        return ()
    rule_of, n_bytes = rules_of(snapshot, file), largest_copies(snapshot)
    accepted = [row.path for row in journal if row.action == "delete"]
    is_new = index_in(snapshot.paths.take(pa.array(deleted)), pa.array(accepted, pa.large_string())) < 0
    found = []
    for number, rule in enumerate(file.rules):
        new_bytes = int(n_bytes[deleted[is_new & (rule_of[deleted] == number)]].sum())
        if new_bytes == 0:
            continue
        applies = rule_of == number
        if rule.keep:
            applies &= snapshot.kind == CHECKPOINT
        matched_bytes = int(n_bytes[np.flatnonzero(applies)].sum())
        if new_bytes > parse_bytes(rule.max_delete, whole_bytes=matched_bytes):
            found.append(ExceededLimit(rule.name, new_bytes, matched_bytes, rule.max_delete))
    return tuple(found)


class _Policy:
    """Collects the moves of one plan. is_moved: bool[n_groups], whether the group has a move already."""

    def __init__(
        self, index: SnapshotIndex, capacity_bytes: Sequence[int | None], unavailable: Mapping[str, str]
    ) -> None:
        self.index, self.ledger, self.unavailable = index, CapacityLedger(index, capacity_bytes), unavailable
        self.is_moved = np.zeros(index.snapshot.n_groups, np.bool_)
        self.moves: list[MoveColumns] = []
        self.refused: list[MoveColumns] = []

    def decide(self) -> Decisions:
        """Run both steps of the policy."""
        index, refused = self.index, self.refused
        refused.append(_refuse_immovable(index))
        proposals = [propose(index, rule, number) for number, rule in enumerate(index.file.rules)]
        for of_rule in proposals:
            # Protection comes first, because its reason holds for a move that the rule itself refuses, too.
            refused.append(refuse_protected(index, of_rule.refused, refused))
            moves = keep_newest(index, refuse_protected(index, of_rule.proposed, refused), refused)
            moves = refuse_unavailable(index, refuse_linked(index, moves, refused), refused, self.unavailable)
            self._admit(refuse_unprofitable(index, moves, refused))
        for tier in range(index.n_tiers - 1):
            self._keep_below_high(tier, proposals)
        moves, all_refused = MoveColumns.concat(self.moves), MoveColumns.concat(refused)
        # One refusal per group, with the reason that was found first; none for a group that another rule moves.
        _, first = np.unique(all_refused.group, return_index=True)
        first = first[~self.is_moved[all_refused.group[first]]]
        names = [rule.name for rule in index.file.rules]
        names += [f"tiers.{name}.capacity" for name in reversed(index.snapshot.tiers)]
        return Decisions(moves.take(np.argsort(moves.action, kind="stable")), all_refused.take(first), tuple(names))

    def _admit(self, moves: MoveColumns) -> None:
        moves = moves.take(self.ledger.admit(moves, self.refused))
        self.is_moved[moves.group] = True
        self.moves.append(moves)

    # -- watermarks --------------------------------------------------------------------------------------------------

    def _keep_below_high(self, tier: int, proposals: Sequence[RuleProposals]) -> None:
        ledger, name, unused_s = self.ledger, self.index.name(tier), self.index.unused_s
        limit = ledger.limits[tier]
        used = int(ledger.stored_bytes[tier] + ledger.arriving_bytes[tier] - ledger.leaving_bytes[tier])
        if limit is None or used <= limit * HIGH:
            return
        rows = self._may_go(tier, proposals)
        full = f"{name} is {used / max(limit, 1):.1%} full, and at most {HIGH:.0%} are wanted"
        text = format_reasons(lambda n_hours: f"{full}; not used for {ago(n_hours)}", hours(unused_s[rows]))
        proposed, unreadable = propose_down(self.index, rows, tier, (-1 - tier, text))
        skipped = [unreadable]
        proposed = refuse_unavailable(self.index, proposed, skipped, self.unavailable)
        moves = proposed.take(np.lexsort((proposed.group, -unused_s[proposed.group])))
        freed = np.cumsum(np.where(ledger.fitting(moves), bytes_of(self.index, moves), 0))
        n = int(np.searchsorted(freed, used - int(limit * LOW))) + 1
        # Report only those refused groups that the watermark would have chosen: unused for at least as long.
        last_s = unused_s[moves.group[n - 1]] if n <= len(moves) else -np.inf
        over = MoveColumns.concat(skipped)
        self.refused.append(over.take(unused_s[over.group] >= last_s))
        self._admit(with_costs(self.index, moves.take(np.arange(len(moves))[:n])))

    def _may_go(self, tier: int, proposals: Sequence[RuleProposals]) -> Rows:
        """Return the groups whose copy in the tier the watermark may send down.

        A move of its own, a pin, a hold, a reader, an incomplete or newest checkpoint, a symbolic link and a keep list
        keep a copy.
        """
        index = self.index
        must_stay = (
            self.is_moved | index.snapshot.in_use | (index.pin >= 0) | _protected_by_hold(index) | (index.at[tier] < 0)
        )
        must_stay[[*index.snapshot.immovable]] = True
        must_stay |= (index.snapshot.kind == CHECKPOINT) & (~index.snapshot.complete | index.newest)
        must_stay[sorted(index.snapshot.pinned)] = True
        linked = [copy for copy in index.snapshot.links if index.snapshot.tier[copy] == tier]
        must_stay[index.snapshot.group[linked]] = True
        for of_rule in proposals:
            if of_rule.kept is not None:
                must_stay[of_rule.rows[of_rule.kept[tier]]] = True
        return np.flatnonzero(~must_stay)
