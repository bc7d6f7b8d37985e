"""Fault injection: the n-th system call of a kind below one folder fails, in our code and in SQLite.

A process is started with the shim library in LD_PRELOAD (preload). It forks a child for each position, which arms the
shim and works.
"""

from __future__ import annotations

import ctypes
import errno
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support.forks import DEADLINE_S, ChildEnd, SendLine, run_forked

_FULL, _DISK, _RIGHTS = ("ENOSPC", "EDQUOT"), ("EIO",), ("EACCES", "EROFS")

# Errors of each kind of call, in the order of the enum in errnos.c.
KINDS: dict[str, tuple[str, ...]] = {
    "open": ("EMFILE", "EACCES", "ENOSPC", "EIO", "EROFS"),
    "opendir": ("EMFILE", "EACCES", "EIO"),
    "read": _DISK,
    "pread": _DISK,
    "write": (*_FULL, *_DISK),
    "pwrite": (*_FULL, *_DISK),
    "truncate": (*_FULL, *_DISK),
    "link": (*_FULL, *_DISK, "EACCES", "EPERM"),
    "unlink": (*_DISK, *_RIGHTS),
    "rename": (*_FULL, *_DISK, "EACCES"),
    "mkdir": (*_FULL, *_DISK, *_RIGHTS),
    "chmod": (*_DISK, "EROFS"),
    "chown": ("EPERM",),
    "stat": (*_DISK, "EACCES"),
    "access": ("EACCES",),
    "flock": ("ENOLCK", "EIO", "EWOULDBLOCK"),
    "lock": ("ENOLCK", "EIO", "EACCES"),
    "sync": (*_DISK, "ENOSPC"),
    "mmap": ("ENOMEM", "EACCES", "ENODEV"),
    "statvfs": _DISK,
    "fallocate": (*_FULL, "EOPNOTSUPP", "EIO"),
    "utime": (*_DISK, *_RIGHTS),
}
FOR_EVER = -1


@dataclass(frozen=True, slots=True)
class Position:
    """Calls number nth to nth + times - 1 of a kind fail with an errno, counted from 1; FOR_EVER: all from nth on."""

    kind: str
    error: str
    nth: int
    times: int = 1


@dataclass(frozen=True, slots=True)
class FailedCalls:
    """How many calls failed in a child. where: The first of them, e.g. "pwrite64(/path)"."""

    ended: ChildEnd
    n_struck: int
    where: str


def build_shim(folder: Path, compiler: str = "cc") -> Path:
    """Compile the shim into folder and return the path of the library. Raises CalledProcessError."""
    source, library = Path(__file__).with_name("errnos.c"), folder / "errnos.so"
    command = [compiler, "-std=c11", "-O2", "-fPIC", "-shared", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return library


def preload(shim: Path) -> dict[str, str]:
    return {"LD_PRELOAD": str(shim)}


class Shim:
    """The shim in this process. It counts calls of this process only; a forked child must arm it again."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        if not hasattr(self._library, "tc_errno_arm"):
            raise RuntimeError("this process was started without the shim: put preload(shim) into its environment")
        self._library.tc_errno_count.restype = ctypes.c_long
        self._library.tc_errno_struck.restype = ctypes.c_long
        self._library.tc_errno_where.restype = ctypes.c_char_p
        number, long = ctypes.c_int, ctypes.c_long
        self._library.tc_errno_arm.argtypes = [ctypes.c_char_p, number, long, long, number]

    def arm(self, folder: Path, position: Position) -> None:
        number = getattr(errno, position.error)
        kind = list(KINDS).index(position.kind)
        self._library.tc_errno_arm(bytes(folder), kind, position.nth, position.times, number)

    def count_only(self, folder: Path) -> None:
        self._library.tc_errno_arm(bytes(folder), -1, 1, 0, 0)

    def disarm(self) -> None:
        """Stop counting and failing; the counts can still be read."""
        self._library.tc_errno_disarm()

    def counts(self) -> dict[str, int]:
        return {kind: int(self._library.tc_errno_count(i)) for i, kind in enumerate(KINDS)}

    def struck(self) -> tuple[int, str]:
        """Return the number of calls that failed since arm(), and the first of them."""
        where: bytes = self._library.tc_errno_where()
        return int(self._library.tc_errno_struck()), where.decode(errors="replace")


def count_calls(
    work: Callable[[SendLine], object], folder: Path, *, deadline_s: float = DEADLINE_S
) -> tuple[Mapping[str, int], ChildEnd]:
    """Return the calls of each kind that work(tell) makes below folder in a forked child, and the end of the child."""

    def child(tell: SendLine) -> None:
        shim = Shim()
        shim.count_only(folder)
        work(tell)
        shim.disarm()
        for kind, n in shim.counts().items():
            tell(f"count {kind} {n}")

    ended = run_forked(child, deadline_s=deadline_s)
    counts = [line.split(" ") for line in ended.lines if line.startswith("count ")]
    return {kind: int(n) for _, kind, n in counts}, ended


def fail_calls(
    work: Callable[[SendLine], object], folder: Path, position: Position, *, deadline_s: float = DEADLINE_S
) -> FailedCalls:
    """Run work(tell) in a forked child in which the calls at position fail; n_struck is 0 if it made fewer calls."""

    def child(tell: SendLine) -> None:
        shim = Shim()
        shim.arm(folder, position)
        try:
            work(tell)
        finally:
            shim.disarm()
            tell("struck {} {}".format(*shim.struck()))

    ended = run_forked(child, deadline_s=deadline_s)
    notes = [line.split(" ", 2) for line in ended.lines if line.startswith("struck ")]
    _, n_struck, where = notes[-1] if notes else ("", "0", "")
    lines = tuple(line for line in ended.lines if not line.startswith("struck "))
    return FailedCalls(ChildEnd(ended.code, lines, ended.hung, ended.error), int(n_struck), where)
