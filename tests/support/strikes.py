"""Ctrl-C at a chosen place of some functions, in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection

from tests.support.interrupts import leaves_with


def strike(at: int, call: Callable[[], object], names: Collection[str], events: Collection[str]) -> bool:
    """Do call() with Ctrl-C at the event number `at`, counted from 1; whether it struck.

    names: of functions; events: those of them that count, of "call", "line" and "return".
    """
    n_seen = 0

    def trace(frame, event, argument):
        nonlocal n_seen
        if frame.f_code.co_name not in names:
            return None
        if event in events and not (event == "line" and leaves_with(frame.f_code, frame.f_lasti)):
            n_seen += 1
            if n_seen == at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False
