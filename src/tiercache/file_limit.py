"""Limit of open files of this process (RLIMIT_NOFILE, `ulimit -n`): the part that open shards may use, and the error.

The limit belongs to the process: its data sets, its loaders and the user's own files share it.
"""

from __future__ import annotations

import contextlib
import errno
import resource

# Maximum to which the soft limit is raised. Some programs loop over all possible descriptors when they start a child,
# and in many containers the hard limit is 1,048,576.
MAX_SOFT_LIMIT = 65_536


def _limits() -> tuple[int, int]:
    """Return the soft limit, and the value that it may be raised to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = MAX_SOFT_LIMIT if soft == resource.RLIM_INFINITY else soft
    hard = MAX_SOFT_LIMIT if hard == resource.RLIM_INFINITY else hard
    return soft, max(soft, min(hard, MAX_SOFT_LIMIT))


def max_shard_descriptors() -> int:
    """Return the number of descriptors for all open shards of this process; the other half is left to the user."""
    return _limits()[1] // 2


def raise_limit_for(n_descriptors: int) -> None:
    """Raise the soft limit towards the hard limit if open shards may use fewer than n_descriptors.

    Many systems set a soft limit of 1,024 because select(2) cannot use larger descriptors, and leave the hard limit
    high for programs that do not use select(2). Child processes inherit the limit.
    """
    soft, highest = _limits()
    if n_descriptors > soft // 2:
        _raise_to(soft, highest)


def raise_limit() -> bool:
    """Raise the soft limit towards the hard limit. Returns False if it is already as high as possible."""
    return _raise_to(*_limits())


def _raise_to(soft: int, highest: int) -> bool:
    if soft >= highest:
        return False
    with contextlib.suppress(ValueError, OSError):  # macOS refuses more than OPEN_MAX, whatever the hard limit is
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        return True
    return False


def emfile_message(error: BaseException) -> str:
    """Return a message with the limits and how to raise them if the error is EMFILE; "" for any other error."""
    if not isinstance(error, OSError) or error.errno != errno.EMFILE:
        return ""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = "unlimited" if hard == resource.RLIM_INFINITY else hard
    return (
        f"too many open files: this process has reached its limit of {soft} descriptors (the hard limit is {shown}); "
        f"raise it with `ulimit -n {max(4096, 4 * soft)}` before the program starts (the hard limit may need the "
        "administrator), or close files that are not needed"
    )
