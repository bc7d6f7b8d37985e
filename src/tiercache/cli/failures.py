"""How a verb ends: one line for an error, and the exit code that says what kind it was."""

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
from tiercache.store.retry import unreachable_fails_at_once

P = ParamSpec("P")

FAILED = 1
USAGE = 2
PARTLY = 3
CORRUPT = 4
PENDING = 5
INTERRUPTED = 130
_DONE = "all was done before"


def reports_failures(verb: Callable[P, object], *, how_to_go_on: str) -> Callable[P, None]:
    """The verb, with its errors printed as one line on standard error (and, with --verbose, the traceback before it).

    Other exceptions than those that tell of the world are bugs: they keep their traceback, which a report needs.
    """

    @wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        is_done = False
        try:
            with warnings.catch_warnings(), _shown_log(), unreachable_fails_at_once():
                warnings.showwarning = _show_warning
                is_done = verb(*args, **kwargs) is None
        except BrokenPipeError:
            raise  # the reader of a pipe has seen enough: typer ends quietly
        except KeyboardInterrupt as error:  # Python's own says nothing; one of ours knows better what to do
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
    """Show warnings of the library's log, such as that of a long wait, as those of Python are shown."""
    handler, logger = _LogToStderr(logging.WARNING), logging.getLogger("tiercache")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def exit_code_of(error: Exception) -> int:
    """Exit code of an error: its class's own, usage for wrong arguments, else failed."""
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
