"""Where two files differ, against a plain comparison of bytes."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.cache import quarantine
from tiercache.cache.quarantine import Difference, difference_of


def compared(tmp_path, bad, good):
    fds = []
    for name, data in (("bad", bad), ("good", good)):
        (tmp_path / name).write_bytes(data)
        fds.append(os.open(tmp_path / name, os.O_RDONLY))
    try:
        return difference_of(*fds)
    finally:
        for fd in fds:
            os.close(fd)


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_what_differs_is_counted_and_found(tmp_path_factory, bad, good):
    patch = pytest.MonkeyPatch()
    patch.setattr(quarantine, "_PIECE_BYTES", 7)
    try:
        found = compared(tmp_path_factory.mktemp("files"), bad, good)
    finally:
        patch.undo()
    offsets = [i for i in range(min(len(bad), len(good))) if bad[i] != good[i]]
    assert (found.n_bad_bytes, found.n_good_bytes, found.n_differ) == (len(bad), len(good), len(offsets))
    assert found.last == (offsets[-1] if offsets else None)
    if offsets:
        assert found.first == offsets[0]
    else:
        assert found.first == (None if len(bad) == len(good) else min(len(bad), len(good)))


def test_it_is_said_in_words(tmp_path):
    assert "equal" in str(compared(tmp_path, b"abc", b"abc"))
    assert str(compared(tmp_path, b"abX", b"abc")) == "1 bytes differed, from offset 2 to 2"
    assert "2 bytes instead of 3" in str(compared(tmp_path, b"ab", b"abc"))


def test_a_file_that_cannot_be_read_on_is_compared_up_to_there(tmp_path, monkeypatch):
    really_read = os.preadv
    monkeypatch.setattr(quarantine, "_PIECE_BYTES", 4)
    broken = (tmp_path / "bad").resolve()

    def read(fd, buffers, offset):
        if offset >= 4 and Path(f"/proc/self/fd/{fd}").readlink() == broken:
            raise OSError(5, "input/output error")
        return really_read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)
    found = compared(tmp_path, b"aXcdefgh", b"abcdefgh")
    assert found == Difference(8, 8, 1, 1, 1, unreadable=4)
    assert "could not be read at offset 4" in str(found)
