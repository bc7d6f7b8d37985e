"""The demo's claims fail when they should."""

import pytest

from tiercache.demo import claims
from tiercache.demo.events import Epoch


def epoch(
    how: str, *, digests: tuple[str, ...] = (), fetched_bytes: int = 0, task: str = "digits", weights: str = "w"
) -> Epoch:
    return Epoch(
        task=task, epoch=3, how=how, n_samples=10, elapsed_s=1.0, wait_share=0.0, served_bytes=100,
        fetched_bytes=fetched_bytes, hits=1, misses=0, loss=1.0, accuracy=None, digests=digests, weights=weights,
    )  # fmt: skip


def test_a_warm_epoch_without_a_fetched_byte_holds():
    assert claims.warm_fetched_nothing([epoch("warm"), epoch("warm")]).holds


@pytest.mark.parametrize("epochs", [[], [epoch("warm"), epoch("warm", fetched_bytes=1)]], ids=["none ran", "one byte"])
def test_a_warm_epoch_that_fetched_or_never_ran_fails(epochs):
    assert not claims.warm_fetched_nothing(epochs).holds


@pytest.mark.parametrize(("sent_bytes", "holds"), [(0, True), (1000, True), (1001, False)])
def test_what_the_store_sent_is_bounded_by_the_version_files(sent_bytes, holds):
    assert claims.store_sent_versions_only(sent_bytes, 1000).holds is holds


def resumed(stopped: tuple[str, ...], rest: tuple[str, ...], whole: tuple[str, ...] = ("a", "b", "c")) -> bool:
    before = [epoch("whole", digests=whole), epoch("stopped", digests=stopped)]
    [claim] = claims.resumed_exactly(before, [epoch("resumed", digests=rest)])
    return claim.holds


def test_two_parts_that_are_the_whole_hold():
    assert resumed(("a",), ("b", "c"))


@pytest.mark.parametrize(
    ("stopped", "rest"),
    [
        (("a",), ("c", "b")),
        (("a",), ("b",)),
        (("a",), ("a", "b", "c")),
        (("a",), ("b", "c", "d")),
        ((), ("a", "b", "c")),
        (("a", "b", "c"), ()),
    ],
    ids=["other order", "one missing", "from the start", "one too many", "nothing before", "nothing after"],
)
def test_parts_that_are_not_the_whole_fail(stopped, rest):
    assert not resumed(stopped, rest)


def test_another_model_at_the_end_fails():
    before = [epoch("whole", digests=("a", "b")), epoch("stopped", digests=("a",))]
    [claim] = claims.resumed_exactly(before, [epoch("resumed", digests=("b",), weights="other")])
    assert not claim.holds
    assert "other weights" in claim.found


def test_each_task_has_its_own_claim():
    before = [epoch(how, digests=("a",), task=task) for task in ("digits", "python") for how in ("whole", "stopped")]
    assert [c.text.split(":")[0] for c in claims.resumed_exactly(before, [])] == ["digits", "python"]
