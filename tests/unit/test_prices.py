"""The price table, and tables that a tier has of its own."""

import re
from dataclasses import replace

import pytest

from tiercache.prices import (
    FREE,
    Prices,
    RestorePrice,
    named_prices,
    parse_prices,
    price_notes,
    price_table,
)
from tiercache.tier.rules import Tier

S3 = {"STANDARD", "INTELLIGENT_TIERING", "STANDARD_IA", "ONEZONE_IA", "GLACIER_IR", "GLACIER", "DEEP_ARCHIVE"}


def tier(url="s3://bucket/x", prices=None):
    return Tier(name="cold", url=url, prices=prices)


class TestTheTable:
    def test_the_table_has_a_date_and_notes_that_its_figures_are_secondary(self):
        dated, _ = price_table()
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", dated)
        assert "Secondary figures" in " ".join(price_notes())

    def test_the_table_has_the_classes_of_s3_google_and_azure(self):
        _, table = price_table()
        names = {name.partition(":")[0]: set() for name in table}
        for name in table:
            provider, _, storage_class = name.split(":")
            names[provider].add(storage_class)
        assert names == {
            "aws": S3 | {"EXPRESS_ONEZONE"},
            "gcs": {"STANDARD", "NEARLINE", "COLDLINE", "ARCHIVE"},
            "azure": {"HOT", "COOL", "COLD", "ARCHIVE"},
        }

    def test_a_colder_class_costs_less_to_store_and_more_to_write(self):
        """Within each provider, in the order of the file: a price with a slipped decimal point stands out."""
        chains = [
            ["aws:us-east-1:" + name for name in ("STANDARD", "STANDARD_IA", "GLACIER_IR", "GLACIER", "DEEP_ARCHIVE")],
            ["gcs:us-central1:" + name for name in ("STANDARD", "NEARLINE", "COLDLINE", "ARCHIVE")],
            ["azure:eastus2:" + name for name in ("HOT", "COOL", "COLD", "ARCHIVE")],
        ]
        for chain in chains:
            prices = [named_prices(name) for name in chain]
            kept = [p.store_gb_month for p in prices]
            days = [p.min_days for p in prices]
            assert kept == sorted(kept, reverse=True)
            assert days == sorted(days)
        written = [named_prices(name).put_1000 for name in chains[0]]
        assert written == sorted(written)

    def test_faster_restores_cost_more(self):
        _, table = price_table()
        restored = {name for name, prices in table.items() if prices.restore}
        assert restored == {"aws:us-east-1:GLACIER", "aws:us-east-1:DEEP_ARCHIVE", "azure:eastus2:ARCHIVE"}
        for name in restored:
            by_hours = sorted(table[name].restore.values(), key=lambda price: price.hours)
            assert [p.gb for p in by_hours] == sorted((p.gb for p in by_hours), reverse=True)

    def test_an_unknown_name_is_an_error_with_similar_names(self):
        with pytest.raises(ValueError, match=r"no prices are called 'aws:us-east-1:GLACER'; did you mean .*GLACIER'"):
            named_prices("aws:us-east-1:GLACER")
        with pytest.raises(ValueError, match=r"'x'; there are aws:us-east-1:STANDARD, .*; or write a table"):
            named_prices("x")


class TestATableOfOnesOwn:
    def test_an_own_table_has_the_same_keys(self):
        given = {
            "store_gb_month": 0.004,
            "get_1000": 0.01,
            "put_1000": 0.02,
            "retrieve_gb": 0.03,
            "min_days": 90,
            "min_bytes": 131072,
            "restore": {"bulk": {"gb": 0.1, "hours": 9}},
        }
        assert parse_prices("mine", given) == Prices(
            "mine", 0.004, 0.02, 0.01, 0.02, 0.03, 0.0, 90.0, 131072, 0, {"bulk": RestorePrice(0.1, 0.0, 9.0)}
        )

    def test_an_own_table_may_start_from_named_prices(self):
        base = named_prices("aws:us-east-1:GLACIER")
        found = parse_prices("mine", {"like": "aws:us-east-1:GLACIER", "store_gb_month": 0.003})
        assert found == replace(base, name="aws:us-east-1:GLACIER (mine)", store_gb_month=0.003)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({}, "store_gb_month is missing"),
            ({"store_gb_month": -1}, "store_gb_month: expected a number that is not negative, got -1"),
            ({"store_gb_month": True}, "store_gb_month: expected a number"),
            ({"store_gb_month": float("nan")}, "store_gb_month: expected a number"),
            ({"store_gb_month": 1, "min_bytes": 0.5}, "min_bytes: expected whole bytes, got 0.5"),
            ({"store_gb_month": 1, "get_100": 1}, "get_100: no such price; did you mean 'get_1000'"),
            ({"store_gb_month": 1, "restore": 3}, "restore: expected a table of speeds, got 3"),
            (
                {"store_gb_month": 1, "restore": {"fast": {}}},
                "restore.fast: no such speed; there are expedited, standard",
            ),
            ({"store_gb_month": 1, "restore": {"bulk": 3}}, "restore.bulk: expected a table with gb, per_1000, hours"),
            ({"store_gb_month": 1, "restore": {"bulk": {"g": 1}}}, "restore.bulk.g: no such price; there are gb"),
            ({"store_gb_month": 1, "restore": {"bulk": {"gb": "x"}}}, "restore.bulk.gb: expected a number"),
            ({"like": "aws"}, "no prices are called 'aws'"),
            ({"like": 3}, "like: expected a name of prices, got 3"),
        ],
    )
    def test_an_invalid_key_or_value_is_named(self, given, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            parse_prices("mine", given)


class TestOfATier:
    def test_a_local_path_is_free_unless_it_has_prices(self):
        assert tier("/nvme").known_prices == tier("file:///nvme").known_prices == FREE
        assert tier("/nvme", {"store_gb_month": 0.1}).known_prices.store_gb_month == 0.1

    def test_an_own_table_is_named_after_its_tier(self):
        assert tier(prices={"store_gb_month": 1}).known_prices.name == "tiers.cold"
