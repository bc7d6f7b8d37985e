"""Writes a first rule file, with comments, for what a folder contains: runs of checkpoints, data sets, other files.

What the folder does not show (the URL of a bucket, how much is to be kept) is written as a line that is commented out,
or as a default that a comment explains. The text is a valid rule file in every case.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np

from tiercache.errors import StoreError
from tiercache.model import ObjectInfo, format_bytes
from tiercache.shard.versions.manifest import VERSIONS_FOLDER
from tiercache.tier.inventory.datasets import OWN_KEY
from tiercache.tier.inventory.layouts import NO_GROUP, OWN_TIME, UserLayout, group_keys
from tiercache.tier.inventory.listing import keys_of
from tiercache.tier.inventory.metrics import metrics_in_name, read_metrics
from tiercache.tier.rule_edits import literal_glob
from tiercache.tier.suggestions import suggest_layouts
from tiercache.tier.text_columns import match_regex

if TYPE_CHECKING:
    from tiercache.store import Store

_MOST_RUNS = 20  # runs that the comments of a rule list
_MIN_STEPS = 100  # highest step of a run from which on a rule keeps one checkpoint for each tenth of it
_HIGH_IS_GOOD = ("acc", "f1", "auc", "bleu", "rouge", "precision", "recall", "reward", "map", "iou", "psnr", "dice")
_LOW_IS_GOOD = ("loss", "error", "perplexity", "ppl", "wer", "cer", "rmse", "mae", "mse", "fid")


@dataclass(frozen=True, slots=True)
class FoundRun:
    """A run of checkpoints. name: Folder and name as a glob. metrics: Those of one checkpoint of the run."""

    name: str
    n_checkpoints: int
    n_bytes: int
    steps: tuple[int, int]
    metrics: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FolderScan:
    """The content of a folder.

    Attributes:
        runs: Runs of checkpoints by their top folder ("": the scanned folder itself).
        data_sets: Folders of data sets, with the bytes of each.
        patterns: Patterns of single files that may be checkpoints, by top folder.
        n_files, file_bytes: Number and size of all other files.
    """

    runs: Mapping[str, Sequence[FoundRun]] = field(default_factory=dict)
    data_sets: Mapping[str, int] = field(default_factory=dict)
    patterns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    n_files: int = 0
    file_bytes: int = 0

    @property
    def n_checkpoints(self) -> int:
        """Number of checkpoints."""
        return sum(run.n_checkpoints for runs in self.runs.values() for run in runs)


def scan_folder(store: Store) -> FolderScan:
    """List a folder, and return what is in it. Reads the metrics of one checkpoint of each run. Raises StoreError."""
    infos = list(store.list())
    data_sets: dict[str, int] = {}
    for info in infos:
        folder, found, _ = info.key.rpartition(VERSIONS_FOLDER)
        if found:
            data_sets.setdefault(folder.rstrip("/"), 0)
    rest: list[ObjectInfo] = []
    is_own = match_regex(keys_of(infos), OWN_KEY) if infos else np.empty(0, np.bool_)
    for info, own in zip(infos, is_own.tolist(), strict=True):
        of_set = next((one for one in data_sets if info.key.startswith(f"{one}/" if one else "")), None)
        if of_set is not None:
            data_sets[of_set] += info.n_bytes
        elif not own:
            rest.append(info)
    patterns = _patterns(rest)
    layouts = [
        UserLayout(one, (f"{literal_glob(top)}/**" if top else "**",)) for top, some in patterns.items() for one in some
    ]
    runs, file_rows = _runs(store, rest, layouts)
    file_bytes = sum(rest[row].n_bytes for row in file_rows)
    return FolderScan(runs, data_sets, patterns, len(file_rows), file_bytes)


def _top(key: str) -> str:
    return key.partition("/")[0] if "/" in key else ""


def _patterns(infos: Sequence[ObjectInfo]) -> dict[str, list[str]]:
    """Return patterns for the files that belong to no checkpoint of a known layout, by top folder."""
    layout = group_keys(keys_of(infos))
    by_top: dict[str, list[str]] = defaultdict(list)
    for info, group in zip(infos, layout.group.tolist(), strict=True):
        if group != NO_GROUP and not layout.checkpoint[group]:
            by_top[_top(info.key)].append(info.key)
    found = {top: list(suggest_layouts(keys)) for top, keys in sorted(by_top.items())}
    return {top: some for top, some in found.items() if some}


def _runs(
    store: Store, infos: Sequence[ObjectInfo], layouts: Sequence[UserLayout]
) -> tuple[dict[str, list[FoundRun]], list[int]]:
    """Return the runs by top folder, and the rows of the files that belong to no checkpoint."""
    layout = group_keys(keys_of(infos), layouts)
    rows: dict[int, list[int]] = defaultdict(list)
    file_rows = []
    for row, group in enumerate(layout.group.tolist()):
        if group != NO_GROUP and layout.checkpoint[group]:
            rows[group].append(row)
        elif group != NO_GROUP:
            file_rows.append(row)
    by_run: dict[int, list[int]] = defaultdict(list)
    for group in rows:
        by_run[int(layout.run[group])].append(group)
    runs: dict[str, list[FoundRun]] = defaultdict(list)
    for groups in by_run.values():
        paths = [layout.paths[group].as_py() for group in groups]
        steps = sorted(int(layout.step[group]) for group in groups)
        last = max(groups, key=lambda group: int(layout.step[group]))
        n_bytes = sum(infos[row].n_bytes for group in groups for row in rows[group])
        metrics = _metrics(store, [infos[row] for row in rows[last]], layout.paths[last].as_py())
        run = FoundRun(_glob(paths), len(groups), n_bytes, (steps[0], steps[-1]), metrics)
        runs[_top(paths[0]) if "/" in paths[0] else ""].append(run)
    return {top: sorted(some, key=lambda run: run.name) for top, some in sorted(runs.items())}, file_rows


def _glob(paths: Sequence[str]) -> str:
    """Return the paths of a run as a name for people: "runs/a/step-*"."""
    folder, slash, name = paths[0].rpartition("/")
    return f"{folder}{slash}{re.sub('[0-9]+', '*', re.sub(OWN_TIME, '', name))}"


def _metrics(store: Store, objects: Sequence[ObjectInfo], path: str) -> tuple[str, ...]:
    try:
        found = read_metrics(store, objects, path)
    except StoreError:
        found = {}
    return tuple(sorted(found | metrics_in_name(path.rpartition("/")[2])))


def best_of(metrics: Iterable[str]) -> str | None:
    """Return the value of `best` for the metric that most probably decides: validation before training; or None."""
    found = []
    for name in metrics:
        words = name.lower()
        is_high, is_low = (any(word in words for word in some) for some in (_HIGH_IS_GOOD, _LOW_IS_GOOD))
        if (is_high or is_low) and ":" not in name:
            is_validation = any(word in words for word in ("val", "eval", "test"))
            found.append((not is_validation, not is_low, name, f"{name}:2" if is_low else f"{name}:2:max"))
    return min(found)[-1] if found else None


def rule_text(
    folder: str,
    scan: FolderScan,
    *,
    is_local: bool,
    standard: str | None,
    archive: str | None,
    made_s: float,
    disk_bytes: int | None = None,
) -> str:
    """Return the text of a rule file.

    Args:
        folder: URL or absolute path of the scanned folder, the first tier.
        scan: Its content.
        is_local: Whether the folder is on a disk of this machine: it is then the hot tier.
        standard: URL of the standard tier; None: not known yet. Not used if the folder is the standard tier.
        archive: URL of the archive tier; None: not known yet.
        made_s: Current time, in seconds since the epoch.
        disk_bytes: Size of the disk of a local folder.
    """
    day = f"{datetime.fromtimestamp(made_s, UTC):%Y-%m-%d}"
    lines = [
        f"# Rules for {folder}, written by `tiercache tier init` on {day}. Nothing is moved before you run a command.",
        "# 1. Read this file and change it. A line that begins with '#' has no effect.",
        "# 2. `tiercache tier check` shows what each rule matches. 3. `tiercache tier plan` shows what would be moved.",
        "# 4. `tiercache tier run --once` moves it; a scheduler such as cron repeats that command.",
        "",
        *_tier_lines(folder, is_local=is_local, standard=standard, archive=archive, disk_bytes=disk_bytes),
        *_checkpoint_lines(scan, is_local=is_local, standard=standard, archive=archive),
        *_data_set_lines(scan, archive=archive, is_home=not is_local or standard is None),
    ]
    if scan.n_files:
        size = format_bytes(scan.file_bytes)
        lines += [f"# Other files: {scan.n_files:,}, {size}. Keep lists do not apply to them: they stay.", ""]
    lines += [
        "# Checkpoints that no rule may touch:",
        "# [[pins]]",
        '# match = "runs/7/step-5000"',
        "# until = 2027-06-30",
        '# why = "the figures of the paper"',
    ]
    return "\n".join(lines) + "\n"


def _tier_lines(
    folder: str, *, is_local: bool, standard: str | None, archive: str | None, disk_bytes: int | None
) -> list[str]:
    lines = []
    if is_local:
        lines += ["# The fast disk.", "[tiers.hot]", f"url = {json.dumps(folder)}"]
        size = f" (its disk has {format_bytes(disk_bytes)})" if disk_bytes else ""
        lines += [f'# capacity = "80%"   # above 90 % of this, the least recently used objects move down{size}', ""]
        comment = "" if standard else "# "
        lines.append(
            "# Where checkpoints go from there." + ("" if standard else " Remove the '# ', and write your bucket.")
        )
        lines += _tier("standard", standard or "s3://BUCKET/train", comment, _prices(standard, "STANDARD"))
    else:
        lines += ["# The bucket to which jobs write.", *_tier("standard", folder, "", _prices(folder, "STANDARD"))]
    comment = "" if archive else "# "
    lines.append("# For what is rarely read." + ("" if archive else " Remove the '# ', and write your bucket."))
    is_s3 = archive is None or archive.startswith("s3://")
    more = ['storage_class = "GLACIER_IR"'] if is_s3 else []
    return lines + _tier("archive", archive or "s3://BUCKET-cold/train", comment, more + _prices(archive, "GLACIER_IR"))


def _tier(name: str, url: str, comment: str, more: Sequence[str]) -> list[str]:
    return [f"{comment}[tiers.{name}]", f"{comment}url = {json.dumps(url)}", *(f"{comment}{line}" for line in more), ""]


def _prices(url: str | None, storage_class: str) -> list[str]:
    if url is not None and not url.startswith("s3://"):
        return [] if "://" not in url else ["# prices = ...   # `tiercache tier check --prices` lists the names"]
    return [f'prices = "aws:us-east-1:{storage_class}"   # `tiercache tier check --prices` lists the names']


def _checkpoint_lines(scan: FolderScan, *, is_local: bool, standard: str | None, archive: str | None) -> list[str]:
    lines: list[str] = []
    for top, runs in scan.runs.items():
        total = sum(run.n_bytes for run in runs)
        n_checkpoints = sum(run.n_checkpoints for run in runs)
        lines.append(f"# Checkpoints: {n_checkpoints:,}, runs: {len(runs):,}, {format_bytes(total)}:")
        for run in runs[:_MOST_RUNS]:
            metrics = f"; metrics {', '.join(run.metrics)}" if run.metrics else ""
            steps = f"steps {run.steps[0]:,} to {run.steps[1]:,}"
            lines.append(
                f"#   {_comment(run.name)}: {run.n_checkpoints:,}, {steps}, {format_bytes(run.n_bytes)}{metrics}"
            )
        if len(runs) > _MOST_RUNS:
            lines.append(f"#   ... and {len(runs) - _MOST_RUNS:,} more runs")
        lines += _rule_lines(
            top, runs, scan.patterns.get(top, ()), is_local=is_local, standard=standard, archive=archive
        )
    if not scan.runs:
        lines += ["# No checkpoint was found. A file with a name of your own is one with this key of a rule:"]
        lines += ['# checkpoint = "model_{step}.pt"', ""]
    return lines


def _rule_lines(
    top: str,
    runs: Sequence[FoundRun],
    patterns: Sequence[str],
    *,
    is_local: bool,
    standard: str | None,
    archive: str | None,
) -> list[str]:
    """Return a rule for the checkpoints below a top folder."""
    lines = ["[[rules]]", f"name = {json.dumps(f'checkpoints in {top}' if top else 'checkpoints', ensure_ascii=False)}"]
    lines.append(f"match = {json.dumps(f'{literal_glob(top)}/**' if top else '**', ensure_ascii=False)}")
    if patterns:
        lines.append("# Each of these files is a checkpoint:")
        lines.append(f"checkpoint = {json.dumps(patterns[0] if len(patterns) == 1 else list(patterns))}")
    if is_local:
        below = "the others move to standard" if standard else "without a standard tier, nothing moves"
        lines.append(f"keep_hot = {{ last = 2 }}   # to resume from; {below}")
    best = best_of(sorted({name for run in runs for name in run.metrics}))
    # A metric that a run does not have would keep all of it.
    has_best = best is not None and all(best.split(":")[0] in run.metrics for run in runs)
    named = f', best = "{best}"' if has_best else ""
    highest = max(run.steps[1] for run in runs)
    every = f", every_steps = {_round_steps(highest)}" if highest >= _MIN_STEPS else ""
    comment = "" if standard or not is_local else "# "
    lines.append(f"{comment}keep_standard = {{ last = 10{every}{named} }}   # a union: any of these keeps it")
    if best is not None and not has_best:
        lines.append(f'# best = "{best}" in a keep list keeps the best two; some runs do not have this metric')
    elif best is None:
        lines.append('# best = "val_loss:2" in a keep list keeps the best two by a metric of names or of metrics.json')
    comment = "" if archive and (standard or not is_local) else "# "
    lines += [
        f'{comment}then = "archive"   # where the others go,',
        f'{comment}after = "14d"      # once they are as old as this',
    ]
    lines += ['# delete_after = "365d"   # deletes last copies of what no keep list names', ""]
    return lines


def _round_steps(highest: int) -> int:
    """Return a round number of steps, about a tenth of the highest step."""
    tenth = str(max(highest // 10, 1))
    return int(tenth[0]) * int(f"1{'0' * (len(tenth) - 1)}")


def _data_set_lines(scan: FolderScan, *, archive: str | None, is_home: bool) -> list[str]:
    """Return the rules for data sets. is_home: Whether the folder is the home tier: readers follow moves only of it."""
    lines: list[str] = []
    by_top: dict[str, dict[str, int]] = defaultdict(dict)
    for folder, n_bytes in sorted(scan.data_sets.items()):
        by_top[folder.partition("/")[0]][folder] = n_bytes
    for top, some in by_top.items():
        names = ", ".join(map(_comment, [*some][:_MOST_RUNS])) + (", ..." if len(some) > _MOST_RUNS else "")
        lines.append(f"# Data sets: {len(some):,}, {format_bytes(sum(some.values()))}: {names}")
        if not is_home:
            lines += ["# They stay: rules move only data sets that lie in the standard tier.", ""]
            continue
        comment = "" if archive else "# "
        name = f"data sets in {top}" if top else "data sets"
        match = f"{literal_glob(top)}/**" if top else "**"
        lines += [f"{comment}[[rules]]", f"{comment}name = {json.dumps(name, ensure_ascii=False)}"]
        lines += [f"{comment}match = {json.dumps(match, ensure_ascii=False)}", f'{comment}kind = "shard"']
        lines += [f'{comment}idle = "30d"      # not used for this time, tracked from the first `tier run --once`']
        lines += [f'{comment}to = "archive"', ""]
    return lines


def _comment(text: str) -> str:
    """Return a name that stays in its line of comment."""
    return text.encode("unicode_escape").decode() if not text.isprintable() else text
