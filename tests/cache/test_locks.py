"""The processes that hold locks, as the kernel lists them."""

import fcntl
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiercache.cache import locks
from tiercache.cache.locks import command_of, holders_of, locked_inodes

pytestmark = pytest.mark.skipif(not os.access("/proc/locks", os.R_OK), reason="no /proc/locks here")

HOLD = """
import fcntl, sys
files = [open(path) for path in sys.argv[1:]]
for file in files:
    fcntl.flock(file, fcntl.LOCK_SH)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_lock_is_listed_until_descriptor_and_mapping_are_closed(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 5000)
    with (tmp_path / "a").open("rb") as file:
        inode = os.fstat(file.fileno()).st_ino
        assert inode not in locked_inodes()
        fcntl.flock(file, fcntl.LOCK_SH)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        (tmp_path / "a").unlink()
        assert os.getpid() in locked_inodes()[inode]
    assert inode in locked_inodes(), "the mapping holds the open file, and its lock"
    mapped.close()
    assert inode not in locked_inodes()


def test_holders_are_listed_with_command_and_copies(tmp_path):
    for name in "abc":
        (tmp_path / name).write_bytes(b"x")
    inodes = {name: (tmp_path / name).stat().st_ino for name in "abc"}
    command = [sys.executable, "-c", HOLD, tmp_path / "a", tmp_path / "c"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        (found,) = holders_of(tmp_path, inodes)
        assert (found.pid, found.names) == (child.pid, ("a", "c"))
        assert sys.executable in found.command
        child.stdin.close()
    assert holders_of(tmp_path, inodes) == []


def test_an_inode_number_of_another_disk_has_no_holder(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "a").write_bytes(b"x")
    with (tmp_path / "a").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        inode = os.fstat(file.fileno()).st_ino
        assert holders_of(tmp_path / "here", {"a": inode}) == []
        assert len(holders_of(tmp_path, {"a": inode})) == 1


def test_no_holders_are_listed_without_proc(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_LOCKS", Path(tmp_path / "nothing"))
    assert locked_inodes() == {}
    assert holders_of(tmp_path, {"a": 1}) == []
    assert command_of(1 << 30) == ""
