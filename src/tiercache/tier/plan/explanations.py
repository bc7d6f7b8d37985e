"""Explains which rule keeps each checkpoint, in which tier, and why: the keep lists evaluated key by key."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from tiercache.keep import KeepList, evaluate_keep_list
from tiercache.tier.model import CHECKPOINT
from tiercache.tier.plan.proposals import span
from tiercache.tier.plan.selection import SnapshotIndex

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tiercache.tier.model import Snapshot
    from tiercache.tier.rules import RuleFile


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
