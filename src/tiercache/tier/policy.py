"""The policy: a pure function from a snapshot, rules, prices and capacities to moves and refusals.

The policy works on columns, so that it sorts and compares a million groups without a loop over them.
docs/reference/tiers.md defines the rules. A group gets at most one move. Steps, in this order:

1. Each rule proposes moves, each with its reason. Moves of protected groups, unprofitable moves and moves without room
   are refused. If several checks refuse a move, the refusal gives the reason of the first.
2. A tier that would still be above HIGH of its capacity sends its least recently used groups down until LOW.

keep_reasons() explains why checkpoints are kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.keep import Flags, KeepList, Rows, evaluate_keep_list, from_end
from tiercache.model import format_bytes, parse_bytes
from tiercache.prices import (
    DAY_S,
    Prices,
    break_even_days,
    copy_dollars,
    early_dollars,
    leaves_and_streams,
    month_dollars,
    reclass_dollars,
)
from tiercache.tier.journal import JournalRow, TierCatalog
from tiercache.tier.rules import Rule, RuleFile
from tiercache.tier.snapshot import (
    CHECKPOINT,
    COPY,
    DELETE,
    DROP,
    MOVE,
    NO_MOVES,
    READABLE,
    RECLASS,
    RESTORED,
    RESTORING,
    SHARD,
    Decisions,
    ExceededLimit,
    MoveColumns,
    Snapshot,
)
from tiercache.tier.stores import Stores, deletion_block_reason, unavailable_tiers
from tiercache.tier.text_columns import first_match, index_in


@dataclass(frozen=True, slots=True, eq=False)
class SnapshotIndex:
    """The snapshot indexed for the policy. In two-dimensional columns, tiers are rows and groups are columns."""

    snapshot: Snapshot
    file: RuleFile
    prices: Sequence[Prices | None]  # of each tier; None: unknown
    at: NDArray[np.int32]  # [n_tiers, n_groups], number of the group's copy in the tier; -1: none
    readable: Flags  # [n_tiers, n_groups], whether the copy can be read now
    whole: Flags  # [n_tiers, n_groups]
    reliable: Flags  # [n_tiers, n_groups], whether the copy is whole and verified
    rule: NDArray[np.int16]  # [n_groups], number of the rule that applies to the group; -1: none
    pin: NDArray[np.int16]  # [n_groups], number of the first pin in force that matches the group; -1: none
    newest: Flags  # [n_groups], see find_newest()
    age_s: NDArray[np.float64]  # [n_groups], seconds since the group was written
    unused_s: NDArray[np.float64]  # [n_groups], since its last use, or since it was written if that is later
    same_url: Flags  # [n_tiers, n_tiers]: a move between the tiers changes the storage class
    leaves: Flags  # [n_tiers, n_tiers], whether a copy between the tiers leaves the provider's region
    streams: Flags  # [n_tiers, n_tiers], whether it passes through this machine; otherwise the store copies objects

    @classmethod
    def of(cls, snapshot: Snapshot, file: RuleFile, prices: Sequence[Prices | None]) -> SnapshotIndex:
        names = tuple(tier.name for tier in file.tiers)
        shape = len(names), snapshot.n_groups

        def spread(column: NDArray[np.bool_]) -> Flags:
            out = np.zeros(shape, np.bool_)
            out[snapshot.tier, snapshot.group] = column
            return out

        at = np.full(shape, -1, np.int32)
        at[snapshot.tier, snapshot.group] = np.arange(snapshot.n_copies, dtype=np.int32)
        pins = [pin for pin in file.pins if pin.until_s is None or pin.until_s > snapshot.now_s]
        # The snapshot has no objects: the path of a folder stands for the objects that `run/step-10/**` matches.
        pin = first_match(snapshot.paths, [(pin.match + covered_folders(pin.match), ()) for pin in pins])
        tiers = [(tier.url.rstrip("/"), price) for tier, price in zip(file.tiers, prices, strict=True)]
        routes = np.array(
            [[(src == dst, *leaves_and_streams(src, dst, old, new)) for dst, new in tiers] for src, old in tiers]
        )
        return cls(
            snapshot=snapshot,
            file=file,
            prices=prices,
            at=at,
            readable=spread((snapshot.state == READABLE) | (snapshot.state == RESTORED)),
            whole=spread(snapshot.whole),
            reliable=spread(snapshot.whole & snapshot.verified),
            rule=rules_of(snapshot, file),
            pin=np.append([file.pins.index(pin) for pin in pins], -1).astype(np.int16)[pin],
            newest=find_newest(snapshot),
            age_s=snapshot.now_s - snapshot.created_s,
            unused_s=snapshot.now_s - np.maximum(snapshot.last_use_s, snapshot.created_s),
            same_url=routes[:, :, 0],
            leaves=routes[:, :, 1],
            streams=routes[:, :, 2],
        )

    @property
    def n_tiers(self) -> int:
        return len(self.at)

    def name(self, tier: int) -> str:
        return self.snapshot.tiers[tier]

    def has(self, tier: int, rows: Rows) -> Flags:
        return np.asarray(self.at[tier, rows] >= 0)


def rules_of(snapshot: Snapshot, file: RuleFile) -> NDArray[np.int16]:
    return first_match(snapshot.paths, [(rule.match, rule.exclude) for rule in file.rules])


def largest_copies(snapshot: Snapshot) -> NDArray[np.int64]:
    n_bytes = np.zeros(snapshot.n_groups, np.int64)
    np.maximum.at(n_bytes, snapshot.group, snapshot.n_bytes)
    return n_bytes


def covered_folders(globs: Sequence[str]) -> tuple[str, ...]:
    return tuple(glob.removesuffix("/**") for glob in globs if glob.endswith("/**") and glob != "/**")


def find_newest(snapshot: Snapshot) -> Flags:
    """Return whether each group is the newest complete checkpoint of its run; bool[n_groups].

    The newest is the one that was written last. The one with the highest step counts as newest, too: where the catalog
    that knows when moved checkpoints were written is lost, copies of old checkpoints look as if they were written last.
    """
    found = np.zeros(snapshot.n_groups, np.bool_)
    complete = np.flatnonzero((snapshot.kind == CHECKPOINT) & snapshot.complete)
    run, step, created_s = snapshot.run[complete], snapshot.step[complete], snapshot.created_s[complete]
    for order in (np.lexsort((complete, step, created_s, run)), np.lexsort((complete, created_s, step, run))):
        rows = complete[order]
        found[rows[from_end(snapshot.run[rows]) == 0]] = True
    return found


Reasons = NDArray[np.object_]


@dataclass(frozen=True, slots=True, eq=False)
class RuleProposals:
    rows: Rows  # groups that the rule applies to and does not delete
    proposed: MoveColumns
    refused: MoveColumns  # moves that the rule implies and that are refused already
    kept: Flags | None = None  # [n_tiers, n_rows], whether the tier's keep list keeps the group; None: no keep lists


# -- reasons ---------------------------------------------------------------------------------------------------------


def format_reasons(words: Callable[..., str], *figures: NDArray[Any]) -> Reasons:
    """Return words(figure, ...) of each row. Rows with equal figures share one text object, which is formatted once."""
    texts: dict[tuple[Any, ...], str] = {}
    out = np.empty(len(figures[0]), np.object_)
    rows = zip(*(figure.tolist() for figure in figures), strict=True)
    out[:] = [texts.get(row) or texts.setdefault(row, words(*row)) for row in rows]
    return out


def append_to_reasons(texts: Reasons, mask: Flags, end: str) -> Reasons:
    new: dict[str, str] = {}
    out = texts.copy()
    out[mask] = [new.setdefault(text, text + end) for text in texts[mask].tolist()]
    return out


def hours(seconds: NDArray[np.float64]) -> NDArray[np.int64]:
    """Round down to the precision that reasons show: whole hours, and from two days on whole days (in hours)."""
    whole = np.floor(np.maximum(seconds, 0.0) / 3600).astype(np.int64)
    return np.where(whole < 48, whole, whole // 24 * 24)


def span(seconds: float) -> str:
    for unit_s, name, least in ((86400, "days", 2), (3600, "hours", 2), (60, "minutes", 2)):
        if seconds >= unit_s * least:
            return f"{seconds / unit_s:.4g} {name}"
    return f"{seconds:.4g} s"


def ago(n_hours: int) -> str:
    if n_hours == 1:
        return "1 hour"
    return f"{n_hours} hours" if n_hours < 48 else f"{n_hours // 24} days"


# -- moves between two tiers -----------------------------------------------------------------------------------------


def propose_move(
    index: SnapshotIndex, rows: Rows, sources: Flags, dst: int, reasons: tuple[int, Reasons]
) -> tuple[MoveColumns, MoveColumns]:
    """Propose how groups get from any of their source tiers to dst, at the lowest cost. Returns (proposed, refused).

    sources: bool[n_tiers, n_rows], copies that may be moved: at least one of each row, none in dst. reasons: Number of
    the rule, and the reason of each row.
    """
    rule, text = reasons
    src, action = np.full(len(rows), -1, np.int8), np.full(len(rows), MOVE, np.int8)
    for tier in range(index.n_tiers):
        drops = sources[tier] & (src < 0) & droppable(index, rows, tier, dst)
        src[drops], action[drops] = tier, DROP
    drops = action == DROP
    text = append_to_reasons(text, drops, f"; a verified copy is in {index.name(dst)}")
    least = np.full(len(rows), np.inf)
    for tier in range(index.n_tiers):
        can = np.flatnonzero(~drops & sources[tier] & index.whole[tier, rows] & index.readable[tier, rows])
        cost = transfer_dollars(index, rows[can], tier, dst)
        cheaper = cost < least[can]
        can = can[cheaper]
        least[can], src[can] = cost[cheaper], tier
        action[can] = RECLASS if index.same_url[tier, dst] else MOVE
    nowhere = src < 0
    src[nowhere] = np.argmax(sources[:, nowhere], axis=0)
    moves = MoveColumns.of(rows, action, src, dst, rule, text)
    refused = moves.take(nowhere)
    return moves.take(~nowhere), replace(refused, reason=_unreadable_reasons(index, refused))


def droppable(index: SnapshotIndex, rows: Rows, src: int, dst: int) -> Flags:
    """Return whether the copy in src may be dropped because dst holds the same data; bool[n_rows].

    The copy in dst must be whole and verified. An unverified copy in src must not be newer than it: somebody has
    written to src since dst received its copy, and the group is copied again. Shards are immutable, so that this does
    not apply to them.
    """
    found = index.whole[src, rows] & index.reliable[dst, rows]
    some = rows[found]
    written_s = index.snapshot.modified_s
    not_newer = written_s[index.at[src, some]] <= written_s[index.at[dst, some]]
    found[found] = not_newer | index.reliable[src, some] | (index.snapshot.kind[some] == SHARD)
    return np.asarray(found, np.bool_)


def transfer_dollars(index: SnapshotIndex, rows: Rows, src: int, dst: int) -> NDArray[np.float64]:
    src_prices, dst_prices = index.prices[src], index.prices[dst]
    if src_prices is None or dst_prices is None:
        return np.zeros(len(rows))
    sizes = index.snapshot.sizes(index.at[src, rows].astype(np.int64))
    if index.same_url[src, dst]:
        return reclass_dollars(src_prices, dst_prices, sizes)
    leaves, streams = bool(index.leaves[src, dst]), bool(index.streams[src, dst])
    return copy_dollars(src_prices, dst_prices, sizes, leaves=leaves, streams=streams)


def _unreadable_reasons(index: SnapshotIndex, refused: MoveColumns) -> Reasons:
    out = np.empty(len(refused), np.object_)
    state = index.snapshot.state[index.at[refused.src, refused.group]]
    paths = index.snapshot.paths.take(pa.array(refused.group)).to_pylist()
    whole = index.whole[refused.src, refused.group]
    for row, (path, tier, is_whole) in enumerate(zip(paths, refused.src.tolist(), whole.tolist(), strict=True)):
        if not is_whole:
            out[row] = (
                f"its copy in {index.name(tier)} is not whole: objects of it are missing; `tiercache tier get {path}` "
                f"completes it from another tier, or delete what is left of it"
            )
        elif state[row] == RESTORING:
            out[row] = f"its copy in {index.name(tier)} is being restored: it can be read when that is done"
        else:
            out[row] = f"its copy in {index.name(tier)} is archived: restore it first: tiercache tier get {path}"
    return out


# -- proposals of a rule ---------------------------------------------------------------------------------------------


def propose(index: SnapshotIndex, rule: Rule, number: int) -> RuleProposals:
    rows = np.flatnonzero(index.rule == number)
    if rule.keep:
        return _by_keep_lists(index, rule, number, rows[index.snapshot.kind[rows] == CHECKPOINT])
    deletes = _deletes(index, rule, number, rows)
    left = _left(index, rows, deletes)
    if rule.to is None:
        return RuleProposals(left, deletes, NO_MOVES)
    dst = index.file.index(rule.to)
    fits, unsure = _conditions_hold(index, rule, left)
    sources = index.at[:, left] >= 0
    sources[dst:] = False
    lies = sources.any(axis=0)
    goes, waits = lies & fits & ~unsure, lies & unsure
    proposed, refused = propose_move(
        index, left[goes], sources[:, goes], dst, (number, _reasons(index, rule, left[goes]))
    )
    waiting = MoveColumns.concat(
        propose_move(index, left[waits], sources[:, waits], dst, (number, np.full(int(waits.sum()), "", np.object_)))
    )
    is_unreported = index.snapshot.unreported[waiting.group]
    unknown = replace(waiting, reason=np.where(is_unreported, _UNREPORTED, _untracked_reasons(index, waiting)))
    return RuleProposals(left, MoveColumns.concat([deletes, proposed]), MoveColumns.concat([refused, unknown]))


_UNREPORTED = "its use is not known yet: a machine that may have used it has not reported"


def _untracked_reasons(index: SnapshotIndex, waiting: MoveColumns) -> Reasons:
    def words(is_shard: bool) -> str:
        if is_shard:
            how = "machines report uses only after the first `tier apply` or `tier run --once`"
        else:
            how = "it was never read through tiercache here, and other programs do not report their reads"
        return f"its use is not known: {how}; `after` in place of `idle` counts from the last write"

    return format_reasons(words, index.snapshot.kind[waiting.group] == SHARD)


def _left(index: SnapshotIndex, rows: Rows, deletes: MoveColumns) -> Rows:
    """Return the rows that will not be deleted, with the newest checkpoints, which never are."""
    out = np.zeros(index.snapshot.n_groups, np.bool_)
    out[deletes.group] = True
    return rows[~out[rows] | index.newest[rows]]


def _conditions_hold(index: SnapshotIndex, rule: Rule, rows: Rows) -> tuple[Flags, Flags]:
    """Return whether the conditions hold, and for which of these groups an unreported use may contradict them."""
    fits, unsure = np.ones(len(rows), np.bool_), np.zeros(len(rows), np.bool_)
    if rule.after_s is not None:
        fits &= index.age_s[rows] >= rule.after_s
    if rule.idle_s:  # idle = 0 holds for every group
        fits &= _unused_s(index, rows) >= rule.idle_s
        unsure = index.snapshot.unreported[rows] | np.isposinf(index.snapshot.uses_tracked_since_s[rows])
    return fits, fits & unsure


def _unused_s(index: SnapshotIndex, rows: Rows) -> NDArray[np.float64]:
    unused_s, since_s = index.unused_s[rows], index.snapshot.uses_tracked_since_s[rows]
    return np.where(np.isposinf(since_s), unused_s, np.minimum(unused_s, index.snapshot.now_s - since_s))


def _reasons(index: SnapshotIndex, rule: Rule, rows: Rows) -> Reasons:
    def words(unused: int, age: int) -> str:
        parts = []
        if rule.idle_s is not None:
            parts.append(f"not used for {ago(unused)} (idle = {span(rule.idle_s)})")
        if rule.after_s is not None:
            parts.append(f"written {ago(age)} ago (after = {span(rule.after_s)})")
        return ", ".join(parts) or f"belongs in {rule.to}"

    none = np.zeros(len(rows), np.int64)
    unused = none if rule.idle_s is None else hours(_unused_s(index, rows))
    return format_reasons(words, unused, none if rule.after_s is None else hours(index.age_s[rows]))


def _deletes(index: SnapshotIndex, rule: Rule, number: int, rows: Rows, named: Flags | None = None) -> MoveColumns:
    limit_s = rule.delete_after_s
    if limit_s is None:
        return NO_MOVES
    old = index.age_s[rows] >= limit_s
    rows = rows[old if named is None else old & ~named]
    what = "" if named is None else ", in no keep list"
    text = format_reasons(
        lambda age: f"written {ago(age)} ago (delete_after = {span(limit_s)}){what}", hours(index.age_s[rows])
    )
    src = np.argmax(index.at[:, rows] >= 0, axis=0).astype(np.int8)
    return MoveColumns.of(rows, DELETE, src, -1, number, text)


def _by_keep_lists(index: SnapshotIndex, rule: Rule, number: int, rows: Rows) -> RuleProposals:
    named, by_keys = np.zeros((index.n_tiers, len(rows)), np.bool_), index.newest[rows]
    without = np.zeros(index.snapshot.n_groups, np.bool_)
    unscored_by: list[str] = []
    without_by: list[str] = []
    for name, keep in rule.keep.items():
        found = evaluate_keep_list(index.snapshot, rows, keep)
        # Each keep list keeps the newest checkpoint of a run.
        named[index.file.index(name)] = found.named | found.unscored | index.newest[rows]
        by_keys = by_keys | found.named
        without[rows] |= found.without
        unscored_by += found.unscored_by
        without_by += found.without_by
    anywhere = np.asarray(named.any(axis=0), np.bool_)
    deletes = _deletes(index, rule, number, rows, anywhere)
    lacks = f"; it lacks {_worded(without_by)}, which other checkpoints of its run have"
    deletes = replace(deletes, reason=append_to_reasons(deletes.reason, without[deletes.group], lacks))
    # Checkpoints that only the unknown result of `best` saves from deletion: reported as refused deletions.
    unscored = _deletes(index, rule, number, rows[anywhere], by_keys[anywhere])
    where = "found in no checkpoint of its run, or only in files that cannot be read"
    text = f"it may be the best by {_worded(unscored_by)}, which is {where}"
    unscored = replace(unscored, reason=np.full(len(unscored), text, np.object_))
    left = np.isin(rows, _left(index, rows, deletes), assume_unique=True)
    rows, named, anywhere = rows[left], named[:, left], anywhere[left]
    old = np.zeros(len(rows), np.bool_)
    if rule.then is not None:
        old = ~anywhere & (index.age_s[rows] >= (rule.after_s or 0.0))
    parts = [(deletes, unscored), _then(index, rule, number, rows[old])]
    tiers = sorted(index.file.index(name) for name in rule.keep)
    undecided = ~old
    # Without `then`, the last tier with a keep list sends copies down too, unless it is the last tier.
    for tier in [tier for tier in tiers if tier + 1 < index.n_tiers] if rule.then is None else tiers[:-1]:
        goes = undecided & ~named[tier] & index.has(tier, rows)
        undecided &= ~goes
        reasons = np.full(int(goes.sum()), f"keep_{index.name(tier)} does not name it", np.object_)
        parts.append(propose_down(index, rows[goes], tier, (number, reasons), named[tier + 1, goes]))
    proposed, refused = (MoveColumns.concat(part) for part in zip(*parts, strict=True))
    return RuleProposals(rows, proposed, refused, named)


def _worded(metrics: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(map(repr, metrics)))


def _then(index: SnapshotIndex, rule: Rule, number: int, rows: Rows) -> tuple[MoveColumns, MoveColumns]:
    if rule.then is None:
        return NO_MOVES, NO_MOVES
    dst = index.file.index(rule.then)
    sources = index.at[:, rows] >= 0
    sources[dst:] = False
    lies = sources.any(axis=0)
    after = "" if rule.after_s is None else f" (after = {span(rule.after_s)})"
    text = format_reasons(lambda age: f"in no keep list, written {ago(age)} ago{after}", hours(index.age_s[rows[lies]]))
    return propose_move(index, rows[lies], sources[:, lies], dst, (number, text))


def propose_down(
    index: SnapshotIndex, rows: Rows, tier: int, reasons: tuple[int, Reasons], kept_below: Flags | None = None
) -> tuple[MoveColumns, MoveColumns]:
    """Propose to send copies in a tier down, as propose_move(). kept_below: Rows that need a copy in the next tier."""
    dst = np.full(len(rows), tier + 1, np.int8)
    for lower in range(index.n_tiers - 1, tier, -1):
        drops = droppable(index, rows, tier, lower)
        dst[drops if kept_below is None or lower == tier + 1 else drops & ~kept_below] = lower
    number, texts = reasons
    parts = [(NO_MOVES, NO_MOVES)]
    for to in np.unique(dst).tolist():
        here = dst == to
        sources = np.zeros((index.n_tiers, int(here.sum())), np.bool_)
        sources[tier] = True
        parts.append(propose_move(index, rows[here], sources, to, (number, texts[here])))
    proposed, refused = zip(*parts, strict=True)
    return MoveColumns.concat(proposed), MoveColumns.concat(refused)


# -- why a checkpoint is kept -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KeepReason:
    """A reason why a checkpoint is kept, in the words of the rule file where it is one of its keys.

    rule: "pins[N]" for a pin; "" for what holds under every rule. tier: Whose keep list names the checkpoint; None:
    every tier where it is.
    """

    kind: Literal["rule", "newest", "incomplete", "pin", "hold", "program"]
    rule: str
    tier: str | None
    text: str

    def __str__(self) -> str:
        where = "" if self.tier is None else f"keep_{self.tier} "
        return f"{self.rule}: {where}{self.text}" if self.rule else self.text


def keep_reasons(snapshot: Snapshot, file: RuleFile) -> Mapping[int, tuple[KeepReason, ...]]:
    """Return by group, for each checkpoint that is kept, every reason. Others may be moved or deleted by their rule."""
    index = SnapshotIndex.of(snapshot, file, [None] * len(file.tiers))
    found: dict[int, list[KeepReason]] = defaultdict(list)
    _always(index, found)
    is_checkpoint = index.snapshot.kind == CHECKPOINT
    for number, rule in enumerate(file.rules):
        rows = np.flatnonzero((index.rule == number) & is_checkpoint)
        for tier, keep in rule.keep.items():
            for text, alone in _keys(keep):
                result = evaluate_keep_list(index.snapshot, rows, alone)
                for group in rows[result.named].tolist():
                    found[group].append(KeepReason("rule", rule.name, tier, text))
                for group in rows[result.unscored & ~result.named].tolist():
                    unknown = f"{text}, and its metric is not known"
                    found[group].append(KeepReason("rule", rule.name, tier, unknown))
    return {group: tuple(reasons) for group, reasons in found.items()}


def _always(index: SnapshotIndex, found: dict[int, list[KeepReason]]) -> None:
    snapshot = index.snapshot
    is_checkpoint = snapshot.kind == CHECKPOINT
    for group in np.flatnonzero(index.newest & is_checkpoint).tolist():
        run = np.flatnonzero((snapshot.run == snapshot.run[group]) & snapshot.complete & is_checkpoint)
        is_last = snapshot.created_s[group] == snapshot.created_s[run].max()
        text = "newest of its run" if is_last else "highest step of its run"
        found[group].append(KeepReason("newest", "", None, text))
    for group in np.flatnonzero(is_checkpoint & ~snapshot.complete).tolist():
        found[group].append(KeepReason("incomplete", "", None, "not complete"))
    for group in np.flatnonzero(is_checkpoint & (index.pin >= 0)).tolist():
        pin = index.file.pins[index.pin[group]]
        found[group].append(KeepReason("pin", f"pins[{index.pin[group] + 1}]", None, pin.why or "pinned"))
    for group in sorted(snapshot.pinned):
        found[group].append(KeepReason("pin", "", None, "pinned in its pin.json"))
    for group, reason in snapshot.held.items():
        if is_checkpoint[group]:
            found[group].append(KeepReason("hold", "", None, reason))


def _keys(keep: KeepList) -> Iterator[tuple[str, KeepList]]:
    if keep.last is not None:
        yield f"last = {keep.last}", KeepList(last=keep.last)
    if keep.every_steps is not None:
        yield f"every_steps = {keep.every_steps}", KeepList(every_steps=keep.every_steps)
    if keep.every_s is not None:
        yield f"every = {span(keep.every_s)}", KeepList(every_s=keep.every_s)
    for best in keep.best:
        mode = ":max" if best.mode == "max" else ""
        yield f"best = {best.metric}:{best.n}{mode}", KeepList(best=(best,))
    if keep.younger_s is not None:
        yield f"younger than {span(keep.younger_s)}", KeepList(younger_s=keep.younger_s)


Dollars = NDArray[np.float64]

# Above HIGH of its capacity, a tier sends its least recently used groups down until LOW is reached.
HIGH, LOW = 0.9, 0.75
# A move must be earned back within this time.
BREAK_EVEN_DAYS = 365.0
# Actions after which dst holds more bytes; for the others, dst is -1 or has the copy already.
_ADDS_BYTES_TO_DST = (RECLASS, MOVE, COPY)
_NOT_WHOLE = "no copy of it is whole: it is not complete yet, or objects of it are missing"


def with_costs(index: SnapshotIndex, moves: MoveColumns) -> MoveColumns:
    once, saving_month = np.zeros(len(moves)), np.zeros(len(moves))
    deleted_in_s = _seconds_until_deletion(index, moves)

    def add(rows: NDArray[np.int64], action: int, src: int, dst: int) -> None:
        groups = moves.group[rows]
        copies = index.at[src, groups].astype(np.int64)
        sizes = index.snapshot.sizes(copies)
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
    limits = [np.inf if rule.delete_after_s is None else rule.delete_after_s for rule in index.file.rules]
    by_rule = np.array([*limits, np.inf])[np.where(moves.rule < 0, len(limits), moves.rule)]
    by_rule[index.newest[moves.group]] = np.inf  # never deleted
    return np.asarray(np.maximum(by_rule - index.age_s[moves.group], 0.0), np.float64)


# -- refusals -----------------------------------------------------------------------------------------------------


def refuse(moves: MoveColumns, refused: list[MoveColumns], mask: Flags, text: Reasons | str) -> MoveColumns:
    """Refuse the moves of a mask, and return the others. text: Reason of each refused move, or of all."""
    if not mask.any():
        return moves
    refused.append(replace(moves.take(mask), reason=np.full(int(mask.sum()), text, np.object_)))
    return moves.take(~mask)


def refuse_protected(index: SnapshotIndex, moves: MoveColumns, refused: list[MoveColumns]) -> MoveColumns:
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
    found = np.zeros(index.snapshot.n_groups, np.bool_)
    found[[*index.snapshot.held]] = True
    return found


def keep_newest(index: SnapshotIndex, moves: MoveColumns, refused: list[MoveColumns]) -> MoveColumns:
    """Refuse moves that would remove the newest complete checkpoint of a run, or its last readable copy.

    A move of it becomes a copy, so that a later plan drops the source once the new copy is known to be verified.
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
    if reason := deletion_block_reason(unavailable):
        moves = refuse(moves, refused, moves.action == DELETE, reason)
    for name, reason in unavailable.items():
        moves = refuse(moves, refused, moves.dst == index.file.index(name), f"nothing goes to tier {name}: {reason}")
    return moves


def _readable_elsewhere(index: SnapshotIndex, moves: MoveColumns) -> Flags:
    found = np.zeros(len(moves), np.bool_)
    is_readable = np.append(index.snapshot.state == READABLE, False)  # index -1 (no copy) is the last entry
    for tier in range(index.n_tiers):
        found |= index.reliable[tier, moves.group] & is_readable[index.at[tier, moves.group]] & (moves.src != tier)
    return found


def refuse_unprofitable(index: SnapshotIndex, moves: MoveColumns, refused: list[MoveColumns]) -> MoveColumns:
    """Refuse moves that do not pay back within BREAK_EVEN_DAYS, or before their rule deletes the group.

    Moves of a watermark, whose purpose is room, are not checked.
    """
    moves = with_costs(index, moves)
    deleted_in_days = _seconds_until_deletion(index, moves) / DAY_S
    too_late = break_even_days(moves.once, moves.saving_month) > np.minimum(BREAK_EVEN_DAYS, deleted_in_days)
    too_late &= _is_about_cost(index, moves)
    return refuse(moves, refused, too_late, _unprofitable_reasons(moves.take(too_late), deleted_in_days[too_late]))


def _is_about_cost(index: SnapshotIndex, moves: MoveColumns) -> Flags:
    """Return whether storage in src has a price. A local disk has none, and costs are not compared."""
    paid = np.array([price is not None and price.store_gb_month > 0 for price in index.prices], np.bool_)
    known = np.array([price is not None for price in index.prices], np.bool_)
    is_move = (moves.action == MOVE) | (moves.action == RECLASS)
    return np.asarray(is_move & paid[moves.src] & known[moves.dst], np.bool_)


def _unprofitable_reasons(too_late: MoveColumns, deleted_in_days: NDArray[np.float64]) -> Reasons:
    def words(once: float, saving: float, days: float, deleted_in: int) -> str:
        when = "never earned back" if np.isinf(days) else f"earned back in {days:.3g} days"
        change = f"saves {dollars_in_reason(saving)}" if saving >= 0 else f"{dollars_in_reason(-saving)} more"
        what = f"costs {dollars_in_reason(once)} once and {change} a month: {when}"
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
    return f"${dollars:,.2f}" if dollars >= 1 else f"${dollars:.3g}"


def _refuse_immovable(index: SnapshotIndex) -> MoveColumns:
    groups = np.array(sorted(group for group in index.snapshot.immovable if index.rule[group] >= 0), np.int64)
    reasons = np.array([index.snapshot.immovable[group] for group in groups.tolist()], np.object_)
    lies = index.at[:, groups] >= 0
    src, dst = (np.argmax(lies, axis=0), index.n_tiers - 1 - np.argmax(lies[::-1], axis=0))
    return replace(MoveColumns.of(groups, MOVE, src, dst, index.rule[groups], ""), reason=reasons)


class CapacityLedger:
    """Bytes in each tier: stored, arriving and leaving. Leaving bytes occupy it until the grace period is over."""

    def __init__(self, index: SnapshotIndex, capacity_bytes: Sequence[int | None]) -> None:
        snapshot = index.snapshot
        self._index, self.limits = index, tuple(capacity_bytes)
        stored = np.bincount(snapshot.tier, weights=snapshot.n_bytes.astype(np.float64), minlength=index.n_tiers)
        self.stored_bytes = stored.astype(np.int64)
        self.arriving_bytes, self.leaving_bytes = np.zeros_like(self.stored_bytes), np.zeros_like(self.stored_bytes)

    def fitting(self, moves: MoveColumns) -> Flags:
        fits = np.ones(len(moves), np.bool_)
        for tier, limit in enumerate(self.limits):
            rows = np.flatnonzero((moves.dst == tier) & np.isin(moves.action, _ADDS_BYTES_TO_DST))
            if limit is not None and len(rows):
                left_bytes = limit - int(self.stored_bytes[tier] + self.arriving_bytes[tier])
                fits[rows] = _first_fit(bytes_of(self._index, moves.take(rows)), left_bytes)
        return fits

    def admit(self, moves: MoveColumns, refused: list[MoveColumns]) -> Flags:
        """Return which moves fit. Counts these, and refuses the others."""
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
    return index.snapshot.n_bytes[index.at[moves.src, moves.group]]


def _first_fit(n_bytes: NDArray[np.int64], left_bytes: int) -> Flags:
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

    prices, capacity_bytes: Of each tier; None: unknown, so that costs are not considered, and unlimited. unavailable:
    Reason by tier that is perhaps not mounted. Nothing moves to such a tier, and nothing is deleted while there is one.
    """
    return _Policy(SnapshotIndex.of(snapshot, file, prices), capacity_bytes, unavailable or {}).decide()


def decide_now(
    snapshot: Snapshot, file: RuleFile, stores: Stores, catalog: TierCatalog
) -> tuple[Decisions, Mapping[str, str]]:
    """Return the decisions for tiers as they are now, and the reason for each unavailable tier, by name."""
    unavailable = unavailable_tiers(file, stores, catalog)
    capacity = [stores.capacity(tier.name) for tier in file.tiers]
    decisions = decide(snapshot, file, file.prices, capacity_bytes=capacity, unavailable=unavailable)
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
        """Return the groups whose copy in the tier the watermark may send down."""
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
