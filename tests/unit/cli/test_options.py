"""Texts of flags."""

import pytest

from tiercache.cli.common import parse_columns, parse_storage_options
from tiercache.cli.data import parse_type, parse_types
from tiercache.errors import SchemaError
from tiercache.shard.schema import Column, Image, Ragged, Tensor


def test_storage_options_stay_text_except_true_false_and_objects():
    assert parse_storage_options(["key=123", "anon=true", "sse=false", 'client_kwargs={"a": 1}', "token=a=b="]) == {
        "key": "123",
        "anon": True,
        "sse": False,
        "client_kwargs": {"a": 1},
        "token": "a=b=",
    }
    assert parse_storage_options(None) == {}


@pytest.mark.parametrize(
    ("text", "message"), [("region", "takes KEY=VALUE"), ("=x", "takes KEY=VALUE"), ("a={x", "a: not")]
)
def test_an_invalid_storage_option_is_an_error_that_hides_its_value(text, message):
    with pytest.raises(ValueError, match=message):
        parse_storage_options([text])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int64", "int64"),
        ("str?", "str?"),
        ("image<jpeg>", Image("jpeg")),
        ("image<png>?", Image("png", nullable=True)),
        ("float32[3, 64, 64]", Tensor("float32", (3, 64, 64))),
        ("uint16[1024]?", Tensor("uint16", (1024,), nullable=True)),
        ("float32[*, 4]", Ragged("float32", (None, 4))),
    ],
)
def test_a_column_type_is_parsed_as_info_prints_it(text, expected):
    assert parse_type(text) == expected
    assert str(Column.of("x", parse_type(text))) == text


@pytest.mark.parametrize("text", ["", "int64[a]", "int64[]", "list<int>x", "a b"])
def test_an_invalid_column_type_is_an_error(text):
    with pytest.raises((ValueError, SchemaError)):
        Column.of("x", parse_type(text))


def test_column_types_may_have_an_equals_sign_in_the_name():
    assert parse_types(["a=b=int8"]) == {"a=b": "int8"}
    with pytest.raises(ValueError, match="--column takes NAME=TYPE"):
        parse_types(["int8"])


def test_columns_are_parsed_and_errors_name_the_option():
    assert parse_columns("a, b") == ["a", "b"]
    with pytest.raises(ValueError, match="--columns takes names"):
        parse_columns("a,,b")
