"""Explains which rule keeps each checkpoint, in which tier, and why: the keep lists evaluated key by key."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tiercache.tier.model import CHECKPOINT
from tiercache.tier.plan.proposals import span
from tiercache.tier.plan.selection import SnapshotIndex, evaluate_keep_list, fits_size
from tiercache.tier.rules import KeepList

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tiercache.tier.model import Snapshot
    from tiercache.tier.rules import RuleFile


@dataclass(frozen=True, slots=True)
class KeepReason:
    """A reason why a checkpoint is kept.

    Attributes:
        rule: Name of the rule; "pins[N]" for a pin; "" for what holds under every rule.
        tier: Tier whose keep list names the checkpoint; None: every tier where it is.
        text: Condition, in the words of the rule file where it is one of its keys.
    """

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
        rows = rows[fits_size(rule, index.group_bytes[rows])]
        for tier, keep in rule.keep.items():
            for text, alone in _keys(keep):
                result = evaluate_keep_list(index.snapshot, rows, alone)
                for group in rows[result.named].tolist():
                    found[group].append(KeepReason(rule.name, tier, text))
                for group in rows[result.unscored & ~result.named].tolist():
                    found[group].append(KeepReason(rule.name, tier, f"{text}, and its metric is not known"))
    return {group: tuple(reasons) for group, reasons in found.items()}


def protected_groups(snapshot: Snapshot, file: RuleFile) -> Mapping[int, str]:
    """Return the groups that a pin (of the rule file, or of their own tags.json) or a hold protects, with the reason.

    The reason completes "which is": "pinned", or "held until ...".
    """
    index = SnapshotIndex.of(snapshot, file, [None] * len(file.tiers))
    pinned = (*np.flatnonzero(index.pin >= 0).tolist(), *snapshot.pinned)
    return {**snapshot.held, **dict.fromkeys(pinned, "pinned")}


def _always(index: SnapshotIndex, found: dict[int, list[KeepReason]]) -> None:
    """Add the reasons that hold under every rule."""
    snapshot = index.snapshot
    is_checkpoint = snapshot.kind == CHECKPOINT
    for group in np.flatnonzero(index.newest & is_checkpoint).tolist():
        run = np.flatnonzero((snapshot.run == snapshot.run[group]) & snapshot.complete & is_checkpoint)
        is_last = snapshot.created_s[group] == snapshot.created_s[run].max()
        found[group].append(KeepReason("", None, "newest of its run" if is_last else "highest step of its run"))
    for group in np.flatnonzero(is_checkpoint & ~snapshot.complete).tolist():
        found[group].append(KeepReason("", None, "not complete"))
    for group in np.flatnonzero(is_checkpoint & (index.pin >= 0)).tolist():
        pin = index.file.pins[index.pin[group]]
        found[group].append(KeepReason(f"pins[{index.pin[group] + 1}]", None, pin.why or "pinned"))
    for group in sorted(snapshot.pinned):
        found[group].append(KeepReason("", None, "pinned in its tags.json"))
    for group, reason in snapshot.held.items():
        if is_checkpoint[group]:
            found[group].append(KeepReason("", None, reason))


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
