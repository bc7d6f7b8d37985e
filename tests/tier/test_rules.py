"""The rule file: how its keys are read, and the errors for keys and values that are wrong."""

import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import ValidationError

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
role = "hot"
url = "/nvme"
[tiers.lustre]
role = "hot"
url = "/lustre"
[tiers.bucket]
role = "standard"
url = "s3://b/x"
[tiers.cold]
role = "archive"
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


class TestReading:
    def test_the_file_of_the_reference_is_read_as_described(self, read):
        text = (Path(__file__).parents[2] / "docs/reference/tiers.md").read_text()
        file = read(text.partition("```toml\n")[2].partition("```")[0])
        checkpoints, datasets = file.rules
        assert [tier.name for tier in file.tiers] == ["hot", "standard", "archive"]
        assert checkpoints == Rule(
            name="rules[1]",
            match=("checkpoints/**",),
            keep={
                "hot": KeepList(last=2),
                "standard": KeepList(last=10, every_steps=5000, best=(BestMetric(("val_loss",), n=2),)),
            },
            then="archive",
            after_s=14 * 86400.0,
            delete_after_s=365 * 86400.0,
        )
        assert datasets == Rule(
            name="rules[2]",
            match=("datasets/**",),
            to="archive",
            sources=("hot", "standard"),
            idle_s=30 * 86400.0,
        )
        assert file.pins[0].why == "the paper's figures"
        assert file.tiering == TieringOptions()

    def test_without_a_path_the_file_in_a_folder_above_is_read(self, tmp_path, monkeypatch):
        (tmp_path / "tiercache.toml").write_text('cache_size = "1GB"\n' + TIERS)
        (tmp_path / "deep" / "er").mkdir(parents=True)
        assert load_rule_file(start=tmp_path / "deep" / "er").path == tmp_path / "tiercache.toml"
        monkeypatch.chdir(tmp_path / "deep")
        assert load_rule_file().path == tmp_path / "tiercache.toml"

    def test_a_missing_file_is_an_error_that_says_what_to_do(self, tmp_path):
        with pytest.raises(ValueError, match=rf"no tiercache\.toml in {tmp_path}.*\[tiers\.NAME\].*--rules"):
            load_rule_file(start=tmp_path)

    def test_a_named_file_that_does_not_exist_is_an_error(self, tmp_path):
        with pytest.raises(ValueError, match=rf"{tmp_path}/gone\.toml: cannot be read: No such file"):
            load_rule_file(Path("gone.toml"))

    def test_the_hash_is_that_of_the_bytes_of_the_file(self, read):
        assert read(TIERS).sha256 == hashlib.sha256(TIERS.encode()).hexdigest()

    def test_a_syntax_error_names_the_line(self, complaint):
        assert complaint('[tiers.hot]\nurl = "/nvme"\nrole = \n').startswith("not TOML: ")
        assert "line 3" in complaint('[tiers.hot]\nurl = "/nvme"\nrole = \n')

    def test_a_rule_file_is_frozen(self, read):
        file = read(TIERS)
        with pytest.raises(ValidationError, match="frozen"):
            file.tiers[0].url = "/elsewhere"


class TestTiers:
    def test_a_tier_with_the_name_of_a_role_has_that_role(self, read):
        assert [tier.role for tier in read(TIERS).tiers] == ["hot", "standard", "archive"]

    def test_home_is_the_first_standard_tier_or_else_the_first(self, read):
        assert read(FOUR).home_tier.name == "bucket"
        assert read('[tiers.hot]\nurl = "/a"\n[tiers.archive]\nurl = "/b"').home_tier.name == "hot"

    def test_tiers_are_found_by_name(self, read):
        file = read(FOUR)
        assert (file.index("bucket"), file.tier("cold").url) == (2, "s3://c/x")
        with pytest.raises(ValueError, match=r"no tier is called 'warm'; there are nvme, lustre, bucket, cold"):
            file.tier("warm")

    def test_a_relative_path_is_resolved_against_the_folder_of_the_file(self, read, tmp_path):
        file = read('[tiers.hot]\nurl = "nvme/./train/"\n[tiers.standard]\nurl = "~/slow"')
        assert [tier.url for tier in file.tiers] == [str(tmp_path / "nvme/train"), str(Path.home() / "slow")]

    def test_a_capacity_is_a_size_or_a_percentage_of_the_disk(self, read):
        text = '[tiers.hot]\nurl = "/a"\ncapacity = {}\nhigh = "80%"\nlow = 0.5'
        tier = read(text.format('"50%"')).tiers[0]
        assert (tier.capacity_bytes(1000), tier.high, tier.low) == (500, 0.8, 0.5)
        with pytest.raises(ValueError, match=r"tiers\.hot\.capacity: .*disk.*50%"):
            tier.capacity_bytes(None)
        assert read(text.format('"2KB"')).tiers[0].capacity_bytes(None) == 2000
        assert read(text.format("2000")).tiers[0].capacity_bytes(None) == 2000
        assert read(TIERS).tier("archive").capacity_bytes(1000) is None

    def test_storage_options_are_never_shown(self, complaint):
        tier = Tier(name="a", role="hot", url="s3://b", storage_options={"secret": "hush"})
        assert "hush" not in repr(tier) + str(tier)
        assert "hush" not in complaint('[tiers.standard]\nurl = "s3://b"\nstorage_options = "hush"')

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "tiers: no tier is given; write [tiers.NAME]"),
            ("tiers = 3", "tiers: expected a table, got 3"),
            ("[tiers]\nhot = 3", "tiers.hot: expected a table, got 3"),
            ('[tiers.nvme]\nurl = "/a"', "tiers.nvme.role: is missing"),
            (
                '[tiers.a]\nrole = "warm"\nurl = "/a"',
                "tiers.a.role: Input should be 'hot', 'standard' or 'archive'",
            ),
            ("[tiers.hot]", "tiers.hot.url: is missing"),
            ("[tiers.hot]\nurl = 5", "tiers.hot.url: Input should be a valid string"),
            ('[tiers.hot]\nurl = ""', "tiers.hot.url: a tier needs a URL or path"),
            ('[tiers.hot]\nurl = "/a\\u0000b"', "tiers.hot.url: a URL or path cannot contain a NUL"),
            ('[tiers.hot]\nurl = "s3://key:hush@b/x"', "tiers.hot.url: a URL must not contain credentials"),
            ('[tiers.hot]\nurl = "/a"\nurll = "/b"', "tiers.hot.urll: no such key; did you mean 'url'?"),
            ('[tiers.hot]\nurl = "/a"\nname = "x"', "tiers.hot.name: no such key; "),
            ('[tiers."a b"]\nurl = "/a"', "tiers.a b: the name of a tier must consist of"),
            ('[tiers.hot]\nurl = "/a"\ncapacity = "big"', "tiers.hot.capacity: not a size: 'big'"),
            (
                '[tiers.hot]\nurl = "s3://a"\ncapacity = "5%"',
                "tiers.hot.capacity: only a local tier may have a percentage",
            ),
            ('[tiers.hot]\nurl = "/a"\nhigh = "110%"', "tiers.hot.high: expected a fraction such as"),
            ('[tiers.hot]\nurl = "/a"\nlow = 0.95', "tiers.hot.low: must be below high, got 95% and 90%"),
            ('[tiers.hot]\nurl = "/a"\nprices = "aws:x"', "tiers.hot.prices: no prices are called 'aws:x'"),
            ('[tiers.hot]\nurl = "/a"\nprices = 7', "tiers.hot.prices: expected a name of the price table or a table"),
            ('[tiers.hot]\nurl = "/a"\nprices = {put = 1}', "tiers.hot.prices: store_gb_month is missing"),
        ],
    )
    def test_a_wrong_key_or_value_is_an_error_that_names_it(self, complaint, text, message):
        assert complaint(text).startswith(message)

    def test_a_secret_in_a_url_is_not_repeated(self, complaint):
        assert "hush" not in complaint('[tiers.hot]\nurl = "s3://key:hush@b/x"')

    def test_the_name_of_a_container_in_a_url_is_allowed(self, read):
        url = "abfss://container@account.dfs.core.windows.net/x"
        assert read(f'[tiers.standard]\nurl = "{url}"').home_tier.url == url

    def test_a_colder_tier_before_a_faster_one_is_refused(self, complaint):
        message = complaint('[tiers.archive]\nurl = "/a"\n[tiers.hot]\nurl = "/b"')
        assert message.startswith("tiers.hot: stands after the colder tier tiers.archive")

    def test_two_tiers_may_have_one_url_if_their_classes_differ(self, read, complaint):
        text = '[tiers.standard]\nurl = "s3://b/x/"\n[tiers.archive]\nurl = "s3://b/x"\n'
        assert len(read(text + 'storage_class = "GLACIER"').tiers) == 2
        assert complaint(text).startswith("tiers.archive.url: tiers.standard has the same URL")
        assert complaint(text + 'storage_class = "STANDARD"').startswith(
            "tiers.archive.url: tiers.standard has the same URL"
        )

    @pytest.mark.parametrize(
        ("first", "second"), [("/a", "/a/cold"), ("file:///a/b%20c/d", "/a/b c"), ("s3://b", "s3://b/x"), ("/", "/a")]
    )
    def test_a_tier_inside_another_is_refused(self, complaint, first, second):
        message = complaint(f'[tiers.hot]\nurl = "{first}"\n[tiers.archive]\nurl = "{second}"')
        assert message == "tiers.archive.url: must not lie inside tiers.hot.url, nor contain it"

    def test_a_folder_with_a_common_name_prefix_is_another_location(self, read):
        assert len(read('[tiers.hot]\nurl = "/a"\n[tiers.archive]\nurl = "/a-cold"').tiers) == 2


class TestRules:
    def test_values_are_read_as_seconds_bytes_and_tuples(self, read):
        rule = read(
            TIERS
            + """
            [[rules]]
            name = "cold files"
            match = ["a/**", "b/*"]
            except = "a/keep/*"
            kind = "file"
            larger_than = "64KiB"
            smaller_than = 1000000
            idle = "12h"
            age = "60s"
            uses_below = 3
            to = "archive"
            from = "standard"
            """
        ).rules[0]
        assert rule == Rule(
            name="cold files",
            match=("a/**", "b/*"),
            exclude=("a/keep/*",),
            kind="file",
            larger_than_bytes=65536,
            smaller_than_bytes=1000000,
            idle_s=43200.0,
            age_s=60.0,
            uses_below=3,
            to="archive",
            sources=("standard",),
        )

    def test_a_role_stands_for_its_tiers(self, read):
        rules = read(
            FOUR
            + '[[rules]]\nmatch = "*"\nto = "archive"\nfrom = ["hot"]\n'
            + '[[rules]]\nmatch = "*"\nkeep_standard = {last = 1}\nkeep_nvme = {last = 2}\nthen = "archive"\n'
        ).rules
        assert (rules[0].to, rules[0].sources) == ("cold", ("nvme", "lustre"))
        assert (list(rules[1].keep), rules[1].then) == (["nvme", "bucket"], "cold")

    def test_the_name_of_a_tier_has_precedence_over_a_role(self, read):
        tiers = '[tiers.fast]\nrole = "hot"\nurl = "/a"\n[tiers.hot]\nurl = "/b"\n[tiers.archive]\nurl = "/c"\n'
        rule = read(tiers + '[[rules]]\nmatch = "*"\nto = "archive"\nfrom = "hot"').rules[0]
        assert rule.sources == ("hot",)

    def test_a_rule_without_an_action_keeps_objects_where_they_are(self, read):
        assert read(TIERS + '[[rules]]\nmatch = "raw/**"').rules[0].to is None

    def test_keep_lists_have_all_keys(self, read):
        keep = (
            read(
                TIERS + '[[rules]]\nmatch = "*"\nkeep_hot = {every = "6h", younger_than = "7d",'
                ' best = ["loss:2", "top 1 : 3 : max", {metric = ["a", "b"], n = 1, mode = "max"}]}'
            )
            .rules[0]
            .keep["hot"]
        )
        assert keep == KeepList(
            every_s=21600.0,
            younger_s=604800.0,
            best=(
                BestMetric(("loss",), n=2),
                BestMetric(("top 1",), n=3, mode="max"),
                BestMetric(("a", "b"), n=1, mode="max"),
            ),
        )

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "rules[1].match: is missing"),
            ("match = []", "rules[1].match: expected one or more"),
            ('match = "/a"', "rules[1].match: a glob matches paths below a tier's URL"),
            ('match = "a[b"', "rules[1].match: not a glob: 'a[b': a '[' is not closed"),
            ('match = "*"\nexcept = "a{b,c"', "rules[1].except: not a glob: 'a{b,c': a '{' is not closed"),
            ('match = "*"\nexcept = 3', "rules[1].except: expected a string or a list of strings"),
            ('match = "*"\nexcepted = "a"', "rules[1].excepted: no such key; did you mean 'except'?"),
            ('match = "*"\nkeep = {}', "rules[1].keep: no such key"),
            (
                'match = "*"\nkind = "shards"',
                "rules[1].kind: Input should be 'file', 'shard' or 'checkpoint', got",
            ),
            ('match = "*"\nto = "archive"\nidle = "soon"', "rules[1].idle: not a duration: 'soon'"),
            (
                'match = "*"\nto = "archive"\nidle = -5',
                "rules[1].idle: expected a duration from 0 to 10,000 years",
            ),
            ('match = "*"\nto = "archive"\nage = inf', "rules[1].age: expected a duration from 0 to"),
            ('match = "*"\nto = "archive"\nage = true', "rules[1].age: expected a duration such as '30d'"),
            (
                'match = "*"\nto = "archive"\nuses_below = "3"',
                "rules[1].uses_below: Input should be a valid integer",
            ),
            ('match = "*"\nlarger_than = "x"', "rules[1].larger_than: not a size: 'x'"),
            ('match = "*"\nlarger_than = 5\nsmaller_than = 5', "rules[1].larger_than: must be below smaller_than"),
            (
                'match = "*"\nto = "cold"',
                "rules[1].to: no tier is called 'cold' or has that role; there are hot",
            ),
            ('match = "*"\nto = "hot"', "rules[1].to: 'hot' is the first tier"),
            ('match = "*"\nto = "standard"\nfrom = "archive"', "rules[1].from: tier 'archive' must stand before"),
            ('match = "*"\nidle = "5d"', "rules[1].idle: is a condition of `to`"),
            ('match = "*"\nthen = "archive"', "rules[1].then: needs a keep list"),
            ('match = "*"\nkeep_hot = {last = 1}\nafter = "1d"', "rules[1].after: needs `then`"),
            ('match = "*"\nkeep_hot = {last = 1}\nto = "archive"', "rules[1].to: cannot be combined with keep lists"),
            ('match = "*"\nkeep_hot = {last = 1}\nidle = 5', "rules[1].idle: cannot be combined with keep lists"),
            ('match = "*"\nkeep_hot = {last = 1}\nkind = "file"', "rules[1].kind: keep lists apply to checkpoints"),
            ('match = "*"\nkeep_warm = {last = 1}', "rules[1].keep_warm: no tier is called 'warm' or has that role"),
            ('match = "*"\nkeep_hot = 3', "rules[1].keep_hot: expected a table, got 3"),
            ('match = "*"\nkeep_hot = {}', "rules[1].keep_hot: is empty; its keys are best, every"),
            ('match = "*"\nkeep_hot = {best = []}', "rules[1].keep_hot.best: expected one or more"),
            ('match = "*"\nkeep_hot = {tags = ["a"]}', "rules[1].keep_hot.tags: no such key"),
            ('match = "*"\nkeep_hot = {last = 0}', "rules[1].keep_hot.last: expected an integer from 1 to 2^62, got 0"),
            ('match = "*"\nkeep_hot = {lats = 1}', "rules[1].keep_hot.lats: no such key; did you mean 'last'"),
            ('match = "*"\nkeep_hot = {best = "loss"}', "rules[1].keep_hot.best: expected METRIC:N or METRIC:N:max"),
            ('match = "*"\nkeep_hot = {best = "loss:0"}', "rules[1].keep_hot.best: expected METRIC:N"),
            ('match = "*"\nkeep_hot = {best = {metric = "loss"}}', "rules[1].keep_hot.best: n: expected an integer"),
            (
                'match = "*"\nkeep_hot = {best = {metric = [], n = 1}}',
                "rules[1].keep_hot.best: metric: expected a name",
            ),
            ('match = "*"\nkeep_hot = {best = {metrik = "a", n = 1}}', "rules[1].keep_hot.best: metrik: no such key"),
            (
                'match = "*"\nkeep_standard = {last = 1}\nthen = "standard"',
                "rules[1].then: tier 'standard' is not colder than 'standard', which has a keep list",
            ),
            ('match = "*"\ndelete_after = 0', "rules[1].delete_after: Input should be greater than 0, got 0"),
        ],
    )
    def test_a_wrong_key_or_value_is_an_error_that_names_it(self, complaint, text, message):
        assert complaint(f"{TIERS}\n[[rules]]\n{text}").startswith(message)

    @pytest.mark.parametrize(
        ("text", "key"),
        [
            ('[[rules]]\nmatch = "*"\ndelete_after = 30', "rules[1].delete_after"),
            ('[[rules]]\nmatch = "*"\nto = "archive"\nidle = 30', "rules[1].idle"),
            ('[[rules]]\nmatch = "*"\nto = "archive"\nage = 1.5', "rules[1].age"),
            ('[[rules]]\nmatch = "*"\nkeep_hot = {last = 1}\nthen = "archive"\nafter = 30', "rules[1].after"),
            ('[[rules]]\nmatch = "*"\nkeep_hot = {every = 6}', "rules[1].keep_hot.every"),
            ('[[rules]]\nmatch = "*"\nkeep_hot = {younger_than = 7}', "rules[1].keep_hot.younger_than"),
            *((f"[tiering]\n{key} = 5", f"tiering.{key}") for key in ("grace", "hold", "quiet_period")),
            *((f"[tiering]\n{key} = 5", f"tiering.{key}") for key in ("reader_timeout", "max_break_even")),
        ],
    )
    def test_a_duration_without_a_unit_is_an_error(self, complaint, text, key):
        tiers = f'{TIERS}\nprices = "aws:us-east-1:GLACIER_IR"\n'
        assert complaint(f"{tiers}{text}").startswith(f"{key}: a duration needs a unit (s, m, h, d or w)")

    def test_a_duration_of_zero_needs_no_unit(self, read):
        assert read(f"{TIERS}\n[tiering]\ngrace = 0").tiering.grace_s == 0

    def test_a_role_of_several_tiers_is_ambiguous_in_to(self, complaint):
        archive = '\nrole = "archive"\nurl = '
        tiers = f'[tiers.hot]\nurl = "/a"\n[tiers.x]{archive}"/b"\n[tiers.y]{archive}"/c"\n'
        message = complaint(tiers + '[[rules]]\nmatch = "*"\nto = "archive"')
        assert message == "rules[1].to: several tiers have the role 'archive': name one of x, y"

    def test_a_tier_has_one_keep_list(self, complaint):
        tiers = '[tiers.nvme]\nrole = "hot"\nurl = "/a"\n[tiers.archive]\nurl = "/b"\n'
        message = complaint(tiers + '[[rules]]\nmatch = "*"\nkeep_hot = {last = 1}\nkeep_nvme = {last = 1}')
        assert message == "rules[1].keep_nvme: tier 'nvme' has a keep list already"

    def test_two_rules_must_not_have_one_name(self, complaint):
        rule = '[[rules]]\nname = "a"\nmatch = "*"\n'
        assert complaint(TIERS + rule + rule) == "rules[2].name: another rule is called 'a'"

    def test_rules_in_single_brackets_are_an_error(self, complaint):
        assert complaint(TIERS + '[rules]\nmatch = "*"') == "rules: expected [[rules]] tables, in double brackets"


class TestTheRest:
    @pytest.mark.parametrize(
        ("text", "moment"),
        [
            ("2027-06-30", datetime(2027, 7, 1, tzinfo=UTC)),
            ('"2027-06-30"', datetime(2027, 7, 1, tzinfo=UTC)),
            ("2027-06-30T12:00:00", datetime(2027, 6, 30, 12, tzinfo=UTC)),
            ("2027-06-30T12:00:00+02:00", datetime(2027, 6, 30, 10, tzinfo=UTC)),
            ('"2027-06-30T12:00:00Z"', datetime(2027, 6, 30, 12, tzinfo=UTC)),
        ],
    )
    def test_a_pin_ends_at_a_time_or_at_the_end_of_a_date(self, read, text, moment):
        pin = read(f'{TIERS}\n[[pins]]\nmatch = "a"\nuntil = {text}').pins[0]
        assert pin == Pin(match=("a",), until_s=moment.timestamp())

    def test_a_pin_without_until_does_not_expire(self, read):
        assert read(f'{TIERS}\n[[pins]]\nmatch = "a"').pins[0].until_s is None

    def test_tiering_options_are_read_as_seconds_and_bytes(self, read, tmp_path):
        tiers = TIERS + 'prices = "aws:us-east-1:GLACIER_IR"\n'
        text = 'grace = "1h"\nmax_break_even = "90d"'
        text += '\njobs = 2\nrate = "5MB/s"\nstate_dir = "s"'
        assert read(f"{tiers}\n[tiering]\n{text}").tiering == TieringOptions(
            grace_s=3600.0,
            max_break_even_s=90 * 86400.0,
            jobs=2,
            rate_bytes_s=5_000_000,
            state_dir=tmp_path / "s",
        )

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('[[pins]]\nmatch = "a"\nuntil = "soon"', "pins[1].until: expected a date or time such as 2027-06-30"),
            ('[[pins]]\nmatch = "a"\nuntil = 12:00:00', "pins[1].until: expected a date or time"),
            ('[[pins]]\nwhy = "a"', "pins[1].match: is missing"),
            ('[tiering]\ngrace = "x"', "tiering.grace: not a duration: 'x'"),
            ("[tiering]\njobs = 0", "tiering.jobs: Input should be greater than or equal to 1, got 0"),
            ("[tiering]\nrate = 0", "tiering.rate: expected a rate of at least 1 byte"),
            ('[[rules]]\nmatch = "*"\nto = "archive"\nidle_by = "mtime"', "rules[1].idle_by: needs `idle`"),
            ('[[rules]]\nmatch = "*"\neven_if_dearer = true', "rules[1].even_if_dearer: needs `to`"),
            (
                '[tiering]\nmax_break_even = "9d"',
                "tiering.max_break_even: tiers.archive.prices: not given",
            ),
            ("[tiering]\ngrase = 1", "tiering.grase: no such key; did you mean 'grace'"),
            ("[rule]\na = 1", "rule: no such key; did you mean 'rules'"),
        ],
    )
    def test_a_wrong_key_or_value_is_an_error_that_names_it(self, complaint, text, message):
        assert complaint(f"{TIERS}\n{text}").startswith(message)
