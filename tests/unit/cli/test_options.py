"""Texts of flags."""

import pytest

from tiercache.cli.common import parse_columns, parse_storage_options
from tiercache.cli.data import parse_types
from tiercache.errors import SchemaError


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


def test_column_types_have_the_notation_of_info_and_may_have_an_equals_sign_in_the_name():
    given = ["label=int", "a=b=int8", "image=image<png>?", "x=float32[3, 64]", "when=timestamp[us, UTC]"]
    types = parse_types(given)
    assert list(types) == ["label", "a=b", "image", "x", "when"]
    assert list(types.values()) == ["int64", "int8", "image<png>?", "float32[3, 64]", "timestamp[us, UTC]"]
    with pytest.raises(ValueError, match="--column takes NAME=TYPE"):
        parse_types(["int8"])
    with pytest.raises(SchemaError, match="column 'label': no such type: 'int65'; the nearest is 'int64'"):
        parse_types(["label=int65"])


def test_columns_are_parsed_and_errors_name_the_option():
    assert parse_columns("a, b") == ["a", "b"]
    with pytest.raises(ValueError, match="--columns takes names"):
        parse_columns("a,,b")
