"""The SIGBUS guard beside other handlers: errors inside a guard are ours, all others are passed on."""

import signal
import subprocess
import sys

import pytest

SETUP = """
import faulthandler, mmap, sys
import numpy as np
from tiercache._native import gather
from tiercache._native.checksum import crc32c

with open(sys.argv[1], "w+b") as file:
    file.truncate(1 << 20)
    mapping = mmap.mmap(file.fileno(), 0)
    file.truncate(4096)
whole = np.frombuffer(mapping, np.uint8)

def sum_it():
    crc32c(whole)

def gather_it():
    gather.offsets_ok(whole.ctypes.data + 65536, 8, 0)

def fails(call):
    try:
        call()
    except OSError:
        return
    raise AssertionError("read beyond the end")
"""


def run(tmp_path, code):
    return subprocess.run(
        [sys.executable, "-c", SETUP + code, str(tmp_path / "file")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("order", ["sum_it, gather_it", "gather_it, sum_it"])
def test_the_guard_works_after_others_install_a_handler(tmp_path, order):
    code = f"""
for round in range(3):
    for call in ({order}):
        fails(call)
        faulthandler.enable()
        fails(call)
    for call in ({order}):
        fails(call)
    faulthandler.disable()
    for call in ({order}):
        fails(call)
"""
    done = run(tmp_path, code)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("first", ["pass", "faulthandler.enable()"])
def test_a_sigbus_outside_the_guard_reaches_faulthandler_and_ends_the_process(tmp_path, first):
    code = f"""
{first}
fails(sum_it)
fails(gather_it)
faulthandler.enable()
fails(sum_it)
fails(gather_it)
fails(sum_it)
whole[65536]
"""
    done = run(tmp_path, code)
    assert done.returncode == -signal.SIGBUS
    assert done.stderr.count("Fatal Python error: Bus error") == 1
