"""The snapshot indexed by tier and group, with the rule, the pin and the derived flags of each group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.tier.costs import leaves_and_streams
from tiercache.tier.matching import first_match
from tiercache.tier.model import CHECKPOINT, KINDS, READABLE, RESTORED
from tiercache.tier.retention import find_newest

if TYPE_CHECKING:
    from tiercache.prices import Prices
    from tiercache.tier.model import Snapshot
    from tiercache.tierfile import Rule, RuleFile, Tier

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
    opened_versions: Flags
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
            opened_versions=_pairs(file.tiers, lambda a, b: way(a, b)[0]),
            streams=_pairs(file.tiers, lambda a, b: way(a, b)[1]),
        )

    @property
    def n_tiers(self) -> int:
        """Number of tiers."""
        return len(self.at)

    @property
    def hot(self) -> int | None:
        """Number of the tier that groups are promoted to: the first hot tier; None: there is none."""
        return next((i for i, tier in enumerate(self.file.tiers) if tier.role == "hot"), None)

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
