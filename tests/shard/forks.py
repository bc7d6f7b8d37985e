"""Running something in a forked child."""

import os
from collections.abc import Callable


def in_a_fork(call: Callable[[], int]) -> int:
    """The exit status of a forked child that does it; 1 where it raises."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = call()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
