"""Named points in code that must survive being killed, or failing, exactly there.

`reach(name)` stands between two steps that a crash may part. It does nothing (31 ns) unless a test has set a hook,
which then kills the process, raises, or counts. `testing.kill_points` lists every name in the source; a test fails if
one of them was never struck.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_hook: Callable[[str], object] | None = None


def reach(name: str) -> None:
    """Say that this point was reached. name: "area.step", a literal, once in the source."""
    if _hook is not None:
        _hook(name)


def set_hook(hook: Callable[[str], object] | None) -> Callable[[str], object] | None:
    """Have hook(name) called at every point, here and in processes forked from here; returns the hook before."""
    global _hook
    before, _hook = _hook, hook
    return before
