"""Functions that run in Ray's workers, which import them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tiercache.waiting import SYSTEM_CLOCK


def kill_a_worker_once(number: int) -> dict[str, object]:
    """Return a record; the first process that is asked for record 700 kills itself there."""
    if number == 700:
        try:
            Path(os.environ["RAY_TEST_MARK"]).touch(exist_ok=False)
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    return record(number)


def record(number: int) -> dict[str, object]:
    return {"x": number, "text": f"record {number} " * (number % 7)}


def fail(number: int) -> dict[str, object]:
    return {"x": number if number < 900 else "no number", "text": ""}


def slowly(one: dict[str, object]) -> dict[str, object]:
    """Take a few milliseconds for a record, so that a kill strikes in a task."""
    SYSTEM_CLOCK.sleep(0.003)
    return one
