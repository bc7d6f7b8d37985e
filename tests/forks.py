"""Running something in a forked child."""

import os
import traceback
from collections.abc import Callable


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
