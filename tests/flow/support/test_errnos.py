"""The shim fails the call that it was told to, of that kind, below that folder, and no other."""

import json
import shutil

import pytest
from tests.support.errnos import KINDS, build_shim, preload
from tests.support.warm_python import run_warm

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler cc")

CALLS = {
    "open": 'open("f").close()',
    "opendir": 'list(os.scandir("."))',
    "read": "os.read(fd, 1)",
    "pread": "os.pread(fd, 1, 0)",
    "write": 'os.write(fd, b"x")',
    "pwrite": 'os.pwrite(fd, b"x", 0)',
    "truncate": "os.ftruncate(fd, 5)",
    "link": 'os.link("f", "g")',
    "unlink": 'os.unlink("f")',
    "rename": 'os.rename("f", "g")',
    "mkdir": 'os.mkdir("d")',
    "chmod": "os.fchmod(fd, 0o600)",
    "chown": "os.fchown(fd, -1, -1)",
    "stat": "os.fstat(fd)",
    "access": 'os.access("f", os.R_OK) or os.unlink("none")',
    "flock": "fcntl.flock(fd, fcntl.LOCK_EX)",
    "lock": "fcntl.lockf(fd, fcntl.LOCK_EX)",
    "sync": "os.fsync(fd)",
    "mmap": "mmap.mmap(fd, 1)",
    "statvfs": 'os.statvfs(".")',
    "fallocate": "os.posix_fallocate(fd, 0, 10)",
    "utime": 'os.utime("f")',
}

PRELUDE = """
import fcntl, json, mmap, os, sqlite3, sys
from pathlib import Path
from tests.support.errnos import FOR_EVER, Position, Shim, count_calls, fail_calls

root = Path(sys.argv[1])
ours, others = root / "ours", root / "ours-not"

def prepare(folder):
    folder.mkdir(exist_ok=True)
    (folder / "f").write_bytes(b"12345")
    return os.open(folder / "f", os.O_RDWR)

def do(folder, call):
    names = {f'"{name}"': repr(str(folder / name)) for name in ("f", "g", "d", "none", ".")}
    for name, path in names.items():
        call = call.replace(name, path)
    return call

fd_ours, fd_others = prepare(ours), prepare(others)
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    return build_shim(tmp_path_factory.mktemp("shim"))


def answer(shim, folder, code):
    done = run_warm(["-c", PRELUDE + code, str(folder)], more=preload(shim))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_each_kind_of_call_fails_below_the_folder_and_nowhere_else(shim, tmp_path):
    assert CALLS.keys() == KINDS.keys()
    code = f"""
answers = {{}}
for kind, call in {CALLS!r}.items():
    def work(tell):
        fd = fd_others
        exec(do(others, call))
        fd = fd_ours
        try:
            exec(do(ours, call))
        except OSError as error:
            tell(str(error.errno))
    failed = fail_calls(work, ours, Position(kind, "EIO", 1))
    answers[kind] = [failed.ended.lines, failed.n_struck, failed.ended.error]
    for folder in (ours, others):
        for name in ("g", "d"):
            path = folder / name
            path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        (folder / "f").touch()
print(json.dumps(answers))"""
    # access() only says yes or no: then unlink() fails, of what is not there.
    assert answer(shim, tmp_path, code) == {kind: [["2" if kind == "access" else "5"], 1, ""] for kind in KINDS}


def test_only_the_nth_call_fails_and_all_are_counted(shim, tmp_path):
    code = """
def work(tell):
    for i in range(5):
        try:
            os.pwrite(fd_ours, b"x", 0)
        except OSError as error:
            tell(f"{i} {error.errno}")
once = fail_calls(work, ours, Position("pwrite", "ENOSPC", 3))
for_ever = fail_calls(work, ours, Position("pwrite", "EDQUOT", 4, FOR_EVER))
never = fail_calls(work, ours, Position("pwrite", "EIO", 6))
counts, _ = count_calls(work, ours)
print(json.dumps([once.ended.lines, for_ever.ended.lines, never.n_struck, counts["pwrite"], once.where]))"""
    once, for_ever, n_never, n_calls, where = answer(shim, tmp_path, code)
    assert once == ["2 28"]
    assert for_ever == ["3 122", "4 122"]
    assert (n_never, n_calls) == (0, 5)
    assert where == f"pwrite64({tmp_path / 'ours' / 'f'})"
