"""Objects that are corrupt at their source are remembered for some time, whatever the clock does."""

import os
import time

import pytest

from tiercache.cache.folder import POISON_S, Folder

NAME = "a" * 40
BAD = {"url": "s3://bucket/x", "expected": 1, "found": 2}


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "c")


def test_an_object_that_is_corrupt_at_its_source_is_remembered(folder):
    assert folder.corrupt_source(NAME) is None
    folder.add_corrupt_source(NAME, **BAD)
    assert folder.corrupt_source(NAME) == BAD
    assert folder.corrupt_sources() == {NAME: BAD}


def test_a_cached_object_does_not_count_as_corrupt_at_its_source(folder):
    folder.add_corrupt_source(NAME, **BAD)
    (folder.copies / NAME).write_bytes(b"right")
    assert folder.corrupt_sources() == {}


@pytest.mark.parametrize(("jump_s", "holds"), [(POISON_S - 5, True), (POISON_S + 5, False), (-60, True), (-9e6, False)])
def test_a_record_is_valid_for_ten_minutes_even_if_the_clock_is_set_back(folder, monkeypatch, jump_s, holds):
    folder.add_corrupt_source(NAME, **BAD)
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + jump_s)
    assert (folder.corrupt_source(NAME) is not None) is holds
    folder.sweep_corrupt_sources()
    assert (folder.poison / f"{NAME}.json").exists() is holds


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 0}', '{"url": 1, "expected": "x", "found": 2}'])
def test_an_invalid_record_is_ignored(folder, text):
    (folder.poison / f"{NAME}.json").write_text(text)
    assert folder.corrupt_source(NAME) is None
    assert folder.corrupt_sources() == {}


def test_unknown_files_are_left_alone_and_links_are_not_followed(folder, tmp_path):
    (folder.poison / "readme.json").write_text("x")
    (tmp_path / "target").write_text("x")
    (folder.poison / f"{NAME}.json").symlink_to(tmp_path / "target")
    assert folder.corrupt_source(NAME) is None
    os.utime(folder.poison / "readme.json", (0, 0))
    folder.sweep_corrupt_sources()
    assert (folder.poison / "readme.json").exists()
    folder.add_corrupt_source(NAME, **BAD)
    assert folder.corrupt_source(NAME) == BAD
    assert (tmp_path / "target").read_text() == "x"
