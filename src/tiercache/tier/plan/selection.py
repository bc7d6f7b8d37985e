"""Selects groups: which rule and pins apply to each, and which tiers hold copies of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tiercache.keep import Flags, Rows, from_end
from tiercache.tier.costs import leaves_and_streams
from tiercache.tier.model import CHECKPOINT, READABLE, RESTORED
from tiercache.tier.text_columns import first_match

if TYPE_CHECKING:
    from tiercache.prices import Prices
    from tiercache.tier.model import Snapshot
    from tiercache.tier.rules import RuleFile


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
        """Index a snapshot. Raises ValueError if its tiers differ from those of the rule file."""
        names = tuple(tier.name for tier in file.tiers)
        if snapshot.tiers != names:
            raise ValueError(f"the snapshot has tiers {snapshot.tiers}, and {file.path} has {names}: take a new one")
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
        """Number of tiers."""
        return len(self.at)

    def name(self, tier: int) -> str:
        """Return the name of a tier."""
        return self.snapshot.tiers[tier]

    def has(self, tier: int, rows: Rows) -> Flags:
        """Return whether each of the groups has a copy in the tier; bool[n_rows]."""
        return np.asarray(self.at[tier, rows] >= 0)


def rules_of(snapshot: Snapshot, file: RuleFile) -> NDArray[np.int16]:
    """Return the number of the first rule whose globs match each group; -1: none. int16[n_groups]."""
    return first_match(snapshot.paths, [(rule.match, rule.exclude) for rule in file.rules])


def largest_copies(snapshot: Snapshot) -> NDArray[np.int64]:
    """Return the size in bytes of each group's largest copy; int64[n_groups]."""
    n_bytes = np.zeros(snapshot.n_groups, np.int64)
    np.maximum.at(n_bytes, snapshot.group, snapshot.n_bytes)
    return n_bytes


def covered_folders(globs: Sequence[str]) -> tuple[str, ...]:
    """Return the folders that `**` globs cover completely: "a/b" for "a/b/**"."""
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
