"""Plans and their file: what was decided comes back as it was, and what was cut or changed is not taken for a plan."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tier.snapshots import DAY_S, NOW_S, PRICES, TIERS, Copy, Group, in_rows, snapshot_of, tier_file
from tests.tier.test_policy_property import FEWER, applied, bytes_in, capacities, files, fitting, worlds

from tiercache.model import ObjectInfo
from tiercache.tier.inventory.listing import ObjectTable
from tiercache.tier.model import Move, MoveCost, Plan, PlannedObject, PlannedTier, Refusal, Snapshot, TierTotals
from tiercache.tier.plan.plan import holdings, make_plan, plan_lines, read_plan, write_plan
from tiercache.tier.plan.policy import decide
from tiercache.tier.rules import Rule, TieringOptions


@dataclass
class Stock:
    """An inventory of made-up objects: each group's copy is so many of equal size, the last one a little larger."""

    groups: Sequence[Group]
    snapshot: Snapshot

    def pieces(self, groups, tiers) -> ObjectTable:
        copies = [self.objects(group, tier) for group, tier in zip(groups.tolist(), tiers.tolist(), strict=True)]
        flat = [one for copy in copies for one in copy]
        return ObjectTable(
            start=np.cumsum([0, *map(len, copies)]),
            row=np.arange(len(flat)),
            crc32c=np.array([one.crc32c for one in flat], np.int64),
            keys=pa.array([one.key for one in flat], pa.large_string()),
            etags=pa.array([one.etag for one in flat], pa.large_string()),
            n_bytes=np.array([one.n_bytes for one in flat], np.int64),
            modified_s=np.array([one.modified_s for one in flat], np.float64),
        )

    def objects(self, group: int, tier: int) -> tuple[ObjectInfo, ...]:
        one = self.groups[group]
        copy = one.copies[TIERS[tier]]
        each = copy.n_bytes // copy.n_objects
        sizes = [each] * (copy.n_objects - 1) + [copy.n_bytes - each * (copy.n_objects - 1)]
        return tuple(
            ObjectInfo(f"{one.path}/{i}", size, etag=f'"{i}"', crc32c=i, modified_s=NOW_S - DAY_S)
            for i, size in enumerate(sizes)
        )


def made(groups: Sequence[Group], *rules: Rule, **keys) -> Plan:
    file, snapshot = tier_file(rules, **keys), snapshot_of(groups)
    decisions = decide(snapshot, file, PRICES, capacity_bytes=(None, None, None))
    return make_plan(decisions, Stock(groups, snapshot), file, PRICES)


TO_ARCHIVE = Rule(name="cold", match=("**",), to="archive", idle_s=30 * DAY_S)
OLD = [
    Group("data/x", {"standard": Copy(10**9, 2, days=100)}, days=100.0),
    Group("data/y", {"standard": Copy(60, days=100)}, days=100.0),
    Group("data/z", {"hot": Copy(1000)}),
]


# -- making ----------------------------------------------------------------------------------------------------------


def test_a_move_has_names_objects_and_figures():
    (move,) = made(OLD, TO_ARCHIVE).moves
    assert (move.number, move.path, move.kind, move.action) == (1, "data/x", "file", "move")
    assert (move.src, move.dst, move.rule) == ("standard", "archive", "cold")
    half = 500_000_000
    assert move.objects == tuple(PlannedObject(f"data/x/{i}", half, f'"{i}"', NOW_S - DAY_S, i) for i in range(2))
    assert move.n_bytes == 10**9
    assert move.seconds > 0


def test_a_refusal_has_names_and_bytes():
    (refusal,) = made(OLD, TO_ARCHIVE).refusals
    assert (refusal.path, refusal.src, refusal.dst, refusal.n_bytes) == ("data/y", "standard", "archive", 60)


def test_a_plan_says_for_which_tiers_rules_and_prices_it_was_made():
    plan = made(OLD, TO_ARCHIVE)
    assert plan.rules_sha256 == "5" * 64
    assert plan.tiers[1] == PlannedTier("standard", "standard", "s3://warm/train", None, "x:r:S")
    assert plan.made_s == NOW_S


def test_the_id_is_that_of_the_contents():
    assert made(OLD, TO_ARCHIVE).id == made(OLD, TO_ARCHIVE).id
    assert made(OLD, TO_ARCHIVE).id != made(OLD[:1], TO_ARCHIVE.model_copy(update={"to": "hot"})).id


def test_a_slow_rate_makes_a_move_longer():
    (fast,), (slow,) = (
        made(OLD, TO_ARCHIVE, tiering=TieringOptions(rate_bytes_s=rate)).moves for rate in (None, 10**6)
    )
    assert slow.seconds > 1000 > fast.seconds


@FEWER
@given(worlds(), files(), capacities)
def test_bytes_and_objects_before_and_after_are_those_of_the_groups(groups, file, limits):
    groups = fitting(file, groups)
    snapshot = snapshot_of(groups)
    decisions = decide(snapshot, file, PRICES, capacity_bytes=limits)
    before, after = holdings(snapshot, PRICES), holdings(snapshot, PRICES, decisions)
    left = [one for one in applied(groups, in_rows(decisions), PRICES) if one is not None]
    for tier, name in enumerate(TIERS):
        assert before[name].n_bytes == bytes_in(groups, tier)
        assert after[name].n_bytes == bytes_in(left, tier)
        assert after[name].n_objects == sum(one.copies[name].n_objects for one in left if name in one.copies)


@FEWER
@given(worlds(), files())
def test_dollars_a_month_fall_by_what_moves_save(groups, file):
    groups = fitting(file, groups)
    # A copy that is written over is paid for before as well: leave the cases where there is one out.
    groups = [replace(one, copies=dict(list(one.copies.items())[:1])) for one in groups]
    snapshot = snapshot_of(groups)
    decisions = decide(snapshot, file, PRICES, capacity_bytes=(None, None, None))
    before, after = (
        sum(one.dollars_month for one in held.values())
        for held in (holdings(snapshot, PRICES), holdings(snapshot, PRICES, decisions))
    )
    assert before - after == pytest.approx(decisions.moves.saving_month.sum(), abs=1e-9)


# -- the file --------------------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
keys = st.text("ab/.é\n ", min_size=1, max_size=6).filter(
    lambda key: all(part not in ("", ".", "..") for part in key.split("/"))
)
amounts = st.floats(-1e9, 1e9)
objects = st.builds(
    PlannedObject,
    keys,
    st.integers(0, 2**50),
    st.none() | texts,
    st.none() | st.floats(0, 4e9),
    st.none() | st.integers(0, 2**32 - 1),
    st.just(""),
)
ways = {
    "path": keys,
    "kind": st.sampled_from(["file", "shard", "checkpoint"]),
    "src": texts,
    "rule": texts,
    "reason": texts,
}
money = st.builds(MoveCost, amounts, amounts, st.none() | amounts)


def with_way(one):
    """A delete has no dst, all else has one."""
    return replace(one, dst=None if one.action == "delete" else one.dst or "")


def below_path(move):
    """Its objects are the group, or in it."""
    return replace(move, objects=tuple(one._replace(key=f"{move.path}/{one.key}") for one in move.objects))


actions = st.sampled_from(["copy", "move", "drop", "reclass", "delete"])
moves = st.builds(
    Move,
    number=st.integers(1, 10**6),
    action=actions,
    dst=texts,
    objects=st.lists(objects, max_size=3).map(tuple),
    money=money,
    seconds=st.floats(0, 1e9),
    **ways,
).map(lambda move: with_way(below_path(move)))
refusals = st.builds(Refusal, action=actions, dst=texts, n_bytes=st.integers(0, 2**50), **ways).map(with_way)
held = st.dictionaries(texts, st.builds(TierTotals, st.integers(0, 2**60), st.integers(0, 2**40), amounts), max_size=2)
plans = st.builds(
    Plan,
    id=texts,
    made_s=st.integers(0, 4 * 10**12).map(lambda ms: ms / 1000),
    rules=texts,
    rules_sha256=texts,
    tiers=st.lists(
        st.builds(PlannedTier, texts, texts, texts, st.none() | texts, texts), max_size=3, unique_by=lambda t: t.name
    ).map(tuple),
    moves=st.lists(moves, max_size=4, unique_by=lambda move: move.number).map(tuple),
    refusals=st.lists(refusals, max_size=3).map(tuple),
    before=held,
    after=held,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("plans")


@given(plan=plans)
def test_a_plan_comes_back_as_it_was_written(folder, plan):
    write_plan(plan, folder / "plan.jsonl")
    assert read_plan(folder / "plan.jsonl") == plan


def test_a_plan_is_written_in_place_of_an_older_one_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "plan.jsonl"
    write_plan(made(OLD), path)
    write_plan(made(OLD, TO_ARCHIVE), path)
    assert len(read_plan(path).moves) == 1
    assert [one.name for one in path.parent.iterdir()] == ["plan.jsonl"]


def test_its_lines_are_those_of_the_reference(tmp_path):
    header, move, refusal, summary = map(json.loads, plan_lines(made(OLD, TO_ARCHIVE)))
    assert header["format"] == "tiercache-plan"
    assert header["made"] == "1997-05-19T00:00:00.000+00:00"
    assert set(header["tiers"]["hot"]) == {"url", "role", "storage_class", "prices"}
    assert set(move) == {
        *("line", "id", "path", "kind", "action", "src", "dst", "rule", "reason", "n_objects", "n_bytes"),
        *("cost", "saving_month", "break_even_days", "seconds", "objects"),
    }
    assert set(refusal) == {"line", "path", "kind", "action", "src", "dst", "rule", "reason", "n_bytes"}
    assert set(summary) == {"line", "before", "after", "n_moves", "n_bytes", "cost", "saving_month", "sha256"}
    assert set(summary["before"]["hot"]) == {"n_bytes", "n_objects", "dollars_month"}


def stored(folder: Path) -> tuple[Path, bytes]:
    path = folder / "plan.jsonl"
    write_plan(made(OLD, TO_ARCHIVE), path)
    return path, path.read_bytes()


def test_a_plan_that_was_cut_anywhere_is_refused(tmp_path):
    path, data = stored(tmp_path)
    # Without its last line end it is whole all the same.
    ends = [n for n, sign in enumerate(data[:-1]) if sign == ord("\n")]
    for n in sorted({*range(0, len(data) - 1, 7), *ends, *(end + 1 for end in ends), len(data) - 2}):
        path.write_bytes(data[:n])
        with pytest.raises(ValueError, match="plan"):
            read_plan(path)


def test_a_plan_with_a_bit_turned_anywhere_before_its_summary_is_refused(tmp_path):
    path, data = stored(tmp_path)
    for at in range(data.rindex(b'{"line": "summary"')):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(ValueError, match=r"plan\.jsonl"):
            read_plan(path)


@given(data=st.data())
def test_whatever_a_file_holds_it_is_a_plan_or_a_value_error(folder, data):
    """Lines of a plan with values of other types, and the sum put right: what only a person would write."""
    lines = [json.loads(line) for line in plan_lines(made(OLD, TO_ARCHIVE))]
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


def test_a_plan_of_another_version_says_so(tmp_path):
    path, data = stored(tmp_path)
    path.write_bytes(data.replace(b'"version": 1', b'"version": 2', 1))
    with pytest.raises(ValueError, match="expected a plan of version 1, got 2"):
        read_plan(path)


def test_another_file_is_no_plan(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"benchmark": "load"}\n')
    with pytest.raises(ValueError, match="this is not a plan"):
        read_plan(path)


def test_lines_after_the_summary_are_refused(tmp_path):
    path, data = stored(tmp_path)
    path.write_bytes(data + data.splitlines(keepends=True)[1])
    with pytest.raises(ValueError, match="summary to be the last line"):
        read_plan(path)


def test_a_key_that_leaves_its_tier_is_refused(tmp_path):
    path = tmp_path / "plan.jsonl"
    lines = [json.loads(line) for line in plan_lines(made(OLD, TO_ARCHIVE))]
    lines[1]["objects"][0][0] = "../other/x"
    path.write_text("".join(f"{line}\n" for line in summed(lines)))
    with pytest.raises(ValueError, match="not a valid key"):
        read_plan(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"path": "../x"}, "line 2: path: not a valid key"),
        ({"path": "data/\udcff"}, "line 2: path: .*surrogates not allowed"),
        ({"path": "data/_tiercache/versions"}, "line 2: path: .* belongs to tiercache"),
        ({"path": "data"}, ""),
        ({"path": "other"}, "line 2: objects: expected other or a key below it, got data/x/0"),
        ({"id": 10**30}, "line 2: id: expected an integer from 0 to"),
        ({"id": -1}, "line 2: id: expected an integer from 0 to"),
    ],
)
def test_a_move_that_no_planner_writes_is_refused(tmp_path, change, said):
    path = tmp_path / "plan.jsonl"
    lines = [json.loads(line) for line in plan_lines(made(OLD, TO_ARCHIVE))]
    lines[1] |= change
    path.write_text("".join(f"{line}\n" for line in summed(lines)))
    if said:
        with pytest.raises(ValueError, match=said):
            read_plan(path)
    else:
        assert read_plan(path).moves[0].path == change["path"]


def test_what_is_nested_without_end_is_refused(tmp_path):
    path = tmp_path / "plan.jsonl"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="expected a JSON object"):
        read_plan(path)
