"""SIGKILL at random instants of a child's work, counted only where it struck."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tiercache.waiting import SYSTEM_CLOCK, wait_for

LONGEST_RUN_S = 60.0
ROOT = Path(__file__).parents[2]


class KillLoop:
    """A module that is run and killed again and again over the same folders.

    It writes lines to its progress file (its first argument): "begin" when its work begins and "end" when it
    is done. A kill counts only if it came between the two.
    """

    def __init__(self, module: str, progress: Path, arguments: list[str], *, work_s: float, seed: int) -> None:
        self.random = random.Random(seed)
        self.n_struck = 0
        self._command = [sys.executable, "-W", "error", "-m", module, str(progress), *arguments]
        self._progress = progress
        self._work_s = work_s

    def lines(self) -> list[str]:
        """What the latest run wrote, without a torn last line."""
        text = self._progress.read_text() if self._progress.exists() else ""
        return text[: text.rfind("\n") + 1].splitlines()

    def kill_once(self) -> bool:
        """Run it and kill it somewhere in its work; whether the kill struck."""
        with self._start() as child:
            SYSTEM_CLOCK.sleep(self.random.uniform(0, self._work_s))
            child.send_signal(signal.SIGKILL)
            code = child.wait()
            errors = child.stderr.read()
        assert code in (0, -signal.SIGKILL), errors
        struck = code == -signal.SIGKILL and "begin" in self.lines() and "end" not in self.lines()
        self.n_struck += struck
        return struck

    def finish(self) -> None:
        """Let it run to its end, with no help."""
        with self._start() as child:
            errors = child.stderr.read()
            assert child.wait() == 0, errors
        assert self.lines()[-1] == "end", errors

    def run(self, n_kills: int, check: Callable[[], None]) -> None:
        """Kill until n_kills have struck, checking after each; every now and then, and at last, let it finish."""
        n_tries = 0
        while self.n_struck < n_kills:
            n_tries += 1
            assert n_tries <= 4 * n_kills + 10, f"only {self.n_struck} of {n_tries} kills struck"
            self.kill_once()
            check()
            if self.random.random() < 0.2 or self.n_struck == n_kills:
                self.finish()
                check()

    def _start(self) -> subprocess.Popen[str]:
        self._progress.unlink(missing_ok=True)
        child = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        assert wait_for(lambda: self.lines() or child.poll() is not None, LONGEST_RUN_S), "the child never began"
        return child
