"""A plan in columns is the plan in objects: each move, each line of its file, and the sums."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.tier import model
from tiercache.tier.costs import break_even_days
from tiercache.tier.inventory.listing import ObjectTable
from tiercache.tier.model import ACTIONS, KINDS, SHARD, Move, MoveColumns, MoveCost, Plan, PlannedObject, Refusal
from tiercache.tier.plan import tables
from tiercache.tier.plan.plan import plan_lines
from tiercache.tier.plan.tables import (
    MoveTable,
    RefusalTable,
    paths_of,
    total_moves,
    totals_by_route,
)

TIERS = ("hot", "standard", "archive")
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(
    ['"', "\\", "\x7f", "\n", "é\u2028"]
)
amounts = st.floats(-1e12, 1e12).map(lambda amount: round(amount, 9)) | st.sampled_from(
    [0.0, -0.0, 1e-9, 12345678901234567.0]
)
RULES = ("cold", 'a "rule"', "é\n", "tiers.hot.high")
# group, action, src, dst, rule, reason, once, saving_month
rows = st.tuples(
    st.integers(0, 9),
    st.integers(0, 4),
    st.integers(0, 2),
    st.integers(-1, 2),
    st.integers(-1, 2),
    texts,
    amounts,
    amounts,
)
objects = st.builds(
    PlannedObject,
    texts,
    st.integers(0, 2**50),
    st.none() | texts,
    st.none() | amounts,
    st.none() | st.integers(0, 2**32 - 1),
    st.just(""),
)


@st.composite
def plans(draw) -> tuple[MoveTable, list[Move], RefusalTable, list[Refusal]]:
    """Moves and refusals in columns, and the objects that they stand for."""
    paths = draw(st.lists(texts, min_size=1, max_size=5, unique=True))
    kind = draw(st.lists(st.integers(0, 2), min_size=len(paths), max_size=len(paths)))
    moved, refused = (draw(st.lists(rows, max_size=5)) for _ in range(2))
    copies = [draw(st.lists(objects, max_size=3)) for _ in moved]
    sizes = [draw(st.integers(0, 2**50)) for _ in refused]
    pieces = pieces_of(copies)
    of = (pa.array(paths, pa.large_string()), np.array(kind, np.uint8), TIERS)
    in_columns = MoveTable(columns_of(moved, paths), RULES, pieces.bytes_of_copies(), *of, pieces, rate_bytes_s=2e8)
    plain = [
        Move(number, **words(row, paths, kind), objects=tuple(copy), money=cost_of(*row[-2:]))
        for number, (row, copy) in enumerate(zip(moved, copies, strict=True), start=1)
    ]
    refusals = [Refusal(**words(row, paths, kind), n_bytes=size) for row, size in zip(refused, sizes, strict=True)]
    return in_columns, plain, RefusalTable(columns_of(refused, paths), RULES, np.array(sizes, np.int64), *of), refusals


def columns_of(rows: list[tuple], paths: list[str]) -> MoveColumns:
    group, action, src, dst, rule, reason, once, saving = zip(*rows, strict=True) if rows else ((),) * 8
    reasons = np.empty(len(rows), np.object_)
    reasons[:] = reason
    found = MoveColumns.of(np.array(group, np.int64) % len(paths), action, src, dst, rule, reasons)
    return replace(found, once=np.array(once, np.float64), saving_month=np.array(saving, np.float64))


def cost_of(once: float, saving: float) -> MoveCost:
    if not once and not saving:
        return MoveCost(break_even_days=0.0)
    days = float(break_even_days(np.array([once]), np.array([saving]))[0])
    return MoveCost(once, saving, None if days == np.inf else days)


def words(row: tuple, paths: list[str], kind: list[int]) -> dict:
    group, action, src, dst, rule, reason, *_ = row
    dst = None if dst < 0 else TIERS[dst]
    found = {"path": paths[group % len(paths)], "kind": KINDS[kind[group % len(paths)]], "action": ACTIONS[action]}
    return found | {"src": TIERS[src], "dst": dst, "rule": RULES[rule], "reason": reason}


def pieces_of(copies: list[list[PlannedObject]]) -> ObjectTable:
    """In rows that stand the wrong way round, as those of an inventory may."""
    flat = [one for copy in copies for one in copy][::-1]
    return ObjectTable(
        start=np.cumsum([0, *map(len, copies)]),
        row=np.arange(len(flat))[::-1].copy(),
        crc32c=np.array([-1 if one.crc32c is None else one.crc32c for one in flat[::-1]], np.int64),
        keys=pa.array([one.key for one in flat], pa.large_string()),
        etags=pa.array([one.etag for one in flat], pa.large_string()),
        n_bytes=np.array([one.n_bytes for one in flat], np.int64),
        modified_s=np.array([np.nan if one.modified_s is None else one.modified_s for one in flat], np.float64),
    )


@pytest.fixture(params=[1, 2, model.AT_A_TIME])
def at_a_time(request, monkeypatch):
    """How many rows are made at a time."""
    monkeypatch.setattr(model, "AT_A_TIME", request.param)
    monkeypatch.setattr(tables, "AT_A_TIME", request.param)


def timed(plain: list[Move], in_columns: MoveTable) -> list[Move]:
    """The same, with the seconds that are a guess of the columns."""
    return [
        replace(one, seconds=seconds) for one, seconds in zip(plain, in_columns.seconds(0, len(plain)), strict=True)
    ]


@pytest.mark.usefixtures("at_a_time")
def test_columns_are_equal_to_the_objects_that_they_stand_for():
    @given(plans())
    def check(drawn):
        in_columns, plain, refusals, plain_refusals = drawn
        plain = timed(plain, in_columns)
        assert in_columns == tuple(plain)
        assert [*in_columns] == plain
        assert [in_columns[i] for i in range(-len(plain), len(plain))] == plain * 2
        assert [in_columns[i] for i in np.arange(len(plain))] == plain
        assert in_columns[1:3] == tuple(plain[1:3])
        assert in_columns[::-2] == tuple(plain[::-2])
        assert refusals == tuple(plain_refusals)

    check()


@pytest.mark.usefixtures("at_a_time")
def test_lines_of_columns_say_what_lines_of_objects_say():
    @given(plans())
    def check(drawn):
        in_columns, plain, refusals, plain_refusals = drawn
        fast = Plan("id", 1.0, "r", "5" * 64, (), in_columns, refusals)
        slow = replace(fast, moves=timed(plain, in_columns), refusals=plain_refusals)
        found, wanted = ([json.loads(line) for line in plan_lines(plan)] for plan in (fast, slow))
        assert [line | {"sha256": ""} for line in found] == [line | {"sha256": ""} for line in wanted]

    check()


@given(plans())
def test_sums_and_paths_of_columns_are_those_of_the_objects(drawn):
    in_columns, plain, *_ = drawn
    assert total_moves(in_columns) == total_moves(plain)
    assert paths_of(in_columns, SHARD).to_pylist() == [one.path for one in plain if one.kind == "shard"]
    found, wanted = totals_by_route(in_columns), totals_by_route(plain)
    assert [(way, n, of.n_bytes) for way, (n, of) in found.items()] == [
        (w, n, of.n_bytes) for w, (n, of) in wanted.items()
    ]
    for way, (_, of) in wanted.items():
        assert found[way][1][1:] == pytest.approx(of[1:], rel=1e-9, abs=1e-3)


def test_a_rule_that_is_called_as_a_watermark_is_summed_with_it():
    columns = columns_of([(0, 3, 0, 1, rule, "why", 0.0, 0.0) for rule in (0, -1, 0)], ["x"])
    assert [n for n, _ in totals_by_route(table_of(columns, ["tiers.hot.high"] * 2)).values()] == [3]


def table_of(columns: MoveColumns, rules: list[str]) -> MoveTable:
    pieces = pieces_of([[]] * len(columns))
    of = (pa.array(["x"], pa.large_string()), np.zeros(1, np.uint8), TIERS)
    return MoveTable(columns, rules, pieces.bytes_of_copies(), *of, pieces, rate_bytes_s=1.0)


@given(plans(), plans())
def test_what_moves_other_objects_has_another_digest(one, other):
    def content(plain: list[Move]) -> list:
        return [
            (move.path, move.action, move.src, move.dst, [(o.key, o.n_bytes, o.etag) for o in move.objects])
            for move in plain
        ]

    assert (one[0].digest() == other[0].digest()) == (content(one[1]) == content(other[1]))


def test_a_figure_that_json_has_not_is_refused_as_it_is_of_objects():
    one = table_of(columns_of([(0, 3, 0, 1, 0, "why", float("inf"), 1.0)], ["x"]), ["r"])
    with pytest.raises(ValueError, match="JSON"):
        list(plan_lines(Plan("id", 1.0, "r", "5" * 64, (), one)))
