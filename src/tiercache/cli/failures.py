"""End of a verb: one line for an error, and an exit code that tells the kind of the error."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec

import typer

from tiercache.errors import TierCacheError
from tiercache.store.retry import fail_fast_if_unreachable

P = ParamSpec("P")

FAILED = 1
USAGE = 2
PARTIAL = 3
CORRUPT = 4
PENDING = 5
INTERRUPTED = 130
_DONE = "everything was already done"


def report_errors(verb: Callable[P, object], *, how_to_go_on: str) -> Callable[P, None]:
    """Wrap a verb so that its errors become one line on standard error and an exit code.

    With --verbose, the traceback precedes the line. Exceptions other than TierCacheError, ValueError, TypeError,
    OSError and KeyboardInterrupt are bugs and keep their traceback, which a bug report needs.

    Args:
        verb: The verb's function.
        how_to_go_on: Advice that is printed after Ctrl-C.
    """

    @wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        is_done = False
        try:
            with warnings.catch_warnings(), _shown_log(), fail_fast_if_unreachable():
                warnings.showwarning = _show_warning
                is_done = verb(*args, **kwargs) is None
        except BrokenPipeError:
            raise  # the reader of the pipe closed it, e.g. head: typer ends without a message
        except KeyboardInterrupt as error:  # has a text only if our own code raised it: that advice is more precise
            _say(f"interrupted: {_said(error) or (_DONE if is_done else how_to_go_on)}")
            raise typer.Exit(INTERRUPTED) from None
        except (TierCacheError, ValueError, TypeError, OSError) as error:
            if kwargs.get("verbose"):
                traceback.print_exc()
            _say(f"error: {_one_line(error)}")
            raise typer.Exit(exit_code_of(error)) from None

    return run


class _LogToStderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _show_warning(" ".join(record.getMessage().split()))


@contextmanager
def _shown_log() -> Iterator[None]:
    """Print warnings of the library's log, e.g. of a long wait, in the same form as Python warnings."""
    handler, logger = _LogToStderr(logging.WARNING), logging.getLogger("tiercache")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def exit_code_of(error: Exception) -> int:
    """Return the exit code of an error: that of its class, USAGE for wrong arguments, else FAILED."""
    if isinstance(error, TierCacheError):
        return error.exit_code
    return USAGE if isinstance(error, ValueError | TypeError) else FAILED


def _one_line(error: Exception) -> str:
    return _said(error) or type(error).__name__


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())


def _say(text: str) -> None:
    typer.echo(f"tiercache: {text}", err=True)


def _show_warning(message: Warning | str, *_rest: object, **_named: object) -> None:
    _say(f"warning: {message}")
