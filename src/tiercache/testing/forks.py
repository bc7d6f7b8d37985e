"""Children forked from a warm parent: thousands of rounds take minutes, and none of them can hang the run."""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from tiercache.waiting import wait_for

Tell: TypeAlias = Callable[[str], None]

DEADLINE_S = 120.0
DUMP_S = 0.5
# A thread that was joined may be listed by the kernel a moment longer.
THREADS_GONE_S = 5.0


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of a child. code: exit status, or minus the signal; lines: what it told, in order.

    hung: it did not end in time and was killed by the parent. error: the traceback of what its work raised, or where
    each of its threads hung.
    """

    code: int
    lines: tuple[str, ...]
    hung: bool = False
    error: str = ""


def check_no_threads() -> None:
    """Raise RuntimeError where this process has threads: their locks would be held for ever in a forked child."""
    tasks = Path("/proc/self/task")
    if not wait_for(lambda: len(list(tasks.iterdir())) == 1, THREADS_GONE_S):
        names = [(task / "comm").read_text().strip() for task in tasks.iterdir()]
        raise RuntimeError(f"a warm parent has one thread, this one has {len(names)}: {', '.join(names)}")


class ForkedChild:
    """work(tell) in a forked child. What it tells outlives it, however it dies: the lines are in the parent's memory.

    work may start threads, kill itself, or never return. tell() may be called from any thread. wait() once.
    """

    def __init__(self, work: Callable[[Tell], object], *, with_threads: bool = False) -> None:
        """Fork now. Raises RuntimeError where this process has threads, unless that is what is tried."""
        if not with_threads:
            check_no_threads()
        # Not a pipe: one that fills up would stop the child, and one that a grandchild holds would never end.
        self._memory = os.memfd_create("tiercache-told")
        self.pid = os.fork()
        if self.pid == 0:
            self._be_child(work)

    def _be_child(self, work: Callable[[Tell], object]) -> None:
        code = 1
        faulthandler.register(signal.SIGUSR1, file=self._memory, all_threads=True)
        try:
            work(self._tell)
            code = 0
        except BaseException:  # noqa: BLE001 - a process's top: the parent is told
            self._tell("error\n" + traceback.format_exc() + _other_threads())
        finally:
            os._exit(code)

    def _tell(self, line: str) -> None:
        os.write(self._memory, line.encode() + b"\0")

    def lines(self) -> tuple[str, ...]:
        """What it has told so far."""
        n_bytes = os.fstat(self._memory).st_size
        return tuple(part.decode() for part in os.pread(self._memory, n_bytes, 0).split(b"\0")[:-1])

    def _rest(self) -> str:
        """What stands behind the last line: where the threads are."""
        return os.pread(self._memory, os.fstat(self._memory).st_size, 0).rpartition(b"\0")[2].decode(errors="replace")

    def wait(self, deadline_s: float = DEADLINE_S) -> Ended:
        """Wait for its end; one that does not end in time is killed, which the answer says."""
        pidfd = os.pidfd_open(self.pid)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            hung = not poll.poll(deadline_s * 1000)
            if hung:
                os.kill(self.pid, signal.SIGUSR1)  # it says where it hangs
                poll.poll(DUMP_S * 1000)
                os.kill(self.pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            lines, dump = self.lines(), self._rest()
        finally:
            os.close(pidfd)
            os.close(self._memory)
        errors = [line.removeprefix("error\n") for line in lines if line.startswith("error\n")]
        return Ended(
            code, tuple(line for line in lines if not line.startswith("error\n")), hung, "".join([*errors, dump])
        )


def _other_threads() -> str:
    """Where the threads are that somebody may have waited for in vain."""
    here = threading.get_ident()
    frames = {thread: frame for thread, frame in sys._current_frames().items() if thread != here}  # noqa: SLF001
    return "".join(f"\nthread {n}:\n{''.join(traceback.format_stack(frame))}" for n, frame in frames.items())


def run_forked(work: Callable[[Tell], object], *, deadline_s: float = DEADLINE_S) -> Ended:
    """Do work(tell) in a forked child and wait for its end."""
    return ForkedChild(work).wait(deadline_s)
