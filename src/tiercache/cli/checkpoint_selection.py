"""Checkpoints that the arguments of a `tiercache ckpt` command select.

They are selected from the inventory of the tiers, so in every layout that it recognises, and from the same snapshot as
plans. Without a rule file, the folder or URL of the runs in the arguments is the only tier.

An argument is a path with everything below it, a glob, or RUN/WHICH: a path, and which checkpoint below it is meant.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache import config
from tiercache.checkpoint.format import (
    MANIFEST_NAME,
    Manifest,
    parse_manifest,
    parse_name,
)
from tiercache.checkpoint.run_stores import Choice, did_you_mean, missing_file, parse_choice
from tiercache.cli.common import Output
from tiercache.cli.open_tiers import (
    OpenTiers,
    base_folder,
    is_glob,
    open_tiers,
    print_unavailable,
    select_paths,
    split_tier,
    tier_path,
)
from tiercache.errors import NotFound, StoreError, TierCacheError
from tiercache.keep import PIN_NAME, UNREADABLE_PIN, parse_pin
from tiercache.model import ObjectInfo
from tiercache.prices import prices_if_known
from tiercache.store.access import ParsedUrl
from tiercache.tier.inventory.groups import Inventory
from tiercache.tier.inventory.layouts import group_keys
from tiercache.tier.inventory.metrics import metrics_in_name, read_metrics
from tiercache.tier.journal import TierCatalog
from tiercache.tier.model import CHECKPOINT, READABLE, RESTORED, Snapshot
from tiercache.tier.move.mover import catalog_path
from tiercache.tier.rules import RuleFile, Tier, load_rule_file
from tiercache.tier.stores import Stores, unavailable_tiers

_THREADS = 16

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CheckpointTiers:
    """Opened tiers, their inventory, and the checkpoints that the arguments select: numbers of groups, in order."""

    tiers: OpenTiers
    inventory: Inventory
    snapshot: Snapshot  # of the inventory; `complete` is corrected by the manifests of our own checkpoints
    groups: tuple[int, ...]
    prefix: str = ""  # of the paths of the only tier, where there is no rule file, so that they are arguments
    problems: Mapping[int, str] = field(default_factory=dict)  # of incomplete checkpoints, as far as they were examined

    def name(self, group: int) -> str:
        """Return the path of a checkpoint as people write it."""
        return f"{self.prefix}{self.path(group)}"

    def path(self, group: int) -> str:
        """Return the path of a checkpoint below the URLs of the tiers."""
        return str(self.snapshot.paths[group].as_py())

    def copies(self, group: int) -> list[int]:
        """Return the numbers of a checkpoint's copies, the fastest tier first."""
        return [int(copy) for copy in np.flatnonzero(self.snapshot.group == group)]

    def tier(self, copy: int) -> str:
        """Return the name of a copy's tier."""
        return self.snapshot.tiers[int(self.snapshot.tier[copy])]

    def is_readable(self, copy: int) -> bool:
        """Return whether a copy can be read now."""
        return int(self.snapshot.state[copy]) in (READABLE, RESTORED)

    def objects(self, copy: int) -> list[ObjectInfo]:
        """Return the objects of a copy, with the checksums that the store, a manifest or the catalog knows."""
        snapshot = self.snapshot
        table = self.inventory.objects_of(snapshot.group[[copy]].astype(np.int64), snapshot.tier[[copy]])
        return [
            ObjectInfo(key, n_bytes, etag=etag, modified_s=modified_s, crc32c=crc32c)
            for key, n_bytes, etag, modified_s, crc32c in table.named(0, 1)
        ]

    def metrics(self, group: int) -> dict[str, float]:
        """Return the metrics in a checkpoint's name and in the small files of its first readable copy."""
        path = self.path(group)
        found: dict[str, float] = {}
        copy = next(filter(self.is_readable, self.copies(group)), None)
        if copy is not None:
            with suppress(StoreError):  # a checkpoint that cannot be read has the metrics of its name
                found = read_metrics(self.tiers.stores.store(self.tier(copy)), self.objects(copy))
        return found | metrics_in_name(path.rpartition("/")[2])

    def is_own(self, group: int) -> bool:
        """Return whether a checkpoint has the layout of tc.Checkpoints."""
        return parse_name(self.path(group).rpartition("/")[2]) is not None

    def read_manifest(self, group: int, copy: int) -> Manifest:
        """Return the manifest in a copy of our own checkpoint. Raises CorruptCheckpoint, StoreError."""
        store, key = self.tiers.stores.store(self.tier(copy)), f"{self.path(group)}/{MANIFEST_NAME}"
        return parse_manifest(store.get(key), f"{store.url}/{key}")

    def manifest(self, group: int) -> Manifest | None:
        """Return the manifest of a checkpoint of tc.Checkpoints; None: it has another layout, or cannot be read."""
        for copy in filter(self.is_readable, self.copies(group)) if self.is_own(group) else ():
            with suppress(TierCacheError):
                return self.read_manifest(group, copy)
        return None

    def find_problem(self, group: int) -> str:
        """Return why a checkpoint is not complete; "" if it is complete in some tier, or cannot be read now."""
        if group in self.snapshot.immovable:
            return self.snapshot.immovable[group]
        problems = [self._find_missing(group, copy) for copy in self.copies(group)] if self.is_own(group) else [""]
        if all(problems):
            return problems[-1]
        return "" if self.snapshot.complete[group] else "files are missing, or it is still being written"

    def _find_missing(self, group: int, copy: int) -> str:
        """Return which file of a copy of our own checkpoint is missing or has another size than the manifest states."""
        path = self.path(group)
        objects = {one.key.removeprefix(f"{path}/"): one for one in self.objects(copy)}
        if MANIFEST_NAME not in objects:
            return "it has no manifest: its save is not finished, or has failed"
        if not self.is_readable(copy):
            return ""
        try:
            return missing_file(self.read_manifest(group, copy), objects).rpartition("/")[2]
        except TierCacheError as error:
            return str(error)

    def why_pinned(self, group: int) -> str:
        """Return the reason of the pin of a checkpoint of tc.Checkpoints; "" if none was given."""
        reasons: list[str] = []
        for copy in self.copies(group):
            try:
                found = parse_pin(self.tiers.stores.store(self.tier(copy)).get(f"{self.path(group)}/{PIN_NAME}"))
            except NotFound:
                continue
            except StoreError:  # archived
                found = UNREADABLE_PIN
            reasons += [] if found is None else [found]
        return max(reasons, key=len, default="")

    def known_metrics(self, group: int) -> dict[str, float]:
        """Return the metrics in a checkpoint's name, and those that rules use."""
        used = {name: float(values[group]) for name, values in self.snapshot.metrics.items()}
        return {name: v for name, v in used.items() if v == v} | metrics_in_name(self.path(group).rpartition("/")[2])


@contextmanager
def open_checkpoints(output: Output, rules: Path | None, arguments: Sequence[str]) -> Iterator[CheckpointTiers]:
    """Yield the checkpoints that the arguments name, by path below the tiers; no argument: all.

    Raises NotFound if an argument selects none, and ValueError if it does not say which one is meant.
    """
    with _opened(rules, arguments) as (tiers, chosen, prefix):
        inventory = tiers.read_inventory(output)
        if tiers.file.is_from_file:
            print_unavailable(output, tiers.file, unavailable_tiers(tiers.file, tiers.stores, tiers.catalog))
        found = CheckpointTiers(tiers, inventory, inventory.snapshot, (), prefix)
        selections = [
            _select(found, argument, tier, path)
            for argument, (tier, path) in zip(arguments or ("",), chosen or ((None, ""),), strict=True)
        ]
        found = _examine(found, {group for groups, _ in selections for group in groups})
        groups: dict[int, None] = {}
        for argument, (some, choice) in zip(arguments or ("",), selections, strict=True):
            groups |= dict.fromkeys(some if choice is None else [_choose(found, argument, some, choice)])
        yield replace(found, groups=tuple(groups))


def _select(found: CheckpointTiers, argument: str, tier: str | None, path: str) -> tuple[Sequence[int], Choice | None]:
    """Return the checkpoints at or below a path, by run and time; of RUN/WHICH those of the run, and the choice."""
    snapshot, file = found.snapshot, found.tiers.file
    run, _, last = path.rpartition("/")
    choice = _choice(last)
    places: list[tuple[str | None, str, Choice | None]] = [(tier, path, None)]
    places += [] if choice is None else [(tier, run, choice)]
    if tier is None and file.is_from_file and not argument.startswith(("/", "~")) and "://" not in argument:
        with suppress(ValueError):  # a relative path that is no path below a tier may be a path here
            here = tier_path(file, f"./{argument}")
            places += [(None, here, None)]
            places += [] if choice is None else [(None, here.rpartition("/")[0], choice)]
    for where, text, picked in places:
        hit = (snapshot.kind == CHECKPOINT) & _match(snapshot.paths, text)
        if where is not None:
            hit &= np.isin(np.arange(snapshot.n_groups), snapshot.group[snapshot.tier == snapshot.tiers.index(where)])
        if hit.any() or not argument:
            order = sorted(np.flatnonzero(hit).tolist(), key=lambda g: (snapshot.run[g], snapshot.created_s[g], g))
            return order, picked
    if not file.is_from_file:
        text = "there are no checkpoints of a known layout; expected a run, a checkpoint or a glob"
        raise NotFound(f"{text}{did_you_mean(argument.rpartition('/')[2], ['latest'])}", url=argument)
    names = f"the tier {tier}" if tier else f"the tiers {', '.join(snapshot.tiers)}"
    text = f"no checkpoint has this path, or lies below it, in {names}; `tiercache ckpt ls` lists them"
    outside = "; a folder outside the tiers is written ./FOLDER" if Path(base_folder(argument)).exists() else ""
    raise NotFound(f"{text}{outside}", url=argument)


def _match(paths: pa.Array, text: str) -> NDArray[np.bool_]:
    """Return the paths that a path or a glob selects, with everything below it; bool[n]."""
    return select_paths(paths, text) | select_paths(paths, f"{text}/**") if is_glob(text) else select_paths(paths, text)


def _choice(text: str) -> Choice | None:
    """Return which checkpoint of a run a text means; None if it is a name."""
    with suppress(ValueError):
        choice = parse_choice(text)
        return None if choice.kind == "name" else choice
    return None


def _choose(found: CheckpointTiers, argument: str, groups: Sequence[int], choice: Choice) -> int:
    """Return the checkpoint that a choice means among those of one run."""
    snapshot = found.snapshot
    if len({int(snapshot.run[group]) for group in groups}) > 1:
        runs = {int(snapshot.run[group]): found.name(group) for group in groups}
        names = " and ".join([*runs.values()][:2])
        raise ValueError(
            f"{argument}: expected one run, found several, such as those of {names}: name the run's folder"
        )
    whole = [group for group in groups if snapshot.complete[group]]
    fitting, what = whole, ""
    if choice.kind == "step":
        fitting, what = [group for group in whole if snapshot.step[group] == choice.step], f" of step {choice.step}"
    elif choice.kind == "best":
        metrics = dict(zip(whole, in_parallel(found.metrics, whole), strict=True))
        sign = 1 if choice.mode == "max" else -1
        scores = {group: sign * some.get(choice.text, math.nan) for group, some in metrics.items()}
        fitting = sorted((group for group in whole if scores[group] == scores[group]), key=lambda group: scores[group])
        known = sorted({name for some in metrics.values() for name in some})
        what = f" with the metric {choice.text!r}{did_you_mean(choice.text, known)}"
        what += f"; known metrics: {', '.join(known)}" if known else "; no metrics are known"
    if not fitting:
        steps = ", ".join(str(int(snapshot.step[group])) for group in whole[-5:])
        there = (
            f"steps of the last ones: {steps}" if whole else f"{found.name(groups[-1])}: {found.problems[groups[-1]]}"
        )
        raise NotFound(f"no complete checkpoint{what}; {there}", url=argument)
    return fitting[-1]


def _examine(found: CheckpointTiers, groups: Collection[int]) -> CheckpointTiers:
    """Return the same with `problems`, and the snapshot's `complete` corrected by the manifests of our own checkpoints.

    groups: Selected checkpoints; those of their runs that were written later are examined too, because the newest
    complete one is kept.
    """
    snapshot = found.snapshot
    complete = snapshot.complete.copy()
    is_checkpoint = snapshot.kind == CHECKPOINT
    examined = set(groups)
    for run in {int(snapshot.run[group]) for group in groups}:
        since_s = min(float(snapshot.created_s[group]) for group in groups if snapshot.run[group] == run)
        later = is_checkpoint & (snapshot.run == run) & (snapshot.created_s >= since_s)
        examined.update(np.flatnonzero(later).tolist())
    order = sorted(examined)
    problems = {group: text for group, text in zip(order, in_parallel(found.find_problem, order), strict=True) if text}
    complete[[*problems]] = False
    return replace(found, snapshot=replace(snapshot, complete=complete), problems=problems)


@contextmanager
def _opened(
    rules: Path | None, arguments: Sequence[str]
) -> Iterator[tuple[OpenTiers, list[tuple[str | None, str]], str]]:
    """Yield the tiers, the tier (None: any) and the path of each argument, and the prefix of paths for people."""
    file = None
    if rules is not None or config.find_file(Path.cwd()) is not None:
        with suppress(_NoTiers):
            file = _rule_file(rules)
    if file is not None:
        try:
            chosen = [(split_tier(file, text)[0], tier_path(file, text)) for text in arguments]
        except ValueError:  # a URL or a path in no tier
            if rules is not None:
                raise
        else:
            with open_tiers(file.path) as tiers:
                yield tiers, chosen, ""
            return
    if not arguments:
        raise ValueError(
            f"no {config.FILE_NAME} with [tiers.NAME] tables was found: write one (`tiercache tier init FOLDER`), "
            "name it with --rules, or give a folder or a URL with checkpoints"
        )
    file, chosen, prefix = _one_tier(arguments)
    urls = {tier.name: tier.url for tier in file.tiers}
    with Stores(file) as stores, TierCatalog(catalog_path(file), urls) as catalog:
        yield OpenTiers(file, stores, catalog, tuple(prices_if_known(tier) for tier in file.tiers)), chosen, prefix


class _NoTiers(Exception):
    """The settings file that was found has no tiers."""


def _rule_file(rules: Path | None) -> RuleFile:
    if rules is None:
        found = config.find_file(Path.cwd())
        if found is not None and "tiers" not in config.parse_toml(found, config.read_file(found)):
            raise _NoTiers
    return load_rule_file(rules)


def _one_tier(arguments: Sequence[str]) -> tuple[RuleFile, list[tuple[str | None, str]], str]:
    """Return a rule file without rules, whose only tier has all arguments, their paths below it, and its prefix."""
    places = [ParsedUrl.parse(text) for text in arguments]
    texts = [place.full.rstrip("/") if place.scheme else os.path.abspath(place.path) for place in places]  # noqa: PTH100 - keeps links
    folders = [_run_folder(text) for text in texts]
    steps = zip(*(folder.split("/") for folder in folders), strict=False)
    root = "/".join(step[0] for step in takewhile(lambda step: len({*step}) == 1, steps))
    is_server = root.count("/") < 3 and places[0].scheme != ""
    if root not in folders and (root == "" or is_server):
        raise ValueError(
            f"expected checkpoints in one folder, got {' and '.join(sorted({*arguments})[:2])}: "
            "`tiercache tier init` writes a rule file for more"
        )
    root = root or "/"
    inside = ["" if text == root else text.removeprefix(root.rstrip("/") + "/") for text in texts]
    tier = Tier(name="standard", role="standard", url=root)
    file = RuleFile(path=Path.cwd() / config.FILE_NAME, sha256="", tiers=(tier,))
    is_relative = not any(place.scheme or place.path.startswith("/") for place in places)
    prefix = os.path.relpath(root) if is_relative else ParsedUrl.parse(root).shown.rstrip("/")
    return file, [(None, path) for path in inside], "" if prefix == "." else f"{prefix}/"


def _run_folder(text: str) -> str:
    """Return the folder, or URL, that has the runs or checkpoints of an argument: a checkpoint is known by its name."""
    base = base_folder(text)
    head, _, last = base.rpartition("/")
    is_inside = bool(head) and not head.endswith("/")
    return head if is_inside and (_choice(last) is not None or _is_checkpoint_name(last)) else base


def _is_checkpoint_name(name: str) -> bool:
    """Return whether the inventory takes a folder or a file with this name for a checkpoint."""
    return bool(group_keys(pa.array([name, f"{name}/model.safetensors"])).checkpoint.any())


def in_parallel(work: Callable[[int], T], items: Sequence[int]) -> list[T]:
    """Return the results of a function for each item, computed by threads."""
    with ThreadPoolExecutor(_THREADS, "tiercache-ckpt") as pool:
        return list(pool.map(work, items))
