"""Evaluates rules: proposes moves as columns, each with its reason, and explains why checkpoints are kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.keep import Flags, KeepList, Rows, evaluate_keep_list
from tiercache.tier.costs import Sizes, copy_dollars, reclass_dollars
from tiercache.tier.model import CHECKPOINT, DELETE, DROP, MOVE, NO_MOVES, RECLASS, RESTORING, SHARD, MoveColumns
from tiercache.tier.plan.selection import SnapshotIndex

if TYPE_CHECKING:
    from tiercache.tier.model import Snapshot
    from tiercache.tier.rules import Rule, RuleFile


Reasons = NDArray[np.object_]


@dataclass(frozen=True, slots=True, eq=False)
class RuleProposals:
    """The proposals of one rule."""

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
    """Append `end` to the texts of the mask. Rows that shared one text share the new text."""
    new: dict[str, str] = {}
    out = texts.copy()
    out[mask] = [new.setdefault(text, text + end) for text in texts[mask].tolist()]
    return out


def hours(seconds: NDArray[np.float64]) -> NDArray[np.int64]:
    """Round down to whole hours, and from two days on to whole days (in hours): the precision that reasons show."""
    whole = np.floor(np.maximum(seconds, 0.0) / 3600).astype(np.int64)
    return np.where(whole < 48, whole, whole // 24 * 24)


def span(seconds: float) -> str:
    """Format a duration for people: "45 days", "36 hours", "10 minutes", "5 s"."""
    for unit_s, name, least in ((86400, "days", 2), (3600, "hours", 2), (60, "minutes", 2)):
        if seconds >= unit_s * least:
            return f"{seconds / unit_s:.4g} {name}"
    return f"{seconds:.4g} s"


def ago(n_hours: int) -> str:
    """Format a result of hours() for people."""
    if n_hours == 1:
        return "1 hour"
    return f"{n_hours} hours" if n_hours < 48 else f"{n_hours // 24} days"


# -- moves between two tiers -----------------------------------------------------------------------------------------


def propose_move(
    index: SnapshotIndex, rows: Rows, sources: Flags, dst: int, reasons: tuple[int, Reasons]
) -> tuple[MoveColumns, MoveColumns]:
    """Propose how groups get from any of their source tiers to dst. Returns (proposed, refused).

    A copy is dropped where dst has a verified copy already; otherwise it is moved, from the source tier with the lowest
    cost. A group is refused if none of its source copies can be read.

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
    """Return the cost to copy the groups from src to dst, or to change their class; 0 if a tier has no prices."""
    src_prices, dst_prices = index.prices[src], index.prices[dst]
    if src_prices is None or dst_prices is None:
        return np.zeros(len(rows))
    sizes = Sizes.of(index.snapshot, index.at[src, rows].astype(np.int64))
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
    """Return the proposals of a rule for the groups that it applies to."""
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
    """Explain why a rule with `idle` does not move groups whose uses are not tracked."""

    def words(is_shard: bool) -> str:
        if is_shard:
            how = "machines report uses only after the first `tier apply` or `tier run --once`"
        else:
            how = "it was never read through tiercache here, and other programs do not report their reads"
        return f"its use is not known: {how}; `after` in place of `idle` counts from the last write"

    return format_reasons(words, index.snapshot.kind[waiting.group] == SHARD)


def _left(index: SnapshotIndex, rows: Rows, deletes: MoveColumns) -> Rows:
    """Return the rows that will not be deleted.

    The newest checkpoint of a run is never deleted, so that the rule moves it as it does others.
    """
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
    """Return the idle time of each row in seconds, at most the time since which uses are tracked."""
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
    """Propose to delete the rows that are old enough and that no keep list keeps."""
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
    unscored_by: list[tuple[str, ...]] = []
    without_by: list[tuple[str, ...]] = []
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


def _worded(metrics: Iterable[tuple[str, ...]]) -> str:
    """Format the metrics of several `best` keys for people."""
    return ", ".join(dict.fromkeys(" or ".join(map(repr, names)) for names in metrics))


def _then(index: SnapshotIndex, rule: Rule, number: int, rows: Rows) -> tuple[MoveColumns, MoveColumns]:
    """Propose to move what no keep list keeps to the tier of `then`, from any tier, once it is old enough."""
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
    """Propose to send copies in a tier down. Returns (proposed, refused).

    A copy is dropped if a lower tier holds a verified copy, and otherwise moved to the next tier. reasons: See
    propose_move(). kept_below: Rows that must get a copy in the next tier.
    """
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
    """A reason why a checkpoint is kept.

    Attributes:
        kind: What keeps the checkpoint.
        rule: Name of the rule; "pins[N]" for a pin; "" for what holds under every rule.
        tier: Tier whose keep list names the checkpoint; None: every tier where it is.
        text: Condition, in the words of the rule file where it is one of its keys.
    """

    kind: Literal["rule", "newest", "incomplete", "pin", "hold"]
    rule: str
    tier: str | None
    text: str

    def __str__(self) -> str:
        """Return the reason for people: "runs: keep_hot last = 2"."""
        where = "" if self.tier is None else f"keep_{self.tier} "
        return f"{self.rule}: {where}{self.text}" if self.rule else self.text


def keep_reasons(snapshot: Snapshot, file: RuleFile) -> Mapping[int, tuple[KeepReason, ...]]:
    """Return by group, for each checkpoint that is kept, every reason.

    The planner's own function evaluates the keys. A checkpoint without a reason may be moved, or deleted, by its rule.
    """
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
    """Add the reasons that hold under every rule."""
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
    """Yield each key of a keep list, as a text and as a keep list of its own."""
    if keep.last is not None:
        yield f"last = {keep.last}", KeepList(last=keep.last)
    if keep.every_steps is not None:
        yield f"every_steps = {keep.every_steps}", KeepList(every_steps=keep.every_steps)
    if keep.every_s is not None:
        yield f"every = {span(keep.every_s)}", KeepList(every_s=keep.every_s)
    for best in keep.best:
        mode = ":max" if best.mode == "max" else ""
        yield f"best = {' or '.join(best.metrics)}:{best.n}{mode}", KeepList(best=(best,))
    if keep.younger_s is not None:
        yield f"younger than {span(keep.younger_s)}", KeepList(younger_s=keep.younger_s)
