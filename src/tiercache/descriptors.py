"""The limit of open files of this process (RLIMIT_NOFILE, `ulimit -n`): which part open shards may use, and its error.

The limit is the process's, not a data set's: several data sets, loaders and the user's own files share it.
"""

from __future__ import annotations

import contextlib
import errno
import resource

# The soft limit is raised no further than this: some programs loop over all possible descriptors when they start a
# child, and the hard limit is 1,048,576 in many containers.
ENOUGH = 65_536


def _limits() -> tuple[int, int]:
    """The soft limit, and the limit that it may be raised to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = ENOUGH if soft == resource.RLIM_INFINITY else soft
    hard = ENOUGH if hard == resource.RLIM_INFINITY else hard
    return soft, max(soft, min(hard, ENOUGH))


def shard_share() -> int:
    """Number of descriptors that all open shards of this process may hold together; the other half is the user's."""
    return _limits()[1] // 2


def allow(n_descriptors: int) -> None:
    """Raise the soft limit towards the hard limit if the share of open shards is smaller than n_descriptors.

    Many systems set a soft limit of 1,024 because select(2) cannot use larger descriptors, and leave the hard limit
    high for programs that do not use it. Child processes inherit the limit.
    """
    soft, highest = _limits()
    if n_descriptors > soft // 2:
        _raise_to(soft, highest)


def raise_limit() -> bool:
    """Raise the soft limit towards the hard limit. False: it is as high as it may be."""
    return _raise_to(*_limits())


def _raise_to(soft: int, highest: int) -> bool:
    if soft >= highest:
        return False
    with contextlib.suppress(ValueError, OSError):  # macOS refuses more than OPEN_MAX, whatever the hard limit says
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        return True
    return False


def too_many_open(error: BaseException) -> str:
    """The limits, and how to raise them, for an error at the limit of open files; "" for any other error."""
    if not isinstance(error, OSError) or error.errno != errno.EMFILE:
        return ""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = "unlimited" if hard == resource.RLIM_INFINITY else hard
    return (
        f"too many open files: this process has reached its limit of {soft} descriptors (the hard limit is {shown}); "
        f"raise it with `ulimit -n {max(4096, 4 * soft)}` before the program starts (the hard limit may need the "
        "administrator), or close files that are not needed"
    )
