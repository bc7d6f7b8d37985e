"""The demo's input and its training processes; `make demo` runs the whole story."""

import pytest

from tiercache.cli.common import Output
from tiercache.demo import story
from tiercache.demo.story import Story, write_digits
from tiercache.errors import TierCacheError

ENDPOINT = "http://127.0.0.1:1"


def test_digits_are_pngs_in_a_folder_for_each_class(tmp_path):
    write_digits(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == set("0123456789")
    assert len(list(tmp_path.glob("*/*.png"))) == 1797


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, tiercache):
    monkeypatch.setattr(story, "PACKAGES", ("json", "no_such_package"))
    assert "needs no_such_package: pip install 'tiercache-data[demo]'" in tiercache("demo", code=1).err


def test_a_training_process_that_fails_is_an_error_with_the_end_of_its_output(monkeypatch, tmp_path):
    real = story.subprocess.run
    code = "import sys; sys.stdin.read(); sys.exit('it went wrong')"
    monkeypatch.setattr(story.subprocess, "run", lambda program, **options: real([program[0], "-c", code], **options))
    with pytest.raises(TierCacheError, match=r"\(cold\) ended with 1:\nit went wrong"):
        Story(Output(), tmp_path, ENDPOINT).train()


def epoch(*digests, weights="w", fetched_bytes=0):
    return {"digests": list(digests), "weights": weights, "fetched_bytes": fetched_bytes}


CLAIM = "a stopped and resumed epoch equals an uninterrupted one"


@pytest.mark.parametrize(
    ("stopped", "resumed", "failed"),
    [
        (epoch("a"), epoch("b", "c"), []),
        (epoch("a"), epoch("c", "b"), [CLAIM]),
        (epoch("a"), epoch("b"), [CLAIM]),
        (epoch("a"), epoch("b", "c", "d"), [CLAIM]),
        (epoch(), epoch("a", "b", "c"), [CLAIM]),
        (epoch("a"), epoch("b", "c", weights="other"), [CLAIM]),
    ],
    ids=["equal", "other order", "one missing", "one too many", "nothing before", "other weights"],
)
def test_a_resumed_epoch_that_is_not_the_whole_one_fails(monkeypatch, tmp_path, stopped, resumed, failed):
    found = {"cold": [epoch()], "warm": [epoch()], "stop": [epoch("a", "b", "c"), stopped], "resume": [resumed]}
    told = Story(Output(), tmp_path, ENDPOINT)
    monkeypatch.setattr(told, "_run", found.get)
    told.train()
    assert told.failed == failed


@pytest.mark.parametrize(
    ("after", "n_failed"),
    [
        ({"hot": {"new": "y"}, "standard": {}, "archive": {"old": "x", "shard": "s"}}, 0),
        ({"hot": {"new": "y"}, "standard": {"shard": "s"}, "archive": {"old": "x", "shard": "s"}}, 1),
        ({"hot": {"new": "y"}, "standard": {}, "archive": {"shard": "s"}}, 1),
        ({"hot": {"new": "y"}, "standard": {}, "archive": {"old": "z", "shard": "s"}}, 1),
        ({"hot": {"old": "x", "new": "y"}, "standard": {}, "archive": {"old": "x"}}, 2),
    ],
    ids=["as promised", "a shard is in both", "a checkpoint is gone", "other bytes", "nothing moved"],
)
def test_objects_that_are_not_where_the_rules_say_fail(monkeypatch, tmp_path, after, n_failed):
    before = {"hot": {"old": "x", "new": "y"}, "standard": {"shard": "s"}, "archive": {}}
    paths = {
        "old": "checkpoints/digits/step-1/model",
        "new": "checkpoints/digits/step-2/model",
        "shard": "digits/shards/a.tcs",
    }
    states = [{t: {paths[n]: d for n, d in files.items()} for t, files in one.items()} for one in (before, after)]
    told = Story(Output(), tmp_path, ENDPOINT)
    monkeypatch.setattr(told, "_digests", lambda: states.pop(0))
    monkeypatch.setattr(told, "_apply_rules", lambda: None)
    monkeypatch.setattr(told, "_run", lambda _phase: [epoch("a", fetched_bytes=1)])
    told.tier(epoch("a"))
    assert len(told.failed) == n_failed
