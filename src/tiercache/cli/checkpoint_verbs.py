"""`tiercache ckpt`: lists, shows, verifies, deletes and pins the checkpoints of every layout."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Annotated, Any

import numpy as np
import typer

from tiercache.checkpoint.format import MANIFEST_NAME
from tiercache.cli.checkpoint_selection import CheckpointTiers, in_parallel, open_checkpoints
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
    option,
    printable,
    verb,
)
from tiercache.cli.open_tiers import STATE_NAMES, OpenTiers, format_copy, format_duration, format_time
from tiercache.errors import CorruptCheckpoint, StoreError
from tiercache.keep import PIN_NAME, encode_pin
from tiercache.model import format_bytes
from tiercache.tier.inventory.groups import Inventory
from tiercache.tier.model import CHECKPOINT, Snapshot
from tiercache.tier.move.deletions import Removal, remove_groups
from tiercache.tier.move.mover import open_mover
from tiercache.tier.move.transfer import Transfer
from tiercache.tier.plan.plan import make_plan
from tiercache.tier.plan.policy import decide_now
from tiercache.tier.plan.proposals import KeepReason, keep_reasons
from tiercache.tier.plan.selection import rules_of

_SHOWN_FILES = 20
_AGAIN = "nothing was changed; run the same command again"
_WHICH = "RUN/latest, RUN/best:METRIC[:max] and RUN/STEP select one of a run."
Paths = Annotated[
    list[str],
    argument(
        "PATH...", f"Checkpoints: paths below a tier (hot/runs/7/step-100), local paths, URLs, or globs. {_WHICH}"
    ),
]


# -- ls and show ------------------------------------------------------------------------------------------------------


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
        values = in_parallel(found.metrics if metrics else found.known_metrics, found.groups)
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
            {
                "tier": found.tier(copy),
                "state": STATE_NAMES[snapshot.state[copy]],
                "n_objects": int(snapshot.n_objects[copy]),
                "n_bytes": int(snapshot.n_bytes[copy]),
                "whole": bool(snapshot.whole[copy]),
                "verified": bool(snapshot.verified[copy]),
            }
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
        "kept by": _kept_text(row["kept"]),
    }


def _metrics_text(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} = {value:.6g}" for name, value in sorted(metrics.items()))


def _kept_text(kept: Sequence[Mapping[str, Any]]) -> str:
    """Return the reasons for people, with the name of a rule once: "runs: keep_hot last = 2, keep_cold best = a:1"."""
    parts: dict[str, list[str]] = {}
    for one in kept:
        where = "" if one["tier"] is None else f"keep_{one['tier']} "
        text = str(one["text"]).removeprefix(f"{one['rule']}: ").removeprefix(where)
        parts.setdefault(one["rule"], []).append(f"{where}{text}")
    return "; ".join(f"{rule}: {', '.join(texts)}" if rule else ", ".join(texts) for rule, texts in parts.items())


@verb(after_ctrl_c=_AGAIN)
def show(
    output: Output,
    path: Annotated[
        str,
        argument("PATH", f"Checkpoint: a path below a tier (hot/runs/7/step-100), a local path, or a URL. {_WHICH}"),
    ],
    rules: Rules = None,
) -> None:
    """Show one checkpoint: its copies and files, its metrics, what keeps it, and what the next plan does with it."""
    with open_checkpoints(output, rules, [path]) as found:
        if len(found.groups) != 1:
            names = ", ".join(found.name(group) for group in found.groups[:3])
            raise ValueError(
                f"{path}: expected one checkpoint, found {len(found.groups)}: {names}, ...; the last one is"
                f" {path.rstrip('/')}/latest"
            )
        (group,) = found.groups
        tiers, file, snapshot = found.tiers, found.tiers.file, found.snapshot
        reasons = _kept(found).get(group, ())
        metrics, manifest = found.metrics(group), found.manifest(group)
        objects = {found.tier(copy): found.objects(copy) for copy in found.copies(group)}
        number = int(rules_of(snapshot, file)[group])
        plan_text = _next_move(tiers, found.inventory, group)
        below = found.path(group)
        urls = {name: f"{tiers.stores.store(name).url}/{below}" for name in objects}
    facts = _facts(found, group, metrics, reasons) | {
        "rule": file.rules[number].name if number >= 0 else None,
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
        yield f"copy in {format_copy(copy)}: {facts['urls'][copy['tier']]}, {size}{verified}"
    if facts["metrics"]:
        yield f"metrics: {_metrics_text(facts['metrics'])}"
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
    decisions, _ = decide_now(inventory.snapshot, file, tiers.stores, tiers.catalog)
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
    """Read all objects of a copy, and compare them with the known checksums."""
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
        except CorruptCheckpoint as error:
            problems.append(str(error))
            is_corrupt = True
        else:
            known |= {f"{path}/{one.path}": one.crc32c for one in manifest.files if not one.path.startswith("../")}
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

    Unlike those of keep_reasons(), they state what an incomplete checkpoint lacks, and why its own file pins one.
    """

    def detailed(group: int, reason: KeepReason) -> KeepReason:
        if reason.kind == "incomplete":
            return replace(reason, text=f"{reason.text}: {found.problems.get(group, '')}")
        if reason.kind == "pin" and not reason.rule:
            why = found.why_pinned(group)
            return replace(reason, text=f"pinned: {why}" if why else "pinned")
        return reason

    reasons = keep_reasons(found.snapshot, found.tiers.file)
    return {group: tuple(detailed(group, one) for one in reasons[group]) for group in found.groups if group in reasons}


def _question(found: CheckpointTiers, groups: Sequence[int], total: str) -> str:
    """Return the question before a deletion, which names each checkpoint, its step and its metrics."""
    lines = []
    for group, metrics in zip(groups, in_parallel(found.metrics, groups), strict=True):
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
