"""Tables, lines and values."""

import json

import numpy as np
import pytest
from tests.support.clock import FakeClock

from tiercache.cli import common
from tiercache.cli.common import Output, aligned
from tiercache.cli.data import format_value, json_value
from tiercache.cli.tier import format_dollars, plan_text
from tiercache.shard.schema import Column, Image, Ragged, Tensor
from tiercache.tier.plans import Plan, PlanTotals


def test_table_columns_are_aligned_and_numbers_right_aligned():
    rows = [["name", "size"], ["a", "1.0 KiB"], ["longer", "12 B"]]
    assert aligned(rows) == ["name       size", "a       1.0 KiB", "longer     12 B"]
    assert aligned([["only", "head"]]) == ["only  head"]


def test_control_characters_in_file_names_are_escaped_in_tables(capsys):
    Output().table("x", [], [{"path": "a\nb\x1b[2J\u202egpj.\udcff", "n": "1"}, {"path": "é 🎉", "n": "2"}])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["path", r"a\nb\x1b[2J\u202egpj.\udcff", "é 🎉"]


def test_a_line_break_in_a_name_is_escaped_in_an_event(capsys):
    output = Output()
    output.event("finding", {}, "set/a\nb.tcs: file: it is missing")
    output.summary({}, "checked set/a\nb.tcs")
    assert capsys.readouterr().out.splitlines() == [r"set/a\nb.tcs: file: it is missing", r"checked set/a\nb.tcs"]


def test_json_is_one_object_per_line_and_quiet_hides_only_the_summary_for_people(capsys):
    Output(as_json=True, quiet=True).table("x", [{"a": 1}, {"a": 2}], [{"A": "1"}, {"A": "2"}])
    Output(as_json=True, quiet=True).summary({"n": 2}, "two")
    lines = capsys.readouterr().out.splitlines()
    assert list(map(json.loads, lines)) == [
        {"event": "x", "a": 1},
        {"event": "x", "a": 2},
        {"event": "summary", "n": 2},
    ]
    Output(quiet=True).table("x", [{"a": 1}], [{"A": "1"}])
    Output(quiet=True).summary({"n": 2}, "two")
    assert capsys.readouterr().out == "A\n1\n"


@pytest.mark.parametrize(
    ("kind", "value", "line", "as_json"),
    [
        (Image("jpeg"), b"x" * 2048, "<jpeg 2.0 KiB>", "<jpeg 2.0 KiB>"),
        ("bytes", b"abc", "<bytes 3 B>", "<bytes 3 B>"),
        ("str", 'a "b"\n', r'"a \"b\"\n"', 'a "b"\n'),
        ("str", "x" * 100, '"' + "x" * 66 + "...", "x" * 100),
        ("int64?", None, "null", None),
        ("int64", np.int64(5), "5", 5),
        ("bool", np.bool_(True), "True", True),
        ("json", {"a": [1]}, '{"a": [1]}', {"a": [1]}),
        (
            Tensor("uint8", (2, 4)),
            np.arange(8).reshape(2, 4),
            "uint8[2, 4] [0, 1, 2, 3, 4, 5, ...]",
            [[0, 1, 2, 3], [4, 5, 6, 7]],
        ),
        (Ragged("float32", (None,)), np.array([0.5], "f4"), "float32[1] [0.5]", [0.5]),
    ],
)
def test_values_are_one_line_for_people_and_complete_in_json(kind, value, line, as_json):
    column = Column.of("x", kind)
    assert format_value(column, value) == line
    assert json_value(column, value) == as_json
    json.dumps(json_value(column, value))


@pytest.mark.parametrize(
    ("cost", "saving", "text"),
    [
        (0.0, 0.0, "costs $0.00 once, saves $0.00 a month"),
        (0.004, 0.00033, "costs less than $0.01 once, saves less than $0.01 a month"),
        (0.004, -0.00033, "costs less than $0.01 once, then costs less than $0.01 more a month"),
        (1234.5, -2.0, "costs $1,234.50 once, then costs $2.00 more a month"),
    ],
)
def test_a_plan_says_what_it_saves_or_costs_more(cost, saving, text):
    made = Plan("id", 0.0, "rules.toml", "", (), (), totals=PlanTotals(5, cost, saving))
    assert plan_text(made) == f"0 moves, 5 B, {text}"


def test_a_sum_that_is_rounded_to_zero_has_no_sign():
    assert [format_dollars(amount) for amount in (-0.0, -1e-9, 0.25, -0.00033)] == ["0.00", "0.00", "0.25", "-0.00033"]


def test_without_a_terminal_the_progress_is_a_line_every_30_s_with_the_rate_and_the_time_left(capsys, monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(common, "SYSTEM_CLOCK", clock)
    with Output(as_json=True).byte_progress("warming") as advance:
        for done in range(70):
            advance(done << 20, 100 << 20)
            clock.advance(1)
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "tiercache: warming: 30.0 MiB of 100.0 MiB (30%), 1.0 MiB/s, 70 s left",
        "tiercache: warming: 60.0 MiB of 100.0 MiB (60%), 1.0 MiB/s, 40 s left",
    ]
    assert captured.out == ""
    with Output().byte_progress("packing") as advance:  # 500 MiB were packed by an earlier run
        for done in (500, 501, 530, 530):
            advance(done << 20, 1000 << 20)
            clock.advance(15)
    line = "tiercache: packing: 530.0 MiB of 1000.0 MiB (53%), 1.0 MiB/s, 8 min left"
    assert capsys.readouterr().err.splitlines() == [line]
    with Output(quiet=True).byte_progress("warming") as advance:
        clock.advance(100)
        advance(1, 2)
    assert capsys.readouterr().err == ""
