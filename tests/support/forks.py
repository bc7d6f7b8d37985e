"""Child processes forked from a warmed-up parent: fast enough for thousands of rounds, and with a deadline each."""

from __future__ import annotations

import faulthandler
import fcntl
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

SendLine: TypeAlias = Callable[[str], None]

DEADLINE_S = 120.0
DUMP_S = 0.5
# The kernel may list a joined thread for a moment longer.
THREADS_GONE_S = 5.0


@dataclass(frozen=True, slots=True)
class ChildEnd:
    """The end of a child process.

    Attributes:
        code: Exit status, or minus the signal number.
        lines: Lines that the child passed to tell(), in order.
        hung: Whether the child missed its deadline and was killed by the parent.
        error: Traceback of the exception in the child's work, or stacks of all its threads if it hung.
    """

    code: int
    lines: tuple[str, ...]
    hung: bool = False
    error: str = ""


def check_no_threads() -> None:
    """Raise RuntimeError if this process has several threads: a forked child would inherit their locks held."""
    tasks = Path("/proc/self/task")
    if not wait_for(lambda: len(list(tasks.iterdir())) == 1, THREADS_GONE_S):
        names = [(task / "comm").read_text().strip() for task in tasks.iterdir()]
        raise RuntimeError(f"a process that forks must have one thread, but has {len(names)}: {', '.join(names)}")


class ForkedChild:
    """A forked child that runs work(tell). Its lines survive any kind of death: they are in the parent's memory.

    work may start threads, kill its own process, or never return. tell() may be called from any thread. wait() may be
    called once.

    Args:
        work: Function that the child runs.
        with_threads: Whether this process may have several threads.
    """

    def __init__(self, work: Callable[[SendLine], object], *, with_threads: bool = False) -> None:
        """Fork now. Raises RuntimeError if this process has several threads and with_threads is False."""
        if not with_threads:
            check_no_threads()
        # Not a pipe: a full pipe would stop the child, and a pipe that a grandchild inherited would never end.
        self._memory = os.memfd_create("tiercache-told")
        # Lines of several threads and grandchildren would overwrite each other: the kernel does not lock the position
        # of such a file.
        fcntl.fcntl(self._memory, fcntl.F_SETFL, os.O_APPEND)
        self.pid = os.fork()
        if self.pid == 0:
            self._be_child(work)

    def _be_child(self, work: Callable[[SendLine], object]) -> None:
        code = 1
        faulthandler.register(signal.SIGUSR1, file=self._memory, all_threads=True)
        try:
            work(self._tell)
            code = 0
        except BaseException:  # noqa: BLE001 - top of the process: the error goes to the parent
            self._tell("error\n" + traceback.format_exc() + _other_threads())
        finally:
            os._exit(code)

    def _tell(self, line: str) -> None:
        os.write(self._memory, line.encode() + b"\0")

    def lines(self) -> tuple[str, ...]:
        """Return the lines that the child has passed to tell() so far."""
        n_bytes = os.fstat(self._memory).st_size
        return tuple(part.decode() for part in os.pread(self._memory, n_bytes, 0).split(b"\0")[:-1])

    def _rest(self) -> str:
        """Return the text after the last line: the stacks of the threads."""
        return os.pread(self._memory, os.fstat(self._memory).st_size, 0).rpartition(b"\0")[2].decode(errors="replace")

    def wait(self, deadline_s: float = DEADLINE_S) -> ChildEnd:
        """Wait for the child's end. A child that misses the deadline is killed, and hung is True."""
        pidfd = os.pidfd_open(self.pid)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            hung = not poll.poll(deadline_s * 1000)
            if hung:
                os.kill(self.pid, signal.SIGUSR1)  # faulthandler dumps the stacks
                poll.poll(DUMP_S * 1000)
                os.kill(self.pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            lines, dump = self.lines(), self._rest()
        finally:
            os.close(pidfd)
            os.close(self._memory)
        errors = [line.removeprefix("error\n") for line in lines if line.startswith("error\n")]
        return ChildEnd(
            code, tuple(line for line in lines if not line.startswith("error\n")), hung, "".join([*errors, dump])
        )


def _other_threads() -> str:
    """Return the stacks of all other threads."""
    here = threading.get_ident()
    frames = {thread: frame for thread, frame in sys._current_frames().items() if thread != here}
    return "".join(f"\nthread {n}:\n{''.join(traceback.format_stack(frame))}" for n, frame in frames.items())


def run_forked(work: Callable[[SendLine], object], *, deadline_s: float = DEADLINE_S) -> ChildEnd:
    """Run work(tell) in a forked child and wait for its end."""
    return ForkedChild(work).wait(deadline_s)


def in_a_fork(call: Callable[[], int]) -> int:
    """The exit status of a forked child that does it; 1 where it raises, which it tells standard error."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = call()
        except BaseException:  # noqa: BLE001 - the parent is told by the exit code
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_child(work: Callable[[], object]) -> bool:
    """Whether a forked child does the work without raising."""

    def call() -> int:
        work()
        return 0

    return in_a_fork(call) == 0
