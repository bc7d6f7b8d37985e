"""Counters that threads share, and what a forked child can do with them."""

import threading

import pytest
from tests.support.forks import ForkedChild

from tiercache.stats import Counters

# From Python 3.12 on: what the test is about.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


class SlowName(str):
    """A name whose look-up, which happens in the middle of an addition, stops until go_on is set."""

    def __new__(cls, text: str):
        name = super().__new__(cls, text)
        name.is_asked, name.go_on = threading.Event(), threading.Event()
        return name

    def __hash__(self) -> int:
        self.is_asked.set()
        assert self.go_on.wait(60)
        return super().__hash__()


def test_a_child_forked_in_the_middle_of_an_addition_counts_on():
    mine, others, name = Counters("requests"), Counters("requests"), SlowName("requests")
    adding = threading.Thread(target=mine.add, args=(name,))
    adding.start()
    assert name.is_asked.wait(60)

    def count(tell) -> None:
        mine.add("requests")
        others.add("requests", 2)
        tell(f"{mine['requests']} {others.snapshot()['requests']}")

    child = ForkedChild(count, with_threads=True)
    name.go_on.set()
    adding.join()
    ended = child.wait(60)
    assert (ended.code, ended.lines) == (0, ("1 2",)), ended.error
    assert mine["requests"] == 1


def test_an_addition_counts_in_the_total_too():
    total = Counters()
    Counters("requests", total=total).add("requests", 3)
    assert total.snapshot() == {"requests": 3}
