"""The snapshot as the policy looks at it: copies by tier and group, and what the rule file says of each group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.tier.costs import leaves_and_streams
from tiercache.tier.matching import first_match
from tiercache.tier.model import CHECKPOINT, HERE, KINDS, RESTORED
from tiercache.tier.retention import newest

if TYPE_CHECKING:
    from tiercache.prices import Prices
    from tiercache.tier.model import Snapshot
    from tiercache.tierfile import Rule, Tier, TierFile

Rows = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """What is asked of a snapshot again and again. Tiers are rows, groups columns.

    Attributes:
        at: int32[n_tiers, n_groups], the number of the copy there; -1: none.
        readable: bool[n_tiers, n_groups], a copy that can be read now.
        whole, ok: of copies, likewise; ok: whole and verified.
        rule: int16[n_groups], the rule that holds for it; -1: none.
        pin: int16[n_groups], the first pin that matches and holds; -1: none.
        newest: bool[n_groups], the newest complete checkpoint of its run.
        tagged: bool[n_groups].
        age_s, unused_s: float64[n_groups], since it was written, and since anybody used it.
        group_bytes: int64[n_groups], of its largest copy.
        same_place: bool[n_tiers, n_tiers], tiers with one URL: a move between them changes the class.
        leaves: bool[n_tiers, n_tiers], bytes that are copied from one to the other leave the provider's region.
        streams: bool[n_tiers, n_tiers], such bytes pass through this machine; else the store copies them itself.
    """

    snapshot: Snapshot
    file: TierFile
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
    def of(cls, snapshot: Snapshot, file: TierFile, prices: Sequence[Prices | None]) -> View:
        """Look at a snapshot. Raises ValueError where its tiers are not the file's."""
        names = tuple(tier.name for tier in file.tiers)
        if snapshot.tiers != names:
            raise ValueError(f"the snapshot is of tiers {snapshot.tiers}, and {file.path} has {names}: take it again")
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
        # The mover knows the objects of a group, and `run/step-10/**` names them; here its path stands for them.
        pin = first_match(snapshot.paths, [(pin.match + _folders(pin.match), ()) for pin in pins])

        def way(a: int, b: int) -> tuple[bool, bool]:
            return leaves_and_streams(file.tiers[a].url, file.tiers[b].url, prices[a], prices[b])

        return cls(
            snapshot=snapshot,
            file=file,
            prices=prices,
            at=at,
            readable=spread((snapshot.state == HERE) | (snapshot.state == RESTORED)),
            whole=spread(snapshot.whole),
            ok=spread(snapshot.whole & snapshot.verified),
            rule=rules_of(snapshot, file),
            pin=np.append([file.pins.index(pin) for pin in pins], -1).astype(np.int16)[pin],
            newest=newest(snapshot),
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
        """How many tiers there are."""
        return len(self.at)

    @property
    def hot(self) -> int | None:
        """The tier that what is read is promoted to: the first hot one."""
        return next((i for i, tier in enumerate(self.file.tiers) if tier.role == "hot"), None)

    def name(self, tier: int) -> str:
        """Of a tier."""
        return self.snapshot.tiers[tier]

    def has(self, tier: int, rows: Rows) -> Flags:
        """Whether these groups have a copy there."""
        return np.asarray(self.at[tier, rows] >= 0)


def rules_of(snapshot: Snapshot, file: TierFile) -> NDArray[np.int16]:
    """The rule that holds for each group: the first whose match, except and kind fit; -1: none."""
    if all(rule.kind is None for rule in file.rules):
        return first_match(snapshot.paths, [(rule.match, rule.excepted) for rule in file.rules])
    found = np.full(snapshot.n_groups, -1, np.int16)
    for number, kind in enumerate(KINDS):
        of_kind = snapshot.kind == number
        rules = [i for i, rule in enumerate(file.rules) if rule.kind in (None, kind)]
        globs = [(file.rules[i].match, file.rules[i].excepted) for i in rules]
        hits = first_match(snapshot.paths.filter(pa.array(of_kind)), globs)
        found[of_kind] = np.append(rules, -1).astype(np.int16)[hits]
    return found


def fits_size(rule: Rule, n_bytes: NDArray[np.int64]) -> Flags:
    """Whether groups of so many bytes are as large, and as small, as a rule asks for."""
    fits = np.ones(len(n_bytes), np.bool_)
    if rule.larger_than_bytes is not None:
        fits &= n_bytes > rule.larger_than_bytes
    if rule.smaller_than_bytes is not None:
        fits &= n_bytes < rule.smaller_than_bytes
    return fits


def largest_copies(snapshot: Snapshot) -> NDArray[np.int64]:
    """Bytes of each group's largest copy."""
    n_bytes = np.zeros(snapshot.n_groups, np.int64)
    np.maximum.at(n_bytes, snapshot.group, snapshot.n_bytes)
    return n_bytes


def with_tags(snapshot: Snapshot, file: TierFile) -> Snapshot:
    """The snapshot with the tags that the file gives to checkpoints, beside those that they have."""
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
    """The folders of which globs name all that is in them."""
    return tuple(glob.removesuffix("/**") for glob in globs if glob.endswith("/**") and glob != "/**")
