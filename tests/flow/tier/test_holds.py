"""Holds beside the home: what they protect, for how long, and what happens to damaged ones."""

import pytest

from tiercache.errors import StoreError
from tiercache.store import MemoryStore
from tiercache.tier.stores import HOLDS_FOLDER, put_hold, read_holds, remove_obsolete_holds

NOW_S = 1_800_000_000.0


@pytest.fixture
def home(request):
    return MemoryStore(f"holds-{request.node.name}")


def hold(home, *paths, until_s=100.0, now_s=0.0, why="recalled"):
    return put_hold(home, paths, until_s=NOW_S + until_s, now_s=NOW_S + now_s, why=why)


def test_a_hold_protects_its_paths_until_its_end(home):
    hold(home, "a", "b")
    assert read_holds(home, NOW_S + 99).of("a").paths == ("a", "b")
    assert read_holds(home, NOW_S + 99).of("c") is None
    assert read_holds(home, NOW_S + 100).of("a") is None


def test_the_newest_hold_of_a_path_counts_even_if_it_has_ended(home):
    hold(home, "a", "b", until_s=1000)
    hold(home, "a", until_s=1, now_s=1)
    holds = read_holds(home, NOW_S + 10)
    assert (holds.of("a"), holds.of("b").until_s) == (None, NOW_S + 1000)


def test_only_holds_that_change_nothing_are_removed(home):
    hold(home, "a", "b", until_s=1000)
    hold(home, "a", until_s=1, now_s=1)
    hold(home, "c", until_s=5)
    remove_obsolete_holds(home, NOW_S + 10)
    holds = read_holds(home, NOW_S + 10)
    assert (holds.of("a"), holds.of("c")) == (None, None)
    assert holds.of("b") is not None
    assert len(list(home.list(HOLDS_FOLDER))) == 2
    remove_obsolete_holds(home, NOW_S + 2000)
    assert list(home.list(HOLDS_FOLDER)) == []


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b'{"format": "tiercache-hold", "version": 9, "paths": [], "made_s": 0, "until_s": 1, "why": ""}',
        b'{"format": "tiercache-hold", "version": 1, "paths": 3, "made_s": 0, "until_s": 1, "why": ""}',
        b'{"format": "tiercache-hold", "version": 1, "paths": [], "made_s": 0, "until_s": 1e300, "why": ""}',
        b'{"format": "tiercache-hold", "version": 1, "paths": [], "made_s": NaN, "until_s": 1, "why": ""}',
    ],
)
def test_a_hold_that_cannot_be_read_is_an_error_that_names_it(home, data):
    home.put(f"{HOLDS_FOLDER}x.json", data)
    with pytest.raises(StoreError, match=r"holds/x\.json: this hold cannot be read"):
        read_holds(home, NOW_S)


def test_a_hold_that_is_removed_while_holds_are_read_is_no_error(home):
    hold(home, "a")
    assert not read_holds(home, NOW_S, [f"{HOLDS_FOLDER}gone.json"])
