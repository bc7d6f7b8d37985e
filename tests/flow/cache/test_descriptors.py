"""No descriptor stays open after a failure: it would be missing until the process ends."""

import contextlib
import errno
import fcntl
import itertools
import os

import numpy as np
import pytest
from tests.support.cache_world import open_below, write_units

from tiercache.cache import copy_file
from tiercache.cache.copy_file import continue_part, create_part, open_part
from tiercache.cache.folder import Folder

NAME, OTHER, UNIT = "0" * 40, "1" * 40, 4096
N_BYTES = 3 * UNIT
STRUCK = [(os, name) for name in ("open", "dup", "fstat", "pread", "pwrite", "ftruncate")]
STRUCK += [(fcntl, "flock")]


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "cache")


@pytest.fixture
def part(folder):
    part = create_part(folder, NAME, N_BYTES)
    write_units(part, 0, np.ones(UNIT, np.uint8))
    yield part
    part.close()


def refuse(*_, **__):
    raise OSError(errno.EMFILE, "as at the limit of open files")


@contextlib.contextmanager
def failing(monkeypatch, n):
    """The n-th system call fails; gives the names of all that were made."""
    made = []

    def struck(name, real):
        def call(*args, **options):
            made.append(name)
            return refuse() if len(made) == n else real(*args, **options)

        return call

    with monkeypatch.context() as patch:
        for module, name in STRUCK:
            patch.setattr(module, name, struck(name, getattr(module, name)))
        yield made


def check_each_call(monkeypatch, folder, work):
    """Have each system call of work() fail in turn: what is open before is open after, and nothing else."""
    before = open_below(folder.root.parent)
    for n in itertools.count(1):
        with failing(monkeypatch, n) as made, contextlib.suppress(OSError):
            opened = work()
            if opened is not None:
                opened.close()
        assert open_below(folder.root.parent) == before, f"the last of {made[:n]} failed"
        if len(made) < n:
            return


def test_a_system_call_that_fails_leaves_nothing_open(folder, part, monkeypatch):
    def of_an_earlier_boot():
        with monkeypatch.context() as patch:
            patch.setattr(copy_file, "boot_id", lambda: "another-boot")
            return continue_part(folder, NAME, N_BYTES)

    def make_anew():
        for kind in (".part", ".map"):
            (folder.copies / f"{OTHER}{kind}").unlink(missing_ok=True)
        return create_part(folder, OTHER, N_BYTES)

    with contextlib.closing(part.hold()) as held:
        check_each_call(monkeypatch, folder, held.dup)
    check_each_call(monkeypatch, folder, part.hold)
    check_each_call(monkeypatch, folder, lambda: open_part(folder, NAME, N_BYTES))
    check_each_call(monkeypatch, folder, lambda: continue_part(folder, NAME, N_BYTES))
    check_each_call(monkeypatch, folder, of_an_earlier_boot)
    check_each_call(monkeypatch, folder, make_anew)
