"""Cost formulas: figures that were worked out by hand, and sums over single objects."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache import prices
from tiercache.prices import Prices, Sizes, price_table

DAY_S = 86_400.0


def sizes(*copies: tuple[int, ...]) -> Sizes:
    """Of copies, each given as the sizes of its objects."""
    return Sizes(
        np.array([len(copy) for copy in copies], np.int64),
        np.array([sum(copy) for copy in copies], np.int64),
        np.array([min(copy) for copy in copies], np.int64),
    )


def price(name: str) -> Prices:
    return price_table()[1][f"aws:us-east-1:{name}"]


def test_a_part_of_the_overhead_is_billed_as_standard_storage():
    month = prices.month_dollars(price("GLACIER"), sizes((0,)))
    assert month == pytest.approx([(32768 * 0.0036 + 8192 * 0.023) / 2**30])


def test_an_early_deletion_costs_the_rest_of_the_minimum_duration():
    """64 MB in DEEP_ARCHIVE for its 180 days cost $0.00038 in all: half of it when they leave after 90."""
    fee = prices.early_dollars(price("DEEP_ARCHIVE"), sizes((64_000_000,), (64_000_000,)), np.array([90, 181]) * DAY_S)
    assert fee[0] == pytest.approx(((64_000_000 + 32768) * 0.00099 + 8192 * 0.023) / 2**30 * 3)
    assert fee[1] == 0


@pytest.mark.parametrize("name", ["GLACIER", "DEEP_ARCHIVE"])
def test_parts_of_uploads_into_archive_classes_are_billed_as_standard_requests(name):
    def cost(n_bytes):
        return prices.copy_dollars(Prices("disk"), price(name), sizes((n_bytes,)), leaves=False, streams=True)[0]

    of_class = price(name).put_1000
    assert cost(8 << 20) == pytest.approx(of_class / 1000), "one part is one PUT"
    assert cost(800 << 20) == pytest.approx((of_class + 101 * 0.005) / 1000)


def test_a_restore_also_pays_for_its_temporary_copy():
    speed = price("GLACIER").restore["standard"]
    cost = prices.restore_dollars(price("GLACIER"), speed, np.array([1 << 30]), days=3)
    assert cost == pytest.approx([0.01 + 0.05 / 1000 + 0.023 * 3 / 30])


@pytest.mark.parametrize(
    ("n_bytes", "days"), [(128 << 10, 19 * 30), (1 << 20, 2.3 * 30), (16 << 20, 4.1), (64 << 20, 1.0)]
)
def test_the_break_even_of_a_move_to_deep_archive_matches_published_figures(n_bytes, days):
    """$0.05 for 1,000 transitions against $0.022 a GB and month saved, with nothing beside the object."""
    bare = Prices("", store_gb_month=0.00099, transition_1000=0.05)
    once = prices.reclass_dollars(price("STANDARD"), bare, sizes((n_bytes,)))
    saving = prices.month_dollars(price("STANDARD"), sizes((n_bytes,))) - prices.month_dollars(bare, sizes((n_bytes,)))
    assert prices.break_even_days(once, saving)[0] == pytest.approx(days, rel=0.1)


copies = st.lists(st.lists(st.integers(0, 500), min_size=1, max_size=5).map(tuple), min_size=1, max_size=6)


@given(copies, st.integers(0, 300), st.integers(0, 50))
def test_billed_bytes_are_exact_for_one_object_and_a_lower_bound_for_many(given_copies, least, beside):
    bare = Prices("", min_bytes=least, overhead_bytes=beside)
    found = prices.billed_bytes(bare, sizes(*given_copies)).tolist()
    for n_bytes, copy in zip(found, given_copies, strict=True):
        exact = sum(max(size, least) + beside for size in copy)
        assert sum(copy) <= n_bytes <= exact
        if len(copy) == 1 or min(copy) >= least or max(copy) <= least:
            assert n_bytes == exact
