"""What `tier check` and `plan` report of a rule file: rules and pins that probably do not do what was meant.

refuse_shared_folders() refuses tiers that are one folder, which their URLs do not show.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.keep import scores_of
from tiercache.store.access import ParsedUrl
from tiercache.tier.policy import covered_folders, rules_of
from tiercache.tier.rules import Rule, RuleFile, Tier
from tiercache.tier.snapshot import CHECKPOINT, FILE, Snapshot
from tiercache.tier.text_columns import first_match

_SHOWN = 10  # names in a message


@dataclass(frozen=True, slots=True)
class RuleWarning:
    kind: Literal["no_match", "no_metric", "unmatched"]
    rule: str  # name of the rule, or "pins[N]"
    text: str  # message for people


def rule_warnings(file: RuleFile, snapshot: Snapshot) -> tuple[RuleWarning, ...]:
    """Return what is probably wrong with rules and pins."""
    found: list[RuleWarning] = []
    if snapshot.n_groups:
        rule_of = rules_of(snapshot, file)
        found += [*_unused_rules(file, snapshot, rule_of), *_unused_pins(file, snapshot)]
        for number, rule in enumerate(file.rules):
            if rule.keep:
                found += _missing_metrics(rule, snapshot, np.flatnonzero(rule_of == number))
                found += _unmatched(rule, snapshot, np.flatnonzero((rule_of == number) & (snapshot.kind == FILE)))
    return tuple(found)


def _unused_rules(file: RuleFile, snapshot: Snapshot, rule_of: NDArray[np.int16]) -> Iterator[RuleWarning]:
    paths = snapshot.paths.cast(pa.large_string())
    for number, rule in enumerate(file.rules):
        matched = first_match(paths, [(rule.match, ())]) >= 0
        left = matched & (first_match(paths, [(rule.exclude, ())]) < 0)
        if not matched.any():
            yield RuleWarning("no_match", rule.name, f"{rule.name}: matches no object")
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
                yield RuleWarning("no_match", rule.name, text)


def _unused_pins(file: RuleFile, snapshot: Snapshot) -> Iterator[RuleWarning]:
    paths = snapshot.paths.cast(pa.large_string())
    for number, pin in enumerate(file.pins, start=1):
        for glob in pin.match if pin.until_s is None or pin.until_s > snapshot.now_s else ():
            globs = (glob, *covered_folders((glob,)))
            if not (first_match(paths, [(globs, ())]) >= 0).any():
                text = f"pins[{number}]: {glob!r} matches no object, and protects nothing"
                yield RuleWarning("no_match", f"pins[{number}]", text)


# -- what keep lists leave alone ---------------------------------------------------------------------------------------


def _missing_metrics(rule: Rule, snapshot: Snapshot, rows: NDArray[np.int64]) -> Iterator[RuleWarning]:
    """Yield a warning for each run of which no complete checkpoint has a metric of a keep list: all of it is kept."""
    complete = rows[(snapshot.kind[rows] == CHECKPOINT) & snapshot.complete[rows]]
    used: dict[str, list[str]] = {}
    for tier, keep in rule.keep.items():
        for best in keep.best:
            used.setdefault(best.metric, []).append(f"keep_{tier}")
    for metric, lists in used.items():
        unscored = complete[scores_of(snapshot, complete, metric)[1]]
        for number in np.unique(snapshot.run[unscored]).tolist():
            run = unscored[snapshot.run[unscored] == number]
            folder, slash, name = snapshot.paths[int(run[0])].as_py().rpartition("/")
            checkpoints = f"{folder}{slash}{re.sub('[0-9]+', '*', name)}"
            text = f"{rule.name}: no checkpoint of {checkpoints} has the metric {metric!r}, "
            text += f"so that {', '.join(dict.fromkeys(lists))} keeps all {len(run):,} of them and none is deleted"
            yield RuleWarning("no_metric", rule.name, text)


def _unmatched(rule: Rule, snapshot: Snapshot, files: NDArray[np.int64]) -> Iterator[RuleWarning]:
    if len(files):
        names = ", ".join(snapshot.paths.take(pa.array(files[:_SHOWN])).to_pylist())
        more = ", ..." if len(files) > _SHOWN else ""
        text = f"{rule.name}: {len(files):,} file{'s' if len(files) > 1 else ''} left alone, in no checkpoint, so that "
        text += f"keep lists do not apply: {names}{more}; names of checkpoints are described in the rule, as in "
        yield RuleWarning("unmatched", rule.name, f'{text}checkpoint = "model_{{step}}.pt"')


# -- tiers that are one folder ---------------------------------------------------------------------------------------


def refuse_shared_folders(file: RuleFile) -> None:
    """Raise ValueError if two local tiers are one folder by a link or a mount, or if one is inside the other.

    Their URLs do not show it. A copy in one would count as a copy in the other, and a deletion of one deletes both. The
    mover makes sure before each deletion (context.py), in stores of all kinds.
    """
    for one, other in combinations([tier for tier in file.tiers if tier.is_local], 2):
        if one.url == other.url:
            continue  # two storage classes
        ids, other_ids = _folder_ids(one), _folder_ids(other)
        if ids[0] in other_ids or other_ids[0] in ids:
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
