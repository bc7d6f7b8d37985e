"""Snapshots for tests of the policy: groups and copies as small objects, converted to columns; decisions by row."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from tiercache.prices import FREE, Prices, RestorePrice
from tiercache.tier.policy import decide
from tiercache.tier.rules import RuleFile, Tier
from tiercache.tier.snapshot import ACTIONS, KINDS, NO_RUN, NO_STEP, READABLE, Decisions, Kind, MoveColumns, Snapshot

DAY_S = 86_400.0
NOW_S = 10_000 * DAY_S
TIERS = ("hot", "standard", "archive")
STANDARD = Prices("x:r:S", store_gb_month=0.02, put_1000=0.005, get_1000=0.0004, egress_gb=0.09)
COLD = Prices(
    "x:r:C",
    store_gb_month=0.004,
    put_1000=0.02,
    get_1000=0.01,
    transition_1000=0.02,
    retrieve_gb=0.03,
    egress_gb=0.09,
    min_days=90,
    min_bytes=100,
)
FROZEN = Prices(
    "x:r:F", store_gb_month=0.001, min_days=5, overhead_bytes=40, restore={"standard": RestorePrice(0.01, 0.05, 5)}
)
PRICES = (FREE, STANDARD, COLD)


@dataclass(frozen=True)
class Copy:
    """A copy. days: since its newest object was written; None: as for its group."""

    n_bytes: int = 1000
    n_objects: int = 1
    smallest_bytes: int | None = None
    days: float | None = None
    state: int = READABLE
    whole: bool = True
    verified: bool = True
    link: str = ""


@dataclass(frozen=True)
class Group:
    """A group. days: since it was written; unused_days: since its last use, None: it was never used."""

    path: str
    copies: Mapping[str, Copy]
    kind: Kind = "file"
    step: int = NO_STEP
    run: int = NO_RUN
    complete: bool = True
    days: float = 0.0
    unused_days: float | None = None
    unreported: bool = False
    counted_days: float | None = np.inf  # since uses are tracked; None: they are not
    in_use: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)
    unread: bool = False
    held: str = ""
    immovable: str = ""
    is_pinned: bool = False  # by its own pin.json


def checkpoint(run: int, step: int, copies: Mapping[str, Copy], **facts: object) -> Group:
    return Group(f"ckpt/r{run}/step-{step}", copies, "checkpoint", step, run, **facts)


def snapshot_of(groups: Sequence[Group], tiers: Sequence[str] = TIERS, now_s: float = NOW_S) -> Snapshot:
    rows = [
        (number, tiers.index(name), copy, group)
        for number, group in enumerate(groups)
        for name, copy in sorted(group.copies.items(), key=lambda item: tiers.index(item[0]))
    ]
    metrics = sorted({name for group in groups for name in group.metrics})

    def each(of, dtype):
        return np.array([of(group) for group in groups], dtype)

    def since(days):
        return each(lambda group: now_s - days(group) * DAY_S, np.float64)

    def copies(of, dtype):
        return np.array([of(copy) for _, _, copy, _ in rows], dtype)

    return Snapshot(
        now_s=now_s,
        tiers=tuple(tiers),
        classes=("",),
        paths=pa.array([group.path for group in groups], pa.string()),
        kind=each(lambda group: KINDS.index(group.kind), np.uint8),
        step=each(lambda group: group.step, np.int64),
        run=each(lambda group: group.run, np.int32),
        complete=each(lambda group: group.complete, np.bool_),
        created_s=since(lambda group: group.days),
        last_use_s=since(lambda group: group.days if group.unused_days is None else group.unused_days),
        uses_tracked_since_s=since(lambda group: -np.inf if group.counted_days is None else group.counted_days),
        unreported=each(lambda group: group.unreported, np.bool_),
        in_use=each(lambda group: group.in_use, np.bool_),
        metrics={name: np.array([group.metrics.get(name, np.nan) for group in groups]) for name in metrics},
        unread=each(lambda group: group.unread, np.bool_),
        group=np.array([number for number, *_ in rows], np.int32),
        tier=np.array([tier for _, tier, *_ in rows], np.int8),
        n_objects=copies(lambda copy: copy.n_objects, np.int32),
        n_bytes=copies(lambda copy: copy.n_bytes, np.int64),
        smallest_bytes=copies(
            lambda c: c.n_bytes // c.n_objects if c.smallest_bytes is None else c.smallest_bytes, np.int64
        ),
        modified_s=np.array(
            [now_s - (group.days if copy.days is None else copy.days) * DAY_S for _, _, copy, group in rows], np.float64
        ),
        storage_class=np.zeros(len(rows), np.int16),
        state=copies(lambda copy: copy.state, np.uint8),
        whole=copies(lambda copy: copy.whole, np.bool_),
        verified=copies(lambda copy: copy.verified, np.bool_),
        links={row: copy.link for row, (_, _, copy, _) in enumerate(rows) if copy.link},
        held={number: group.held for number, group in enumerate(groups) if group.held},
        immovable={number: group.immovable for number, group in enumerate(groups) if group.immovable},
        pinned=frozenset(number for number, group in enumerate(groups) if group.is_pinned),
    )


@dataclass(frozen=True)
class Decided:
    group: int
    action: str
    src: int
    dst: int | None
    rule: str
    reason: str
    cost: float
    saving_month: float


@dataclass(frozen=True)
class Outcome:
    moves: tuple[Decided, ...]
    refusals: tuple[Decided, ...]


def in_rows(found: Decisions) -> Outcome:
    return Outcome(*(tuple(_rows(columns, found.rules)) for columns in (found.moves, found.refusals)))


def _rows(columns: MoveColumns, rules: Sequence[str]) -> Iterator[Decided]:
    for i in range(len(columns)):
        action, dst, once, saving = (
            ACTIONS[columns.action[i]],
            int(columns.dst[i]),
            columns.once[i],
            columns.saving_month[i],
        )
        named = (int(columns.src[i]), None if dst < 0 else dst, rules[columns.rule[i]], columns.reason[i])
        yield Decided(int(columns.group[i]), action, *named, float(once), float(saving))


def decided(*args, **keys) -> Outcome:
    return in_rows(decide(*args, **keys))


def tier_file(rules: Sequence[object] = (), *, one_bucket: bool = False, **parts) -> RuleFile:
    """Three tiers. one_bucket: standard and archive are classes of one."""
    urls = {"hot": "/nvme/train", "standard": "s3://warm/train", "archive": "s3://cold/train"}
    if one_bucket:
        urls["archive"] = urls["standard"]
    tiers = [Tier(name=name, url=urls[name]) for name in TIERS]
    return RuleFile(path=Path("tiercache.toml"), sha256="5" * 64, tiers=tuple(tiers), rules=tuple(rules), **parts)
