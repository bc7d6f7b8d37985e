"""Evaluates rules: indexes the snapshot by tier and group, evaluates keep lists, and proposes moves as columns.

Steps of checkpoints are compared as numbers. Among equal steps, the checkpoint that was written later ranks higher. An
incomplete checkpoint is kept only by its tags and its age, so that it does not displace a complete one. If no
checkpoint of a run has the metric of a `best`, the keep list keeps all checkpoints of that run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.tier.costs import Sizes, copy_dollars, leaves_and_streams, reclass_dollars
from tiercache.tier.model import (
    CHECKPOINT,
    DELETE,
    DROP,
    KINDS,
    MOVE,
    NO_MOVES,
    READABLE,
    RECLASS,
    RESTORED,
    RESTORING,
    SHARD,
    MoveColumns,
)
from tiercache.tier.text_columns import first_match

if TYPE_CHECKING:
    from tiercache.prices import Prices
    from tiercache.tier.model import Snapshot
    from tiercache.tier.rules import BestMetric, KeepList, Rule, RuleFile, Tier


_Rows = NDArray[np.int64]
_Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class KeepResult:
    """The result of a keep list for some groups; bool[n_rows] each, in the order of the rows.

    Attributes:
        named: Whether the list keeps the group.
        unscored: Whether `best` cannot be evaluated for the group, so that the group is kept.
        without: Whether the group lacks a metric of `best` that another group of its run has, so that `best` ignores
            it.
        unscored_by: Metrics of each `best` for which any group is unscored.
        without_by: Metrics of each `best` that any group lacks.
    """

    named: _Flags
    unscored: _Flags
    without: _Flags
    unscored_by: tuple[tuple[str, ...], ...] = ()
    without_by: tuple[tuple[str, ...], ...] = ()


def evaluate_keep_list(snapshot: Snapshot, rows: _Rows, keep: KeepList) -> KeepResult:
    """Return which of the groups a keep list keeps, evaluated per run.

    Args:
        snapshot: Snapshot, for its columns, metrics and tags.
        rows: Group numbers of checkpoints, unique, in any order.
        keep: Keep list; it keeps the union of what its keys keep.
    """
    named, unscored, without = (np.zeros(snapshot.n_groups, np.bool_) for _ in range(3))
    complete = rows[snapshot.complete[rows]]
    if keep.last is not None or keep.every_steps is not None:
        rising = _sorted(snapshot, complete)
        if keep.last is not None:
            named[rising[_from_end(snapshot.series[rising]) < keep.last]] = True
        if keep.every_steps is not None:
            named[_first_of_steps(snapshot, rising, keep.every_steps)] = True
    if keep.every_s is not None:
        named[_first_of_stretches(snapshot, complete, keep.every_s)] = True
    unscored_by: list[tuple[str, ...]] = []
    without_by: list[tuple[str, ...]] = []
    for best in keep.best:
        scores = scores_of(snapshot, complete, best)
        named[_best(snapshot, complete, scores.values, best)] = True
        unsure = scores.is_unscored | (np.isnan(scores.values) & snapshot.unread[complete])
        lacks = np.isnan(scores.values) & ~unsure
        unscored[complete[unsure]], without[complete[lacks]] = True, True
        unscored_by += [best.metrics] if unsure.any() else []
        without_by += [best.metrics] if lacks.any() else []
    if keep.tags:
        wanted = set(keep.tags)
        named[[group for group, tags in snapshot.tags.items() if not wanted.isdisjoint(tags)]] = True
    if keep.younger_s is not None:
        named[rows[snapshot.now_s - snapshot.created_s[rows] <= keep.younger_s]] = True
    return KeepResult(named[rows], unscored[rows], without[rows], tuple(unscored_by), tuple(without_by))


@dataclass(frozen=True, slots=True, eq=False)
class BestScores:
    """Values of the metric of a `best`.

    Attributes:
        values: float64[n_rows], NaN where the group has no value.
        is_unscored: bool[n_rows], whether no group of the run has any of the metrics.
    """

    values: NDArray[np.float64]
    is_unscored: _Flags


def scores_of(snapshot: Snapshot, complete: _Rows, best: BestMetric) -> BestScores:
    """Return the metric of complete checkpoints: per run, the first metric that any of its checkpoints has.

    One metric is used per run, because values of two metrics cannot be compared.
    """
    _, run = np.unique(snapshot.series[complete], return_inverse=True)
    values = np.full(len(complete), np.nan)
    has = np.zeros(int(run.max(initial=-1)) + 1, np.bool_)
    for name in best.metrics:
        if name in snapshot.metrics:
            found = snapshot.metrics[name][complete]
            is_first = np.bincount(run, weights=~np.isnan(found), minlength=len(has)).astype(np.bool_) & ~has
            values = np.where(is_first[run], found, values)
            has |= is_first
    return BestScores(values, ~has[run])


def find_newest(snapshot: Snapshot) -> _Flags:
    """Return whether each group is the newest complete checkpoint of its run; bool[n_groups]."""
    found = np.zeros(snapshot.n_groups, np.bool_)
    rows = _sorted(snapshot, np.flatnonzero((snapshot.kind == CHECKPOINT) & snapshot.complete))
    found[rows[_from_end(snapshot.series[rows]) == 0]] = True
    return found


def _sorted(snapshot: Snapshot, rows: _Rows) -> _Rows:
    """Sort rows by run and step."""
    columns = (rows, snapshot.created_s[rows], snapshot.step[rows], snapshot.series[rows])
    return rows[np.lexsort(columns)]


def _begins(*columns: NDArray[np.generic]) -> _Flags:
    """Return whether each row differs from the previous row in any column; bool[n]."""
    begins = np.ones(len(columns[0]), np.bool_)
    begins[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return begins


def _from_start(series: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return, for each row of a sorted column, the number of earlier rows of its run; int64[n]."""
    starts = np.flatnonzero(_begins(series))
    places = np.arange(len(series))
    return places - np.repeat(starts, np.diff(np.append(starts, len(series))))


def _from_end(series: NDArray[np.int32]) -> NDArray[np.int64]:
    return _from_start(series[::-1])[::-1]


def _first_of_steps(snapshot: Snapshot, rising: _Rows, every: int) -> _Rows:
    rows = rising[snapshot.step[rising] >= 0]
    return rows[_begins(snapshot.series[rows], snapshot.step[rows] // every)]


def _first_of_stretches(snapshot: Snapshot, rows: _Rows, every_s: float) -> _Rows:
    rows = rows[np.lexsort((rows, snapshot.created_s[rows], snapshot.series[rows]))]
    series, created_s = snapshot.series[rows], snapshot.created_s[rows]
    starts = np.flatnonzero(_begins(series))
    first_s = np.repeat(created_s[starts], np.diff(np.append(starts, len(rows))))
    return rows[_begins(series, np.floor((created_s - first_s) / every_s))]


def _best(snapshot: Snapshot, rows: _Rows, values: NDArray[np.float64], best: BestMetric) -> _Rows:
    """Return the best rows of each run. Among equal values, the higher step is better. values: Value of each row."""
    rows, values = rows[~np.isnan(values)], values[~np.isnan(values)]
    worse = values if best.mode == "min" else -values
    rows = rows[np.lexsort((-rows, -snapshot.created_s[rows], -snapshot.step[rows], worse, snapshot.series[rows]))]
    return rows[_from_start(snapshot.series[rows]) < best.n]


Rows = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class SnapshotIndex:
    """The snapshot indexed for the policy. In two-dimensional columns, tiers are rows and groups are columns.

    Attributes:
        snapshot: Snapshot, with the tags of the rule file.
        file: Rule file.
        prices: Prices of each tier; None: unknown.
        at: int32[n_tiers, n_groups], number of the group's copy in the tier; -1: none.
        readable: bool[n_tiers, n_groups], whether the copy can be read now.
        whole: bool[n_tiers, n_groups], whether the copy is whole.
        ok: bool[n_tiers, n_groups], whether the copy is whole and verified.
        rule: int16[n_groups], number of the rule that applies to the group; -1: none.
        pin: int16[n_groups], number of the first pin in force that matches the group; -1: none.
        newest: bool[n_groups], whether the group is the newest complete checkpoint of its run.
        tagged: bool[n_groups], whether the group has a tag.
        age_s: float64[n_groups], seconds since the group was written.
        unused_s: float64[n_groups], seconds since its last use, or since it was written if that is later.
        group_bytes: int64[n_groups], size of the largest copy.
        same_place: bool[n_tiers, n_tiers], whether the tiers share a URL: a move between them changes the storage
            class.
        leaves: bool[n_tiers, n_tiers], whether a copy between the tiers leaves the provider's region.
        streams: bool[n_tiers, n_tiers], whether a copy between the tiers passes through this machine; otherwise the
            store copies the objects itself.
    """

    snapshot: Snapshot
    file: RuleFile
    prices: Sequence[Prices | None]
    at: NDArray[np.int32]
    readable: Flags
    whole: Flags
    ok: Flags
    rule: NDArray[np.int16]
    pin: NDArray[np.int16]
    newest: Flags
    tagged: Flags
    age_s: NDArray[np.float64]
    unused_s: NDArray[np.float64]
    group_bytes: NDArray[np.int64]
    same_place: Flags
    leaves: Flags
    streams: Flags

    @classmethod
    def of(cls, snapshot: Snapshot, file: RuleFile, prices: Sequence[Prices | None]) -> SnapshotIndex:
        """Index a snapshot. Raises ValueError if its tiers differ from those of the rule file."""
        names = tuple(tier.name for tier in file.tiers)
        if snapshot.tiers != names:
            raise ValueError(f"the snapshot has tiers {snapshot.tiers}, and {file.path} has {names}: take a new one")
        snapshot = with_tags(snapshot, file)
        shape = len(names), snapshot.n_groups

        def spread(column: NDArray[np.bool_]) -> Flags:
            out = np.zeros(shape, np.bool_)
            out[snapshot.tier, snapshot.group] = column
            return out

        at = np.full(shape, -1, np.int32)
        at[snapshot.tier, snapshot.group] = np.arange(snapshot.n_copies, dtype=np.int32)
        tagged = np.zeros(snapshot.n_groups, np.bool_)
        tagged[[group for group, tags in snapshot.tags.items() if tags]] = True
        pins = [pin for pin in file.pins if pin.until_s is None or pin.until_s > snapshot.now_s]
        # The snapshot has no objects: the path of a folder stands for the objects that `run/step-10/**` matches.
        pin = first_match(snapshot.paths, [(pin.match + _folders(pin.match), ()) for pin in pins])

        def way(a: int, b: int) -> tuple[bool, bool]:
            return leaves_and_streams(file.tiers[a].url, file.tiers[b].url, prices[a], prices[b])

        return cls(
            snapshot=snapshot,
            file=file,
            prices=prices,
            at=at,
            readable=spread((snapshot.state == READABLE) | (snapshot.state == RESTORED)),
            whole=spread(snapshot.whole),
            ok=spread(snapshot.whole & snapshot.verified),
            rule=rules_of(snapshot, file),
            pin=np.append([file.pins.index(pin) for pin in pins], -1).astype(np.int16)[pin],
            newest=find_newest(snapshot),
            tagged=tagged,
            age_s=snapshot.now_s - snapshot.created_s,
            unused_s=snapshot.now_s - np.maximum(snapshot.last_use_s, snapshot.created_s),
            group_bytes=largest_copies(snapshot),
            same_place=_pairs(file.tiers, lambda a, b: _folder(file.tiers[a]) == _folder(file.tiers[b])),
            leaves=_pairs(file.tiers, lambda a, b: way(a, b)[0]),
            streams=_pairs(file.tiers, lambda a, b: way(a, b)[1]),
        )

    @property
    def n_tiers(self) -> int:
        """Number of tiers."""
        return len(self.at)

    def name(self, tier: int) -> str:
        """Return the name of a tier."""
        return self.snapshot.tiers[tier]

    def has(self, tier: int, rows: Rows) -> Flags:
        """Return whether each of the groups has a copy in the tier; bool[n_rows]."""
        return np.asarray(self.at[tier, rows] >= 0)


def rules_of(snapshot: Snapshot, file: RuleFile) -> NDArray[np.int16]:
    """Return the number of the first rule whose globs and kind match each group; -1: none. int16[n_groups]."""
    if all(rule.kind is None for rule in file.rules):
        return first_match(snapshot.paths, [(rule.match, rule.exclude) for rule in file.rules])
    found = np.full(snapshot.n_groups, -1, np.int16)
    for number, kind in enumerate(KINDS):
        of_kind = snapshot.kind == number
        rules = [i for i, rule in enumerate(file.rules) if rule.kind in (None, kind)]
        globs = [(file.rules[i].match, file.rules[i].exclude) for i in rules]
        hits = first_match(snapshot.paths.filter(pa.array(of_kind)), globs)
        found[of_kind] = np.append(rules, -1).astype(np.int16)[hits]
    return found


def fits_size(rule: Rule, n_bytes: NDArray[np.int64]) -> Flags:
    """Return whether groups of these sizes satisfy larger_than and smaller_than of a rule; bool[n]."""
    fits = np.ones(len(n_bytes), np.bool_)
    if rule.larger_than_bytes is not None:
        fits &= n_bytes > rule.larger_than_bytes
    if rule.smaller_than_bytes is not None:
        fits &= n_bytes < rule.smaller_than_bytes
    return fits


def largest_copies(snapshot: Snapshot) -> NDArray[np.int64]:
    """Return the size in bytes of each group's largest copy; int64[n_groups]."""
    n_bytes = np.zeros(snapshot.n_groups, np.int64)
    np.maximum.at(n_bytes, snapshot.group, snapshot.n_bytes)
    return n_bytes


def with_tags(snapshot: Snapshot, file: RuleFile) -> Snapshot:
    """Return the snapshot with the tags of the rule file added to those that its checkpoints have."""
    if not file.tags:
        return snapshot
    checkpoints = np.flatnonzero(snapshot.kind == CHECKPOINT)
    paths = snapshot.paths.take(pa.array(checkpoints))
    tags = dict(snapshot.tags)
    for tag in file.tags:
        for group in checkpoints[first_match(paths, [(tag.match, ())]) >= 0].tolist():
            tags[group] = tags.get(group, frozenset()) | frozenset(tag.tags)
    return replace(snapshot, tags=tags)


def _pairs(tiers: Sequence[Tier], of: Callable[[int, int], bool]) -> Flags:
    numbers = range(len(tiers))
    return np.array([[a != b and of(a, b) for b in numbers] for a in numbers], np.bool_).reshape(len(tiers), -1)


def _folder(tier: Tier) -> str:
    return tier.url.rstrip("/")


def _folders(globs: Sequence[str]) -> tuple[str, ...]:
    """Return the folders that `**` globs cover completely: "a/b" for "a/b/**"."""
    return tuple(glob.removesuffix("/**") for glob in globs if glob.endswith("/**") and glob != "/**")


Texts = NDArray[np.object_]


@dataclass(frozen=True, slots=True, eq=False)
class RuleProposals:
    """The proposals of one rule.

    Attributes:
        rows: Groups that the rule applies to and does not delete.
        wanted: Proposed moves.
        refused: Moves that the rule implies and that are rejected already.
        kept: bool[n_tiers, n_rows], whether the keep list of the tier keeps the group; None: the rule has no keep
            lists.
    """

    rows: Rows
    wanted: MoveColumns
    refused: MoveColumns
    kept: Flags | None = None


# -- reasons ---------------------------------------------------------------------------------------------------------


def format_reasons(words: Callable[..., str], *figures: NDArray[Any]) -> Texts:
    """Return words(figure, ...) of each row. Rows with equal figures share one text object, which is formatted once."""
    code = np.zeros(len(figures[0]), np.int64)
    for figure in figures:
        values, inverse = np.unique(figure, return_inverse=True)
        _, code = np.unique(code * len(values) + inverse, return_inverse=True)
    _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
    said = np.empty(len(first), np.object_)
    said[:] = [words(*(figure[row].item() for figure in figures)) for row in first.tolist()]
    return np.asarray(said[inverse], np.object_)


def append_to_reasons(texts: Texts, mask: Flags, end: str) -> Texts:
    """Append `end` to the texts of the mask. Rows that shared one text share the new text."""
    known: dict[str, str] = {}
    out = texts.copy()
    out[mask] = [known.setdefault(text, text + end) for text in texts[mask].tolist()]
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
    view: SnapshotIndex, rows: Rows, sources: Flags, dst: int, why: tuple[int, Texts]
) -> tuple[MoveColumns, MoveColumns]:
    """Propose how groups get from any of their source tiers to dst. Returns (proposed, rejected).

    A copy is dropped where dst has a verified copy already; otherwise it is moved, from the source tier with the lowest
    cost. A group is rejected if none of its source copies can be read.

    Args:
        view: Indexed snapshot.
        rows: Groups that have a copy in at least one source tier.
        sources: bool[n_tiers, n_rows], copies that may be moved; none in dst.
        dst: Destination tier.
        why: Number of the rule, and the reason of each row.
    """
    rule, text = why
    src, action = np.full(len(rows), -1, np.int8), np.full(len(rows), MOVE, np.int8)
    for tier in range(view.n_tiers):
        drops = sources[tier] & (src < 0) & droppable(view, rows, tier, dst)
        src[drops], action[drops] = tier, DROP
    drops = action == DROP
    text = append_to_reasons(text, drops, f"; a verified copy is in {view.name(dst)}")
    least = np.full(len(rows), np.inf)
    for tier in range(view.n_tiers):
        can = np.flatnonzero(~drops & sources[tier] & view.whole[tier, rows] & view.readable[tier, rows])
        cost = _cost(view, rows[can], tier, dst)
        cheaper = cost < least[can]
        can = can[cheaper]
        least[can], src[can] = cost[cheaper], tier
        action[can] = RECLASS if view.same_place[tier, dst] else MOVE
    nowhere = src < 0
    src[nowhere] = np.argmax(sources[:, nowhere], axis=0)
    moves = MoveColumns.of(rows, action, src, dst, rule, text)
    stuck = moves.take(nowhere)
    return moves.take(~nowhere), replace(stuck, reason=_why_stuck(view, stuck))


def droppable(view: SnapshotIndex, rows: Rows, src: int, dst: int) -> Flags:
    """Return whether the copy in src may be dropped because dst holds the same data; bool[n_rows].

    The copy in dst must be whole and verified. An unverified copy in src must not be newer than it: somebody has
    written to src since dst received its copy, and the group is copied again. Shards are immutable, so that this does
    not apply to them.
    """
    found = view.whole[src, rows] & view.ok[dst, rows]
    some = rows[found]
    written_s = view.snapshot.modified_s
    not_newer = written_s[view.at[src, some]] <= written_s[view.at[dst, some]]
    found[found] = not_newer | view.ok[src, some] | (view.snapshot.kind[some] == SHARD)
    return np.asarray(found, np.bool_)


def _cost(view: SnapshotIndex, rows: Rows, src: int, dst: int) -> NDArray[np.float64]:
    src_prices, dst_prices = view.prices[src], view.prices[dst]
    if src_prices is None or dst_prices is None:
        return np.zeros(len(rows))
    sizes = Sizes.of(view.snapshot, view.at[src, rows].astype(np.int64))
    if view.same_place[src, dst]:
        return reclass_dollars(src_prices, dst_prices, sizes)
    leaves, streams = bool(view.leaves[src, dst]), bool(view.streams[src, dst])
    return copy_dollars(src_prices, dst_prices, sizes, leaves=leaves, streams=streams)


def _why_stuck(view: SnapshotIndex, stuck: MoveColumns) -> Texts:
    out = np.empty(len(stuck), np.object_)
    state = view.snapshot.state[view.at[stuck.src, stuck.group]]
    paths = view.snapshot.paths.take(pa.array(stuck.group)).to_pylist()
    whole = view.whole[stuck.src, stuck.group]
    for row, (path, tier, is_whole) in enumerate(zip(paths, stuck.src.tolist(), whole.tolist(), strict=True)):
        if not is_whole:
            out[row] = f"its copy in {view.name(tier)} is not whole: objects are missing, or sizes differ"
        elif state[row] == RESTORING:
            out[row] = f"its copy in {view.name(tier)} is being restored: it can be read when that is done"
        else:
            out[row] = f"its copy in {view.name(tier)} is archived: restore it first: tiercache restore {path}"
    return out


# -- proposals of a rule ---------------------------------------------------------------------------------------------


def propose(view: SnapshotIndex, rule: Rule, number: int) -> RuleProposals:
    """Return the proposals of a rule for the groups that it applies to."""
    rows = np.flatnonzero(view.rule == number)
    rows = rows[fits_size(rule, view.group_bytes[rows])]
    if rule.keep:
        return _by_keep_lists(view, rule, number, rows[view.snapshot.kind[rows] == CHECKPOINT])
    deletes = _deletes(view, rule, number, rows)
    left = _left(view, rows, deletes)
    if rule.to is None:
        return RuleProposals(left, deletes, NO_MOVES)
    dst = view.file.index(rule.to)
    fits, unsure = _fits(view, rule, left)
    tiers = [view.file.index(name) for name in rule.sources] or list(range(dst))
    sources = np.zeros((view.n_tiers, len(left)), np.bool_)
    sources[tiers] = view.at[tiers][:, left] >= 0
    sources[dst] = False
    lies = sources.any(axis=0)
    goes, waits = lies & fits & ~unsure, lies & unsure
    wanted, refused = propose_move(view, left[goes], sources[:, goes], dst, (number, _why(view, rule, left[goes])))
    waiting = MoveColumns.concat(
        propose_move(view, left[waits], sources[:, waits], dst, (number, np.full(int(waits.sum()), "", np.object_)))
    )
    late = view.snapshot.unreported[waiting.group]
    unknown = replace(waiting, reason=np.where(late, _UNREPORTED, _uncounted(rule, view, waiting)))
    return RuleProposals(left, MoveColumns.concat([deletes, wanted]), MoveColumns.concat([refused, unknown]))


_UNREPORTED = "its use is not known yet: a machine that may have used it has not reported"


def _uncounted(rule: Rule, view: SnapshotIndex, waiting: MoveColumns) -> Texts:
    """Explain why a rule on idle time does not move groups whose uses are not recorded."""
    key = "idle" if rule.idle_s is not None else "uses_below"

    def words(is_shard: bool) -> str:
        if is_shard:
            how = "machines report uses only after the first `tier apply` or `tier run`"
        else:
            how = "it was never read through tiercache here, and other programs do not report their reads"
        return f'its use is not known: {how}; to use its modification time for {key}, write idle_by = "mtime"'

    return format_reasons(words, view.snapshot.kind[waiting.group] == SHARD)


def _left(view: SnapshotIndex, rows: Rows, deletes: MoveColumns) -> Rows:
    """Return the rows that will not be deleted.

    The newest checkpoint of a run and tagged groups are never deleted, so that the rule moves them as it does others.
    """
    out = np.zeros(view.snapshot.n_groups, np.bool_)
    out[deletes.group] = True
    return rows[~out[rows] | view.newest[rows] | view.tagged[rows]]


def _fits(view: SnapshotIndex, rule: Rule, rows: Rows) -> tuple[Flags, Flags]:
    """Return whether the conditions hold, and for which of these groups an unreported use may contradict them."""
    fits = np.ones(len(rows), np.bool_)
    if rule.age_s is not None:
        fits &= view.age_s[rows] >= rule.age_s
    if rule.idle_s is not None:
        fits &= _unused_s(view, rule, rows) >= rule.idle_s
    if rule.uses_below is not None:
        fits &= view.snapshot.uses[rows] < rule.uses_below
    asks_use = bool(rule.idle_s) or rule.uses_below is not None  # idle = 0 holds for every group
    uncounted = np.isposinf(view.snapshot.uses_recorded_since_s[rows]) & (rule.idle_by == "use")
    return fits, fits & (view.snapshot.unreported[rows] | uncounted) & asks_use


def _unused_s(view: SnapshotIndex, rule: Rule, rows: Rows) -> NDArray[np.float64]:
    """Return the idle time of each row in seconds, at most the time since which uses are recorded.

    A rule with idle_by = "mtime" uses the time since the last write or use instead.
    """
    unused_s, since_s = view.unused_s[rows], view.snapshot.uses_recorded_since_s[rows]
    if rule.idle_by == "mtime":
        return unused_s
    return np.where(np.isposinf(since_s), unused_s, np.minimum(unused_s, view.snapshot.now_s - since_s))


def _why(view: SnapshotIndex, rule: Rule, rows: Rows) -> Texts:
    def words(unused: int, age: int, uses: int, is_by_mtime: bool) -> str:
        parts = []
        if rule.idle_s is not None and is_by_mtime:
            limit = f'idle = {span(rule.idle_s)}, idle_by = "mtime"'
            parts.append(f"not written for {ago(unused)}, its uses are not recorded ({limit})")
        elif rule.idle_s is not None:
            parts.append(f"not used for {ago(unused)} (idle = {span(rule.idle_s)})")
        if rule.age_s is not None:
            parts.append(f"written {ago(age)} ago (age = {span(rule.age_s)})")
        if rule.uses_below is not None:
            parts.append(f"used {uses} times (uses_below = {rule.uses_below})")
        return ", ".join(parts) or f"belongs in {rule.to}"

    none = np.zeros(len(rows), np.int64)
    unused = none if rule.idle_s is None else hours(_unused_s(view, rule, rows))
    age = none if rule.age_s is None else hours(view.age_s[rows])
    n_uses = none if rule.uses_below is None else view.snapshot.uses[rows]
    is_by_mtime = np.isposinf(view.snapshot.uses_recorded_since_s[rows]) & (rule.idle_by == "mtime")
    return format_reasons(words, unused, age, n_uses, is_by_mtime)


def _deletes(view: SnapshotIndex, rule: Rule, number: int, rows: Rows, named: Flags | None = None) -> MoveColumns:
    """Propose to delete the rows that are old enough and that no keep list keeps."""
    limit_s = rule.delete_after_s
    if limit_s is None:
        return NO_MOVES
    old = view.age_s[rows] >= limit_s
    rows = rows[old if named is None else old & ~named]
    what = "" if named is None else ", in no keep list"
    text = format_reasons(
        lambda age: f"written {ago(age)} ago (delete_after = {span(limit_s)}){what}", hours(view.age_s[rows])
    )
    src = np.argmax(view.at[:, rows] >= 0, axis=0).astype(np.int8)
    return MoveColumns.of(rows, DELETE, src, -1, number, text)


def _by_keep_lists(view: SnapshotIndex, rule: Rule, number: int, rows: Rows) -> RuleProposals:
    named, by_keys = np.zeros((view.n_tiers, len(rows)), np.bool_), view.newest[rows]
    without = np.zeros(view.snapshot.n_groups, np.bool_)
    unscored_by: list[tuple[str, ...]] = []
    without_by: list[tuple[str, ...]] = []
    for name, keep in rule.keep.items():
        found = evaluate_keep_list(view.snapshot, rows, keep)
        # Each keep list keeps the newest checkpoint of a run.
        named[view.file.index(name)] = found.named | found.unscored | view.newest[rows]
        by_keys = by_keys | found.named
        without[rows] |= found.without
        unscored_by += found.unscored_by
        without_by += found.without_by
    anywhere = np.asarray(named.any(axis=0), np.bool_)
    deletes = _deletes(view, rule, number, rows, anywhere)
    says = f"; it lacks {_worded(without_by)}, which other checkpoints of its run have"
    deletes = replace(deletes, reason=append_to_reasons(deletes.reason, without[deletes.group], says))
    # Checkpoints that only the unknown result of `best` saves from deletion: reported as rejected deletions.
    unscored = _deletes(view, rule, number, rows[anywhere], by_keys[anywhere])
    where = "found in no checkpoint of its run, or only in files that cannot be read"
    text = f"it may be the best by {_worded(unscored_by)}, which is {where}"
    unscored = replace(unscored, reason=np.full(len(unscored), text, np.object_))
    left = np.isin(rows, _left(view, rows, deletes), assume_unique=True)
    rows, named, anywhere = rows[left], named[:, left], anywhere[left]
    old = np.zeros(len(rows), np.bool_)
    if rule.then is not None:
        old = ~anywhere & (view.age_s[rows] >= (rule.after_s or 0.0))
    parts = [(deletes, unscored), _then(view, rule, number, rows[old])]
    tiers = sorted(view.file.index(name) for name in rule.keep)
    undecided = ~old
    for tier in tiers if rule.then is None else tiers[:-1]:
        goes = undecided & ~named[tier] & view.has(tier, rows)
        undecided &= ~goes
        parts.append(_down(view, rows[goes], tier, named[:, goes], number))
    wanted, refused = (MoveColumns.concat(part) for part in zip(*parts, strict=True))
    return RuleProposals(rows, wanted, refused, named)


def _worded(metrics: Iterable[tuple[str, ...]]) -> str:
    """Format the metrics of several `best` keys for people."""
    return ", ".join(dict.fromkeys(" or ".join(map(repr, names)) for names in metrics))


def _then(view: SnapshotIndex, rule: Rule, number: int, rows: Rows) -> tuple[MoveColumns, MoveColumns]:
    """Propose to move what no keep list keeps to the tier of `then`, from any tier, once it is old enough."""
    if rule.then is None:
        return NO_MOVES, NO_MOVES
    dst = view.file.index(rule.then)
    sources = view.at[:, rows] >= 0
    sources[dst:] = False
    lies = sources.any(axis=0)
    after = "" if rule.after_s is None else f" (after = {span(rule.after_s)})"
    text = format_reasons(lambda age: f"in no keep list, written {ago(age)} ago{after}", hours(view.age_s[rows[lies]]))
    return propose_move(view, rows[lies], sources[:, lies], dst, (number, text))


def _down(view: SnapshotIndex, rows: Rows, tier: int, named: Flags, number: int) -> tuple[MoveColumns, MoveColumns]:
    """Propose to send down what the tier's keep list does not keep.

    A copy is dropped if a lower tier holds a verified copy, and otherwise moved to the next tier.

    named: bool[n_tiers, n_rows]: a group that the keep list of the next tier keeps must get a copy in that tier.
    """
    if tier + 1 == view.n_tiers:
        return NO_MOVES, NO_MOVES
    dst = np.full(len(rows), tier + 1, np.int8)
    for lower in range(view.n_tiers - 1, tier + 1, -1):
        dst[~named[tier + 1] & droppable(view, rows, tier, lower)] = lower
    dst[droppable(view, rows, tier, tier + 1)] = tier + 1
    text = np.full(len(rows), f"keep_{view.name(tier)} does not name it", np.object_)
    return propose_moves(view, rows, tier, dst, (number, text))


def propose_moves(
    view: SnapshotIndex, rows: Rows, src: int, dst: NDArray[np.int8], why: tuple[int, Texts]
) -> tuple[MoveColumns, MoveColumns]:
    """Propose moves from one source tier, with a destination tier for each row."""
    parts = []
    for tier in np.unique(dst).tolist():
        to = dst == tier
        sources = np.zeros((view.n_tiers, int(to.sum())), np.bool_)
        sources[src] = True
        parts.append(propose_move(view, rows[to], sources, tier, (why[0], why[1][to])))
    wanted, refused = zip(*parts, strict=True) if parts else ((), ())
    return MoveColumns.concat(wanted), MoveColumns.concat(refused)
