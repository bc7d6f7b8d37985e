"""Conditions of --where, compared with those of SQLite, which has the same rules for nulls; and what is refused."""

import sqlite3

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiercache as tc
from tiercache.cli.expressions import parse_condition
from tiercache.errors import SchemaError

N = 200
ROWS = [
    {
        "n": i,
        "label": None if i % 7 == 0 else i % 5 - 2,
        "other": i % 3,
        "score": None if i % 11 == 0 else i / 8,
        "split": None if i % 13 == 0 else ("train", "val", "it's", "äöü")[i % 4],
        "my col": i % 4,
        "is_bad": None if i % 17 == 0 else i % 2 == 0,
    }
    for i in range(N)
]
SCHEMA = {"n": "int32", "label": "int8?", "other": "uint16", "score": "float64?", "split": "str?"}
SCHEMA |= {"my col": "int32", "is_bad": "bool?"}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("where") / "data"
    with tc.Writer(path, schema=SCHEMA, block_size="1KiB") as writer:
        writer.write_batch(pa.Table.from_pylist(ROWS))
    return path


@pytest.fixture
def dataset(packed):
    dataset = tc.Dataset(packed)
    yield dataset
    dataset.close()


@pytest.fixture
def database():
    database = sqlite3.connect(":memory:")
    database.execute('create table t (n, label, other, score, split, "my col", is_bad)')
    database.executemany("insert into t values (?, ?, ?, ?, ?, ?, ?)", [tuple(row.values()) for row in ROWS])
    yield database
    database.close()


NUMBERS = st.sampled_from(["label", "other", "score", ("field('my col')", '"my col"')])
INTEGERS = st.integers(-300, 300).map(str)
VALUES = INTEGERS | st.floats(-30, 30).map(repr)
TEXTS = st.sampled_from([("'val'", "'val'"), ('"it\'s"', "'it''s'"), ("'äöü'", "'äöü'"), ("''", "''")])


def pair(text):
    return text if isinstance(text, tuple) else (text, text)


def joined(*parts):
    """Return Python's and SQLite's text of parts that are the same in both, or pairs of them."""
    return tuple(" ".join(texts) for texts in zip(*map(pair, parts), strict=True))


def listed(values):
    return tuple(f"({', '.join(texts)},)" for texts in zip(*map(pair, values), strict=True))


def in_list(column, op, values):
    python, sql = listed(values)
    return joined(column, op, (python, sql.replace(",)", ")")))


COMPARISON = st.sampled_from(["==", "!=", "<", "<=", ">", ">="])
IN = st.sampled_from(["in", "not in"])
IS = st.sampled_from([("is None", "is null"), ("is not None", "is not null")])
LEAVES = st.one_of(
    st.builds(joined, NUMBERS, COMPARISON, VALUES | NUMBERS),
    st.builds(joined, VALUES, COMPARISON, NUMBERS),
    st.builds(joined, st.just("split"), COMPARISON, TEXTS),
    st.builds(joined, NUMBERS | st.sampled_from(["split", "is_bad"]), IS),
    st.builds(in_list, st.sampled_from(["label", "other"]), IN, st.lists(INTEGERS, min_size=1, max_size=4)),
    st.builds(in_list, st.just("split"), IN, st.lists(TEXTS, min_size=1, max_size=3)),
    st.builds(
        lambda low, column, high: (f"{low} < {column} <= {high}", f"{low} < {column} and {column} <= {high}"),
        INTEGERS,
        st.sampled_from(["label", "score"]),
        INTEGERS,
    ),
    st.sampled_from([("is_bad", "is_bad"), ("True", "1"), ("False", "0")]),
)
CONDITIONS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        inner.map(lambda one: joined("not (", one, ")")),
        st.builds(joined, st.just("("), inner, st.just(")"), st.sampled_from(["and", "or"]), inner),
    ),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CONDITIONS)
def test_a_condition_selects_what_sqlite_selects(dataset, database, condition):
    python, sql = condition
    expected = [number for (number,) in database.execute(f"select n from t where {sql} order by n")]
    assert [record["n"] for record in dataset.filter(parse_condition(python))] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label = 3", "at character [0-9]+ of 'label = 3': expected comparisons"),
        ("  label == 3 and", "invalid syntax at character 17 of"),
        ("class == 3", r"at character 1 of 'class == 3'.*is written field\('NAME'\)"),
        ("", "at character 1 of ''"),
        ("split == 'val", "unterminated string literal .* at character 10"),
        ("split == 'ä' and label & 1", "'label & 1' at character 18: write `and`"),
        ("label == 3 | other == 1", r"'3 \| other' at character 10: write `or`"),
        ("~is_bad", "'~is_bad' at character 1: write `not`"),
        ("other + 1 == 2", r"'other \+ 1' at character 1: expected comparisons"),
        ("len(split) == 3", r"'len\(split\)' at character 1: expected comparisons"),
        ("split.upper() == 'A'", "at character 1: expected comparisons"),
        ("__import__('os').remove('x')", "at character 1: expected comparisons"),
        ("label == None", "'None' at character 10: .*; test for null with `is None`"),
        ("label in [1, None]", "'None' at character 14: .*; test for null with `is None`"),
        ("is_bad is True", "'True' at character 11: `is` is only for None"),
        ("label in other", "'other' at character 10: `in` takes a list of values"),
        ("label in [1, 'a']", "at character 10: the values must have one type"),
        ("label in [1, other]", "'other' at character 14: a value is a number"),
        ("split == b'val'", "at character 10: a value is a number, a text in quotes"),
        ("label == -split", "'-split' at character 10: a value is a number"),
        ("label == 99999999999999999999", "at character 10: the number is outside of int64"),
        ("label in [99999999999999999999]", "at character 10: .*integers be those of int64"),
        ("not " * 5000 + "is_bad", "nested too deeply"),
    ],
)
def test_another_text_is_an_error_that_names_the_place(text, message):
    with pytest.raises(ValueError, match=message):
        parse_condition(text)


def test_a_long_condition_is_evaluated(dataset):
    condition = parse_condition(" or ".join(f"label == {i}" for i in range(2000)))
    assert len(dataset.filter(condition)) == sum(row["label"] is not None and row["label"] >= 0 for row in ROWS)
    assert not len(dataset.filter(parse_condition("label in []")))


@pytest.mark.parametrize("text", ["labl == 3", "label == 'x'", "label in ['x']", "label", "3", "label and is_bad"])
def test_an_unknown_column_and_a_text_that_is_no_condition_over_the_columns_are_errors_of_the_schema(dataset, text):
    with pytest.raises(SchemaError, match=r"no such column; there are n, label|as a condition over the columns"):
        dataset.filter(parse_condition(text))
