"""Findings that `tier check`, `plan` and `run` report.

These are bucket settings, lost objects, missing metrics, unmatched files, rules that probably do not do what was meant,
and tiers that are one folder.

A lifecycle rule deletes or moves objects without notice. An object is lost if a version, a placement or the catalog
says that it exists and no tier has a copy; unless its last tier is unavailable, a rule may have deleted it, or
`[tiering] gone` lists it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tiercache.errors import CorruptShard, NotFound, StoreError, UnsupportedFormat
from tiercache.keep import BestMetric, Flags, scores_of
from tiercache.store.options import ParsedUrl
from tiercache.store.placement import log
from tiercache.tier.inventory.datasets import OWN_KEY, SHARD_KEY
from tiercache.tier.inventory.metrics import metrics_in_name, used_metrics
from tiercache.tier.model import CHECKPOINT, FILE, KINDS
from tiercache.tier.plan.proposals import span
from tiercache.tier.plan.selection import covered_folders, fits_size, largest_copies, rules_of
from tiercache.tier.stores import CLASSES_TO_RESTORE, unavailable_tiers
from tiercache.tier.suggestions import nearest_glob, suggest_layouts
from tiercache.tier.text_columns import first_match, match_regex, sample_path

if TYPE_CHECKING:
    from collections.abc import Collection

    from tiercache.store.archive import BucketSettings
    from tiercache.tier.inventory.groups import Inventory
    from tiercache.tier.journal import TierCatalog
    from tiercache.tier.model import Snapshot
    from tiercache.tier.rules import Rule, RuleFile, Tier
    from tiercache.tier.stores import Stores


SettingKind: TypeAlias = Literal["expiration", "transition", "versions", "object_lock", "unread"]


@dataclass(frozen=True, slots=True)
class BucketFinding:
    """An effect of a bucket's settings on a tier's objects."""

    tier: str  # name of the tier
    kind: SettingKind  # "unread": a setting that could not be read
    lifecycle_rule: str | None  # ID of the lifecycle rule; None: another setting
    is_danger: bool  # whether objects are deleted, or become unreadable, without tiercache
    text: str  # message for people


def bucket_findings(tier: str, folder: str, class_of: str, settings: BucketSettings) -> Iterator[BucketFinding]:
    """Yield the effects of a bucket's settings on the objects of a tier.

    folder: Prefix of all its keys in the bucket; "" or ending in "/". class_of: Storage class of its copies.
    """
    where = f"tiers.{tier}"
    has_versions = settings.versioning in ("Enabled", "Suspended")
    rules = [rule for rule in settings.lifecycle if _applies(rule, folder)]
    for rule in rules:
        name = str(rule.get("ID") or "without ID")
        described = f"{where}: the bucket's lifecycle rule {name!r}{_of(rule)}"
        if when := _when(rule.get("Expiration", {})):
            kept = " (old versions stay, hidden)" if has_versions else ""
            text = f"{described} deletes objects of this tier {when}{kept}, last copies too:"
            text += " take the tier out of its prefix"
            yield BucketFinding(tier, "expiration", name, True, text)
        for transition in rule.get("Transitions", ()):
            target = str(transition.get("StorageClass", ""))
            if target != class_of:
                more = "; they cannot be read before a restore" if target in CLASSES_TO_RESTORE else ""
                text = f"{described} moves objects of this tier to {target} {_when(transition) or 'at once'}{more}"
                yield BucketFinding(tier, "transition", name, target in CLASSES_TO_RESTORE, text)
    if has_versions:
        yield BucketFinding(tier, "versions", None, False, f"{where}: {_versions(settings.versioning, rules)}")
    if settings.lock is not None:
        text = f"{where}: the bucket has object lock{_retention(settings.lock)}: a deletion adds only a delete marker"
        yield BucketFinding(tier, "object_lock", None, False, f"{text}, and what is locked stays and is billed")
    for name, reason in settings.unread.items():
        text = f"{where}: the bucket's {name} could not be read, and is not checked: {reason}"
        yield BucketFinding(tier, "unread", None, False, text)


def _versions(versioning: str, rules: Sequence[Mapping[str, Any]]) -> str:
    """Describe what happens to versions that tiercache deletes."""
    state = "the bucket keeps versions" if versioning == "Enabled" else "the bucket has kept versions"
    days = [
        one["NoncurrentDays"]
        for one in (rule.get("NoncurrentVersionExpiration", {}) for rule in rules if not _conditions(rule))
        if "NoncurrentDays" in one
    ]
    if days:
        return f"{state}, and deletes old ones after {min(days)} days: what is deleted can be had back until then"
    return f"{state}, and no lifecycle rule expires all old ones: what is deleted stays, and is billed"


def _applies(rule: Mapping[str, Any], folder: str) -> bool:
    """Return whether an enabled lifecycle rule affects objects in the folder, or some below it."""
    prefix = _prefix(rule)
    return rule.get("Status") == "Enabled" and (folder.startswith(prefix) or prefix.startswith(folder))


def _prefix(rule: Mapping[str, Any]) -> str:
    given = rule.get("Filter", {})
    found = given.get("And", given).get("Prefix")
    return str(rule.get("Prefix", "") if found is None else found)  # rules older than 2016 have no Filter


def _conditions(rule: Mapping[str, Any]) -> list[str]:
    """Return the conditions of a rule other than the prefix, for people."""
    given = rule.get("Filter", {})
    both = given.get("And", given)
    tags = [*both.get("Tags", ()), *([given["Tag"]] if "Tag" in given else [])]
    found = [f"tag {tag['Key']}={tag['Value']}" for tag in tags]
    if "ObjectSizeGreaterThan" in both:
        found.append(f"more than {both['ObjectSizeGreaterThan']} bytes")
    if "ObjectSizeLessThan" in both:
        found.append(f"less than {both['ObjectSizeLessThan']} bytes")
    return found


def _of(rule: Mapping[str, Any]) -> str:
    """Describe the objects that a rule affects, for people."""
    facts = [f"prefix {_prefix(rule)!r}" if _prefix(rule) else "the whole bucket", *_conditions(rule)]
    return f" ({', '.join(facts)})"


def _when(action: Mapping[str, Any]) -> str:
    """Describe when an action of a rule takes effect; "": never (it expires delete markers only)."""
    if "Days" in action:
        return f"{action['Days']} days after they were written"
    return f"on {action['Date']:%Y-%m-%d}" if "Date" in action else ""


def _retention(lock: Mapping[str, Any]) -> str:
    default = lock.get("Rule", {}).get("DefaultRetention", {})
    length = next((f"{default[unit]} {unit.lower()}" for unit in ("Days", "Years") if default.get(unit)), "")
    return f" ({default.get('Mode', '')}, {length} by default)" if length else ""


# Number of losses that are confirmed, by one HEAD per tier: a mover may have moved objects during the listing.
_CONFIRMED = 1000
_THREADS = 16
# Keys that only versions account for (shards), and keys of tiercache's own objects.
_NO_FILE = rf"{SHARD_KEY}|{OWN_KEY}"


@dataclass(frozen=True, slots=True)
class Loss:
    """A lost object."""

    path: str  # path below the tier's URL
    tiers: tuple[str, ...]  # tiers that held it last, as far as is known
    known_by: str  # the source that says that it should exist

    @property
    def text(self) -> str:
        """The message for people."""
        where = f" in {', '.join(self.tiers)}" if self.tiers else ""
        return f"{self.path}: expected a copy{where} ({self.known_by}), found none in any tier"


def find_losses(
    inventory: Inventory, file: RuleFile, stores: Stores, catalog: TierCatalog, *, now_s: float
) -> tuple[Loss, ...]:
    """Return all lost objects, by path. Changes nothing. Raises StoreError if a store cannot be reached now."""
    hidden = {*unavailable_tiers(file, stores, catalog), *inventory.facts["unlisted"]}
    expected: dict[str, _Expected] = {}
    keys, named_s = inventory.facts["missing_shards"]
    _add(expected, keys, named_s, "", "a version of its data set names it")
    _add_from_catalog(expected, inventory, file, catalog)
    if file.home_tier.name not in hidden:
        _add_from_placement(expected, inventory, file, stores)
    found = {path: one for path, one in expected.items() if hidden.isdisjoint(one.tiers)}
    paths = pa.array(sorted(found), pa.large_string())
    written_s = np.array([found[path].written_s for path in paths.to_pylist()], np.float64)
    may_be_gone = (first_match(paths, [(file.tiering.gone, ())]) >= 0) | _is_deletable(paths, now_s - written_s, file)
    left = paths.filter(pa.array(~may_be_gone)).to_pylist()
    existing = _existing(left[:_CONFIRMED], [tier.name for tier in file.tiers if tier.name not in hidden], stores)
    return tuple(
        Loss(path, tuple(sorted(found[path].tiers, key=file.index)), found[path].known_by)
        for path in left
        if path not in existing
    )


@dataclass(slots=True)
class _Expected:
    """An object that should exist and was not listed. written_s: Latest possible time of its write; NaN: unknown."""

    tiers: set[str]
    written_s: float
    known_by: str


def _add(
    expected: dict[str, _Expected], keys: pa.Array, written_s: NDArray[np.float64], tier: str, known_by: str
) -> None:
    for path, since_s in zip(keys.to_pylist(), written_s.tolist(), strict=True):
        one = expected.setdefault(path, _Expected(set(), since_s, known_by))
        one.written_s = since_s if np.isnan(one.written_s) else one.written_s
        one.tiers |= {tier} - {""}


def _add_from_catalog(
    expected: dict[str, _Expected], inventory: Inventory, file: RuleFile, catalog: TierCatalog
) -> None:
    shards = [path for path in expected if path.endswith(".tcs")]
    for tier in file.tiers:
        entries = catalog.checksums(tier.name)
        entries = entries.filter(entries["verified"]).combine_chunks()
        keys = pa.concat_arrays([pa.array([], pa.large_string()), *entries["key"].chunks])
        lacking = pa.array(~inventory.lies(keys) & ~match_regex(keys, _NO_FILE))
        written_s = entries["written_s"].fill_null(np.nan).filter(lacking).to_numpy()
        _add(expected, keys.filter(lacking), written_s, tier.name, "a move has verified it")
        # For shards, the catalog only adds the tiers that held them last.
        for key, copy in catalog.entries(tier.name, shards).items() if shards else ():
            if copy.verified:
                expected[key].tiers.add(tier.name)


def _add_from_placement(expected: dict[str, _Expected], inventory: Inventory, file: RuleFile, stores: Stores) -> None:
    """Add files and checkpoints that the home tier's placement leads readers to."""
    if not inventory.lies(pa.array([log.TRACKING_MARKER_KEY], pa.large_string()))[0]:
        return
    try:
        placed = log.read_placement(stores.store(file.home_tier.name))
    except (CorruptShard, UnsupportedFormat):
        return  # the mover reports the damaged placement, and moves nothing
    if placed is None or not len(placed):
        return
    keys = pa.concat_arrays([pa.array([], pa.large_string()), *placed.rows["key"].cast(pa.large_string()).chunks])
    urls = pc.utf8_rtrim(placed.rows["url"], "/")
    lacking = ~inventory.lies(keys) & ~match_regex(keys, _NO_FILE)
    for tier in file.tiers:
        here = keys.filter(pc.and_(pa.array(lacking), pc.equal(urls, tier.url.rstrip("/")).combine_chunks()))
        _add(expected, here, np.full(len(here), np.nan), tier.name, "readers are led there")


def _is_deletable(paths: pa.Array, age_s: NDArray[np.float64], file: RuleFile) -> Flags:
    """Return whether a rule deletes objects of this age: another machine's mover may have done so; bool[n]."""
    is_shard = match_regex(paths, SHARD_KEY)
    found = np.zeros(len(paths), np.bool_)
    for rule in file.rules:
        if rule.delete_after_s is not None:
            fits = is_shard if rule.kind == "shard" else ~is_shard if rule.kind else np.ones(len(paths), np.bool_)
            # A glob may match the folder of a checkpoint; these paths are of objects in the folder.
            globs = rule.match + tuple(f"{glob}/**" for glob in rule.match if not glob.endswith("**"))
            found |= fits & (age_s >= rule.delete_after_s) & (first_match(paths, [(globs, rule.exclude)]) >= 0)
    return found


def _existing(paths: Sequence[str], tiers: Collection[str], stores: Stores) -> set[str]:
    """Return the paths that exist in a tier now."""

    def exists(path: str) -> bool:
        for tier in tiers:
            try:
                stores.head(tier, path)
            except NotFound:
                continue
            except StoreError as error:
                if error.retryable:
                    raise
                continue
            return True
        return False

    with ThreadPoolExecutor(_THREADS, "tiercache-losses") as pool:
        return {path for path, is_there in zip(paths, pool.map(exists, paths), strict=True) if is_there}


# -- missing metrics -------------------------------------------------------------------------------------------------

_MOST_NAMES = 200  # number of checkpoint names per run that are parsed to list the run's metrics in a message
_SHOWN = 10
_NO_WORD = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True, slots=True)
class MetricGap:
    """A metric of a keep list that no complete checkpoint of a run has, so that the list keeps all of the run."""

    rule: str  # name of the rule
    tiers: tuple[str, ...]  # tiers whose keep lists use the metric
    metrics: tuple[str, ...]  # names of the metric in the keep list
    run: str  # checkpoints of the run, as a glob
    n_checkpoints: int  # number of complete checkpoints of the run
    found: tuple[str, ...]  # metrics that the run has
    likely: str | None  # metric of the run with the most similar name; None: there is no similar name

    @property
    def text(self) -> str:
        """The message for people."""
        lists = ", ".join(f"keep_{tier}" for tier in self.tiers)
        names = " or ".join(map(repr, self.metrics))
        if self.found:
            more = ", ..." if len(self.found) > _SHOWN else ""
            found = f"found: {', '.join(self.found[:_SHOWN])}{more}"
        else:
            found = "no metric was found, neither in names nor in readable files"
        likely = f"; did you mean {self.likely!r}?" if self.likely else ""
        return (
            f"{self.rule}: no checkpoint of {self.run} has the metric {names}, so that {lists} keeps all "
            f"{self.n_checkpoints:,} of them and none is deleted; {found}{likely}"
        )


@dataclass(frozen=True, slots=True)
class UnscoredCheckpoints:
    """Complete checkpoints without a metric that others of their runs have, so that `best` does not keep them."""

    rule: str  # name of the rule
    metrics: tuple[str, ...]  # names of the metric in the keep list
    n_checkpoints: int  # number of such checkpoints
    n_runs: int  # number of their runs
    paths: tuple[str, ...]  # paths of the first few

    @property
    def text(self) -> str:
        """The message for people."""
        names = " or ".join(map(repr, self.metrics))
        more = ", ..." if self.n_checkpoints > len(self.paths) else ""
        return (
            f"{self.rule}: {self.n_checkpoints:,} checkpoints lack the metric {names}, which others of their run have, "
            f"so that `best` does not keep them: {', '.join(self.paths)}{more}"
        )


def metric_gaps(
    snapshot: Snapshot, file: RuleFile, in_files: Mapping[int, frozenset[str]]
) -> tuple[tuple[MetricGap, ...], tuple[UnscoredCheckpoints, ...]]:
    """Return the metrics that keep lists use and that are missing: in whole runs, and in some checkpoints of a run.

    in_files: Group to the names of the metrics in its files.
    """
    gaps: list[MetricGap] = []
    unscored_checkpoints: list[UnscoredCheckpoints] = []
    if not used_metrics(file):
        return (), ()
    rule_of, n_bytes = rules_of(snapshot, file), largest_copies(snapshot)
    for number, rule in enumerate(file.rules):
        rows = np.flatnonzero((rule_of == number) & (snapshot.kind == CHECKPOINT) & snapshot.complete)
        rows = rows[fits_size(rule, n_bytes[rows])]
        used: dict[tuple[str, ...], tuple[BestMetric, list[str]]] = {}
        for tier, keep in rule.keep.items():
            for best in keep.best:
                used.setdefault(best.metrics, (best, []))[1].append(tier)
        for metrics, (best, tiers) in used.items():
            scores = scores_of(snapshot, rows, best)
            unscored = rows[scores.is_unscored]
            for number in np.unique(snapshot.run[unscored]).tolist():
                run = unscored[snapshot.run[unscored] == number]
                found = _names_in(snapshot, run, in_files)
                facts = (rule.name, tuple(dict.fromkeys(tiers)), metrics, _run_name(snapshot, run), len(run))
                gaps.append(MetricGap(*facts, found, _likely(metrics, found)))
            without = rows[np.isnan(scores.values) & ~scores.is_unscored & ~snapshot.unread[rows]]
            if len(without):
                paths = tuple(snapshot.paths[row].as_py() for row in without[:3].tolist())
                n_runs = len(np.unique(snapshot.run[without]))
                unscored_checkpoints.append(UnscoredCheckpoints(rule.name, metrics, len(without), n_runs, paths))
    return tuple(gaps), tuple(unscored_checkpoints)


def _names_in(snapshot: Snapshot, run: NDArray[np.int64], in_files: Mapping[int, frozenset[str]]) -> tuple[str, ...]:
    """Return the names of all metrics of a run's checkpoints, sorted."""
    found: set[str] = set()
    for group in run.tolist():
        found |= in_files.get(group, frozenset())
    for group in run[:_MOST_NAMES].tolist():
        found |= metrics_in_name(snapshot.paths[group].as_py().rpartition("/")[2]).keys()
    return tuple(sorted(found))


def _run_name(snapshot: Snapshot, run: NDArray[np.int64]) -> str:
    """Return the checkpoints of a run as a glob: "checkpoints/run7/step-*"."""
    folder, slash, name = snapshot.paths[int(run[0])].as_py().rpartition("/")
    return f"{folder}{slash}{re.sub('[0-9]+', '*', name)}"


def _likely(metrics: Sequence[str], found: Sequence[str]) -> str | None:
    """Return the found metric whose name is most similar to one of the wanted names; None: there is no similar name."""
    plain = {_NO_WORD.sub("_", name.lower()): name for name in reversed(found)}
    for metric in metrics:
        near = get_close_matches(_NO_WORD.sub("_", metric.lower()), plain, n=1)
        if near:
            return plain[near[0]]
    return None


# -- files that a rule with keep lists leaves alone ------------------------------------------------------------------

_LISTED = 10  # number of unmatched files that a finding names


@dataclass(frozen=True, slots=True)
class UnmatchedFiles:
    """Files that a rule with keep lists matches and leaves alone, because they belong to no checkpoint."""

    rule: str  # name of the rule
    n_files: int  # number of such files
    n_bytes: int  # their size; of each the largest copy
    paths: tuple[str, ...]  # paths of the first few
    suggestion: tuple[str, ...]  # patterns for the rule's `checkpoint` that would make checkpoints of some of them

    @property
    def text(self) -> str:
        """The message for people."""
        more = ", ..." if self.n_files > len(self.paths) else ""
        files = f"{self.n_files:,} file{'s' if self.n_files > 1 else ''}"
        text = f"{self.rule}: {files} left alone, in no checkpoint, so that keep lists do not apply: "
        text += ", ".join(self.paths) + more
        if self.suggestion:
            names = ", ".join(f'"{pattern}"' for pattern in self.suggestion)
            names = names if len(self.suggestion) == 1 else f"[{names}]"
            text += f"; if each is a checkpoint, write checkpoint = {names} into the rule"
        return text


def unmatched_files(snapshot: Snapshot, file: RuleFile) -> tuple[UnmatchedFiles, ...]:
    """Return, for each rule with keep lists, the files that it matches and that belong to no checkpoint."""
    found: list[UnmatchedFiles] = []
    if not any(rule.keep for rule in file.rules):
        return ()
    rule_of, n_bytes = rules_of(snapshot, file), largest_copies(snapshot)
    for number, rule in enumerate(file.rules):
        rows = np.flatnonzero((rule_of == number) & (snapshot.kind == FILE))
        if rule.keep and len(rows):
            paths = snapshot.paths.take(pa.array(rows)).to_pylist()
            few = tuple(paths[:_LISTED])
            patterns = tuple(suggest_layouts(paths))[:_LISTED]
            found.append(UnmatchedFiles(rule.name, len(rows), int(n_bytes[rows].sum()), few, patterns))
    return tuple(found)


# -- rules that probably do not do what was meant --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RuleWarning:
    """Something in a rule file that is valid, and probably not what was meant."""

    kind: Literal["no_match", "order", "durations"]
    rule: str  # name of the rule, or "pins[N]"
    text: str  # message for people


def rule_warnings(file: RuleFile, snapshot: Snapshot | None = None) -> tuple[RuleWarning, ...]:
    """Return what is probably wrong with rules and pins. snapshot: None: nothing is known of the tiers."""
    found = [*_bad_durations(file), *_bad_order(file)]
    if snapshot is not None and snapshot.n_groups:
        found += [*_unused_rules(file, snapshot), *_unused_pins(file, snapshot)]
    return tuple(found)


def _bad_durations(file: RuleFile) -> Iterator[RuleWarning]:
    for rule in file.rules:
        for key, before_s, tier in (("after", rule.after_s, rule.then), ("age", rule.age_s, rule.to)):
            if rule.delete_after_s is not None and before_s is not None and rule.delete_after_s <= before_s:
                text = f"{rule.name}: delete_after ({span(rule.delete_after_s)}) is not longer than {key} "
                text += f"({span(before_s)}), so that objects are deleted and never move to {tier}"
                yield RuleWarning("durations", rule.name, text)


def _bad_order(file: RuleFile) -> Iterator[RuleWarning]:
    """Yield a warning for each rule below another that applies to all that it is to protect."""
    for number, rule in enumerate(file.rules):
        paths = pa.array([sample_path(glob) for glob in rule.match], pa.large_string())
        for above in file.rules[:number]:
            harm = _harm(above, rule)
            is_covered = (first_match(paths, [(above.match, above.exclude)]) >= 0).all()
            if harm and is_covered and (above.kind == rule.kind or None in (above.kind, rule.kind)):
                text = (
                    f"{rule.name}: protects nothing, because {above.name}, which {harm}, stands above it and matches "
                )
                text += f"the same paths: move {rule.name} above {above.name}"
                yield RuleWarning("order", rule.name, text)
                break


def _harm(above: Rule, rule: Rule) -> str:
    """Return what a rule does with objects that another rule leaves alone; "": nothing."""
    if above.delete_after_s is not None and rule.delete_after_s is None:
        return "deletes"
    is_idle = rule.to is None and not rule.keep and rule.delete_after_s is None
    return "moves" if is_idle and (above.to is not None or above.keep) else ""


def _unused_rules(file: RuleFile, snapshot: Snapshot) -> Iterator[RuleWarning]:
    """Yield a warning for each rule, and each glob of `except`, that matches nothing."""
    paths, rule_of = snapshot.paths.cast(pa.large_string()), rules_of(snapshot, file)
    for number, rule in enumerate(file.rules):
        of_kind = np.ones(snapshot.n_groups, np.bool_) if rule.kind is None else snapshot.kind == KINDS.index(rule.kind)
        matched = of_kind & (first_match(paths, [(rule.match, ())]) >= 0)
        left = matched & (first_match(paths, [(rule.exclude, ())]) < 0)
        if not matched.any():
            what = f"{rule.kind or 'object'}" + _near_globs(rule.match, paths)
            yield RuleWarning("no_match", rule.name, f"{rule.name}: matches no {what}")
            continue
        if not left.any():
            text = f"{rule.name}: matches nothing, because `except` matches all {int(matched.sum()):,} objects"
            yield RuleWarning("no_match", rule.name, text)
        elif not (rule_of == number).any():
            above = file.rules[int(rule_of[np.flatnonzero(left)[0]])].name
            text = f"{rule.name}: applies to nothing, because rules above it apply to all {int(left.sum()):,} objects "
            yield RuleWarning("no_match", rule.name, f"{text}that it matches: the first of these is {above}")
        for glob in rule.exclude:
            if not (first_match(paths.filter(pa.array(matched)), [((glob,), ())]) >= 0).any():
                text = f"{rule.name}: except = {glob!r} matches none of the objects that `match` matches"
                yield RuleWarning("no_match", rule.name, text + _near_globs((glob,), paths))


def _unused_pins(file: RuleFile, snapshot: Snapshot) -> Iterator[RuleWarning]:
    """Yield a warning for each glob of a pin in force that matches nothing."""
    paths = snapshot.paths.cast(pa.large_string())
    for number, pin in enumerate(file.pins, start=1):
        for glob in pin.match if pin.until_s is None or pin.until_s > snapshot.now_s else ():
            globs = (glob, *covered_folders((glob,)))
            if not (first_match(paths, [(globs, ())]) >= 0).any():
                text = f"pins[{number}]: {glob!r} matches no object, and protects nothing"
                yield RuleWarning("no_match", f"pins[{number}]", text + _near_globs((glob,), paths))


def _near_globs(globs: Sequence[str], paths: pa.Array) -> str:
    """Return the end of a message that names the globs that were probably meant."""
    near = [found for glob in globs if (found := nearest_glob(glob, paths)) is not None]
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


# -- tiers that are one folder ---------------------------------------------------------------------------------------


def refuse_shared_folders(file: RuleFile) -> None:
    """Raise ValueError if two local tiers are one folder by a link or a mount, or if one is inside the other.

    Their URLs do not show it. A copy in one would count as a copy in the other, and a deletion of one deletes both. The
    mover makes sure before each deletion (move/checks.py), in stores of all kinds.
    """
    local = [tier for tier in file.tiers if tier.is_local]
    for one, other in combinations(local, 2):
        if one.url == other.url:
            continue  # two storage classes
        ids, other_ids = _folder_ids(one), _folder_ids(other)
        is_inside = ids[0] in other_ids or other_ids[0] in ids
        if is_inside:
            how = "are one folder" if ids[0] == other_ids[0] else "lie inside one another"
            raise ValueError(
                f"{file.path}: tiers.{other.name}.url: {other.url}, and {one.url} of tiers.{one.name}, {how} by a link "
                f"or a mount: what is deleted in one would be gone from the other; give each tier a folder of its own"
            )


def _folder_ids(tier: Tier) -> list[tuple[int, int] | str]:
    """Return what identifies a tier's folder and each folder above it: device and inode, or else the path."""
    folder = Path(os.path.realpath(ParsedUrl.parse(tier.url).path))
    found: list[tuple[int, int] | str] = []
    for path in (folder, *folder.parents):
        try:
            status = path.stat()
        except OSError:
            found.append(str(path))
        else:
            found.append((status.st_dev, status.st_ino))
    return found
