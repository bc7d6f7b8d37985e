"""What the policy should decide, one group after the other and in plain Python: it shares no code with the library.

For tiers without capacities, where no group depends on how full a tier is. It follows docs/reference/tiers.md.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from tests.support.tier_snapshots import DAY_S, NOW_S, TIERS, Copy, Group

HERE, ARCHIVED, RESTORING, RESTORED = range(4)
PART = 8 << 20


def kept_plainly(groups: list[Group], rows: list[int], keep: Any) -> set[int]:
    """Rows that a keep list names: every run is walked."""
    named = set()
    for run in {groups[row].run for row in rows}:
        mine = [row for row in rows if groups[row].run == run]
        if keep.younger_s is not None:
            named |= {row for row in mine if groups[row].days * DAY_S <= keep.younger_s}
        named |= _of_series(groups, [row for row in mine if groups[row].complete], keep)
    return named


def _of_series(groups: list[Group], rows: list[int], keep: Any) -> set[int]:
    by_step = sorted(rows, key=lambda row: (groups[row].step, -groups[row].days, row))
    written = sorted(rows, key=lambda row: (-groups[row].days, groups[row].step, row))
    named = set(written[-keep.last :]) if keep.last else set()
    if keep.every_steps:
        parts, before = [[]], -1
        for row in (row for row in written if groups[row].step >= 0):
            if groups[row].step < before:
                parts.append([])
            before = groups[row].step
            parts[-1].append(row)
        for part in parts:
            highest = max((groups[row].step for row in part), default=0)
            for multiple in range(keep.every_steps, highest + 1, keep.every_steps):
                named |= set([row for row in part if groups[row].step >= multiple][:1])
    if keep.every_s:
        by_time = sorted(rows, key=lambda row: (-groups[row].days, row))
        start = end = None
        for row in by_time:
            at = -groups[row].days * DAY_S
            start = at if start is None else start
            if end is None or at >= end:
                named.add(row)
                end = start
                while end <= at:
                    end += keep.every_s
    for best in keep.best:
        having = [row for row in by_step if _has(groups[row], best.metric)]
        having.reverse()
        having.sort(key=lambda row: groups[row].metrics[best.metric], reverse=best.mode == "max")
        # A reversed sort keeps the order of equal ones as well.
        named |= set(having[: best.n])
    return named


def unscored_plainly(groups: list[Group], rows: list[int], keep: Any) -> set[int]:
    """Rows that a keep list keeps because nobody can say whether they are among the best."""
    found = set()
    for run in {groups[row].run for row in rows}:
        mine = [row for row in rows if groups[row].run == run and groups[row].complete]
        for best in keep.best:
            lacking = {row for row in mine if not _has(groups[row], best.metric)}
            found |= lacking if len(lacking) == len(mine) else {row for row in lacking if groups[row].unread}
    return found


def _has(group: Group, metric: str) -> bool:
    return not math.isnan(group.metrics.get(metric, math.nan))


@dataclass
class Expected:
    action: str
    src: str
    dst: str | None
    refused: bool = False


class PlannerOracle:
    def __init__(self, file: Any, prices: Any, groups: list[Group], unseen: Collection[str] = ()) -> None:
        """unseen: names of tiers whose disks may not be mounted."""
        self.file, self.groups, self.unseen = file, groups, unseen
        self.prices = dict(zip(TIERS, prices, strict=True))
        self.urls = {tier.name: tier.url for tier in file.tiers}
        self.newest = self._newest()

    def _newest(self) -> set[int]:
        found = set()
        for run in {group.run for group in self.groups}:
            rows = [
                row
                for row, group in enumerate(self.groups)
                if group.kind == "checkpoint" and group.complete and group.run == run
            ]
            if rows:
                found.add(max(rows, key=lambda row: (-self.groups[row].days, self.groups[row].step, row)))
                found.add(max(rows, key=lambda row: (self.groups[row].step, -self.groups[row].days, row)))
        return found

    def rule_of(self, group: Group) -> Any:
        for rule in self.file.rules:
            folder = rule.match[0].removesuffix("**")
            if group.path.startswith(folder):
                return rule
        return None

    def decide(self, row: int) -> Expected | None:
        group = self.groups[row]
        rule = self.rule_of(group)
        if rule is None:
            return None
        if rule.keep and (group.kind != "checkpoint" or row in self.newest):
            return None
        named = {name: row in self.kept(rule, keep) for name, keep in rule.keep.items()}
        by_keys = any(row in self._named(rule, keep, kept_plainly) for keep in rule.keep.values())
        refused = None
        is_old = rule.delete_after_s is not None and group.days * DAY_S >= rule.delete_after_s
        if is_old and any(named.values()) and not by_keys:
            refused = Expected("delete", self._first(group), None, refused=True)
        if is_old and not any(named.values()):
            found = self._checked(row, Expected("delete", self._first(group), None))
            if not found.refused or row not in self.newest:
                return found
            refused = found
        wish = self._by_keep(row, rule, named) if rule.keep else self._by_to(row, rule)
        return refused if wish is None else self._checked(row, wish)

    def kept(self, rule: Any, keep: Any) -> set[int]:
        return self._named(rule, keep, kept_plainly) | self._named(rule, keep, unscored_plainly)

    def _named(self, rule: Any, keep: Any, by: Any) -> set[int]:
        rows = [i for i, g in enumerate(self.groups) if g.kind == "checkpoint" and self.rule_of(g) is rule]
        return by(self.groups, rows, keep)

    @staticmethod
    def _first(group: Group) -> str:
        return next(name for name in TIERS if name in group.copies)

    # -- wishes -----------------------------------------------------------------------------------------------------

    def _by_to(self, row: int, rule: Any) -> Expected | None:
        group = self.groups[row]
        if rule.to is None:
            return None
        unused = min(group.days, group.days if group.unused_days is None else group.unused_days)
        if group.counted_days is not None:
            unused = min(unused, group.counted_days)
        if rule.after_s is not None and group.days * DAY_S < rule.after_s:
            return None
        if rule.idle_s is not None and unused * DAY_S < rule.idle_s:
            return None
        sources = [name for name in TIERS[: TIERS.index(rule.to)] if name in group.copies]
        if not sources:
            return None
        wish = self._sent(row, sources, rule.to)
        if (rule.idle_s or 0) > 0 and (group.unreported or group.counted_days is None):
            wish.refused = True
        return wish

    def _by_keep(self, row: int, rule: Any, named: dict[str, bool]) -> Expected | None:
        group = self.groups[row]
        if rule.then is not None and not any(named.values()) and group.days * DAY_S >= (rule.after_s or 0):
            sources = [name for name in TIERS[: TIERS.index(rule.then)] if name in group.copies]
            return self._sent(row, sources, rule.then) if sources else None
        keepers = [name for name in TIERS if name in rule.keep]
        for name in keepers:
            if named[name] or name not in group.copies:
                continue
            if (name == keepers[-1] and rule.then is not None) or name == TIERS[-1]:
                continue
            lower = TIERS[TIERS.index(name) + 1 :]
            if named.get(lower[0], False) or self._may_drop(group, name, lower[0]):
                return self._sent(row, [name], lower[0])
            has_it = [other for other in lower if self._may_drop(group, name, other)]
            return self._sent(row, [name], has_it[0] if has_it else lower[0])
        return None

    def _may_drop(self, group: Group, src: str, dst: str) -> bool:
        a, b = group.copies.get(src), group.copies.get(dst)
        if a is None or b is None or not (a.whole and b.whole and b.verified):
            return False
        written = [group.days if copy.days is None else copy.days for copy in (a, b)]
        return group.kind == "shard" or a.verified or written[0] >= written[1]

    def _sent(self, row: int, sources: list[str], dst: str) -> Expected:
        group = self.groups[row]
        for src in sources:
            if self._may_drop(group, src, dst):
                return Expected("drop", src, dst)
        readable = [s for s in sources if group.copies[s].whole and group.copies[s].state in (HERE, RESTORED)]
        if not readable:
            return Expected("move", sources[0], dst, refused=True)
        src = min(readable, key=lambda name: (self._way(group.copies[name], name, dst), TIERS.index(name)))
        return Expected("reclass" if self.urls[src] == self.urls[dst] else "move", src, dst)

    # -- refusals ---------------------------------------------------------------------------------------------------

    def _checked(self, row: int, wish: Expected) -> Expected:
        wish.refused = wish.refused or self._is_refused(row, wish)
        return wish

    def _is_refused(self, row: int, wish: Expected) -> bool:
        group = self.groups[row]
        held = group.in_use or (group.kind == "checkpoint" and not group.complete)
        if held or self.is_pinned(group):
            return True
        if (wish.action == "delete" and len(self.unseen) > 0) or wish.dst in self.unseen:
            return True
        if row in self.newest:
            if wish.action in ("delete", "reclass"):
                return True
            others = [
                c for n, c in group.copies.items() if n != wish.src and c.whole and c.verified and c.state == HERE
            ]
            if wish.action == "drop" and not others:
                return True
            if wish.action == "move":
                wish.action = "copy"
        return self._is_dear(group, wish)

    def is_pinned(self, group: Group) -> bool:
        pins = [pin for pin in self.file.pins if pin.until_s is None or pin.until_s > NOW_S]
        return any(group.path.startswith(pin.match[0].removesuffix("**")) for pin in pins)

    def _is_dear(self, group: Group, wish: Expected) -> bool:
        rule, copy = self.rule_of(group), group.copies[wish.src]
        if wish.action not in ("move", "reclass"):
            return False
        if self.prices[wish.src].store_gb_month == 0:
            return False
        saving = self._month(wish.src, copy) - self._month(wish.dst, copy)
        once = self._fee(group, wish.src, copy) + self._way(copy, wish.src, wish.dst)
        limit_s = 365 * DAY_S
        is_deleted = rule.delete_after_s is not None and self.groups.index(group) not in self.newest
        if is_deleted:
            stays_s = max(rule.delete_after_s - group.days * DAY_S, 0)
            missing_days = max(self.prices[wish.dst].min_days - stays_s / DAY_S, 0)
            once += self._month(wish.dst, copy) * missing_days / 30
            limit_s = min(limit_s, stays_s)
        if saving == once == 0:
            return limit_s < 0
        return saving <= 0 or once / saving * 30 * DAY_S > limit_s

    def _month(self, name: str, copy: Copy) -> float:
        price = self.prices[name]
        smallest = copy.n_bytes // copy.n_objects if copy.smallest_bytes is None else copy.smallest_bytes
        padded = max(copy.n_bytes + max(price.min_bytes - smallest, 0), copy.n_objects * price.min_bytes)
        return (padded + copy.n_objects * price.overhead_bytes) / 2**30 * price.store_gb_month

    def _fee(self, group: Group, name: str, copy: Copy) -> float:
        days = group.days if copy.days is None else copy.days
        return self._month(name, copy) * max(self.prices[name].min_days - days, 0) / 30

    def _way(self, copy: Copy, src: str, dst: str) -> float:
        a, b = self.prices[src], self.prices[dst]
        gigabytes = copy.n_bytes / 2**30
        if self.urls[src] == self.urls[dst]:
            return copy.n_objects * b.transition_1000 / 1000 + gigabytes * a.retrieve_gb
        both_remote = "hot" not in (src, dst)
        egress = 0.0 if both_remote or a.name == "free" else a.egress_gb
        n_more = 0 if both_remote else max(copy.n_bytes - 1, 0) // PART
        begins = min(n_more, copy.n_objects)
        reads = copy.n_objects + n_more
        writes = copy.n_objects if not n_more else copy.n_objects + n_more + 2 * begins
        return (reads * a.get_1000 + writes * b.put_1000) / 1000 + gigabytes * (a.retrieve_gb + egress)
