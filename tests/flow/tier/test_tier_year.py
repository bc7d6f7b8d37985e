"""The example year of docs/guide/tiers.md with fewer shards: nothing is lost, and planned costs are those of a bill."""

import importlib.util
import sys

import pytest
from tests.support import ROOT

N_SHARDS = 50


@pytest.fixture(scope="module")
def story():
    spec = importlib.util.spec_from_file_location("tier_year", ROOT / "examples" / "tier_year.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["tier_year"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["tier_year"]


@pytest.fixture(scope="module")
def plain(story):
    return story.live(None, N_SHARDS)


@pytest.fixture(scope="module")
def year(story):
    return story.live("GLACIER", N_SHARDS)


def test_nothing_is_lost_in_a_year(year):
    assert year.world.present.any(axis=1).all()


def test_tiers_cost_less_than_standard_storage_alone(year, plain):
    parts = ("storage", "moves", "reads", "writes", "restores")
    assert 0 < year.bill.of(*parts) < 0.8 * plain.bill.of(*parts)


def test_planned_costs_of_moves_are_those_of_the_bill(year):
    assert year.world.promised == pytest.approx(year.bill.of("moves"), rel=0.01)


def test_the_archive_is_restored_once_per_use(story, year):
    days = [day for day, *_ in year.bill.restores]
    assert days == [150, story.EVALUATED_DAY, 300]


def test_the_results_are_those_of_these_rules(story):
    assert story.RULES in (ROOT / "benchmarks" / "results" / "tier_year.md").read_text()
