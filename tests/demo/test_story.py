"""The demo's input, and its training processes."""

import json
from dataclasses import asdict

import pytest

from tiercache.demo import story
from tiercache.demo.results import Epoch, Job
from tiercache.demo.story import WINDOW_BYTES, check_packages, python_windows, write_digits
from tiercache.errors import TierCacheError

JOB = Job("cold", {"python": "s3://b/python"}, {"secret_access_key": "s"}, "cache", 1, "folder", "checkpoints")


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


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    with pytest.raises(TierCacheError, match=r"needs no_such_package: pip install 'tiercache-data\[demo\]'"):
        check_packages(("json", "no_such_package"))


def run_instead(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Make the training process run this code."""
    real = story.subprocess.Popen
    monkeypatch.setattr(story.subprocess, "Popen", lambda command, **options: real([command[0], "-c", code], **options))


def test_a_training_process_that_fails_is_an_error_with_the_end_of_its_output(monkeypatch):
    run_instead(monkeypatch, "import sys; sys.stdin.read(); sys.exit('it went wrong')")
    with pytest.raises(TierCacheError, match=r"\(cold\) ended with 1:\nit went wrong"):
        list(story.run_job(JOB))


def test_closing_the_epochs_of_a_training_process_ends_it(monkeypatch):
    epoch = Epoch("digits", 1, "cold", 10, 1.0, 0, 1.0, 0.5, None, ["a", "b"], "w")
    line = json.dumps(asdict(epoch))
    code = f"import sys, threading; sys.stdin.read(); print({line!r}, flush=True); threading.Event().wait()"
    run_instead(monkeypatch, code)
    epochs = story.run_job(JOB)
    assert next(epochs) == epoch
    epochs.close()  # a process that still runs would be a ResourceWarning
