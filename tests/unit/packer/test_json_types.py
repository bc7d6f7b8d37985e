"""Column types of JSON records."""

import pytest

from tiercache.errors import SchemaError
from tiercache.packer.tables import infer_types, join, type_of


def infer(*records):
    return infer_types(records, lambda i: f"line {i + 1}")


def test_types_come_from_all_records_in_order_of_appearance():
    types = infer({"b": 1, "a": "x"}, {"a": "y", "b": 2.5, "c": True}, {"a": "z", "b": 3, "c": None})
    assert list(types.items()) == [("b", "float64"), ("a", "str"), ("c", "bool?")]


def test_lists_of_numbers_are_ragged_and_other_lists_and_objects_json():
    types = infer(
        {"t": [], "f": [1], "s": ["x"], "o": {"k": 1}, "m": [1]}, {"t": [1], "f": [1.5], "s": [], "o": [], "m": ["x"]}
    )
    assert types == {
        "t": "int64[*]",
        "f": "float64[*]",
        "s": "json",
        "o": "json",
        "m": "json",
    }


def test_a_list_that_is_missing_somewhere_is_nullable():
    assert infer({"t": [1], "x": 0}, {"x": 1}) == {"t": "int64[*]?", "x": "int64"}


def test_incompatible_scalars_are_an_error_with_their_location():
    with pytest.raises(
        SchemaError, match=r"column 'a': line 2: expected int64 as in earlier records, got str; specify its type"
    ):
        infer({"a": 1}, {"a": "x"})
    with pytest.raises(SchemaError, match="expected bool as in earlier records, got int64"):
        infer({"a": True}, {"a": None}, {"a": 1})


def test_a_column_of_nulls_has_no_type():
    with pytest.raises(SchemaError, match="column 'a': only nulls in the first 2 records"):
        infer({"a": None}, {})


def test_joining_does_not_depend_on_the_order():
    kinds = ["bool", "int64", "float64", "str", "int64[*]", "float64[*]", "json"]
    assert all(join(a, b) == join(b, a) for a in kinds for b in kinds)
    assert type_of([[1]]) == type_of([None]) == type_of([True]) == type_of({}) == "json"
