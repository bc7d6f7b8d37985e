"""The verbs of `tiercache ckpt`; checkpoint_commands.py has their options.

They work on the inventory of the tiers, so on every layout that it recognises, and on the same snapshot as plans.
Without a rule file, the folder or URL of the runs in the arguments is the only tier.

An argument is a path with everything below it, a glob, or RUN/WHICH: a path, and which checkpoint below it is meant.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import typer
from numpy.typing import NDArray

from tiercache import config
from tiercache._native.checksum import crc32c
from tiercache.catalog.tiers import TierCatalog
from tiercache.checkpoint.inventory import missing_file
from tiercache.checkpoint.layout import (
    MANIFEST_NAME,
    SHARED_FOLDER,
    TAGS_NAME,
    Choice,
    Manifest,
    did_you_mean,
    key_of,
    parse_choice,
    parse_manifest,
    parse_name,
)
from tiercache.cli.output import CORRUPT, PARTIAL, Output, confirm, count, printable
from tiercache.cli.tiers import (
    OpenTiers,
    base_folder,
    format_duration,
    is_glob,
    open_tiers,
    print_unavailable,
    select_paths,
    split_tier,
    tier_path,
)
from tiercache.errors import CorruptCheckpoint, NotFound, StoreError, TierCacheError
from tiercache.model import ObjectInfo, format_bytes
from tiercache.prices import prices_if_known
from tiercache.store.options import ParsedUrl
from tiercache.tier.inventory.groups import Inventory
from tiercache.tier.inventory.layouts import group_keys
from tiercache.tier.inventory.metrics import metrics_in_name, read_metrics
from tiercache.tier.model import CHECKPOINT, READABLE, RESTORED, Snapshot
from tiercache.tier.move.mover import catalog_path, open_mover
from tiercache.tier.move.removal import remove_groups
from tiercache.tier.move.transfer import Transfer
from tiercache.tier.plan.explanations import KeepReason, keep_reasons, pinned_groups
from tiercache.tier.plan.plan import make_plan
from tiercache.tier.plan.policy import decide
from tiercache.tier.plan.selection import rules_of, with_tags
from tiercache.tier.rule_edits import Section, add_tables, literal_glob, remove_tables
from tiercache.tier.rules import RuleFile, Tier, load_rule_file
from tiercache.tier.stores import Stores, unavailable_tiers

_THREADS = 16
_STATES = ("here", "archived", "restoring", "restored")
_SHOWN_FILES = 20
_NOT_COMPLETE = "not complete"  # text of a KeepReason

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CheckpointTiers:
    """Opened tiers, their inventory, and the checkpoints that the arguments select: numbers of groups, in order."""

    tiers: OpenTiers
    inventory: Inventory
    snapshot: Snapshot  # of the inventory, with the tags of the rule file
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
                found = read_metrics(self.tiers.stores.store(self.tier(copy)), self.objects(copy), path)
        return found | metrics_in_name(path.rpartition("/")[2])

    def find_problem(self, group: int) -> str:
        """Return why a checkpoint is not complete; "" if it is complete in some tier, or cannot be read now."""
        path = self.path(group)
        if parse_name(path.rpartition("/")[2]) is not None:
            text = ""
            for copy in self.copies(group):
                text = self._find_missing(path, copy)
                if not text:
                    break
            if text:
                return text
        return "" if self.snapshot.complete[group] else "files are missing, or it is still being written"

    def _find_missing(self, path: str, copy: int) -> str:
        """Return which file of a copy of our own checkpoint is missing or has another size than the manifest states."""
        name = path.rpartition("/")[2]
        objects = {one.key.removeprefix(f"{path}/"): one for one in self.objects(copy)}
        if MANIFEST_NAME not in objects:
            return "it has no manifest: its save is not finished, or has failed"
        if not self.is_readable(copy):
            return ""
        store, key = self.tiers.stores.store(self.tier(copy)), f"{path}/{MANIFEST_NAME}"
        try:
            manifest = parse_manifest(store.get(key), f"{store.url}/{key}")
        except TierCacheError as error:
            return str(error)
        shared = [one for one in manifest.files if one.path.startswith("../")]
        keys = [f"{path.removesuffix(name)}{key_of(name, one.path)}" for one in shared]
        listed = self.inventory.lies(pa.array(keys, pa.large_string()))  # their sizes are not known
        known = {
            key_of(name, one.path): ObjectInfo(one.path, one.n_bytes)
            for one, is_listed in zip(shared, listed, strict=True)
            if is_listed
        }
        return missing_file(manifest, objects, known).replace(f"{name}/", "")

    def known_metrics(self, group: int) -> dict[str, float]:
        """Return the metrics in a checkpoint's name, and those that rules use."""
        used = {name: float(values[group]) for name, values in self.snapshot.metrics.items()}
        return {name: v for name, v in used.items() if v == v} | metrics_in_name(self.path(group).rpartition("/")[2])

    def manifest(self, group: int) -> Manifest | None:
        """Return the manifest of a checkpoint of tc.Checkpoints; None: it has another layout, or cannot be read."""
        path = self.path(group)
        if parse_name(path.rpartition("/")[2]) is None:
            return None
        for copy in filter(self.is_readable, self.copies(group)):
            store, key = self.tiers.stores.store(self.tier(copy)), f"{path}/{MANIFEST_NAME}"
            with suppress(TierCacheError):
                return parse_manifest(store.get(key), f"{store.url}/{key}")
        return None


@contextmanager
def open_checkpoints(output: Output, rules: Path | None, arguments: Sequence[str]) -> Iterator[CheckpointTiers]:
    """Yield the checkpoints that the arguments name, by path below the tiers; no argument: all.

    Raises NotFound if an argument selects none, and ValueError if it does not say which one is meant.
    """
    arguments = _joined(arguments)
    with _opened(rules, arguments) as (tiers, chosen, prefix):
        inventory = tiers.read_inventory(output)
        if tiers.file.sha256:
            print_unavailable(output, tiers.file, unavailable_tiers(tiers.file, tiers.stores, tiers.catalog))
        found = CheckpointTiers(tiers, inventory, with_tags(inventory.snapshot, tiers.file), (), prefix)
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
    if tier is None and file.sha256 and not argument.startswith(("/", "~")) and "://" not in argument:
        with suppress(ValueError):  # a relative path that is no path below a tier may be a path here
            here = tier_path(file, f"./{argument}")
            places += [(None, here, None)]
            places += [] if choice is None else [(None, here.rpartition("/")[0], choice)]
    for where, text, picked in places:
        hit = (snapshot.kind == CHECKPOINT) & _match(snapshot.paths, text)
        if where is not None:
            hit &= np.isin(np.arange(snapshot.n_groups), snapshot.group[snapshot.tier == snapshot.tiers.index(where)])
        if hit.any() or not argument:
            order = sorted(np.flatnonzero(hit).tolist(), key=lambda g: (snapshot.series[g], snapshot.created_s[g], g))
            return order, picked
    if not file.sha256:
        text = "there are no checkpoints of a known layout; expected a run, a checkpoint or a glob"
        raise NotFound(f"{text}{did_you_mean(argument.rpartition('/')[2], ['latest'])}", url=argument)
    names = f"the tier {tier}" if tier else f"the tiers {', '.join(snapshot.tiers)}"
    text = f"no checkpoint has this path, or lies below it, in {names}; `tiercache ckpt ls` lists them"
    outside = "; a folder outside the tiers is written ./FOLDER" if Path(base_folder(argument)).exists() else ""
    raise NotFound(f"{text}{outside}", url=argument)


def _joined(arguments: Sequence[str]) -> list[str]:
    """Return arguments in which RUN WHICH... are RUN/WHICH..."""
    found: list[str] = []
    run = ""
    for text in arguments:
        if run and _choice(text) is not None:
            if found[-1] == run:
                found.pop()
            found.append(f"{run.rstrip('/')}/{text}")
        else:
            run = "" if _choice(text.rpartition("/")[2]) is not None else text
            found.append(text)
    return found


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
    if len({int(snapshot.series[group]) for group in groups}) > 1:
        runs = {int(snapshot.series[group]): found.name(group) for group in groups}
        names = " and ".join([*runs.values()][:2])
        raise ValueError(
            f"{argument}: expected one run, found several, such as those of {names}: name the run's folder"
        )
    whole = [group for group in groups if snapshot.complete[group]]
    fitting, what = whole, ""
    if choice.kind == "step":
        fitting, what = [group for group in whole if snapshot.step[group] == choice.step], f" of step {choice.step}"
    elif choice.kind == "best":
        metrics = dict(zip(whole, _in_parallel(found.metrics, whole), strict=True))
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
    for run in {int(snapshot.series[group]) for group in groups}:
        since_s = min(float(snapshot.created_s[group]) for group in groups if snapshot.series[group] == run)
        later = is_checkpoint & (snapshot.series == run) & (snapshot.created_s >= since_s)
        examined.update(np.flatnonzero(later).tolist())
    order = sorted(examined)
    problems = {group: text for group, text in zip(order, _in_parallel(found.find_problem, order), strict=True) if text}
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


def _one(found: CheckpointTiers, argument: str) -> int:
    """Return the only selected checkpoint. Raises ValueError if there are several."""
    if len(found.groups) != 1:
        names = ", ".join(found.name(group) for group in found.groups[:3])
        raise ValueError(
            f"{argument}: expected one checkpoint, found {len(found.groups)}: {names}, ...; the last one is"
            f" {argument.rstrip('/')}/latest"
        )
    return found.groups[0]


def _in_parallel(work: Callable[[int], T], items: Sequence[int]) -> list[T]:
    with ThreadPoolExecutor(_THREADS, "tiercache-ckpt") as pool:
        return list(pool.map(work, items))


# -- ls and show ------------------------------------------------------------------------------------------------------


def ls(output: Output, rules: Path | None, paths: Sequence[str], *, read_metrics: bool) -> None:
    """List checkpoints. paths: See open_checkpoints(). read_metrics: Whether to read the metrics of all from files."""
    with open_checkpoints(output, rules, paths) as found:
        reasons = keep_reasons(found.snapshot, found.tiers.file)
        metrics = _in_parallel(found.metrics if read_metrics else found.known_metrics, found.groups)
        rows = [
            _facts(found, group, some, reasons.get(group, ()))
            for group, some in zip(found.groups, metrics, strict=True)
        ]
    texts = [_row_text(row) for row in rows]
    if not any(text["metrics"] for text in texts):
        texts = [{name: cell for name, cell in text.items() if name != "metrics"} for text in texts]
    output.table("checkpoint", rows, texts)
    n_bytes = sum(copy["n_bytes"] for row in rows for copy in row["copies"])
    n_runs = len({row["run"] for row in rows})
    text = f"{count(len(rows), 'checkpoint')} of {count(n_runs, 'run')}, {format_bytes(n_bytes)} in all tiers"
    output.summary({"checkpoints": len(rows), "runs": n_runs, "n_bytes": n_bytes}, text)


def _facts(
    found: CheckpointTiers, group: int, metrics: Mapping[str, float], reasons: Sequence[KeepReason]
) -> dict[str, Any]:
    """Return a checkpoint for JSON output."""
    snapshot, copies = found.snapshot, found.copies(group)
    created_s = float(snapshot.created_s[group])
    return {
        "path": found.name(group),
        "run": int(snapshot.series[group]),
        "step": int(snapshot.step[group]),
        "n_bytes": max(int(snapshot.n_bytes[copy]) for copy in copies),
        "created": _time(created_s),
        "age_s": round(snapshot.now_s - created_s, 3),
        "complete": bool(snapshot.complete[group]),
        "problem": found.problems.get(group, ""),
        "copies": [
            {
                "tier": found.tier(copy),
                "state": _STATES[snapshot.state[copy]],
                "n_objects": int(snapshot.n_objects[copy]),
                "n_bytes": int(snapshot.n_bytes[copy]),
                "whole": bool(snapshot.whole[copy]),
                "verified": bool(snapshot.verified[copy]),
            }
            for copy in copies
        ],
        "metrics": dict(metrics),
        "tags": sorted(snapshot.tags.get(group, ())),
        "kept": [asdict(reason) | {"text": str(reason)} for reason in reasons],
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _row_text(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "checkpoint": row["path"],
        "step": f"{row['step']:,}",
        "size": format_bytes(row["n_bytes"]),
        "age": format_duration(row["age_s"]),
        "tiers": ", ".join(_where(copy) for copy in row["copies"]),
        "metrics": _metrics_text(row["metrics"]),
        "kept by": _kept_text(row["kept"]).replace(_NOT_COMPLETE, f"{_NOT_COMPLETE}: {row['problem']}"),
    }


def _where(copy: Mapping[str, Any]) -> str:
    notes = [] if copy["state"] == _STATES[READABLE] else [copy["state"]]
    notes += [] if copy["whole"] else ["in part"]
    return f"{copy['tier']} ({', '.join(notes)})" if notes else str(copy["tier"])


def _metrics_text(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} = {value:.6g}" for name, value in sorted(metrics.items()))


def _kept_text(kept: Sequence[Mapping[str, Any]]) -> str:
    """Return the reasons for people, with the name of a rule once: "runs: keep_hot last = 2, keep_cold tags = a"."""
    parts: dict[str, list[str]] = {}
    for one in kept:
        where = "" if one["tier"] is None else f"keep_{one['tier']} "
        text = str(one["text"]).removeprefix(f"{one['rule']}: ").removeprefix(where)
        parts.setdefault(one["rule"], []).append(f"{where}{text}")
    return "; ".join(f"{rule}: {', '.join(texts)}" if rule else ", ".join(texts) for rule, texts in parts.items())


def show(output: Output, rules: Path | None, path: str, which: str | None) -> None:
    """Show one checkpoint, and what the next plan does with it. which: Which checkpoint of the run at the path."""
    with open_checkpoints(output, rules, [path] if which is None else [f"{path.rstrip('/')}/{which}"]) as found:
        group = _one(found, path)
        tiers, file, snapshot = found.tiers, found.tiers.file, found.snapshot
        reasons = keep_reasons(snapshot, file).get(group, ())
        metrics, manifest = found.metrics(group), found.manifest(group)
        objects = {found.tier(copy): found.objects(copy) for copy in found.copies(group)}
        number = int(rules_of(snapshot, file)[group])
        plan_text = _next_move(tiers, found.inventory, group)
        below = found.path(group)
        urls = {name: f"{tiers.stores.store(name).url}/{below}" for name in objects}
    rule = file.rules[number].name if number >= 0 else None
    facts = _facts(found, group, metrics, reasons) | {
        "rule": rule,
        "next": plan_text,
        "urls": urls,
        "files": {
            name: [{"key": one.key, "n_bytes": one.n_bytes, "crc32c": one.crc32c} for one in some]
            for name, some in objects.items()
        },
        "note": None if manifest is None else manifest.note,
        "n_tensors": None if manifest is None else len(manifest.tensors),
    }
    if output.as_json:
        output.event("checkpoint", facts)
        return
    for line in _show_lines(facts, reasons, below):
        typer.echo(printable(line))


def _show_lines(facts: Mapping[str, Any], reasons: Sequence[KeepReason], path: str) -> Iterator[str]:
    """Yield the lines for people. path: Path of the checkpoint below its tiers."""
    state = "complete" if facts["complete"] else f"NOT COMPLETE: {facts['problem']}"
    yield f"{facts['path']}: step {facts['step']:,}, {format_bytes(facts['n_bytes'])}, {state}"
    yield f"written {facts['created']}, {format_duration(facts['age_s'])} ago"
    for copy in facts["copies"]:
        verified = ", verified" if copy["verified"] else ""
        size = f"{count(copy['n_objects'], 'file')}, {format_bytes(copy['n_bytes'])}"
        yield f"copy in {_where(copy)}: {facts['urls'][copy['tier']]}, {size}{verified}"
    if facts["metrics"]:
        yield f"metrics: {_metrics_text(facts['metrics'])}"
    if facts["tags"]:
        yield f"tags: {', '.join(facts['tags'])}"
    if facts["note"] is not None:
        yield f"note: {json.dumps(facts['note'], ensure_ascii=False)}"
    yield f"rule: {facts['rule'] or 'no rule matches it, so that it stays'}"
    for reason in reasons:
        yield f"kept by {reason}"
    yield f"next plan: {facts['next']}"
    files: Sequence[Mapping[str, Any]] = next(iter(facts["files"].values()), [])
    for one in files[:_SHOWN_FILES]:
        yield f"  {one['key'].removeprefix(path + '/')}  {format_bytes(one['n_bytes'])}"
    if len(files) > _SHOWN_FILES:
        yield f"  ... and {count(len(files) - _SHOWN_FILES, 'file')} more"


def _next_move(tiers: OpenTiers, inventory: Inventory, group: int) -> str:
    """Return what a plan made now would do with a checkpoint."""
    file, path = tiers.file, inventory.snapshot.paths[group].as_py()
    unavailable = unavailable_tiers(file, tiers.stores, tiers.catalog)
    limits = [tiers.stores.capacity(tier.name) for tier in file.tiers]
    decisions = decide(inventory.snapshot, file, tiers.prices, capacity_bytes=limits, unavailable=unavailable)
    made = make_plan(decisions, inventory, file, tiers.prices)
    for row in np.flatnonzero(decisions.moves.group == group).tolist():
        move = made.moves[row]
        to = f" to {move.dst}" if move.dst else ""
        return f"{move.action} from {move.src}{to}: {move.rule}: {move.reason}"
    for row in np.flatnonzero(decisions.refusals.group == group).tolist():
        one = made.refusals[row]
        to = f" to {one.dst}" if one.dst else ""
        return f"no move; {one.action} from {one.src}{to} is refused: {one.reason}"
    return f"no move of {path}"


# -- verify -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Finding:
    """Result for one copy. is_corrupt: Whether bytes differ from a checksum. is_proven: Whether all were compared."""

    path: str
    tier: str
    n_bytes: int = 0
    problems: tuple[str, ...] = ()
    is_corrupt: bool = False
    is_proven: bool = False

    @property
    def text(self) -> str:
        """The message for people."""
        if self.problems:
            return f"{self.path} in {self.tier}: {'CORRUPT: ' if self.is_corrupt else ''}{'; '.join(self.problems)}"
        what = "all bytes as they were written" if self.is_proven else "readable; no checksum of all its files is known"
        return f"{self.path} in {self.tier}: {what} ({format_bytes(self.n_bytes)})"


def verify(output: Output, rules: Path | None, paths: Sequence[str]) -> None:
    """Read checkpoints and compare them with known checksums. Raises typer.Exit with CORRUPT or PARTIAL."""
    findings: list[_Finding] = []
    with open_checkpoints(output, rules, paths) as found, Transfer(found.tiers.stores) as transfer:
        total = sum(int(found.snapshot.n_bytes[copy]) for group in found.groups for copy in found.copies(group))
        done = 0
        with output.byte_progress("reading") as advance:

            def on_bytes(n_bytes: int) -> None:
                nonlocal done
                done += n_bytes
                advance(done, total)

            for group in found.groups:
                for finding in _verify_group(found, transfer, group, on_bytes):
                    findings.append(finding)
                    facts = asdict(finding) | {"problems": list(finding.problems)}
                    output.event("copy", facts, printable(finding.text))
    corrupt = sum(one.is_corrupt for one in findings)
    other = sum(bool(one.problems) for one in findings) - corrupt
    text = f"{count(len(findings), 'copy', 'copies')} of {count(len(found.groups), 'checkpoint')}"
    text += f"; {corrupt} corrupt" if corrupt else ""
    text += f"; {other} not read" if other else ""
    output.summary({"copies": len(findings), "corrupt": corrupt, "not_read": other}, text)
    if corrupt or other:
        raise typer.Exit(CORRUPT if corrupt else PARTIAL)


@dataclass(slots=True)
class _ReadCopy:
    """A copy that was read. known, read: CRC-32C by key, as it should be, and as it was read."""

    tier: str
    problems: list[str]
    known: dict[str, int] = field(default_factory=dict)
    read: dict[str, int] = field(default_factory=dict)
    n_bytes: int = 0
    is_corrupt: bool = False


def _verify_group(
    found: CheckpointTiers, transfer: Transfer, group: int, on_bytes: Callable[[int], object]
) -> Iterator[_Finding]:
    """Yield the result of each copy of a checkpoint."""
    path = found.path(group)
    copies = [_read_copy(found, transfer, path, copy, on_bytes) for copy in found.copies(group)]
    for one in copies:
        others = [other for other in copies if other is not one and other.read]
        for other in others:
            for key in sorted(one.read.keys() & other.read.keys() - one.known.keys()):
                if one.read[key] != other.read[key]:
                    text = f"its bytes differ from those in {other.tier}, and no checksum tells which are right"
                    one.problems.append(f"{key}: {text}")
        compared = {*one.known, *(key for other in others for key in other.read)}
        is_proven = bool(one.read) and one.read.keys() <= compared and not one.problems
        if not found.snapshot.complete[group] and not one.problems:
            one.problems.append(f"the checkpoint is not complete: {found.problems.get(group, '')}")
        yield _Finding(found.name(group), one.tier, one.n_bytes, tuple(one.problems), one.is_corrupt, is_proven)


def _read_copy(
    found: CheckpointTiers, transfer: Transfer, path: str, copy: int, on_bytes: Callable[[int], object]
) -> _ReadCopy:
    """Read all objects of a copy, and compare them with the known checksums."""
    one = _ReadCopy(found.tier(copy), [])
    if not found.is_readable(copy):
        state = _STATES[found.snapshot.state[copy]]
        one.problems.append(f"it is {state} and cannot be read: tiercache restore {path}")
        return one
    if not found.snapshot.whole[copy]:
        one.problems.append("files are missing, or differ from those of another tier")
    objects = found.objects(copy)
    try:
        one.known, shared = _checksums(found, one.tier, path, objects)
    except CorruptCheckpoint as error:
        one.problems.append(str(error))
        one.is_corrupt, shared = True, []
    for info in [*objects, *shared]:
        try:
            crc = one.read[info.key] = _checksum_of(found, transfer, one.tier, info, on_bytes)
        except StoreError as error:
            one.problems.append(str(error))
            one.is_corrupt |= info in shared and isinstance(error, NotFound)
            continue
        one.n_bytes += info.n_bytes
        expected = one.known.get(info.key, crc)
        if crc != expected:
            one.problems.append(f"{info.key}: expected CRC-32C {expected:08x}, found {crc:08x}")
            one.is_corrupt = True
    for key in sorted(one.known.keys() - {info.key for info in [*objects, *shared]}):
        one.problems.append(f"{key}: its manifest names it, and it is missing")
        one.is_corrupt = True
    return one


def _checksum_of(
    found: CheckpointTiers, transfer: Transfer, tier: str, info: ObjectInfo, on_bytes: Callable[[int], object]
) -> int:
    """Return the CRC-32C of an object of a copy; shared tensors stay in the home tier when a checkpoint is moved."""
    home = found.tiers.file.home_tier.name
    try:
        return transfer.checksum_of(tier, info, on_bytes)
    except NotFound:
        if f"/{SHARED_FOLDER}" not in f"/{info.key}" or tier == home:
            raise
        return transfer.checksum_of(home, info, on_bytes)


def _checksums(
    found: CheckpointTiers, tier: str, path: str, objects: Sequence[ObjectInfo]
) -> tuple[dict[str, int], list[ObjectInfo]]:
    """Return the known CRC-32C of each object of a copy, and the shared tensors that belong to it.

    Of our own layout, checksums of objects that should be there are included. Raises CorruptCheckpoint if the manifest
    is corrupt.
    """
    sums = {one.key: one.crc32c for one in objects if one.crc32c is not None}
    name = path.rpartition("/")[2]
    manifest = next((one for one in objects if one.key == f"{path}/{MANIFEST_NAME}"), None)
    if manifest is None or parse_name(name) is None:
        return sums, []
    store = found.tiers.stores.store(tier)
    data = store.get(manifest.key)  # parse_manifest() compares it with the checksum that it contains
    stated = parse_manifest(data, f"{store.url}/{manifest.key}")
    parent = path[: len(path) - len(name)]
    sums |= {f"{parent}{key_of(name, one.path)}": one.crc32c for one in stated.files}
    sums.setdefault(manifest.key, crc32c(data))
    shared = [one for one in stated.files if one.path.startswith("../")]
    return sums, [ObjectInfo(f"{parent}{key_of(name, one.path)}", one.n_bytes) for one in shared]


# -- rm, pin, tag -----------------------------------------------------------------------------------------------------


def rm(output: Output, rules: Path | None, paths: Sequence[str], *, yes: bool, dry_run: bool) -> None:
    """Delete checkpoints from all tiers. Raises typer.Exit with PARTIAL if some stayed."""
    with open_checkpoints(output, rules, paths) as found:
        snapshot = found.snapshot
        n_bytes = sum(int(snapshot.n_bytes[copy]) for group in found.groups for copy in found.copies(group))
        text = f"{count(len(found.groups), 'checkpoint')}, {format_bytes(n_bytes)} in all tiers"
        newest = [group for group in found.groups if _is_last_of_run(snapshot, group)]
        if dry_run:
            pinned = pinned_groups(snapshot, found.tiers.file)
            for group in found.groups:
                names = ", ".join(found.tier(copy) for copy in found.copies(group))
                facts = {"path": found.name(group), "tiers": names.split(", "), "pinned": group in pinned}
                stays = f"would leave {found.name(group)}, which is pinned"
                goes = f"would delete {found.name(group)} from {names}"
                output.event("checkpoint", facts, stays if group in pinned else goes)
            going = [group for group in found.groups if group not in pinned]
            going_bytes = sum(int(snapshot.n_bytes[copy]) for group in going for copy in found.copies(group))
            output.summary(
                {"checkpoints": len(going), "n_bytes": going_bytes, "dry_run": True},
                f"would delete {count(len(going), 'checkpoint')}, {format_bytes(going_bytes)} in all tiers",
            )
            return
        if not yes:
            last = f", among them {count(len(newest), 'checkpoint')} from which a run is resumed" if newest else ""
            confirm(f"Delete {text}{last}, for good?", "nothing was deleted")
        with open_mover(found.tiers.file, found.tiers.stores, found.tiers.catalog) as context:
            removals = [
                replace(one, path=f"{found.prefix}{one.path}")
                for one in remove_groups(context, found.inventory, found.groups)
            ]
    for one in removals:
        facts = asdict(one) | {"tiers": list(one.tiers)}
        where = ", ".join(one.tiers)
        output.event(
            "removed", facts, f"{one.path}: {'left: ' + one.reason if one.reason else 'deleted from ' + where}"
        )
    made = [one for one in removals if not one.reason]
    left = len(removals) - len(made)
    done_bytes = sum(one.n_bytes for one in made)
    text = f"{count(len(made), 'checkpoint')} deleted, {format_bytes(done_bytes)}" + (f"; {left} left" if left else "")
    output.summary({"deleted": len(made), "left": left, "n_bytes": done_bytes}, text)
    if left:
        raise typer.Exit(PARTIAL)


def _is_last_of_run(snapshot: Snapshot, group: int) -> bool:
    run = (snapshot.series == snapshot.series[group]) & snapshot.complete & (snapshot.kind == CHECKPOINT)
    return bool(run[group] and snapshot.created_s[group] == snapshot.created_s[run].max())


@dataclass(frozen=True, slots=True)
class PinOptions:
    """Options of a pin. until: Last day, as a text; None: no end. remove: Whether pins are removed instead."""

    until: str | None
    why: str
    remove: bool


def pin(output: Output, rules: Path | None, paths: Sequence[str], options: PinOptions) -> None:
    """Pin checkpoints: those of tc.Checkpoints in their tags.json, others in the rule file."""
    with open_checkpoints(output, rules, paths) as found:
        own, others = _by_layout(found)
        if own and (options.until or options.why) and not options.remove:
            name = found.name(own[0])
            raise ValueError(f"{name}: a pin of tc.Checkpoints has neither --until nor --why: it is in its tags.json")
        for group in own:
            _write_tags(found, group, frozenset(), remove=False, is_pinned=not options.remove)
        more = {"until": options.until, "why": options.why or None}
        tables = [
            {"match": literal_glob(found.path(group))} | {key: text for key, text in more.items() if text is not None}
            for group in others
        ]
        _edit(found.tiers.file, "pins", tables, remove=options.remove)
        names = [found.name(group) for group in found.groups]
    for name in names:
        output.event(
            "pin", {"path": name, "pinned": not options.remove}, f"{'unpinned' if options.remove else 'pinned'} {name}"
        )
    output.summary({"checkpoints": len(names)}, count(len(names), "checkpoint"))


def tag(output: Output, rules: Path | None, path: str, tags: Sequence[str], *, remove: bool) -> None:
    """Tag a checkpoint: one of tc.Checkpoints in its tags.json, others in the rule file."""
    with open_checkpoints(output, rules, [path]) as found:
        group = _one(found, path)
        own, _ = _by_layout(found)
        if own:
            _write_tags(found, group, frozenset(tags), remove=remove, is_pinned=None)
        else:
            tables = [{"match": literal_glob(found.path(group)), "tags": [one]} for one in tags]
            _edit(found.tiers.file, "tags", tables, remove=remove)
        name = found.name(group)
    verb = "removed from" if remove else "added to"
    facts = {"path": name, "tags": list(tags), "removed": remove}
    output.summary(facts, f"{', '.join(tags)} {verb} {name}")


def _by_layout(found: CheckpointTiers) -> tuple[list[int], list[int]]:
    """Return the selected checkpoints of tc.Checkpoints, and the others."""
    own = [group for group in found.groups if parse_name(found.path(group).rpartition("/")[2]) is not None]
    return own, [group for group in found.groups if group not in own]


def _write_tags(
    found: CheckpointTiers, group: int, tags: frozenset[str], *, remove: bool, is_pinned: bool | None
) -> None:
    """Change the tags.json of a checkpoint in every tier that has it. is_pinned: None: the pin stays as it is."""
    snapshot = found.inventory.snapshot  # without the tags of the rule file
    before = snapshot.tags.get(group, frozenset())
    after = before - tags if remove else before | tags
    pinned = group in snapshot.pinned if is_pinned is None else is_pinned
    data = json.dumps({"pinned": pinned, "tags": sorted(after)}).encode() + b"\n"
    for copy in found.copies(group):
        found.tiers.stores.store(found.tier(copy)).put(f"{found.path(group)}/{TAGS_NAME}", data)


def _edit(file: RuleFile, section: Section, tables: Sequence[Mapping[str, object]], *, remove: bool) -> None:
    if not tables:
        return
    if not file.sha256:
        raise ValueError(
            f"{section} of checkpoints of other libraries are tables of a rule file, and there is none: "
            "`tiercache tier init FOLDER` writes one"
        )
    if not remove:
        add_tables(file.path, section, tables)
        return
    present = config.parse_toml(file.path, config.read_file(file.path)).get(section, [])
    for table in tables:
        wanted = [one for one in present if all(one.get(key) in (value, [value]) for key, value in table.items())]
        if not wanted:
            raise ValueError(f"{file.path}: no [[{section}]] table names exactly {table['match']!r}")
        remove_tables(file.path, section, wanted)


# -- diff -------------------------------------------------------------------------------------------------------------


def diff(output: Output, rules: Path | None, first: str, second: str) -> None:
    """Compare two checkpoints."""
    with open_checkpoints(output, rules, [first, second]) as found:
        if len(found.groups) != 2:
            raise ValueError(f"expected two checkpoints, found {len(found.groups)}: {first} and {second}")
        metrics = [found.metrics(group) for group in found.groups]
        files = [_files(found, group) for group in found.groups]
        manifests = [found.manifest(group) for group in found.groups]
        names = [found.name(group) for group in found.groups]
        steps = [int(found.snapshot.step[group]) for group in found.groups]
    rows = [{"what": "step", "name": "", "first": f"{steps[0]:,}", "second": f"{steps[1]:,}"}]
    rows += _differences("metric", *({name: f"{value:.6g}" for name, value in some.items()} for some in metrics))
    rows += _differences("file", *files)
    if manifests[0] is not None and manifests[1] is not None:
        rows += _differences("tensor", *(_tensors(one) for one in manifests if one is not None))
    shown = [row for row in rows if row["first"] != row["second"]]
    texts = [
        {"what": r["what"], "name": r["name"], names[0]: r["first"] or "-", names[1]: r["second"] or "-"} for r in shown
    ]
    output.table("difference", shown, texts)
    n_equal = len(rows) - len(shown)
    unsure = sum(row["first"] == row["second"] and "?" in row["first"] for row in rows)
    note = (
        f"; {unsure} files have equal sizes and no known checksum: `tiercache ckpt verify` reads them" if unsure else ""
    )
    facts = {"first": names[0], "second": names[1], "differences": len(shown), "equal": n_equal, "unsure": unsure}
    output.summary(facts, f"{count(len(shown), 'difference')}, {n_equal} equal{note}")


def _files(found: CheckpointTiers, group: int) -> dict[str, str]:
    """Return the size and the checksum of each file of a checkpoint, as texts, by path in the checkpoint."""
    path, manifest = found.path(group), found.manifest(group)
    stated = {} if manifest is None else {one.path: one.crc32c for one in manifest.files}
    files: dict[str, str] = {}
    for copy in reversed(found.copies(group)):
        for one in found.objects(copy):
            name = one.key.removeprefix(f"{path}/") if one.key != path else Path(path).suffix
            crc = stated.get(name, one.crc32c)
            # A checksum that no tier knows is a question mark.
            known = "?" if crc is None else f"{crc:08x}"
            if name not in files or known != "?":
                files[name] = f"{format_bytes(one.n_bytes)} {known}"
    return files


def _tensors(manifest: Manifest) -> dict[str, str]:
    return {
        name: f"{one.dtype}{list(one.shape)}" + (f" {one.digest[:8]}" if one.digest else "")
        for name, one in manifest.tensors.items()
    }


def _differences(what: str, first: Mapping[str, str], second: Mapping[str, str]) -> list[dict[str, str]]:
    return [
        {"what": what, "name": name, "first": first.get(name, ""), "second": second.get(name, "")}
        for name in sorted(first.keys() | second.keys())
    ]
