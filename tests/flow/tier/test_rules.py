"""The rule file: how its keys are read, and the errors for keys and values that are wrong."""

import os
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tiercache.keep import BestMetric, KeepList
from tiercache.tier.rules import Pin, Rule, Tier, TieringOptions, load_rule_file

TIERS = """
[tiers.hot]
url = "/nvme/train"
capacity = "2TB"

[tiers.standard]
url = "s3://bucket/train"
prices = "aws:us-east-1:STANDARD"

[tiers.archive]
url = "s3://bucket-cold/train"
storage_class = "GLACIER_IR"
"""
FOUR = """
[tiers.nvme]
url = "/nvme"
[tiers.lustre]
url = "/lustre"
[tiers.standard]
url = "s3://b/x"
[tiers.cold]
url = "s3://c/x"
"""


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith("TIERCACHE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def read(tmp_path):
    def run(text):
        path = tmp_path / "tiercache.toml"
        path.write_text(text)
        return load_rule_file(path)

    return run


@pytest.fixture
def complaint(read, tmp_path):
    """What is said of a file that does not fit, without the file's name, which each message begins with."""

    def run(text):
        with pytest.raises(ValueError, match=r"tiercache\.toml: ") as caught:
            read(text)
        path, _, message = str(caught.value).partition(": ")
        assert path == str(tmp_path / "tiercache.toml")
        return message

    return run


# -- the file --------------------------------------------------------------------------------------------------------


def test_a_file_with_tiers_rules_and_pins_is_read_as_the_reference_says(read):
    file = read("""\
[tiers.hot]
url = "/nvme/train"
capacity = "2TB"

[tiers.standard]
url = "s3://bucket/train"
prices = "aws:us-east-1:STANDARD"

[tiers.archive]
url = "s3://bucket-cold/train"
storage_class = "GLACIER_IR"
prices = "aws:us-east-1:GLACIER_IR"

[[rules]]
match = "checkpoints/**"
keep_hot = { last = 2 }
keep_standard = { last = 10, every_steps = 5000, best = "val_loss:2" }
then = "archive"
after = "14d"
delete_after = "365d"

[[rules]]
match = "datasets/**"
idle = "30d"
to = "archive"

[[pins]]
match = "checkpoints/run7/step-5000*"
until = 2027-06-30
why = "the paper's figures"
""")
    assert [tier.name for tier in file.tiers] == ["hot", "standard", "archive"]
    best = (BestMetric("val_loss", n=2),)
    assert file.rules == (
        Rule(
            name="rules[1]",
            match=("checkpoints/**",),
            keep={"hot": KeepList(last=2), "standard": KeepList(last=10, every_steps=5000, best=best)},
            then="archive",
            after_s=14 * 86400.0,
            delete_after_s=365 * 86400.0,
        ),
        Rule(name="rules[2]", match=("datasets/**",), to="archive", idle_s=30 * 86400.0),
    )
    assert file.pins[0].why == "the paper's figures"
    assert file.tiering == TieringOptions()


def test_the_reference_describes_every_key():
    text = (Path(__file__).parents[3] / "docs/reference/tiers.md").read_text()
    described = {key for row in re.findall(r"^\| (`[^|]*) \|", text, re.M) for key in re.findall(r"`(\w+)", row)}
    for table in (Tier, Rule, Pin, TieringOptions):
        keys = {f.validation_alias or name for name, f in table.model_fields.items()} - {"keep"}
        if table in (Tier, Pin):
            keys -= {"name", "match", "until", "why"}  # the reference has sentences for those of pins
        assert keys <= described


def test_without_a_path_the_file_in_a_folder_above_is_read(tmp_path, monkeypatch):
    (tmp_path / "tiercache.toml").write_text('cache_size = "1GB"\n' + TIERS)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    assert load_rule_file(start=tmp_path / "deep" / "er").path == tmp_path / "tiercache.toml"
    monkeypatch.chdir(tmp_path / "deep")
    assert load_rule_file().path == tmp_path / "tiercache.toml"


def test_a_missing_file_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=rf"no tiercache\.toml in {tmp_path}.*\[tiers\.NAME\].*--rules"):
        load_rule_file(start=tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path}/gone\.toml: cannot be read: No such file"):
        load_rule_file(Path("gone.toml"))


def test_a_syntax_error_names_the_line(complaint):
    message = complaint('[tiers.hot]\nurl = "/nvme"\ncapacity = \n')
    assert message.startswith("not TOML: ")
    assert "line 3" in message


# -- tiers -----------------------------------------------------------------------------------------------------------


def test_home_is_the_tier_named_standard_or_else_the_first(read):
    assert read(FOUR).home_tier.name == "standard"
    assert read('[tiers.hot]\nurl = "/a"\n[tiers.archive]\nurl = "/b"').home_tier.name == "hot"


def test_a_relative_path_is_resolved_against_the_folder_of_the_file(read, tmp_path):
    file = read('[tiers.hot]\nurl = "nvme/./train/"\n[tiers.standard]\nurl = "~/slow"')
    assert [tier.url for tier in file.tiers] == [str(tmp_path / "nvme/train"), str(Path.home() / "slow")]


def test_a_capacity_is_a_size_or_a_percentage_of_the_disk(read):
    text = '[tiers.hot]\nurl = "/a"\ncapacity = {}\n'
    tier = read(text.format('"50%"')).tiers[0]
    assert tier.capacity_bytes(1000) == 500
    with pytest.raises(ValueError, match=r"tiers\.hot\.capacity: .*disk.*50%"):
        tier.capacity_bytes(None)
    assert read(text.format('"2KB"')).tiers[0].capacity_bytes(None) == 2000
    assert read(text.format("2000")).tiers[0].capacity_bytes(None) == 2000
    assert read(TIERS).tier("archive").capacity_bytes(1000) is None


def test_secrets_are_never_shown(complaint):
    tier = Tier(name="a", url="s3://b", storage_options={"secret": "hush"})
    assert "hush" not in repr(tier) + str(tier)
    assert "hush" not in complaint('[tiers.standard]\nurl = "s3://b"\nstorage_options = "hush"')
    assert "hush" not in complaint('[tiers.hot]\nurl = "s3://key:hush@b/x"')


def test_two_tiers_may_have_one_url_if_their_classes_differ(read, complaint):
    text = '[tiers.standard]\nurl = "s3://b/x/"\n[tiers.archive]\nurl = "s3://b/x"\n'
    assert len(read(text + 'storage_class = "GLACIER"').tiers) == 2
    for same in (text, text + 'storage_class = "STANDARD"'):
        assert complaint(same).startswith("tiers.archive.url: tiers.standard has the same URL")


def test_a_tier_inside_another_is_refused(read, complaint):
    pairs = [("/a", "/a/cold"), ("file:///a/b%20c/d", "/a/b c"), ("s3://b", "s3://b/x"), ("/", "/a")]
    for first, second in pairs:
        message = complaint(f'[tiers.hot]\nurl = "{first}"\n[tiers.archive]\nurl = "{second}"')
        assert message == "tiers.archive.url: must not lie inside tiers.hot.url, nor contain it"
    assert len(read('[tiers.hot]\nurl = "/a"\n[tiers.archive]\nurl = "/a-cold"').tiers) == 2


# -- rules, pins and options -----------------------------------------------------------------------------------------


def test_values_are_read_as_seconds_and_tuples(read):
    text = 'name = "cold"\nmatch = ["a/**", "b/*"]\nexcept = "a/keep/*"\nidle = "12h"\nafter = "60s"\nto = "archive"\n'
    rule = read(
        f'{TIERS}\n[[rules]]\n{text}delete_after = "9d"\nmax_delete = "60%"\ncheckpoint = "m_{{step}}.pt"'
    ).rules[0]
    assert rule == Rule(
        name="cold",
        match=("a/**", "b/*"),
        exclude=("a/keep/*",),
        checkpoint=("m_{step}.pt",),
        idle_s=43200.0,
        after_s=60.0,
        to="archive",
        delete_after_s=9 * 86400.0,
        max_delete="60%",
    )


def test_keep_lists_have_all_keys(read):
    text = 'every = "6h", younger_than = "7d", best = ["loss:2", "top 1 : 3 : max"]'
    (rule,) = read(f'{TIERS}[[rules]]\nmatch = "*"\nkeep_hot = {{{text}}}').rules
    best = (BestMetric("loss", n=2), BestMetric("top 1", n=3, mode="max"))
    assert rule.keep["hot"] == KeepList(every_s=21600.0, younger_s=604800.0, best=best)


def test_a_pin_ends_at_a_time_or_at_the_end_of_a_date(read):
    moments = {
        "2027-06-30": datetime(2027, 7, 1, tzinfo=UTC),
        '"2027-06-30"': datetime(2027, 7, 1, tzinfo=UTC),
        "2027-06-30T12:00:00": datetime(2027, 6, 30, 12, tzinfo=UTC),
        "2027-06-30T12:00:00+02:00": datetime(2027, 6, 30, 10, tzinfo=UTC),
        '"2027-06-30T12:00:00Z"': datetime(2027, 6, 30, 12, tzinfo=UTC),
    }
    for text, moment in moments.items():
        pin = read(f'{TIERS}\n[[pins]]\nmatch = "a"\nuntil = {text}').pins[0]
        assert pin == Pin(match=("a",), until_s=moment.timestamp())
    assert read(f'{TIERS}\n[[pins]]\nmatch = "a"').pins[0].until_s is None


def test_tiering_options_are_read_as_seconds(read):
    assert read(f'{TIERS}\n[tiering]\ngrace = "1h"').tiering == TieringOptions(grace_s=3600.0)
    assert read(f"{TIERS}\n[tiering]\ngrace = 0").tiering.grace_s == 0


RULE = '[[rules]]\nmatch = "*"\n'
KEEP = f"{RULE}keep_hot = {{last = 1}}\n"
UNIT = "a duration needs a unit (s, m, h, d or w)"
# Tables after the tiers, and how the message begins.
WRONG = [
    ("[[rules]]", "rules[1].match: is missing"),
    ('[[rules]]\nmatch = "/a"', "rules[1].match: a glob matches paths below a tier's URL"),
    ('[[rules]]\nmatch = "a[b"', "rules[1].match: not a glob: 'a[b': '[' has no meaning"),
    (f'{RULE}except = "a{{b,c}}"', "rules[1].except: not a glob: 'a{b,c}': '{' has no meaning: write a list"),
    (f'{RULE}excepted = "a"', "rules[1].excepted: no such key; did you mean 'except'?"),
    (f"{RULE}keep = {{}}", "rules[1].keep: no such key"),
    (f'{RULE}to = "archive"\nidle = "soon"', "rules[1].idle: not a duration: 'soon'"),
    (f'{RULE}to = "cold"', "rules[1].to: no tier is called 'cold'; there are hot"),
    (f'{RULE}to = "hot"', "rules[1].to: 'hot' is the first tier"),
    (f'{RULE}idle = "5d"', "rules[1].idle: is a condition of `to`"),
    (f'{RULE}after = "5d"', "rules[1].after: needs `to` or `then`"),
    (f'{RULE}then = "archive"', "rules[1].then: needs a keep list"),
    (f'{KEEP}then = "archive"\nafter = "9d"\ndelete_after = "9d"', "rules[1].delete_after: is not longer than `after`"),
    (f'{RULE}max_delete = "60%"', "rules[1].max_delete: needs `delete_after`"),
    (f'{KEEP}to = "archive"', "rules[1].to: cannot be combined with keep lists"),
    (f'{KEEP}idle = "5d"', "rules[1].idle: cannot be combined with keep lists"),
    (f'{KEEP}after = "1d"', "rules[1].after: needs `to` or `then`"),
    (f'{KEEP}then = "hot"', "rules[1].then: tier 'hot' is not colder than 'hot', which has a keep list"),
    (f"{RULE}keep_warm = {{last = 1}}", "rules[1].keep_warm: no tier is called 'warm'"),
    (f"{RULE}keep_hot = {{}}", "rules[1].keep_hot: is empty; its keys are best, every"),
    (f'{RULE}keep_hot = {{best = "loss"}}', "rules[1].keep_hot.best: expected METRIC:N or METRIC:N:max"),
    ('[[rules]]\nname = "a"\nmatch = "*"\n' * 2, "rules[2].name: another rule is called 'a'"),
    ('[rules]\nmatch = "*"', "rules: expected [[rules]] tables, in double brackets"),
    (f"{RULE}delete_after = 30", f"rules[1].delete_after: {UNIT}"),
    (f'{RULE}to = "archive"\nidle = 30', f"rules[1].idle: {UNIT}"),
    (f"{RULE}keep_hot = {{every = 6}}", f"rules[1].keep_hot.every: {UNIT}"),
    ("[tiering]\ngrace = 5", f"tiering.grace: {UNIT}"),
    ('[[pins]]\nmatch = "a"\nuntil = "soon"', "pins[1].until: expected a date or time such as 2027-06-30"),
    ('[[pins]]\nwhy = "a"', "pins[1].match: is missing"),
    ("[tiering]\ngrase = 1", "tiering.grase: no such key; did you mean 'grace'"),
    ("[rule]\na = 1", "rule: no such key; did you mean 'rules'"),
]
WRONG_TIERS = [
    ("", "tiers: no tier is given; write [tiers.NAME]"),
    ("[tiers.hot]", "tiers.hot.url: is missing"),
    ('[tiers.hot]\nurl = ""', "tiers.hot.url: a tier needs a URL or path"),
    ('[tiers.hot]\nurl = "/a\\u0000b"', "tiers.hot.url: a URL or path cannot contain a NUL"),
    ('[tiers.hot]\nurl = "s3://key:hush@b/x"', "tiers.hot.url: a URL must not contain credentials"),
    ('[tiers.hot]\nurl = "/a"\nurll = "/b"', "tiers.hot.urll: no such key; did you mean 'url'?"),
    ('[tiers."a b"]\nurl = "/a"', "tiers.a b: the name of a tier must consist of"),
    ('[tiers.hot]\nurl = "/a"\ncapacity = "big"', "tiers.hot.capacity: not a size: 'big'"),
    ('[tiers.hot]\nurl = "s3://a"\ncapacity = "5%"', "tiers.hot.capacity: only a local tier may have a percentage"),
    ('[tiers.hot]\nurl = "/a"\nprices = "aws:x"', "tiers.hot.prices: no prices are called 'aws:x'"),
    ('[tiers.hot]\nurl = "/a"\nprices = {put = 1}', "tiers.hot.prices: store_gb_month is missing"),
]


def test_a_wrong_key_or_value_is_an_error_that_names_it(complaint):
    for text, message in [*((f"{TIERS}\n{text}", message) for text, message in WRONG), *WRONG_TIERS]:
        assert complaint(text).startswith(message), text
