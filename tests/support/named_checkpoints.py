"""Checkpoints in the layouts of several libraries, and an oracle by name for tiers that keep lists move them between.

The oracle knows which checkpoints were saved, under which names and with which bytes, and what the rules say. It looks
at the raw objects of the tiers and shares no code with the library. `problems_now` holds at every instant, also
directly after a kill; `problems_at_rest` holds after runs that were not interrupted, once all grace periods are over.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

Objects: TypeAlias = Mapping[str, bytes]
Picture: TypeAlias = Mapping[str, Objects]
"""Tier to path to bytes, from the fastest tier to the coldest."""

CHECKPOINTS = "checkpoints"  # folder of all runs
MOST_NAMES = 4


# -- layouts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layout:
    """Names of the checkpoints of one library.

    Attributes:
        name: Name of the layout, and of the run that has it.
        checkpoint: Function that returns the name of a checkpoint in the folder of its run, for a step.
        parts: Names of the files in the folder of a checkpoint, in the order of writing; empty: the checkpoint is one
            file.
        beside: Functions that return the bytes of files beside the checkpoints, by name, for the newest step.
    """

    name: str
    checkpoint: Callable[[int], str]
    parts: tuple[str, ...] = ()
    beside: Mapping[str, Callable[[int], bytes]] = field(default_factory=dict)

    @property
    def run(self) -> str:
        return f"{CHECKPOINTS}/{self.name}"

    def files(self, step: int) -> dict[str, bytes]:
        path = f"{self.run}/{self.checkpoint(step)}"
        return {key: content(key) for key in ([f"{path}/{part}" for part in self.parts] or [path])}

    def files_beside(self, step: int) -> dict[str, bytes]:
        """Return the path and the bytes of each file that the save of a step writes beside its checkpoint."""
        return {f"{self.run}/{name}": write(step) for name, write in self.beside.items()}


def content(key: str) -> bytes:
    """Return the bytes of a file: some hundred bytes to some KB that depend on its whole path."""
    numbers = random.Random(key)
    return numbers.randbytes(numbers.randint(200, 4000))


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("plain", lambda n: f"step-{n}", ("a.bin", "b.bin", "c.bin")),
        Layout(
            "deepspeed",
            lambda n: f"global_step{n}",
            (
                "mp_rank_00_model_states.pt",
                "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
                "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
            ),
            {"latest": lambda n: f"global_step{n}".encode(), "zero_to_fp32.py": lambda n: b"#!/usr/bin/env python\n"},
        ),
        Layout("lightning", lambda n: f"epoch={n // 2}-step={n}.ckpt"),
        Layout(
            "huggingface",
            lambda n: f"checkpoint-{n}",
            ("config.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"),
        ),
        Layout("dcp", lambda n: f"step-{n}", ("__0_0.distcp", "__1_0.distcp", ".metadata")),
        Layout("files", lambda n: f"model_step{n}.pt"),
    )
}
OWN = "checkpoints_class"  # layout of tc.Checkpoints, which only the class itself can write
OWN_RUN = f"{CHECKPOINTS}/{OWN}"


# -- the rule, the record of saves, and the oracle -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KeepRule:
    """What the only rule says. tiers: From the fastest to the coldest.

    Attributes:
        keep_last: Number of the newest checkpoints of a run that each tier keeps, for all tiers but the coldest one.
        delete_after_s: Age at which the rule deletes a checkpoint that no keep list names; None: never.
    """

    tiers: tuple[str, ...]
    keep_last: tuple[int, ...]
    delete_after_s: float | None = None

    def tier_of(self, rank: int) -> str:
        """Return the tier of a checkpoint by its rank in its run: 0 is the newest one."""
        return next((tier for tier, n in zip(self.tiers, self.keep_last, strict=False) if rank < n), self.tiers[-1])


@dataclass(frozen=True, slots=True)
class Save:
    """A checkpoint that was saved. files: Path to bytes. written_s: Time of its writing, in seconds since the epoch."""

    path: str
    run: str
    files: Objects
    written_s: float


@dataclass(slots=True)
class Hold:
    """A checkpoint that a recall holds. is_certain: Whether the recall ended, so that the hot tier must have it."""

    until_s: float
    is_certain: bool


@dataclass(slots=True)
class NamedCheckpoints:
    """All saves so far, and what is wrong with the tiers.

    Attributes:
        rule: The rule.
        saves: Saves, oldest first.
        beside: Path to bytes of the files beside checkpoints, which stay in the fastest tier.
        holds: Path of a checkpoint to its newest hold.
        may_be_gone: Checkpoints that the rule has allowed to be deleted at one of the looks so far.
        slack_s: How much later than delete_after a checkpoint may still be there, and how long before or after its end
            a hold is neither expected nor forbidden.
    """

    rule: KeepRule
    saves: list[Save] = field(default_factory=list)
    beside: dict[str, bytes] = field(default_factory=dict)
    holds: dict[str, Hold] = field(default_factory=dict)
    may_be_gone: set[str] = field(default_factory=set)
    slack_s: float = 600.0

    def saved(self, path: str, run: str, files: Objects, written_s: float) -> None:
        self.saves.append(Save(path, run, dict(files), written_s))

    def held(self, path: str, until_s: float, *, is_certain: bool) -> None:
        before = self.holds.get(path)
        was_certain = before is not None and before.is_certain and before.until_s > until_s
        self.holds[path] = Hold(until_s, is_certain or was_certain)
        if is_certain:
            self.may_be_gone.discard(path)  # the recall has found it

    def problems_now(self, picture: Picture, now_s: float) -> list[str]:
        """Return what is wrong with the tiers at any instant: what is lost, and names with the bytes of others."""
        found = [
            f"{save.path} is complete in no tier: {_where(save, picture)}"
            for save in self.saves
            if not self._may_be_gone(save, now_s) and not _tiers_with_all(save, picture)
        ]
        owners = {key: data for save in self.saves for key, data in save.files.items()} | self.beside
        for tier, objects in picture.items():
            foreign = [key for key, data in objects.items() if key in owners and data != owners[key]]
            if foreign:
                found.append(f"{tier} has other bytes than were saved under {_list(foreign)}")
        found += [
            f"{key} is not in {self.rule.tiers[0]}" for key in self.beside if key not in picture[self.rule.tiers[0]]
        ]
        return found

    def problems_at_rest(self, picture: Picture, now_s: float) -> list[str]:
        """Return what is wrong with the tiers once nothing is left to do, without what problems_now() returns."""
        owners = {key for save in self.saves for key in save.files} | set(self.beside)
        found = []
        for tier, objects in picture.items():
            unknown = [key for key in objects if key not in owners]
            if unknown:
                found.append(f"{tier} has names that nobody saved: {_list(unknown)}")
            if tier != self.rule.tiers[0]:
                moved = [key for key in objects if key in self.beside]
                found += [f"{tier} has {_list(moved)}, which no rule moves"] if moved else []
        for save in self.saves:
            text = self._misplaced(save, picture, now_s)
            if text:
                found.append(f"{save.path} {text}: {_where(save, picture)}")
        return found

    def rank(self, save: Save) -> int:
        return sum(other.run == save.run for other in self.saves[self.saves.index(save) + 1 :])

    def _misplaced(self, save: Save, picture: Picture, now_s: float) -> str:
        present = [tier for tier in picture if any(key in picture[tier] for key in save.files)]
        whole = _tiers_with_all(save, picture)
        torn = [tier for tier in present if tier not in whole]
        if torn:
            return f"is torn in {', '.join(torn)}"
        if not whole:
            return "" if self._may_be_gone(save, now_s) else "is nowhere"
        hold = self.holds.get(save.path)
        hot, wanted = self.rule.tiers[0], self.rule.tier_of(self.rank(save))
        if hold is not None and now_s < hold.until_s + self.slack_s:
            is_missing = hold.is_certain and hot not in whole and now_s < hold.until_s - self.slack_s
            return f"was recalled and is held, but is not in {hot}" if is_missing else ""
        if self._is_overdue(save, now_s):
            return "should have been deleted"
        return "" if whole == [wanted] else f"should be in {wanted} alone"

    def _may_be_gone(self, save: Save, now_s: float) -> bool:
        hold = self.holds.get(save.path)
        is_held = hold is not None and hold.is_certain and now_s < hold.until_s - self.slack_s
        if self._overdue_s(save, now_s) > -self.slack_s and not is_held:
            self.may_be_gone.add(save.path)
        return save.path in self.may_be_gone

    def _is_overdue(self, save: Save, now_s: float) -> bool:
        return self._overdue_s(save, now_s) > self.slack_s

    def _overdue_s(self, save: Save, now_s: float) -> float:
        """Return for how long the rule has deleted a checkpoint; negative: not yet."""
        rule = self.rule
        if rule.delete_after_s is None or self.rank(save) < max(rule.keep_last):
            return -math.inf
        return now_s - save.written_s - rule.delete_after_s


def _tiers_with_all(save: Save, picture: Picture) -> list[str]:
    return [tier for tier, objects in picture.items() if all(objects.get(k) == d for k, d in save.files.items())]


def _where(save: Save, picture: Picture) -> str:
    counts = {tier: sum(key in objects for key in save.files) for tier, objects in picture.items()}
    return ", ".join(f"{n} of {len(save.files)} files in {tier}" for tier, n in counts.items() if n) or "no file left"


def _list(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(sorted(names)[:MOST_NAMES]) + more
