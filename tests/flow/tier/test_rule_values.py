"""Each key of a rule file with unusual values: accepted, or refused with the name of the key."""

import pytest

from tiercache.tier.rules import load_rule_file

EVERYTHING = """
[tiers.hot]
url = "/nvme"
storage_class = "A"
prices = { store_gb_month = 1, min_bytes = 1, restore = { bulk = { gb = 1 } } }
capacity = "2TB"
storage_options = { a = 1 }
[tiers.archive]
url = "/cold"
prices = "aws:us-east-1:STANDARD"
[[rules]]
name = "a"
match = "*"
except = "b"
idle = "1s"
after = "1s"
to = "archive"
delete_after = "9s"
[[rules]]
match = "c"
keep_hot = { last = 1, every_steps = 1, every = "1s", best = "a:1", younger_than = "1s" }
then = "archive"
after = "1s"
[[pins]]
match = "d"
until = 2027-01-01
why = "e"
[tiering]
grace = "1s"
"""
ODD = [
    *("0", "-1", "1.5", "inf", "nan", "true", '""', '"x"', '" "', "[]", "[1]", '[""]', "[[]]", "{}", "{ a = 1 }"),
    *("2027-01-01", "9999-12-31", "0001-01-01T00:00:00+23:59", "12:00:00", '"5%"', '"\\u0000"', '"["', '"a:1:max"'),
    *("99999999999999999999", "9" * 400, f'"{"9" * 400}d"', f'"{"9" * 400}"', f'"a:{"9" * 40}"'),
]


@pytest.mark.parametrize("line", [line for line in EVERYTHING.splitlines() if " = " in line])
def test_an_unusual_value_of_any_key_is_accepted_or_refused_by_name(tmp_path, line):
    path = tmp_path / "tiercache.toml"
    assert said_of(path, EVERYTHING) == f"{path}: ", "as it stands it fits"
    key, _, value = line.partition(" = ")
    inner = [f"{key} = {value.replace(' = ' + one, ' = ' + odd, 1)}" for one in ("1", '"1s"', '"a:1"') for odd in ODD]
    for changed in [*(f"{key} = {odd}" for odd in ODD), *(inner if value.startswith("{") else [])]:
        assert f"{path}: " in said_of(path, EVERYTHING.replace(line, changed, 1))


def said_of(path, text):
    """What is said of a file that does not fit; of one that does its name alone."""
    path.write_text(text)
    try:
        return f"{load_rule_file(path).path}: "
    except ValueError as error:
        return str(error)
