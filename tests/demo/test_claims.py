"""The demo's claims fail when they should."""

import pytest

from tiercache.demo import events
from tiercache.demo.events import Epoch


def epoch(
    how: str, *, digests: tuple[str, ...] = (), fetched_bytes: int = 0, task: str = "digits", weights: str = "w"
) -> Epoch:
    return Epoch(
        task=task, epoch=3, mode=how, n_samples=10, elapsed_s=1.0, wait_share=0.0, served_bytes=100,
        fetched_bytes=fetched_bytes, hits=1, misses=0, loss=1.0, accuracy=None, digests=digests, weights=weights,
    )  # fmt: skip


def test_a_warm_epoch_without_a_fetched_byte_holds():
    assert events.warm_fetched_nothing([epoch("warm"), epoch("warm")]).holds


@pytest.mark.parametrize("epochs", [[], [epoch("warm"), epoch("warm", fetched_bytes=1)]], ids=["none ran", "one byte"])
def test_a_warm_epoch_that_fetched_or_never_ran_fails(epochs):
    assert not events.warm_fetched_nothing(epochs).holds


def resumed(stopped: tuple[str, ...], rest: tuple[str, ...], whole: tuple[str, ...] = ("a", "b", "c")) -> bool:
    before = [epoch("whole", digests=whole), epoch("stopped", digests=stopped)]
    [claim] = events.resumed_exactly(before, [epoch("resumed", digests=rest)])
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
    [claim] = events.resumed_exactly(before, [epoch("resumed", digests=("b",), weights="other")])
    assert not claim.holds
    assert "other weights" in claim.found


def test_each_task_has_its_own_claim():
    before = [epoch(how, digests=("a",), task=task) for task in ("digits", "python") for how in ("whole", "stopped")]
    assert [c.text.split(":")[0] for c in events.resumed_exactly(before, [])] == ["digits", "python"]


SHARDS = ("python/a.tcs", "python/b.tcs")


def test_a_data_set_that_lies_in_the_archive_alone_is_moved():
    assert events.moved_whole("python", SHARDS, ["python/_tiercache/versions/1"], SHARDS).holds


@pytest.mark.parametrize(
    ("standard", "archive"),
    [((), SHARDS[:1]), (SHARDS, ()), (SHARDS[:1], SHARDS)],
    ids=["one is nowhere", "nothing moved", "one is in both"],
)
def test_a_shard_that_is_missing_or_left_behind_fails(standard, archive):
    assert not events.moved_whole("python", SHARDS, standard, archive).holds


def test_no_shards_at_all_fail():
    assert not events.moved_whole("python", (), (), ()).holds


FILES = {"checkpoints/a/step-1/model.pt": "x", "checkpoints/a/step-2/model.pt": "y"}
OLD, NEW = FILES


def test_files_in_any_tier_are_not_lost():
    assert events.nothing_lost(FILES, {"hot": {NEW: "y"}, "archive": {OLD: "x"}}).holds


@pytest.mark.parametrize(
    "after",
    [{"hot": {NEW: "y"}, "archive": {}}, {"hot": FILES, "archive": {OLD: "z"}}, {"hot": {}}],
    ids=["one is gone", "one copy has other bytes", "all are gone"],
)
def test_a_file_that_is_gone_or_has_other_bytes_fails(after):
    assert not events.nothing_lost(FILES, after).holds


@pytest.mark.parametrize(("hot", "holds"), [({30}, True), ({20}, False), ({20, 30}, False), (set(), False)], ids=str)
def test_the_newest_checkpoint_alone_stays(hot, holds):
    assert events.newest_stayed("a", {10, 20, 30}, hot).holds is holds


def alike(*moved: Epoch) -> bool:
    return all(claim.holds for claim in events.trained_alike([epoch("warm", digests=("a", "b"))], moved))


def test_the_same_batches_from_the_store_hold():
    assert alike(epoch("moved", digests=("a", "b"), fetched_bytes=1))


@pytest.mark.parametrize(
    "moved",
    [
        (),
        (epoch("moved", digests=("a", "b")),),
        (epoch("moved", digests=("a", "c"), fetched_bytes=1),),
        (epoch("moved", digests=("a",), fetched_bytes=1),),
        (epoch("moved", digests=("a", "b"), fetched_bytes=1, weights="other"),),
        (epoch("moved", digests=("a", "b"), fetched_bytes=1, task="another"),),
    ],
    ids=["none ran", "nothing fetched", "another batch", "one missing", "other weights", "another task"],
)
def test_a_training_that_is_not_the_same_fails(moved):
    assert not alike(*moved)
