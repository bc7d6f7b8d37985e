"""The verb tier check: reads the rule file, tries to reach its tiers, and prints what each rule matches."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import typer

from tiercache.cli.output import FAILED, PARTIAL, Output, count, printable
from tiercache.cli.tiers import (
    OpenTiers,
    open_tiers,
    print_losses,
    print_metric_gaps,
    print_notes,
    print_unavailable,
)
from tiercache.errors import StoreError
from tiercache.model import format_bytes
from tiercache.prices import price_notes, price_table
from tiercache.store import redact
from tiercache.store.archive import S3Archive
from tiercache.store.options import ParsedUrl
from tiercache.tier.findings import Loss, bucket_findings, find_losses, metric_gaps
from tiercache.tier.inventory.groups import Inventory
from tiercache.tier.model import KINDS
from tiercache.tier.plan.selection import largest_copies, rules_of
from tiercache.tier.rules import Rule, RuleFile, Tier, load_rule_file
from tiercache.tier.stores import missing_folder_message, unavailable_tiers

_NO_RULE = "(no rule)"
# Facts of an inventory, and why no plan touches the objects that they count.
_LEFT_ALONE = {
    "orphans": "shards that no version of their data set contains",
    "missing": "shards that a version contains but no tier has: a rule deleted them, or they are elsewhere",
    "unfinished": "still being written",
    "no_keys": "names that are not valid keys",
    "differing": "different copies in two tiers",
}
_SHOWN = 3
_OFFLINE, _UNSEEN = "not asked", "cannot be seen"


def check_file(output: Output, rules: Path | None) -> None:
    """Check the rule file without reaching any tier."""
    file = load_rule_file(rules)
    _print_tiers(output, file, {tier.name: _OFFLINE for tier in file.tiers})
    print_notes(output, filter(None, map(missing_folder_message, file.tiers)))
    _sum_up(output, file, 0, None)


def check_tiers(output: Output, rules: Path | None) -> None:
    """Check the rule file and its tiers, and print what rules match.

    Raises typer.Exit with FAILED if a tier cannot be reached or seen, and with PARTIAL if an object is lost.
    """
    with open_tiers(rules) as tiers:
        _check(output, tiers)


def _check(output: Output, tiers: OpenTiers) -> None:
    file = tiers.file
    reached = {tier.name: _reached(tiers, tier) for tier in file.tiers}
    failed = {name for name, answer in reached.items() if answer != "yes"}
    unseen = unavailable_tiers(file, tiers.stores, tiers.catalog, but=failed)
    _print_tiers(output, file, reached | dict.fromkeys(unseen, _UNSEEN))
    print_unavailable(output, file, unseen)
    losses: tuple[Loss, ...] | None = None
    if not failed:
        inventory = tiers.read_inventory(output)
        _print_rules(output, file, inventory)
        losses = find_losses(inventory, file, tiers.stores, tiers.catalog, now_s=inventory.snapshot.now_s)
        _print_buckets(output, tiers)
        _print_left_alone(output, inventory.facts, lost={loss.path for loss in losses})
        gaps, unscored = metric_gaps(inventory.snapshot, file, inventory.facts["in_files"])
        print_metric_gaps(output, gaps)
        for one in unscored:
            output.event("passed_over", asdict(one), printable(f"note: {one.text}"))
        tiers.print_pending_moves(output)
        folders = [found.folder for found in inventory.facts["datasets"]]
        tiers.print_untracked(output, inventory, pa.array(folders, pa.large_string()))
        print_losses(output, losses)
    n_unreached = len(failed) + len(unseen)
    _sum_up(output, file, n_unreached, losses)
    if n_unreached or losses:
        raise typer.Exit(FAILED if n_unreached else PARTIAL)


def _reached(tiers: OpenTiers, tier: Tier) -> str:
    """Return "yes", or why the tier cannot be reached. A listing needs the same permission as everything else."""
    if tier.is_local and (path := Path(ParsedUrl.parse(tier.url).path)).exists() and not path.is_dir():
        return f"{path}: not a folder"
    try:
        next(iter(tiers.stores.listing(tier.name)), None)
    except (StoreError, ValueError, OSError) as error:
        return " ".join(str(error).split())
    return "yes"


def _print_tiers(output: Output, file: RuleFile, reached: dict[str, str]) -> None:
    rows: list[dict[str, Any]] = []
    texts: list[dict[str, str]] = []
    for tier in file.tiers:
        prices = tier.prices if isinstance(tier.prices, str) else "own" if tier.prices else None
        shown = {"tier": tier.name, "role": tier.role, "url": redact(tier.url)}
        facts = {"storage_class": tier.storage_class, "capacity": tier.capacity, "prices": prices}
        answer = reached[tier.name]
        rows.append({**shown, **facts, "home": tier is file.home, "reached": answer == "yes", "answer": answer})
        words = {"class": tier.storage_class or "", "capacity": tier.capacity or "", "prices": prices or ""}
        texts.append({**shown, **words, "reached": answer})
    output.table("tier", rows, texts)


def _print_rules(output: Output, file: RuleFile, inventory: Inventory) -> None:
    """Print a row for each rule with the objects that it matches, and a row for objects that no rule matches."""
    snapshot = inventory.snapshot
    matched, sizes = rules_of(snapshot, file), largest_copies(snapshot)
    rows: list[dict[str, Any]] = []
    texts: list[dict[str, str]] = []
    for number, name in [*enumerate(rule.name for rule in file.rules), (-1, _NO_RULE)]:
        mine = matched == number
        kinds = {f"{kind}s": int(np.count_nonzero(mine & (snapshot.kind == i))) for i, kind in enumerate(KINDS)}
        n_bytes = int(sizes[mine].sum())
        does = _does(file.rules[number]) if number >= 0 else "stays where it is"
        rows.append({"rule": name, "does": does, **kinds, "n_bytes": n_bytes})
        counts = {kind: f"{n:,}" for kind, n in kinds.items()}
        texts.append({"rule": name, **counts, "size": format_bytes(n_bytes), "does": does})
    output.table("rule", rows, texts)


def _print_buckets(output: Output, tiers: OpenTiers) -> None:
    """Print what the tiers' buckets do with objects by themselves (lifecycle rules, versioning)."""
    for tier in tiers.file.tiers:
        archive = tiers.stores.archive(tier.name)
        if isinstance(archive, S3Archive):
            folder = f"{archive.prefix}/" if archive.prefix else ""
            for found in bucket_findings(tier.name, folder, tiers.stores.class_of(tier.name), archive.settings()):
                text = printable(f"{'warning' if found.is_danger else 'note'}: {found.text}")
                output.event("bucket", asdict(found), text)
        elif tier.url.lower().startswith("s3://"):
            text = f"tiers.{tier.name}: reading the bucket's lifecycle needs boto3: pip install 'tiercache[archive]'"
            output.event("note", {"text": text}, f"note: {text}")


def _print_left_alone(output: Output, facts: Mapping[str, Any], lost: Collection[str]) -> None:
    """Print the objects that no plan touches. lost: Keys that are reported as lost, and not repeated here."""
    for name, what in _LEFT_ALONE.items():
        n, names = facts.get(name, (0, ()))
        if name == "missing":
            keys, _ = facts["missing_shards"]
            n -= sum(key in lost for key in keys.to_pylist()) if lost else 0
            names = tuple(key for key in names if key not in lost)
        if n:
            shown = ", ".join(names[:_SHOWN]) + (", ..." if n > _SHOWN else "")
            text = f"{count(n, 'object')} left alone, {what}: {shown}"
            output.event("left_alone", {"why": name, "objects": n, "names": list(names)}, f"note: {text}")
    for lack, n in facts.get("incomplete", {}).items():
        text = f"{count(n, 'checkpoint')} incomplete, lacking {lack}"
        output.event("incomplete", {"without": lack, "checkpoints": n}, f"note: {text}")
    for found in facts.get("datasets", ()):
        if found.problem:
            output.event("data_set", {"folder": found.folder, "problem": found.problem}, f"note: {found.problem}")


def _does(rule: Rule) -> str:
    """Return a short description of what a rule does."""
    parts = []
    if rule.to is not None:
        parts.append(f"from {', '.join(rule.sources)} to {rule.to}")
    if rule.keep:
        parts.append(f"keeps some in {', '.join(rule.keep)}")
    if rule.then is not None:
        parts.append(f"then {rule.then}")
    if rule.delete_after_s is not None:
        parts.append("deletes")
    return ", ".join(parts) or "stays where it is"


def _setting_notes(file: RuleFile) -> Iterator[str]:
    """Yield a note for each setting that is valid but probably not intended."""
    for tier in file.tiers:
        if tier.prices is None and not tier.is_local:
            yield f"tiers.{tier.name} has no prices, so plans contain no dollars for it"
        if isinstance(tier.prices, str) and tier.prices.startswith("aws:"):
            priced, written = tier.prices.rpartition(":")[2], tier.storage_class or "STANDARD"
            if priced != written and not tier.is_local:
                yield f"tiers.{tier.name} writes storage class {written}, but has the prices of {priced}"


def _sum_up(output: Output, file: RuleFile, n_unreached: int, losses: Sequence[Loss] | None) -> None:
    print_notes(output, _setting_notes(file))
    facts = {
        "rules_file": str(file.path),
        "tiers": len(file.tiers),
        "rules": len(file.rules),
        "pins": len(file.pins),
        "not_reached": n_unreached,
        "lost": None if losses is None else [loss.path for loss in losses],
    }
    text = f"{count(len(file.tiers), 'tier')}, {count(len(file.rules), 'rule')}, {count(len(file.pins), 'pin')}"
    unreached = f"; {count(n_unreached, 'tier')} not reached" if n_unreached else ""
    lost = f"; {count(len(losses), 'object')} LOST" if losses else ""
    output.summary(facts, f"{file.path}: {text}{unreached}{lost}")


def print_prices(output: Output) -> None:
    """Print the built-in price table."""
    dated, table = price_table()
    rows = [asdict(prices) for prices in table.values()]
    names = ("store_gb_month", "put_1000", "get_1000", "transition_1000", "retrieve_gb", "egress_gb", "min_days")
    texts = [
        {"prices": row["name"], **{name: f"{row[name]:.5f}".rstrip("0").rstrip(".") for name in names}}
        | {
            "min_bytes": f"{row['min_bytes']:,}",
            "overhead": f"{row['overhead_bytes'] + row['standard_overhead_bytes']:,}",
        }
        | {"restore": ", ".join(f"{speed} {p['hours']:g} h ${p['gb']:g}/GB" for speed, p in row["restore"].items())}
        for row in rows
    ]
    output.table("prices", rows, texts)
    for note in price_notes():
        output.event("note", {"text": note}, note)
    output.summary(
        {"dated": dated, "prices": len(rows)},
        f"prices as of {dated}, in dollars; price tables in a rule file override them",
    )
