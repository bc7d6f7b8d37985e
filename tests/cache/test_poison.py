"""What is known to be bad at its source, for a while, whatever the clock does."""

import os
import time

import pytest

from tiercache.cache import corrupt_sources as sources
from tiercache.cache.corrupt_sources import POISON_S, CorruptSource
from tiercache.cache.folder import Folder

NAME = "a" * 40
BAD = CorruptSource("s3://bucket/x", 1, 2)


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "c")


def test_what_is_remembered_is_known_until_it_is_forgotten(folder):
    assert sources.corrupt_source_of(folder, NAME) is None
    sources.record_corrupt_source(folder, NAME, BAD)
    assert sources.corrupt_source_of(folder, NAME) == BAD
    assert sources.corrupt_sources(folder) == {NAME: BAD}
    assert sources.forget_corrupt_source(folder, NAME) is True
    assert sources.forget_corrupt_source(folder, NAME) is False
    assert sources.corrupt_sources(folder) == {}


def test_an_object_that_was_mended_and_is_here_is_not_called_bad_any_more(folder):
    sources.record_corrupt_source(folder, NAME, BAD)
    (folder.copies / NAME).write_bytes(b"right")
    assert sources.corrupt_sources(folder) == {}


@pytest.mark.parametrize(("jump_s", "holds"), [(POISON_S - 5, True), (POISON_S + 5, False), (-60, True), (-9e6, False)])
def test_it_holds_for_ten_minutes_and_not_for_ever_where_the_clock_is_set_back(folder, monkeypatch, jump_s, holds):
    sources.record_corrupt_source(folder, NAME, BAD)
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + jump_s)
    assert (sources.corrupt_source_of(folder, NAME) is not None) is holds
    sources.sweep_corrupt_sources(folder)
    assert (folder.poison / f"{NAME}.json").exists() is holds


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 0}', '{"url": 1, "expected": "x", "found": 2}'])
def test_a_torn_note_says_nothing(folder, text):
    (folder.poison / f"{NAME}.json").write_text(text)
    assert sources.corrupt_source_of(folder, NAME) is None
    assert sources.corrupt_sources(folder) == {}


def test_strangers_files_and_links_are_left_alone(folder, tmp_path):
    (folder.poison / "readme.json").write_text("x")
    (tmp_path / "target").write_text("x")
    (folder.poison / f"{NAME}.json").symlink_to(tmp_path / "target")
    assert sources.corrupt_source_of(folder, NAME) is None
    os.utime(folder.poison / "readme.json", (0, 0))
    sources.sweep_corrupt_sources(folder)
    assert (folder.poison / "readme.json").exists()
    sources.record_corrupt_source(folder, NAME, BAD)
    assert sources.corrupt_source_of(folder, NAME) == BAD
    assert (tmp_path / "target").read_text() == "x"
