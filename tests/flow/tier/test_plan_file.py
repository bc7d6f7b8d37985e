"""The file of a plan: it is read back as it was written, and a file that was cut or changed is refused."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.tier.test_plan import OLD, TO_ARCHIVE, made

from tiercache.tier import plans as plans_module
from tiercache.tier.journal import PlannedObject
from tiercache.tier.listing import ObjectTable
from tiercache.tier.plans import (
    Move,
    MoveTable,
    Plan,
    PlannedTier,
    PlanTotals,
    Refusal,
    RefusalTable,
    TierTotals,
    read_plan,
    write_plan,
)
from tiercache.tier.snapshot import ACTIONS, DELETE, KINDS, MoveColumns

TIERS = ("hot", "standard", "archive")
RULES = ("cold", 'a "rule"', "é\n", "tiers.hot.capacity")
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(
    ['"', "\\", "\x7f", "\n", "é\u2028"]
)
keys = st.text('ab/.é\n "\u2028', min_size=1, max_size=6).filter(
    lambda key: all(part not in ("", ".", "..") for part in key.split("/"))
)
amounts = st.floats(-1e12, 1e12).map(lambda amount: round(amount, 9)) | st.sampled_from(
    [0.0, -0.0, 1e-9, 12345678901234567.0]
)
# group, action, src, dst, rule, reason, once, saving_month
rows = st.tuples(
    st.integers(0, 9),
    st.integers(0, 4),
    st.integers(0, 2),
    st.integers(0, 2),
    st.integers(-1, 2),
    texts,
    amounts,
    amounts,
).map(lambda row: (*row[:3], -1 if row[1] == DELETE else row[3], *row[4:]))
objects = st.builds(
    PlannedObject,
    keys,
    st.integers(0, 2**50),
    st.none() | texts,
    st.none() | amounts,
    st.none() | st.integers(0, 2**32 - 1),
    st.just(""),
    st.just(False),  # was_absent: only in the journal
)
totals = st.dictionaries(
    texts, st.builds(TierTotals, st.integers(0, 2**60), st.integers(0, 2**40), amounts), max_size=2
)
plans = st.builds(
    Plan,
    id=texts,
    made_s=st.integers(0, 4 * 10**12).map(lambda ms: ms / 1000),
    rules=texts,
    rules_sha256=texts,
    tiers=st.lists(
        st.builds(PlannedTier, texts, texts, st.none() | texts, texts), max_size=3, unique_by=lambda t: t.name
    ).map(tuple),
    moves=st.just(()),
    totals=st.builds(PlanTotals, st.integers(0, 2**60), amounts, amounts),
    before=totals,
    after=totals,
)


@st.composite
def written_plans(draw) -> tuple[Plan, Plan]:
    """A plan whose moves and refusals are columns, and the plan with the objects that they stand for."""
    paths = draw(st.lists(keys, min_size=1, max_size=5, unique=True))
    kind = draw(st.lists(st.integers(0, 2), min_size=len(paths), max_size=len(paths)))
    moved, refused = (draw(st.lists(rows, max_size=5)) for _ in range(2))
    copies = [
        [one._replace(key=f"{paths[row[0] % len(paths)]}/{one.key}") for one in draw(st.lists(objects, max_size=3))]
        for row in moved
    ]
    sizes = [draw(st.integers(0, 2**50)) for _ in refused]
    table = table_of(copies)
    of_groups = pa.array(paths, pa.large_string()), np.array(kind, np.uint8), TIERS
    moves = MoveTable(columns_of(moved, paths), RULES, table.bytes_of_copies(), *of_groups, table)
    refusals = RefusalTable(columns_of(refused, paths), RULES, np.array(sizes, np.int64), *of_groups)
    plan = replace(draw(plans), moves=moves, refusals=refusals)
    plain_moves = tuple(
        Move(number, *head_of(row, paths, kind), tuple(copy), *row[-2:])
        for number, (row, copy) in enumerate(zip(moved, copies, strict=True), start=1)
    )
    plain_refusals = tuple(Refusal(*head_of(row, paths, kind), size) for row, size in zip(refused, sizes, strict=True))
    return plan, replace(plan, moves=plain_moves, refusals=plain_refusals)


def columns_of(rows: list[tuple], paths: list[str]) -> MoveColumns:
    group, action, src, dst, rule, reason, once, saving = zip(*rows, strict=True) if rows else ((),) * 8
    reasons = np.empty(len(rows), np.object_)
    reasons[:] = reason
    found = MoveColumns.of(np.array(group, np.int64) % len(paths), action, src, dst, rule, reasons)
    return replace(found, once=np.array(once, np.float64), saving_month=np.array(saving, np.float64))


def head_of(row: tuple, paths: list[str], kind: list[int]) -> tuple:
    group, action, src, dst, rule, reason, *_ = row
    dst = None if dst < 0 else TIERS[dst]
    group %= len(paths)
    return paths[group], KINDS[kind[group]], ACTIONS[action], TIERS[src], dst, RULES[rule], reason


def table_of(copies: list[list[PlannedObject]]) -> ObjectTable:
    """In rows in reverse order, as those of an inventory may be."""
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


def lines_of(folder: Path, plan: Plan) -> list[dict]:
    write_plan(plan, folder / "plan.jsonl")
    return [json.loads(line) for line in (folder / "plan.jsonl").read_text().splitlines()]


@pytest.fixture(params=[1, 2, plans_module.ROWS_PER_PART])
def rows_per_part(request, monkeypatch):
    monkeypatch.setattr(plans_module, "ROWS_PER_PART", request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("plans")


@pytest.mark.usefixtures("rows_per_part")
def test_columns_create_the_objects_that_they_stand_for_and_are_read_back_as_they_were_written(folder):
    @given(written_plans())
    def check(drawn):
        in_columns, plain = drawn[0].moves, list(drawn[1].moves)
        assert [*in_columns] == plain
        assert [in_columns[i] for i in range(-len(plain), len(plain))] == plain * 2
        assert [in_columns[i] for i in np.arange(len(plain))] == plain
        assert in_columns[1:3] == tuple(plain[1:3])
        assert in_columns[::-2] == tuple(plain[::-2])
        assert tuple(drawn[0].refusals) == drawn[1].refusals
        write_plan(drawn[0], folder / "plan.jsonl")
        assert read_plan(folder / "plan.jsonl") == drawn[1]

    check()


def test_a_new_plan_replaces_the_old_file_and_leaves_no_other_file(tmp_path):
    path = tmp_path / "new" / "plan.jsonl"
    write_plan(made(OLD), path)
    write_plan(made(OLD, TO_ARCHIVE), path)
    assert len(read_plan(path).moves) == 1
    assert [one.name for one in path.parent.iterdir()] == ["plan.jsonl"]


def test_lines_have_the_keys_of_the_reference(tmp_path):
    header, move, refusal, end = lines_of(tmp_path, made(OLD, TO_ARCHIVE))
    text = (Path(__file__).parents[3] / "docs/reference/tiers.md").read_text()
    text = text[text.index("\n## Plans") : text.index("\n## Prices")]
    assert header["format"] == "tiercache-plan"
    nested = (header["tiers"][0], header["totals"], header["before"]["hot"])
    for row in (header, move, refusal, end, *nested):
        assert [key for key in row if f"`{key}`" not in text and key != "line"] == []


def stored(folder: Path) -> tuple[Path, bytes]:
    path = folder / "plan.jsonl"
    write_plan(made(OLD, TO_ARCHIVE), path)
    return path, path.read_bytes()


def test_a_truncated_plan_is_refused(tmp_path):
    path, data = stored(tmp_path)
    # Without its last line end it is whole all the same.
    ends = [n for n, sign in enumerate(data[:-1]) if sign == ord("\n")]
    for n in sorted({*range(0, len(data) - 1, 7), *ends, *(end + 1 for end in ends), len(data) - 2}):
        path.write_bytes(data[:n])
        with pytest.raises(ValueError, match="plan"):
            read_plan(path)


def test_a_plan_with_a_flipped_bit_is_refused(tmp_path):
    path, data = stored(tmp_path)
    for at in range(0, data.rindex(b'{"line": "end"'), 3):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(ValueError, match=r"plan\.jsonl"):
            read_plan(path)


@given(data=st.data())
def test_reading_any_file_gives_a_plan_or_a_value_error(folder, data):
    """Lines of a plan with values of other types, and the sum put right: what only a person would write."""
    lines = lines_of(folder, made(OLD, TO_ARCHIVE))
    row = data.draw(st.sampled_from(lines))
    key = data.draw(st.sampled_from(sorted(row)))
    row[key] = data.draw(
        st.sampled_from([None, True, 7, -1.5, "x", [], [1], {}, {"hot": 1}, [["../x", 1, None, None, None]]])
    )
    path = folder / "made_up.jsonl"
    path.write_text("".join(f"{line}\n" for line in summed(lines)))
    said = str(path)
    try:
        read_plan(path)
    except ValueError as error:
        said = str(error)
    assert str(path) in said


def summed(rows: list[dict]) -> list[str]:
    lines = [json.dumps(row) for row in rows]
    if isinstance(rows[-1].get("sha256"), str):
        sha256 = hashlib.sha256("".join(f"{line}\n" for line in lines[:-1]).encode()).hexdigest()
        lines[-1] = json.dumps({**rows[-1], "sha256": sha256})
    return lines


def test_a_plan_of_another_version_is_refused(tmp_path):
    path, data = stored(tmp_path)
    path.write_bytes(data.replace(b'"version": 1', b'"version": 2', 1))
    with pytest.raises(ValueError, match="expected a plan of version 1, got 2"):
        read_plan(path)
