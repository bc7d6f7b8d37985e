"""The watch for leaks in conftest.py sees what it is there for."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from tests.support import ROOT

TESTS = """
import gc, glob, os, socket, threading

def test_a_thread():
    threading.Thread(target=threading.Event().wait, name="ours", daemon=True).start()

def test_a_file():
    os.open("a", os.O_CREAT)

def test_a_pipe():
    os.pipe()

def test_shared_memory():
    open(f"/dev/shm/torch_{os.getpid()}_1", "w").close()

def test_a_socket():
    socket.socket(), gc.collect()

def test_nothing():
    thread = threading.Thread(target=print)
    thread.start()
    os.close(os.open("a", os.O_CREAT))

def teardown_module():
    for path in glob.glob(f"/dev/shm/torch_{os.getpid()}_*"):
        os.unlink(path)
"""


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    """Pytest's lines about TESTS under our conftest.py, which here waits less for a thread to end."""
    folder = tmp_path_factory.mktemp("tests")
    conftest = re.sub(r"^pytest_plugins.*", "", (ROOT / "tests" / "conftest.py").read_text(), flags=re.M)
    (folder / "conftest.py").write_text(re.sub(r"JOIN_S = .*", "JOIN_S = 0.5", conftest))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"]
    environment = os.environ | {"COLUMNS": "300"}  # pytest cuts its lines to the width
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return [line for line in done.stdout.splitlines() if line.startswith(("ERROR ", "FAILED "))]


@pytest.mark.parametrize(
    ("test", "said"),
    {
        "a_thread": "left behind: thread ours",
        "a_file": "left behind: descriptor",
        "a_pipe": "left behind: descriptor",
        "shared_memory": "left behind: shared memory",
        "a_socket": "Exception ignored in: <socket",
    }.items(),
)
def test_a_test_that_leaves_something_behind_fails(summary, test, said):
    (line,) = (line for line in summary if f"::test_{test} " in line)
    assert said in line


def test_a_test_that_cleans_up_passes(summary):
    assert not any("test_nothing" in line for line in summary)
