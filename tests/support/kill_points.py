"""SIGKILL at named points: the points in the source, a child that dies at one, and the proof that it did."""

from __future__ import annotations

import ast
import os
import re
import signal
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from threading import Lock

from tests.support.forks import DEADLINE_S, ChildEnd, SendLine, run_forked

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
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "crash_point"):
                continue
            place = f"{path.relative_to(package).as_posix()}:{node.lineno}"
            name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ValueError(f'{place}: a point must be named by a literal "area.step" of lower-case letters and _')
            if name in found:
                raise ValueError(f"{place}: point {name!r} occurs in {found[name]} too; each name must occur once")
            found[name] = place
    return found


@dataclass(frozen=True, slots=True)
class KillAt:
    """The child dies at the n-th time that it reaches a point, counted from 1."""

    point: str
    nth: int = 1


@dataclass(frozen=True, slots=True)
class KillResult:
    """The end of a child, and whether it died at exactly that point and count. lines: What work passed to tell()."""

    ended: ChildEnd
    hit: bool
    lines: tuple[str, ...]


def kill_at(work: Callable[[SendLine], object], at: KillAt, *, deadline_s: float = DEADLINE_S) -> KillResult:
    """Run work(tell) in a forked child that dies at a point; hit is False if it never gets there."""
    note = f"{_STRUCK}{at.point} {at.nth}"

    def child(tell: SendLine) -> None:
        lock, hits = Lock(), count(1)  # the count is exact when several threads reach the point

        def strike(name: str) -> None:
            with lock:
                if name == at.point and next(hits) == at.nth:
                    tell(note)
                    os.kill(os.getpid(), signal.SIGKILL)

        crash_points.set_hook(strike)
        work(tell)

    ended = run_forked(child, deadline_s=deadline_s)
    hit = not ended.hung and ended.code == -signal.SIGKILL and note in ended.lines
    return KillResult(ended, hit, tuple(line for line in ended.lines if line != note))


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
