"""What must hold before anything goes for good, as it is now: listed and planned anew, whatever a plan said earlier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from tiercache.prices import priced
from tiercache.tier.inventory import take_inventory
from tiercache.tier.marks import absences
from tiercache.tier.model import CHECKPOINT, HERE, SHARD
from tiercache.tier.policy import decide
from tiercache.tier.retention import newest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.catalog.tiers import TierCatalog
    from tiercache.tier.model import Decisions, Snapshot
    from tiercache.tier.stores import Stores
    from tiercache.tierfile import TierFile


@dataclass(frozen=True, slots=True)
class Survey:
    """What there is, as far as deletions must know. Paths of groups.

    Attributes:
        in_use: somebody reads them now.
        protected: the newest complete checkpoint of each run, and the newest that can be read now.
        deletes: last copies that the rules delete now.
        asked: (path, tier) that the rules take something away from now.
        linked: (path, tier) -> a symbolic link in that tier that leads to it.
        used_s: when files and checkpoints were last read through a cache of this machine, of those that were.
    """

    in_use: frozenset[str] = frozenset()
    protected: frozenset[str] = frozenset()
    deletes: frozenset[str] = frozenset()
    asked: frozenset[tuple[str, str]] = frozenset()
    linked: Mapping[tuple[str, str], str] = field(default_factory=dict)
    used_s: Mapping[str, float] = field(default_factory=dict)


def take_survey(file: TierFile, stores: Stores, catalog: TierCatalog, now_s: float) -> Survey:
    """List all tiers and plan once more. Raises as take_inventory()."""
    snapshot = take_inventory(file, stores, catalog, now_s=now_s).snapshot
    prices = [priced(tier) for tier in file.tiers]
    capacity = [stores.capacity(tier.name) for tier in file.tiers]
    missing = absences(file, stores, catalog)
    return survey_of(snapshot, decide(snapshot, file, prices, capacity_bytes=capacity, missing=missing))


def survey_of(snapshot: Snapshot, decisions: Decisions) -> Survey:
    """What a snapshot and what was decided of it say of deletions."""
    tiers = snapshot.tiers
    is_used = np.isfinite(snapshot.counted_since_s) & (snapshot.kind != SHARD)
    takes = [move for move in decisions.moves if move.action in ("move", "drop", "reclass")]
    return Survey(
        in_use=_paths(snapshot, snapshot.in_use),
        protected=_paths(snapshot, newest(snapshot) | newest(_readable(snapshot))),
        deletes=frozenset(snapshot.paths[m.group].as_py() for m in decisions.moves if m.action == "delete"),
        asked=frozenset((snapshot.paths[move.group].as_py(), tiers[move.src]) for move in takes),
        linked={
            (snapshot.paths[int(snapshot.group[copy])].as_py(), tiers[snapshot.tier[copy]]): link
            for copy, link in snapshot.links.items()
        },
        used_s={snapshot.paths[row].as_py(): snapshot.last_use_s[row] for row in np.flatnonzero(is_used).tolist()},
    )


def _readable(snapshot: Snapshot) -> Snapshot:
    """The same, where a checkpoint is complete only if it is so in a copy that can be read now, and stays."""
    can_be_read = np.zeros(snapshot.n_groups, np.bool_)
    can_be_read[snapshot.group[snapshot.whole & (snapshot.state == HERE)]] = True
    return replace(snapshot, complete=snapshot.complete & can_be_read & (snapshot.kind == CHECKPOINT))


def _paths(snapshot: Snapshot, groups: NDArray[np.bool_]) -> frozenset[str]:
    return frozenset(snapshot.paths[int(group)].as_py() for group in np.flatnonzero(groups))
