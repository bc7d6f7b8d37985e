"""Guard of deletions: what the tiers and rules say now, from a new listing and plan, whatever an earlier plan said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from tiercache.prices import prices_if_known
from tiercache.tier.inventory import take_inventory
from tiercache.tier.marks import unavailable_tiers
from tiercache.tier.model import CHECKPOINT, READABLE, SHARD
from tiercache.tier.policy import decide
from tiercache.tier.retention import find_newest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.catalog.tiers import TierCatalog
    from tiercache.tier.model import Decisions, Snapshot
    from tiercache.tier.stores import Stores
    from tiercache.tierfile import RuleFile


@dataclass(frozen=True, slots=True)
class DeletionGuard:
    """State of the tiers, as far as deletions depend on it. Paths are paths of groups.

    Attributes:
        in_use: Paths that a reader uses now.
        protected: Newest complete checkpoint of each run, and the newest one that can be read now.
        deletes: Paths whose last copies the rules delete now.
        asked: (path, tier) pairs from which the rules take a copy away now.
        linked: (path, tier) -> symbolic link in that tier that leads to the group.
        used_s: Path -> last read of a file or checkpoint through a cache of this machine, in seconds since the epoch.
    """

    in_use: frozenset[str] = frozenset()
    protected: frozenset[str] = frozenset()
    deletes: frozenset[str] = frozenset()
    asked: frozenset[tuple[str, str]] = frozenset()
    linked: Mapping[tuple[str, str], str] = field(default_factory=dict)
    used_s: Mapping[str, float] = field(default_factory=dict)


def take_deletion_guard(file: RuleFile, stores: Stores, catalog: TierCatalog, now_s: float) -> DeletionGuard:
    """List all tiers and plan once more. Raises as take_inventory()."""
    snapshot = take_inventory(file, stores, catalog, now_s=now_s).snapshot
    prices = [prices_if_known(tier) for tier in file.tiers]
    capacity = [stores.capacity(tier.name) for tier in file.tiers]
    missing = unavailable_tiers(file, stores, catalog)
    return survey_of(snapshot, decide(snapshot, file, prices, capacity_bytes=capacity, missing=missing))


def survey_of(snapshot: Snapshot, decisions: Decisions) -> DeletionGuard:
    """Return the survey of a snapshot and of the decisions on it."""
    tiers = snapshot.tiers
    is_used = np.isfinite(snapshot.uses_recorded_since_s) & (snapshot.kind != SHARD)
    takes = [move for move in decisions.moves if move.action in ("move", "drop", "reclass")]
    return DeletionGuard(
        in_use=_paths(snapshot, snapshot.in_use),
        protected=_paths(snapshot, find_newest(snapshot) | find_newest(_readable(snapshot))),
        deletes=frozenset(snapshot.paths[m.group].as_py() for m in decisions.moves if m.action == "delete"),
        asked=frozenset((snapshot.paths[move.group].as_py(), tiers[move.src]) for move in takes),
        linked={
            (snapshot.paths[int(snapshot.group[copy])].as_py(), tiers[snapshot.tier[copy]]): link
            for copy, link in snapshot.links.items()
        },
        used_s={snapshot.paths[row].as_py(): snapshot.last_use_s[row] for row in np.flatnonzero(is_used).tolist()},
    )


def _readable(snapshot: Snapshot) -> Snapshot:
    """Return the snapshot where a checkpoint is complete only if one copy is complete, readable now and permanent."""
    can_be_read = np.zeros(snapshot.n_groups, np.bool_)
    can_be_read[snapshot.group[snapshot.whole & (snapshot.state == READABLE)]] = True
    return replace(snapshot, complete=snapshot.complete & can_be_read & (snapshot.kind == CHECKPOINT))


def _paths(snapshot: Snapshot, groups: NDArray[np.bool_]) -> frozenset[str]:
    return frozenset(snapshot.paths[int(group)].as_py() for group in np.flatnonzero(groups))
