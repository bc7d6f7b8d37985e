"""The tiers of a rule file for the tier verbs: stores, catalog, prices, inventory, path arguments, and formatting."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tiercache.cli.common import Output, printable
from tiercache.model import format_bytes
from tiercache.prices import Prices, prices_if_known
from tiercache.store.access import ParsedUrl
from tiercache.tier.findings import RuleWarning
from tiercache.tier.inventory.groups import Inventory, take_inventory
from tiercache.tier.journal import TierCatalog
from tiercache.tier.model import READABLE, TierTotals
from tiercache.tier.move.mover import catalog_path
from tiercache.tier.rules import RuleFile, load_rule_file
from tiercache.tier.stores import Stores, missing_folder_message
from tiercache.tier.text_columns import first_match

_DURATION_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


def format_dollars(amount: float) -> str:
    """Return an amount as "1,234.50"; an amount below 0.01 with two significant digits: "0.00012"."""
    if amount == 0 or abs(amount) >= 0.01:
        return f"{amount:,.2f}"
    digits = 1 - math.floor(math.log10(abs(amount)))
    return f"{amount:.{digits}f}" if digits <= 6 else "0.00"


def format_duration(seconds: float) -> str:
    """Return a duration as "12 d", "3 h" or "40 s": in the largest unit of which it has at least two."""
    for length_s, unit in _DURATION_UNITS:
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:,.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def format_time(seconds: float) -> str:
    """Return a time, given in seconds since the epoch, in ISO format in UTC, with whole seconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


STATE_NAMES = ("here", "archived", "restoring", "restored")
"""Names of the states of copies, by the number of the state in a snapshot."""


def format_copy(copy: Mapping[str, Any]) -> str:
    """Return where a copy is, for people: "archive (restoring, in part)". copy: Its facts in JSON output."""
    notes = [] if copy["state"] == STATE_NAMES[READABLE] else [copy["state"]]
    notes += [] if copy["whole"] else ["in part"]
    return f"{copy['tier']} ({', '.join(notes)})" if notes else str(copy["tier"])


def print_holdings(
    output: Output, tiers: Sequence[str], before: Mapping[str, TierTotals], after: Mapping[str, TierTotals]
) -> None:
    """Print a row for each tier with what it holds before and after."""
    rows: list[dict[str, Any]] = []
    texts: list[dict[str, str]] = []
    for name in tiers:
        totals = {"before": before.get(name, TierTotals()), "after": after.get(name, TierTotals())}
        facts = {when: asdict(of) | {"dollars_month": round(of.dollars_month, 6)} for when, of in totals.items()}
        rows.append({"tier": name} | facts)
        text = {"tier": name}
        for when, of in totals.items():
            then = "" if when == "before" else " then"
            text |= {f"objects{then}": f"{of.n_objects:,}", f"bytes{then}": format_bytes(of.n_bytes)}
            text[f"$/month{then}"] = format_dollars(of.dollars_month)
        texts.append(text)
    output.table("tier", rows, texts)


_HERE = ("./", "../")
_SIGNS = "*?[{"


@dataclass(frozen=True, slots=True)
class OpenTiers:
    """The opened tiers of a rule file."""

    file: RuleFile  # the rule file
    stores: Stores  # stores of the tiers
    catalog: TierCatalog  # catalog of this machine
    prices: tuple[Prices | None, ...]  # prices of each tier; None: no prices are known

    def read_inventory(self, output: Output) -> Inventory:
        """Take the inventory: all objects in the tiers now. A progress bar counts the objects."""
        # All keys exist from the start, because threads set their values.
        listed = {tier.name: 0 for tier in self.file.tiers}

        with output.count_progress("listing") as advance:

            def progress(tier: str, n_objects: int) -> None:
                listed[tier] = n_objects
                n_all = sum(listed.values())
                advance(n_all, n_all)

            return take_inventory(self.file, self.stores, self.catalog, now_s=time.time(), on_progress=progress)

    def print_untracked(self, output: Output, inventory: Inventory, paths: pa.Array) -> None:
        """Print a note for each data set among paths whose use is not tracked: whether it is idle is unknown."""
        for found in inventory.facts.get("datasets", ()):
            if not found.is_tracked and not found.problem and pc.any(pc.starts_with(paths, found.folder)).as_py():
                folder = found.folder.rstrip("/") or "/"
                from_then = "machines report it after the first `tier apply` or `tier run --once`"
                text = f"{folder}: its use is not tracked yet; {from_then}"
                output.event("uncounted", {"data_set": folder}, f"note: {text}")

    def unpriced_note(self) -> str:
        """Return the end of a summary that names tiers without prices; "" if all tiers have prices."""
        names = [tier.name for tier, prices in zip(self.file.tiers, self.prices, strict=True) if prices is None]
        return f"; dollars exclude {', '.join(names)}, which has no prices" if names else ""


def print_rule_warnings(output: Output, found: Iterable[RuleWarning]) -> None:
    """Print a warning for each rule or pin that probably does not do what was meant."""
    for one in found:
        level = "note" if one.kind == "unmatched" else "warning"
        output.event("rule_warning", asdict(one), printable(f"{level}: {one.text}"))


def print_unavailable(output: Output, file: RuleFile, unavailable: Mapping[str, str]) -> None:
    """Print a warning for each tier whose copies cannot be seen, and a note for each other tier without a folder."""
    for tier, reason in unavailable.items():
        text = f"tiers.{tier} cannot be seen: {reason}"
        output.event("unseen", {"tier": tier, "reason": reason}, printable(f"warning: {text}"))
    print_notes(
        output, filter(None, (missing_folder_message(tier) for tier in file.tiers if tier.name not in unavailable))
    )


def print_notes(output: Output, notes: Iterable[str]) -> None:
    """Print notes on settings that are valid but probably not intended, as events `doubt`."""
    for note in notes:
        output.event("doubt", {"text": note}, f"note: {note}")


@contextmanager
def open_tiers(rules: Path | None) -> Iterator[OpenTiers]:
    """Yield the opened tiers of the rule file, and close them at the end."""
    file = load_rule_file(rules)
    prices = tuple(prices_if_known(tier) for tier in file.tiers)
    urls = {tier.name: tier.url for tier in file.tiers}
    with Stores(file) as stores, TierCatalog(catalog_path(file), urls) as catalog:
        yield OpenTiers(file, stores, catalog, prices)


def tier_path(file: RuleFile, text: str) -> str:
    """Return the path below the tiers' URLs that an argument names; "" is a whole tier.

    text: URL or local path in a tier; the name of a tier and a path below its URL ("hot/checkpoints/run7"); or a path
    below the tiers' URLs. A local path is absolute, or begins with "~/", "./" or "../". Raises ValueError if the URL or
    absolute path is in no tier.
    """
    location = ParsedUrl.parse(os.path.abspath(text) if text.startswith(_HERE) else text)  # noqa: PTH100 - keeps links
    if not location.scheme and not Path(location.path).is_absolute():
        return split_tier(file, text)[1]
    whole = _whole(location)
    for tier in file.tiers:
        root = _whole(ParsedUrl.parse(tier.url))
        if whole == root:
            return ""
        if whole.startswith(root.rstrip("/") + "/"):
            return whole.removeprefix(root.rstrip("/") + "/")
    known = ", ".join(ParsedUrl.parse(tier.url).shown for tier in file.tiers)
    raise ValueError(f"{location.shown}: not in any tier of {file.path}: {known}")


def split_tier(file: RuleFile, text: str) -> tuple[str | None, str]:
    """Return the tier that an argument names first, and the path below it: "hot/a/b" is ("hot", "a/b").

    (None, path) for an argument that begins with no tier's name.
    """
    name, _, rest = text.strip("/").partition("/")
    is_tier = "://" not in text and name in [tier.name for tier in file.tiers]
    return (name, rest) if is_tier and not text.startswith("/") else (None, text.strip("/"))


def _whole(location: ParsedUrl) -> str:
    return location.full.rstrip("/") if location.scheme else os.path.normpath(location.path)


def is_glob(text: str) -> bool:
    """Return whether an argument is a glob, in the syntax of rules."""
    return any(sign in text for sign in _SIGNS)


def base_folder(text: str) -> str:
    """Return the deepest folder that contains everything a path or glob matches; "" for all."""
    if not is_glob(text):
        return text
    first = min(text.index(sign) for sign in _SIGNS if sign in text)
    return text[:first].rpartition("/")[0]


def select_paths(paths: pa.Array, text: str) -> NDArray[np.bool_]:
    """Return which paths a glob, or a path with everything below it, selects; "" selects all. bool[n]."""
    if is_glob(text):
        return first_match(paths, [((text,), ())]) >= 0
    if not text:
        return np.ones(len(paths), np.bool_)
    hits = pc.or_(pc.equal(paths, text), pc.starts_with(paths, f"{text}/"))
    return np.asarray(hits.to_numpy(zero_copy_only=False), np.bool_)
