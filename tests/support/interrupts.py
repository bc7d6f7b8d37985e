"""Ctrl-C between any two lines of our code: a forked child is interrupted at the n-th line that it executes.

Python handles a signal between two bytecodes, so KeyboardInterrupt can be raised between any two lines of the main
thread. A trace function raises it there. Usage::

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

from tests.support.forks import DEADLINE_S, ChildEnd, SendLine, run_forked

import tiercache

# Outcome of an interrupt: it left the work as an exception; the work ended normally; the work ended normally because
# Python drops exceptions raised in __del__; another exception left the work.
RAISED, SWALLOWED, DROPPED, CHANGED = "raised", "swallowed", "dropped", "changed"
_NOTE = "interrupt "
_OURS = str(Path(tiercache.__file__).parent)


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The effect of an interrupt.

    Attributes:
        where: "file:line" of the line before which the interrupt was raised; "" if the line was never reached.
        outcome: RAISED, SWALLOWED, DROPPED or CHANGED; "" if the line was never reached.
        ended: End of the child, without our own notes in its lines.
    """

    where: str
    outcome: str
    ended: ChildEnd


@dataclass(frozen=True, slots=True)
class Lines:
    """The lines of the package that work executes in its main thread.

    Attributes:
        times: By "file:line", the first and the last execution, as numbers in the sequence of all lines, from 1.
        ended: End of the child.
    """

    times: Mapping[str, tuple[int, int]]
    ended: ChildEnd

    def positions(self) -> list[int]:
        """Return the numbers of the first and the last execution of each line."""
        return sorted({time for times in self.times.values() for time in times})


class _Tracer:
    """A trace function that counts the package's lines in this thread and raises at the n-th; 0: never."""

    def __init__(self, nth: int) -> None:
        self.nth, self.n_lines, self.where, self.is_in_del = nth, 0, "", False
        self.times: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> _Tracer:
        self._before = sys.gettrace()  # of a measurement of coverage
        sys.settrace(self._called)
        return self

    def __exit__(self, *_exc: object) -> None:
        sys.settrace(self._before)

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
    """Return whether this instruction calls __exit__ at the end of a with block that raised no exception.

    Python traces the with line a second time there, but handles no signal between the last call of the block and the
    call of __exit__. An interrupt raised here would leave locks held, which a real Ctrl-C cannot do.
    """
    return at in _withs_left(code)


@cache
def _withs_left(code: CodeType) -> frozenset[int]:
    found = list(get_instructions(code))
    starts = (found[i : i + 3] for i in range(len(found) - 2))
    return frozenset(
        three[0].offset for three in starts if all(one.opname == "LOAD_CONST" and one.argval is None for one in three)
    )


def lines_of(work: Callable[[SendLine], object], *, deadline_s: float = DEADLINE_S) -> Lines:
    """Run work(tell) in a forked child, without an interrupt, and return the lines that it executes."""

    def child(tell: SendLine) -> None:
        with _Tracer(0) as tracer:
            work(tell)
        tell(_NOTE + json.dumps(tracer.times))

    ended = run_forked(child, deadline_s=deadline_s)
    rest, notes = _sorted_out(ended)
    times = json.loads(notes[0]) if notes else {}
    return Lines({where: (first, last) for where, (first, last) in times.items()}, rest)


def interrupted(
    work: Callable[[SendLine], object],
    nth: int,
    *,
    then: Callable[[SendLine], object] | None = None,
    deadline_s: float = DEADLINE_S,
) -> Interrupted:
    """Run work(tell) in a forked child that is interrupted at its nth line, and then then(tell) in the same child.

    The child fails if work raises anything but the interrupt, or if then raises.
    """

    def child(tell: SendLine) -> None:
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


def _sorted_out(ended: ChildEnd) -> tuple[ChildEnd, list[str]]:
    """Return a child's end without our notes, and the notes."""
    notes = [line.removeprefix(_NOTE) for line in ended.lines if line.startswith(_NOTE)]
    lines = tuple(line for line in ended.lines if not line.startswith(_NOTE))
    return ChildEnd(ended.code, lines, ended.hung, ended.error), notes
