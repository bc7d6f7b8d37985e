"""The verbs of `tiercache ckpt` except verify; checkpoint_commands.py has their options."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import typer

from tiercache import config
from tiercache.checkpoint.layout import parse_name
from tiercache.cli.checkpoint_selection import (
    CheckpointTiers,
    in_parallel,
    only_checkpoint,
    open_checkpoints,
)
from tiercache.cli.common import PARTIAL, Output, confirm, count, printable
from tiercache.cli.open_tiers import STATE_NAMES, OpenTiers, format_copy, format_duration, format_time
from tiercache.keep import PIN_NAME, encode_pin
from tiercache.model import format_bytes
from tiercache.tier.inventory.groups import Inventory
from tiercache.tier.model import CHECKPOINT, Snapshot
from tiercache.tier.move.deletions import Removal, remove_groups
from tiercache.tier.move.mover import open_mover
from tiercache.tier.plan.plan import make_plan
from tiercache.tier.plan.policy import decide_now
from tiercache.tier.plan.proposals import KeepReason, keep_reasons
from tiercache.tier.plan.selection import rules_of
from tiercache.tier.rule_edits import add_pins, literal_glob, remove_pins

_SHOWN_FILES = 20


# -- ls and show ------------------------------------------------------------------------------------------------------


def ls(output: Output, rules: Path | None, paths: Sequence[str], *, read_metrics: bool) -> None:
    """List checkpoints. paths: See open_checkpoints(). read_metrics: Whether to read the metrics of all from files."""
    with open_checkpoints(output, rules, paths) as found:
        reasons = _kept(found)
        metrics = in_parallel(found.metrics if read_metrics else found.known_metrics, found.groups)
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


def show(output: Output, rules: Path | None, path: str, which: str | None) -> None:
    """Show one checkpoint, and what the next plan does with it. which: Which checkpoint of the run at the path."""
    with open_checkpoints(output, rules, [path] if which is None else [f"{path.rstrip('/')}/{which}"]) as found:
        group = only_checkpoint(found, path)
        tiers, file, snapshot = found.tiers, found.tiers.file, found.snapshot
        reasons = _kept(found).get(group, ())
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


# -- rm and pin -------------------------------------------------------------------------------------------------------


def rm(output: Output, rules: Path | None, paths: Sequence[str], *, yes: bool, dry_run: bool) -> None:
    """Delete checkpoints from all tiers. Raises typer.Exit with PARTIAL if some stayed."""
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
        facts = asdict(one) | {"tiers": list(one.tiers)}
        text = f"left: {one.reason}" if one.reason else f"deleted from {', '.join(one.tiers)}"
        output.event("removed", facts, printable(f"{one.path}: {text}"))
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
        pins = [f"pinned by {one}" if one.rule else str(one) for one in of_group if one.kind == "pin"]
        if pins:
            unpin = f"`tiercache ckpt unpin {shlex.quote(found.name(group))}` removes the pin"
            refusals[group] = f"{', '.join(pins)}; {unpin}"
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


def pin(output: Output, rules: Path | None, paths: Sequence[str], *, until: str | None, why: str) -> None:
    """Pin checkpoints: those of tc.Checkpoints in their folders, others in the rule file.

    until: Last day, as a text; None: no end.
    """
    with open_checkpoints(output, rules, paths) as found:
        own, others = _by_layout(found)
        if own and until:
            raise ValueError(
                f"{found.name(own[0])}: a pin of tc.Checkpoints has no --until: it stays until `ckpt unpin`"
            )
        for group in own:
            _put_pin(found, group, why)
        more = {key: text for key, text in {"until": until, "why": why}.items() if text}
        tables = [{"match": literal_glob(found.path(group))} | more for group in others]
        if tables:
            add_pins(_file_of_pins(found), tables)
        names = [found.name(group) for group in found.groups]
    _print_pins(output, names, is_pinned=True)


def unpin(output: Output, rules: Path | None, paths: Sequence[str]) -> None:
    """Remove the pins of checkpoints."""
    with open_checkpoints(output, rules, paths) as found:
        own, others = _by_layout(found)
        for group in own:
            _put_pin(found, group, None)
        if others:
            path = _file_of_pins(found)
            present = config.parse_toml(path, config.read_file(path)).get("pins", [])
            for group in others:
                glob = literal_glob(found.path(group))
                wanted = [table for table in present if table.get("match") in (glob, [glob])]
                if not wanted:
                    raise ValueError(
                        f"{path}: no [[pins]] table names exactly {glob!r}; edit the table whose glob matches it"
                    )
                remove_pins(path, wanted)
        names = [found.name(group) for group in found.groups]
    _print_pins(output, names, is_pinned=False)


def _put_pin(found: CheckpointTiers, group: int, why: str | None) -> None:
    """Pin a checkpoint of tc.Checkpoints in every tier that has it. why: Reason; None: the pin is removed."""
    for copy in found.copies(group):
        found.tiers.stores.store(found.tier(copy)).put(f"{found.path(group)}/{PIN_NAME}", encode_pin(why))


def _file_of_pins(found: CheckpointTiers) -> Path:
    if not found.tiers.file.is_from_file:
        raise ValueError(
            "pins of checkpoints of other libraries are tables of a rule file, and there is none: "
            "`tiercache tier init FOLDER` writes one"
        )
    return found.tiers.file.path


def _print_pins(output: Output, names: Sequence[str], *, is_pinned: bool) -> None:
    for name in names:
        output.event("pin", {"path": name, "pinned": is_pinned}, f"{'pinned' if is_pinned else 'unpinned'} {name}")
    output.summary({"checkpoints": len(names)}, count(len(names), "checkpoint"))


def _by_layout(found: CheckpointTiers) -> tuple[list[int], list[int]]:
    """Return the selected checkpoints of tc.Checkpoints, and the others."""
    own = [group for group in found.groups if parse_name(found.path(group).rpartition("/")[2]) is not None]
    return own, [group for group in found.groups if group not in own]
