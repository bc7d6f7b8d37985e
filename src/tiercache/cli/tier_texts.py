"""Formatting of dollars, durations and tier contents for the tier verbs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tiercache.cli.output import Output
from tiercache.model import format_bytes
from tiercache.tier.model import TierTotals

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


def print_holdings(
    output: Output, tiers: Sequence[str], before: Mapping[str, TierTotals], after: Mapping[str, TierTotals]
) -> None:
    """Print a row for each tier with what it holds before and after."""
    rows: list[dict[str, Any]] = []
    texts: list[dict[str, str]] = []
    for name in tiers:
        old, new = before.get(name, TierTotals()), after.get(name, TierTotals())
        rows.append({"tier": name, "before": _holding_facts(old), "after": _holding_facts(new)})
        texts.append(
            {
                "tier": name,
                "objects": f"{old.n_objects:,}",
                "bytes": format_bytes(old.n_bytes),
                "$/month": format_dollars(old.dollars_month),
                "objects then": f"{new.n_objects:,}",
                "bytes then": format_bytes(new.n_bytes),
                "$/month then": format_dollars(new.dollars_month),
            }
        )
    output.table("tier", rows, texts)


def _holding_facts(holding: TierTotals) -> dict[str, Any]:
    return {
        "n_bytes": holding.n_bytes,
        "n_objects": holding.n_objects,
        "dollars_month": round(holding.dollars_month, 6),
    }
