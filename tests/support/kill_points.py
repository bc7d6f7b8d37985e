"""SIGKILL at named points: the points in the source, a child that dies at one, and the proof that it did.

Usage::

    names = points_in(Path(tiercache.__file__).parent)
    struck = strike(work, KillAt("fetch.reserved", nth=2))
    assert struck.hit, "the child did not die at the point"
    check(struck.lines)  # lines that work passed to tell() before and after each promise
"""

from __future__ import annotations

import ast
import os
import re
import signal
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from tests.support.forks import DEADLINE_S, ChildEnd, ForkedChild, SendLine, run_forked

from tiercache import crash_points

_NAME = re.compile(r"[a-z_]+\.[a-z_]+")
_STRUCK, _REACHED = "struck ", "reached "


def points_in(package: Path) -> dict[str, str]:
    """Return every point in the source below a folder, with its "file:line".

    Raises:
        ValueError: A name is not a literal "area.step", or occurs twice; the message says where.
    """
    found: dict[str, str] = {}
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and _called(node) == "crash_point"):
                continue
            place = f"{path.relative_to(package).as_posix()}:{node.lineno}"
            name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ValueError(f'{place}: a point must be named by a literal "area.step" of lower-case letters and _')
            if name in found:
                raise ValueError(f"{place}: point {name!r} occurs in {found[name]} too; each name must occur once")
            found[name] = place
    return found


def _called(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


@dataclass(frozen=True, slots=True)
class KillAt:
    """The child dies at the n-th time that it reaches a point, counted from 1."""

    point: str
    nth: int = 1


@dataclass(frozen=True, slots=True)
class KillResult:
    """The result of a strike.

    Attributes:
        strike: Point and count.
        ended: End of the child.
        hit: Whether the child died by SIGKILL at exactly that point and count.
        lines: Lines that work passed to tell().
    """

    strike: KillAt
    ended: ChildEnd
    hit: bool
    lines: tuple[str, ...]


class _Killer:
    """The hook of a child. The lock makes the count exact when several threads reach the point."""

    def __init__(self, strike: KillAt, tell: SendLine) -> None:
        self._strike, self._tell = strike, tell
        self._lock = Lock()
        self._n_hits = 0

    def __call__(self, name: str) -> None:
        if name != self._strike.point:
            return
        with self._lock:
            self._n_hits += 1
            if self._n_hits == self._strike.nth:
                self._tell(f"{_STRUCK}{name} {self._n_hits}")
                os.kill(os.getpid(), signal.SIGKILL)


class KilledChild:
    """A child that works until it dies at a point. finish() may be called once."""

    def __init__(self, work: Callable[[SendLine], object], strike: KillAt) -> None:
        """Fork now. Raises RuntimeError if this process has several threads."""
        self._strike = strike

        def child(tell: SendLine) -> None:
            crash_points.set_hook(_Killer(strike, tell))
            work(tell)

        self._child = ForkedChild(child)

    def finish(self, deadline_s: float = DEADLINE_S) -> KillResult:
        """Wait for the child's end, and return whether it died at the point."""
        ended = self._child.wait(deadline_s)
        note = f"{_STRUCK}{self._strike.point} {self._strike.nth}"
        hit = not ended.hung and ended.code == -signal.SIGKILL and note in ended.lines
        lines = tuple(line for line in ended.lines if not line.startswith(_STRUCK))
        return KillResult(self._strike, ended, hit, lines)


def kill_at(work: Callable[[SendLine], object], at: KillAt, *, deadline_s: float = DEADLINE_S) -> KillResult:
    """Run work(tell) in a forked child that dies at a point; hit is False if it never gets there."""
    return KilledChild(work, at).finish(deadline_s)


def count_points(
    work: Callable[[SendLine], object], *, deadline_s: float = DEADLINE_S
) -> tuple[Mapping[str, int], ChildEnd]:
    """Return how often work(tell) reaches each point in a forked child, and the end of the child."""

    def child(tell: SendLine) -> None:
        crash_points.set_hook(lambda name: tell(_REACHED + name))
        work(tell)

    ended = run_forked(child, deadline_s=deadline_s)
    names = [line.removeprefix(_REACHED) for line in ended.lines if line.startswith(_REACHED)]
    others = tuple(line for line in ended.lines if not line.startswith(_REACHED))
    return Counter(names), ChildEnd(ended.code, others, ended.hung, ended.error)
