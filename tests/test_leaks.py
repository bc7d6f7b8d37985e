"""The watch for leaks in conftest.py sees what it is there for."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

LEAKS = {
    "thread": ("import threading", "threading.Thread(target=threading.Event().wait, name='ours', daemon=True).start()"),
    "file": ("import os", "os.open('a', os.O_CREAT)"),
    "pipe": ("import os", "os.pipe()"),
    "shared memory": ("import os", "open(f'/dev/shm/torch_{os.getpid()}_1', 'w').close()"),
    "socket": ("import gc, socket", "socket.socket(), gc.collect()"),
}


def run_tests(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(HERE / "conftest.py", folder)
    shutil.copy(HERE.parent / "pyproject.toml", folder)
    (folder / "test_it.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("leak", LEAKS)
def test_a_test_that_leaves_something_behind_fails(leak, tmp_path):
    imports, statement = LEAKS[leak]
    tidy = "import glob, os; [os.unlink(p) for p in glob.glob(f'/dev/shm/torch_{os.getpid()}_*')]"
    done = run_tests(tmp_path, f"{imports}\ndef test_it():\n    {statement}\ndef teardown_module():\n    {tidy}\n")
    assert done.returncode == 1, done.stdout
    assert "left behind" in done.stdout or "ResourceWarning" in done.stdout


def test_a_test_that_cleans_up_passes(tmp_path):
    code = """
import os, threading

def test_it():
    thread = threading.Thread(target=print)
    thread.start()
    os.close(os.open("a", os.O_CREAT))
"""
    assert run_tests(tmp_path, code).returncode == 0
