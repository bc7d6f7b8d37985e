"""Named points in the code at which crash tests kill the process or inject a failure.

`crash_point(name)` is called between two steps that a crash may separate. It does nothing (31 ns) unless a test has set
a hook, which then kills the process, raises or counts. `tests/support/kill_points.py` lists every name in the source; a
test fails if one of them was never used for a kill.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


_hook: Callable[[str], object] | None = None


def crash_point(name: str) -> None:
    """Report that the code reached a point.

    Args:
        name: Name of the point, a literal "area.step" that occurs once in the source.
    """
    if _hook is not None:
        _hook(name)


def set_hook(hook: Callable[[str], object] | None) -> Callable[[str], object] | None:
    """Set the function that is called at every point, in this process and its forks, and return the previous one."""
    global _hook
    before, _hook = _hook, hook
    return before
