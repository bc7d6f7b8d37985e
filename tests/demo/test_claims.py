"""The demo's claims fail when they should."""

import pytest

from tiercache.demo import results
from tiercache.demo.results import Epoch, KilledTraining


def epoch(*digests: str, fetched_bytes: int = 0, weights: str = "w") -> Epoch:
    return Epoch("digits", 3, "mode", 10, 1.0, fetched_bytes, 1.0, 1.0, None, list(digests), weights)


def test_a_warm_epoch_must_fetch_no_byte():
    assert results.warm_fetched_nothing([epoch(), epoch()]).holds
    assert not results.warm_fetched_nothing([epoch(), epoch(fetched_bytes=1)]).holds
    assert not results.warm_fetched_nothing([]).holds


def test_two_parts_that_have_the_batches_of_the_whole_epoch_equal_it():
    assert results.resumed_exactly(epoch("a", "b", "c"), epoch("a"), epoch("b", "c")).holds


@pytest.mark.parametrize(
    ("stopped", "resumed"),
    [("a", "cb"), ("a", "b"), ("a", "abc"), ("a", "bcd"), ("", "abc"), ("abc", "")],
    ids=["other order", "one missing", "from the start", "one too many", "nothing before", "nothing after"],
)
def test_two_parts_that_do_not_have_the_batches_of_the_whole_epoch_fail(stopped, resumed):
    assert not results.resumed_exactly(epoch("a", "b", "c"), epoch(*stopped), epoch(*resumed)).holds


def test_a_resumed_epoch_that_leaves_another_model_fails():
    claim = results.resumed_exactly(epoch("a", "b"), epoch("a"), epoch("b", weights="other"))
    assert not claim.holds
    assert "other weights" in claim.found


SHARDS = ("python/a.tcs", "python/b.tcs")


@pytest.mark.parametrize(
    ("standard", "archive", "holds"),
    [((), SHARDS, True), ((), SHARDS[:1], False), (SHARDS, (), False), (SHARDS[:1], SHARDS, False)],
    ids=["all in the archive", "one is nowhere", "nothing moved", "one is in both"],
)
def test_all_shards_must_be_in_the_archive_tier_alone(standard, archive, holds):
    assert results.all_archived("python", SHARDS, ["python/_tiercache/v", *standard], archive).holds is holds
    assert not results.all_archived("python", (), standard, archive).holds


FILES = {"checkpoints/a/step-1/model.pt": "x", "checkpoints/a/step-2/model.pt": "y"}
OLD, NEW = FILES


@pytest.mark.parametrize(
    ("after", "holds"),
    [
        ({"hot": {NEW: "y"}, "archive": {OLD: "x"}}, True),
        ({"hot": {NEW: "y"}, "archive": {}}, False),
        ({"hot": FILES, "archive": {OLD: "z"}}, False),
        ({"hot": {}}, False),
    ],
    ids=["in two tiers", "one is gone", "one copy has other bytes", "all are gone"],
)
def test_every_checkpoint_file_must_be_in_some_tier_with_its_bytes(after, holds):
    assert results.nothing_lost(FILES, after).holds is holds


@pytest.mark.parametrize(("hot", "holds"), [({30}, True), ({20}, False), ({20, 30}, False), (set(), False)], ids=str)
def test_the_newest_checkpoint_alone_must_stay_in_the_hot_tier(hot, holds):
    assert results.newest_stayed("a", {10, 20, 30}, hot).holds is holds


@pytest.mark.parametrize(
    ("after", "holds"),
    [
        (epoch("a", "b", fetched_bytes=1), True),
        (epoch("a", "b"), False),
        (epoch("a", "c", fetched_bytes=1), False),
        (epoch("a", fetched_bytes=1), False),
        (epoch("a", "b", fetched_bytes=1, weights="other"), False),
    ],
    ids=["equal", "nothing fetched", "another batch", "one missing", "other weights"],
)
def test_training_on_moved_data_must_have_the_same_batches_from_the_store(after, holds):
    assert results.trained_alike(epoch("a", "b"), after).holds is holds


@pytest.mark.parametrize(
    ("found", "holds"),
    [
        (KilledTraining(20, "w", "w"), True),
        (KilledTraining(20, "w", "other"), False),
        (KilledTraining(19, "w", "w"), False),
        (KilledTraining(20, "", ""), False),
    ],
    ids=["equal", "other weights", "too few kills", "no weights"],
)
def test_a_killed_training_must_end_with_the_same_weights_after_all_kills(found, holds):
    assert results.killed_alike(found, 20).holds is holds
