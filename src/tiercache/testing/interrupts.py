"""Ctrl-C between two lines of ours: a forked child is interrupted at the n-th line that it comes to.

Python hears of a signal between two bytecodes, so that KeyboardInterrupt rises out of any line of the main thread: one
has done its work, the next is not begun. A trace function raises it there. Usage::

    for nth in lines_of(work).positions():
        done = interrupted(work, nth)
        assert done.outcome == RAISED, done.ended.error
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from dis import get_instructions
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from tiercache.testing.forks import DEADLINE_S, Ended, Tell, run_forked

# What became of an interrupt: it came out of the work; the work ended as if there had been none; so it did, but Python
# dropped it, as it does with what rises out of __del__; another error came out.
RAISED, SWALLOWED, DROPPED, CHANGED = "raised", "swallowed", "dropped", "changed"
_NOTE = "interrupt "
_OURS = str(Path(__file__).parents[1])


@dataclass(frozen=True, slots=True)
class Interrupted:
    """What an interrupt did.

    where: "file:line" of the line that was not begun, "" if it was never reached; outcome: RAISED, SWALLOWED, DROPPED
    or CHANGED, "" where it was never reached; ended: the child's end, its lines without notes of ours.
    """

    where: str
    outcome: str
    ended: Ended


@dataclass(frozen=True, slots=True)
class Lines:
    """Which lines of the package work comes to in its main thread.

    times: by "file:line" the first and the last time, counted over all lines from 1. ended: how the child ended.
    """

    times: Mapping[str, tuple[int, int]]
    ended: Ended

    def positions(self) -> list[int]:
        """Each line the first time, and the last."""
        return sorted({time for times in self.times.values() for time in times})


class _Tracer:
    """A trace function that knows the lines of the package in this thread, and raises at the n-th; 0: at none."""

    def __init__(self, nth: int) -> None:
        self.nth, self.n_lines, self.where, self.is_in_del = nth, 0, "", False
        self.times: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> _Tracer:
        sys.settrace(self._called)
        return self

    def __exit__(self, *_exc: object) -> None:
        sys.settrace(None)

    def _called(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        name = frame.f_code.co_filename
        is_ours = name.startswith(_OURS) and "/testing/" not in name
        return self._line if is_ours and not self.where else None

    def _line(self, frame: FrameType, event: str, _argument: Any) -> Any:
        if event != "line" or self.where or leaves_with(frame.f_code, frame.f_lasti):
            return self._line
        self.n_lines += 1
        if self.n_lines == self.nth:
            self.where, self.is_in_del = _place(frame), _is_in_del(frame)
            raise KeyboardInterrupt
        if not self.nth:
            where = _place(frame)
            self.times[where] = (self.times.get(where, (self.n_lines,))[0], self.n_lines)
        return self._line


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename.removeprefix(_OURS + '/')}:{frame.f_lineno}"


def _is_in_del(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


def leaves_with(code: CodeType, at: int) -> bool:
    """Whether these instructions call __exit__ at the end of a with block that nothing rose out of.

    Python traces the with line once more there, but hears of no signal between the block's last call and the one of
    __exit__: an interrupt raised here would leave locks taken that no Ctrl-C can.
    """
    return at in _withs_left(code)


@cache
def _withs_left(code: CodeType) -> frozenset[int]:
    found = list(get_instructions(code))
    starts = (found[i : i + 3] for i in range(len(found) - 2))
    return frozenset(
        three[0].offset for three in starts if all(one.opname == "LOAD_CONST" and one.argval is None for one in three)
    )


def lines_of(work: Callable[[Tell], object], *, deadline_s: float = DEADLINE_S) -> Lines:
    """Do work(tell) in a forked child, without interrupt, and note the lines."""

    def child(tell: Tell) -> None:
        with _Tracer(0) as tracer:
            work(tell)
        tell(_NOTE + json.dumps(tracer.times))

    ended = run_forked(child, deadline_s=deadline_s)
    rest, notes = _sorted_out(ended)
    times = json.loads(notes[0]) if notes else {}
    return Lines({where: (first, last) for where, (first, last) in times.items()}, rest)


def interrupted(
    work: Callable[[Tell], object],
    nth: int,
    *,
    then: Callable[[Tell], object] | None = None,
    deadline_s: float = DEADLINE_S,
) -> Interrupted:
    """Do work(tell) in a forked child that is interrupted at its nth line; then(tell) in the same child.

    The child fails where anything but the interrupt comes out of work, or anything out of then.
    """

    def child(tell: Tell) -> None:
        outcome, tracer = CHANGED, _Tracer(nth)
        try:
            with tracer:
                work(tell)
            outcome = (DROPPED if tracer.is_in_del else SWALLOWED) if tracer.where else ""
        except KeyboardInterrupt:
            outcome = RAISED
        finally:
            tell(_NOTE + json.dumps([tracer.where, outcome]))
        if then is not None:
            then(tell)

    rest, notes = _sorted_out(run_forked(child, deadline_s=deadline_s))
    where, outcome = json.loads(notes[0]) if notes else ("", CHANGED)
    return Interrupted(where, outcome, rest)


def _sorted_out(ended: Ended) -> tuple[Ended, list[str]]:
    """A child's end without our notes, and those."""
    notes = [line.removeprefix(_NOTE) for line in ended.lines if line.startswith(_NOTE)]
    lines = tuple(line for line in ended.lines if not line.startswith(_NOTE))
    return Ended(ended.code, lines, ended.hung, ended.error), notes
