"""`tiercache ckpt`: lists, verifies, deletes and pins the checkpoints of every layout.

Checkpoints are selected from the inventory of the tiers, so in every layout that it recognises, and from the same
snapshot as plans. Without a rule file, the folder or URL of the runs in the arguments is the only tier. An argument is
a path with everything below it, a glob, or RUN/WHICH: a path, and which checkpoint below it is meant.
"""

from __future__ import annotations

import math
import os
import shlex
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import pyarrow as pa
import typer
from numpy.typing import NDArray

from tiercache import config
from tiercache.checkpoint.format import KEEP_KEY, MANIFEST_NAME, Manifest, parse_manifest, parse_name
from tiercache.checkpoint.run_stores import Choice, missing_file, parse_choice
from tiercache.checkpoint.writer import in_parallel
from tiercache.cli.common import (
    CORRUPT,
    PARTIAL,
    DryRun,
    Output,
    Rules,
    Yes,
    argument,
    confirm,
    count,
    flag,
    format_duration,
    option,
    printable,
    verb,
)
from tiercache.cli.tier import (
    STATE_NAMES,
    OpenTiers,
    base_folder,
    copy_facts,
    format_copy,
    format_time,
    is_glob,
    open_tiers,
    print_unavailable,
    select_paths,
    split_tier,
    tier_path,
)
from tiercache.errors import CorruptCheckpoint, NotFound, StoreError, TierCacheError, UnsupportedFormat
from tiercache.keep import PIN_NAME, UNREADABLE_PIN, Keep, encode_pin, evaluate_keep_list, parse_keeps, parse_pin
from tiercache.model import ObjectInfo, format_bytes
from tiercache.store.access import ParsedUrl
from tiercache.tier.checkpoint_names import group_keys, metrics_in_name
from tiercache.tier.deletions import Removal, remove_groups
from tiercache.tier.inventory import Inventory, read_metrics
from tiercache.tier.journal import TierCatalog
from tiercache.tier.mover import catalog_path, open_mover
from tiercache.tier.policy import KeepReason, keep_reasons
from tiercache.tier.rules import RuleFile, Tier, load_rule_file
from tiercache.tier.snapshot import CHECKPOINT, READABLE, RESTORED, Snapshot
from tiercache.tier.stores import Stores, unavailable_tiers
from tiercache.tier.transfer import Transfer

_THREADS = 16
_AGAIN = "nothing was changed; run the same command again"
_WHICH = "RUN/latest, RUN/best:METRIC[:max] and RUN/STEP select one of a run."
Paths = Annotated[
    list[str],
    argument(
        "PATH...", f"Checkpoints: paths below a tier (hot/runs/7/step-100), local paths, URLs, or globs. {_WHICH}"
    ),
]

T = TypeVar("T")


# -- selection ---


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
        return f"{self.prefix}{self.path(group)}"

    def path(self, group: int) -> str:
        return str(self.snapshot.paths[group].as_py())

    def copies(self, group: int) -> list[int]:
        return [int(copy) for copy in np.flatnonzero(self.snapshot.group == group)]

    def tier(self, copy: int) -> str:
        return self.snapshot.tiers[int(self.snapshot.tier[copy])]

    def is_readable(self, copy: int) -> bool:
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

    @staticmethod
    def of_each(work: Callable[[int], T], groups: Sequence[int]) -> list[T]:
        return in_parallel([partial(work, group) for group in groups], _THREADS)

    def is_own(self, group: int) -> bool:
        return parse_name(self.path(group).rpartition("/")[2]) is not None

    def read_manifest(self, group: int, copy: int) -> Manifest:
        store, key = self.tiers.stores.store(self.tier(copy)), f"{self.path(group)}/{MANIFEST_NAME}"
        return parse_manifest(store.get(key), f"{store.url}/{key}")

    def keeps(self, folder: str, tier: str) -> Sequence[Keep]:
        """Return the rules of retention that the last program of a run had for its checkpoints in a tier."""
        try:
            return parse_keeps(self.tiers.stores.store(tier).get(f"{folder}/{KEEP_KEY}".lstrip("/")))
        except StoreError:
            return ()

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
    for where, text, picked in places:
        hit = (snapshot.kind == CHECKPOINT) & _match(snapshot.paths, text)
        if where is not None:
            hit &= np.isin(np.arange(snapshot.n_groups), snapshot.group[snapshot.tier == snapshot.tiers.index(where)])
        if hit.any() or not argument:
            order = sorted(np.flatnonzero(hit).tolist(), key=lambda g: (snapshot.run[g], snapshot.created_s[g], g))
            return order, picked
    if not file.is_from_file:
        text = "there are no checkpoints of a known layout; expected a run, a checkpoint, RUN/latest or a glob"
        raise NotFound(text, url=argument)
    names = f"the tier {tier}" if tier else f"the tiers {', '.join(snapshot.tiers)}"
    text = f"no checkpoint has this path, or lies below it, in {names}; `tiercache ckpt ls` lists them"
    outside = "; a local folder is written ./FOLDER" if Path(base_folder(argument)).exists() else ""
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
        metrics = dict(zip(whole, found.of_each(found.metrics, whole), strict=True))
        sign = 1 if choice.mode == "max" else -1
        scores = {group: sign * some.get(choice.text, math.nan) for group, some in metrics.items()}
        fitting = sorted((group for group in whole if scores[group] == scores[group]), key=lambda group: scores[group])
        known = sorted({name for some in metrics.values() for name in some})
        what = f" with the metric {choice.text!r}"
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
    problems = {
        group: text for group, text in zip(order, found.of_each(found.find_problem, order), strict=True) if text
    }
    complete[[*problems]] = False
    return replace(found, snapshot=replace(snapshot, complete=complete), problems=problems)


@contextmanager
def _opened(
    rules: Path | None, arguments: Sequence[str]
) -> Iterator[tuple[OpenTiers, list[tuple[str | None, str]], str]]:
    """Yield the tiers, the tier (None: any) and the path of each argument, and the prefix of paths for people."""
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
        yield OpenTiers(file, stores, catalog, file.prices), chosen, prefix


def _rule_file(rules: Path | None) -> RuleFile | None:
    """Return the rule file that applies; None: there is none, or the settings file that was found has no tiers."""
    if rules is None:
        found = config.find_file(Path.cwd())
        if found is None or "tiers" not in config.parse_toml(found, config.read_file(found)):
            return None
    return load_rule_file(rules)


def _one_tier(arguments: Sequence[str]) -> tuple[RuleFile, list[tuple[str | None, str]], str]:
    """Return a rule file without rules, whose only tier has all arguments, their paths below it, and its prefix."""
    places = [ParsedUrl.parse(text) for text in arguments]
    for place in places:
        if is_glob(place.host):
            raise ValueError(f"{place.shown}: a bucket is named, not chosen by a glob")
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
    tier = Tier(name="standard", url=root)
    file = RuleFile(path=Path.cwd() / config.FILE_NAME, sha256="", tiers=(tier,))
    is_relative = not any(place.scheme or place.path.startswith("/") for place in places)
    prefix = os.path.relpath(root) if is_relative else ParsedUrl.parse(root).shown.rstrip("/")
    return file, [(None, path) for path in inside], "" if prefix == "." else f"{prefix}/"


def _run_folder(text: str) -> str:
    """Return the folder, or URL, that has the runs or checkpoints of an argument: a checkpoint is known by its name."""
    base = base_folder(text)
    head, _, last = base.rpartition("/")
    if not head or head.endswith("/"):
        return base
    is_checkpoint = group_keys(pa.array([last, f"{last}/model.safetensors"])).checkpoint.any()
    return head if is_checkpoint or _choice(last) is not None else base


# -- ls ---------------------------------------------------------------------------------------------------------------


@verb(after_ctrl_c=_AGAIN)
def ls(
    output: Output,
    paths: Annotated[
        list[str] | None,
        argument("[PATH...]", f"Runs or globs: below a tier, local, or URLs; default: all tiers. {_WHICH}"),
    ] = None,
    metrics: Annotated[bool, flag("--metrics", "Read the metrics of all listed checkpoints from their files.")] = False,
    rules: Rules = None,
) -> None:
    """List checkpoints with step, size, age, tiers and metrics, and what keeps them.

    Every layout that tiers recognise is listed. Without a rule file, PATH is a local folder or a URL.
    """
    with open_checkpoints(output, rules, paths or []) as found:
        reasons = _kept(found)
        values = found.of_each(found.metrics if metrics else found.known_metrics, found.groups)
        rows = [
            _facts(found, group, some, reasons.get(group, ())) for group, some in zip(found.groups, values, strict=True)
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
    snapshot, copies = found.snapshot, found.copies(group)
    created_s = float(snapshot.created_s[group])
    return {
        "path": found.name(group),
        "run": int(snapshot.run[group]),
        "step": int(snapshot.step[group]),
        "n_bytes": max(int(snapshot.n_bytes[copy]) for copy in copies),
        "created": format_time(created_s),
        "age_s": round(snapshot.now_s - created_s, 3),
        "complete": bool(snapshot.complete[group]),
        "problem": found.problems.get(group, ""),
        "copies": [
            copy_facts(snapshot, copy)
            | {"url": f"{found.tiers.stores.store(found.tier(copy)).url}/{found.path(group)}"}
            for copy in copies
        ],
        "metrics": dict(metrics),
        "kept": [asdict(reason) | {"text": str(reason)} for reason in reasons],
    }


def _row_text(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "checkpoint": row["path"],
        "step": f"{row['step']:,}",
        "size": format_bytes(row["n_bytes"]),
        "age": format_duration(row["age_s"]),
        "tiers": ", ".join(format_copy(copy) for copy in row["copies"]),
        "metrics": _metrics_text(row["metrics"]),
        "kept by": "; ".join(one["text"] for one in row["kept"]),
    }


def _metrics_text(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} = {value:.6g}" for name, value in sorted(metrics.items()))


# -- verify -----------------------------------------------------------------------------------------------------------


@verb(after_ctrl_c=_AGAIN)
def verify(output: Output, paths: Paths, rules: Rules = None) -> None:
    """Read checkpoints completely, in every tier that has a copy, and compare the bytes with known checksums.

    Checksums are those of checkpoint.json, of the store, or of this machine's catalog. The exit code is 4 if a copy is
    corrupt, and 3 if a copy is incomplete or cannot be read (for example, because it is archived).
    """
    findings: list[dict[str, Any]] = []
    with open_checkpoints(output, rules, paths) as found, Transfer(found.tiers.stores) as transfer:
        copies = [(group, copy) for group in found.groups for copy in found.copies(group)]
        total, done = sum(int(found.snapshot.n_bytes[copy]) for _, copy in copies), 0
        with output.byte_progress("reading") as advance:

            def on_bytes(n_bytes: int) -> None:
                nonlocal done
                done += n_bytes
                advance(done, total)

            for group, copy in copies:
                one = _verify_copy(found, transfer, group, copy, on_bytes)
                findings.append(one)
                what = "all bytes as they were written" if one["is_proven"] else "readable; not all checksums are known"
                text = f"{what} ({format_bytes(one['n_bytes'])})"
                if one["problems"]:
                    text = ("CORRUPT: " if one["is_corrupt"] else "") + "; ".join(one["problems"])
                output.event("copy", one, printable(f"{one['path']} in {one['tier']}: {text}"))
    corrupt = sum(one["is_corrupt"] for one in findings)
    other = sum(bool(one["problems"]) for one in findings) - corrupt
    text = f"{count(len(findings), 'copy', 'copies')} of {count(len(found.groups), 'checkpoint')}"
    text += f"; {corrupt} corrupt" if corrupt else ""
    text += f"; {other} not read" if other else ""
    output.summary({"copies": len(findings), "corrupt": corrupt, "not_read": other}, text)
    if corrupt or other:
        raise typer.Exit(CORRUPT if corrupt else PARTIAL)


def _verify_copy(
    found: CheckpointTiers, transfer: Transfer, group: int, copy: int, on_bytes: Callable[[int], object]
) -> dict[str, Any]:
    path, tier, problems, n_bytes, is_corrupt = found.path(group), found.tier(copy), list[str](), 0, False
    objects = {one.key: one for one in found.objects(copy) if one.key != f"{path}/{PIN_NAME}"}
    known = {key: one.crc32c for key, one in objects.items() if one.crc32c is not None}
    if not found.is_readable(copy):
        state = STATE_NAMES[found.snapshot.state[copy]]
        problems.append(f"it is {state} and cannot be read: tiercache tier get {path}")
        objects = {}
    elif not found.snapshot.whole[copy]:
        problems.append("files are missing, or differ from those of another tier")
    if found.is_own(group) and f"{path}/{MANIFEST_NAME}" in objects:
        try:
            manifest = found.read_manifest(group, copy)
        except (CorruptCheckpoint, UnsupportedFormat) as error:
            problems.append(str(error))
            is_corrupt = isinstance(error, CorruptCheckpoint)
        else:
            known |= {f"{path}/{one.path}": one.crc32c for one in manifest.files}
            n_bytes += objects.pop(f"{path}/{MANIFEST_NAME}").n_bytes  # it contains its own checksum
    for key, info in objects.items():
        try:
            crc = transfer.checksum_of(tier, info, on_bytes)
        except StoreError as error:
            problems.append(str(error))
            continue
        n_bytes += info.n_bytes
        if crc != known.get(key, crc):
            problems.append(f"{key}: expected CRC-32C {known[key]:08x}, found {crc:08x}")
            is_corrupt = True
    for key in sorted(known.keys() - objects.keys()) if objects else ():
        problems.append(f"{key}: its manifest names it, and it is missing")
        is_corrupt = True
    is_proven = bool(objects) and objects.keys() <= known.keys() and not problems
    if not found.snapshot.complete[group] and not problems:
        problems.append(f"the checkpoint is not complete: {found.problems.get(group, '')}")
    return {
        "path": found.name(group),
        "tier": tier,
        "n_bytes": n_bytes,
        "problems": problems,
        "is_corrupt": is_corrupt,
        "is_proven": is_proven,
    }


# -- rm and pin -------------------------------------------------------------------------------------------------------


@verb(after_ctrl_c="deleted checkpoints are gone; the same command deletes the rest")
def rm(output: Output, paths: Paths, rules: Rules = None, yes: Yes = False, dry_run: DryRun = False) -> None:
    """Delete checkpoints from all tiers, at once and for good.

    Pinned and held checkpoints are refused; the exit code is then 3 (`ckpt unpin` removes a pin). The checkpoint of a
    run that was written last is deleted too if it is named, and so is one that a job reads now: reads of checkpoints
    are not known.
    """
    with open_checkpoints(output, rules, paths) as found:
        snapshot, reasons = found.snapshot, _kept(found)
        protected = _refusals(found, reasons)
        going = [group for group in found.groups if group not in protected]
        n_bytes = sum(int(snapshot.n_bytes[copy]) for group in going for copy in found.copies(group))
        text = f"{count(len(going), 'checkpoint')}, {format_bytes(n_bytes)} in all tiers"
        if dry_run:
            for group in found.groups:
                name, reason = found.name(group), protected.get(group)
                names = [found.tier(copy) for copy in found.copies(group)]
                is_pinned = any(one.kind == "pin" for one in reasons.get(group, ()))
                facts = {"path": name, "tiers": names, "pinned": is_pinned, "held": snapshot.held.get(group)}
                goes = f"would delete {name} from {', '.join(names)}"
                output.event(
                    "checkpoint", facts, goes if reason is None else printable(f"would leave {name}: {reason}")
                )
            output.summary({"checkpoints": len(going), "n_bytes": n_bytes, "dry_run": True}, f"would delete {text}")
            return
        if going and not yes:
            confirm(_question(found, going, text), "nothing was deleted")
        made: dict[int, Removal] = {}
        if going:
            with open_mover(found.tiers.file, found.tiers.stores, found.tiers.catalog) as context:
                made = dict(zip(going, remove_groups(context, found.inventory, going), strict=True))
        for group, reason in protected.items():
            tiers = tuple(found.tier(copy) for copy in found.copies(group))
            made[group] = Removal(found.path(group), 0, tiers, reason)
        removals = [replace(made[group], path=found.name(group)) for group in found.groups]
    for one in removals:
        text = f"left: {one.reason}" if one.reason else f"deleted from {', '.join(one.tiers)}"
        output.event("removed", asdict(one) | {"tiers": list(one.tiers)}, printable(f"{one.path}: {text}"))
    left = sum(bool(one.reason) for one in removals)
    done = [one for one in removals if not one.reason]
    done_bytes = sum(one.n_bytes for one in done)
    text = f"{count(len(done), 'checkpoint')} deleted, {format_bytes(done_bytes)}" + (f"; {left} left" if left else "")
    output.summary({"deleted": len(done), "left": left, "n_bytes": done_bytes}, text)
    if left:
        raise typer.Exit(PARTIAL)


def _refusals(found: CheckpointTiers, reasons: Mapping[int, Sequence[KeepReason]]) -> dict[int, str]:
    """Return why selected checkpoints are not deleted, by group, with the command that removes a pin."""
    refusals: dict[int, str] = {}
    for group in found.groups:
        of_group = reasons.get(group, ())
        pins = [one for one in of_group if one.kind == "pin"]
        if any(not one.rule for one in pins):
            unpin = f"`tiercache ckpt unpin {shlex.quote(found.name(group))}` removes the pin"
            refusals[group] = f"{next(str(one) for one in pins if not one.rule)}; {unpin}"
        elif pins:
            refusals[group] = f"pinned by {', '.join(map(str, pins))}: a [[pins]] table of the rule file"
        elif holds := [str(one) for one in of_group if one.kind == "hold"]:
            refusals[group] = ", ".join(holds)
    return refusals


def _kept(found: CheckpointTiers) -> dict[int, tuple[KeepReason, ...]]:
    """Return the reasons that keep the selected checkpoints, by group.

    Unlike those of keep_reasons(), they state what an incomplete checkpoint lacks, why its own file pins one, and which
    rules of the program that saved last keep one.
    """

    def detailed(group: int, reason: KeepReason) -> KeepReason:
        if reason.kind == "incomplete":
            return replace(reason, text=f"{reason.text}: {found.problems.get(group, '')}")
        if reason.kind == "pin" and not reason.rule:
            why = found.why_pinned(group)
            return replace(reason, text=f"pinned: {why}" if why else "pinned")
        return reason

    reasons = keep_reasons(found.snapshot, found.tiers.file)
    of_programs = _rules_of_programs(found)
    kept = {
        group: (*(detailed(group, one) for one in reasons.get(group, ())), *of_programs.get(group, ()))
        for group in found.groups
    }
    return {group: found_reasons for group, found_reasons in kept.items() if found_reasons}


def _rules_of_programs(found: CheckpointTiers) -> dict[int, list[KeepReason]]:
    """Return what the rules keep that the program had that saved last, of the selected runs of tc.Checkpoints."""
    snapshot, selected = found.snapshot, {*found.groups}
    rows_of, kept = defaultdict[tuple[str, str], list[int]](list), defaultdict[int, list[KeepReason]](list)
    for group in np.flatnonzero((snapshot.kind == CHECKPOINT) & snapshot.complete).tolist():
        if found.is_own(group):
            folder = found.path(group).rpartition("/")[0]
            for copy in found.copies(group):
                rows_of[folder, found.tier(copy)].append(group)
    places = [place for place, rows in rows_of.items() if not selected.isdisjoint(rows)]
    every = in_parallel([partial(found.keeps, *place) for place in places], _THREADS)
    for place, keeps in zip(places, every, strict=True):
        rows = rows_of[place]
        if any(keep.keep_list.best for keep in keeps):
            known = found.of_each(found.metrics, rows)
            columns = {name: np.full(snapshot.n_groups, np.nan) for metrics in known for name in metrics}
            for row, metrics in zip(rows, known, strict=True):
                for name, value in metrics.items():
                    columns[name][row] = value
            snapshot = replace(snapshot, metrics=columns)
        for keep in keeps:
            result = evaluate_keep_list(snapshot, np.array(rows, np.int64), keep.keep_list)
            for row in np.flatnonzero(result.named | result.unscored).tolist():
                kept[rows[row]].append(KeepReason("program", "", None, f"Keep({keep})"))
    return kept


def _question(found: CheckpointTiers, groups: Sequence[int], total: str) -> str:
    """Return the question before a deletion, which names each checkpoint, its step and its metrics."""
    lines = []
    for group, metrics in zip(groups, found.of_each(found.metrics, groups), strict=True):
        facts = [f"step {int(found.snapshot.step[group]):,}", *filter(None, [_metrics_text(metrics)])]
        facts += ["a run is resumed from it"] if _is_last_of_run(found.snapshot, group) else []
        lines.append(printable(f"  {found.name(group)}: {', '.join(facts)}"))
    return "\n".join([*lines, f"Delete {total}, for good?"])


def _is_last_of_run(snapshot: Snapshot, group: int) -> bool:
    run = (snapshot.run == snapshot.run[group]) & snapshot.complete & (snapshot.kind == CHECKPOINT)
    return bool(run[group] and snapshot.created_s[group] == snapshot.created_s[run].max())


@verb(after_ctrl_c=_AGAIN)
def pin(
    output: Output,
    paths: Paths,
    why: Annotated[str, option("--why", "TEXT", "Reason, which `ckpt ls` shows.")] = "",
    rules: Rules = None,
) -> None:
    """Pin checkpoints of tc.Checkpoints, in their folders: no rule moves or deletes them, and `ckpt rm` refuses to.

    Others are pinned by [[pins]] tables of the rule file.
    """
    _set_pins(output, rules, paths, why)


@verb(after_ctrl_c=_AGAIN)
def unpin(output: Output, paths: Paths, rules: Rules = None) -> None:
    """Remove the pins of checkpoints of tc.Checkpoints."""
    _set_pins(output, rules, paths, None)


def _set_pins(output: Output, rules: Rules, paths: Sequence[str], why: str | None) -> None:
    """Pin checkpoints in every tier that has them. why: Reason; None: the pins are removed."""
    with open_checkpoints(output, rules, paths) as found:
        for group in found.groups:
            if not found.is_own(group):
                raise ValueError(
                    f"{found.name(group)}: is no checkpoint of tc.Checkpoints; a [[pins]] table of the rule file with"
                    f' match = "{found.path(group)}*" pins it'
                )
        for group in found.groups:
            for copy in found.copies(group):
                found.tiers.stores.store(found.tier(copy)).put(f"{found.path(group)}/{PIN_NAME}", encode_pin(why))
        names = [found.name(group) for group in found.groups]
    for name in names:
        facts = {"path": name, "pinned": why is not None}
        output.event("pin", facts, f"{'unpinned' if why is None else 'pinned'} {name}")
    output.summary({"checkpoints": len(names)}, count(len(names), "checkpoint"))
