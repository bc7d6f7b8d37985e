"""The demo's input, the talk between its processes, and how it ends."""

import pytest

from tiercache.demo import story
from tiercache.demo.events import (
    Claim,
    Epoch,
    Job,
    Note,
    PackedDataSet,
    Step,
    TierContents,
    event_from_line,
    event_to_line,
)
from tiercache.demo.story import WINDOW_BYTES, check_packages, python_windows, write_digits
from tiercache.errors import TierCacheError

JOB = Job(phase="cold", urls={"python": "s3://b/python"}, storage_options={"secret_access_key": "s"}, cache="c",
          cache_bytes=1, folder="f", checkpoints="k")  # fmt: skip


def test_digits_are_pngs_in_a_folder_for_each_class(tmp_path):
    n_train, n_test = write_digits(tmp_path)
    assert (n_train + n_test, n_test) == (1797, 300)
    assert {p.name for p in (tmp_path / "train").iterdir()} == set("0123456789")
    assert len(list(tmp_path.glob("test/*/*.png"))) == n_test


def test_windows_of_python_source_are_the_same_every_time():
    first = python_windows(10_000)
    assert first.shape == (10_000 // (WINDOW_BYTES + 1), WINDOW_BYTES + 1)
    assert first.dtype == "uint8"
    assert (first == python_windows(10_000)).all()


def test_a_missing_package_is_named_with_the_way_to_get_it():
    with pytest.raises(TierCacheError, match=r"needs no_such_package: pip install 'tiercache\[demo\]'"):
        check_packages(("json", "no_such_package"))


@pytest.mark.parametrize(
    "event",
    [
        Step("a"),
        Note("b"),
        PackedDataSet("n", "u", "c", 1, 2, 3, 4),
        Epoch("t", 1, "cold", 1, 1.0, 0.5, 1, 2, 3, 4, 0.5, None, ("x", "y"), "w"),
        Claim("c", True, "f"),
        TierContents("before", "hot", 1, 2, 0.5),
    ],
    ids=lambda event: type(event).__name__,
)
def test_events_survive_the_way_between_processes(event):
    assert event_from_line(event_to_line(event)) == event


def test_a_job_survives_the_way_between_processes():
    assert Job.from_json(JOB.to_json()) == JOB


def program(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """The training process does code instead."""
    real = story.subprocess.Popen

    def popen(command, **options):
        return real([command[0], "-c", code], **options)

    monkeypatch.setattr(story.subprocess, "Popen", popen)


def test_a_training_process_that_fails_is_an_error_with_its_last_words(monkeypatch):
    program(monkeypatch, "import sys; sys.stdin.read(); sys.exit('it went wrong')")
    with pytest.raises(TierCacheError, match=r"\(cold\) ended with 1:\nit went wrong"):
        list(story.run_job(JOB))


def test_closing_the_events_ends_the_training_process(monkeypatch):
    line = event_to_line(Note("begun"))
    program(
        monkeypatch, f"import sys, threading; sys.stdin.read(); print({line!r}, flush=True); threading.Event().wait()"
    )
    events = story.run_job(JOB)
    assert next(events) == Note("begun")
    events.close()  # a process that still runs would be a ResourceWarning
