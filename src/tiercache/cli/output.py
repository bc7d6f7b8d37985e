"""Output of a verb: results and a summary on standard output, progress and errors on standard error, and exit codes."""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from tiercache.errors import TierCacheError
from tiercache.waiting import fail_fast_if_unreachable

if TYPE_CHECKING:
    from types import ModuleType

# Line ends, control characters and text direction marks: file names may contain them, and a terminal would obey them.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

Advance: TypeAlias = Callable[[int, int], None]
"""Callback of a progress bar; its arguments are the amount done and the total."""


def printable(text: str) -> str:
    """Return text as one line, with escapes for control characters and text direction marks."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


@dataclass(frozen=True, slots=True)
class Output:
    """Prints results for people, or as JSON objects for programs, one per line, each with its kind in `event`.

    Args:
        as_json: Whether results are printed as JSON.
        quiet: Whether progress and the summary are left out.
    """

    as_json: bool = False
    quiet: bool = False

    def event(self, event: str, facts: Mapping[str, Any], text: str | None = None) -> None:
        """Print one result.

        Args:
            event: Kind of the result, for JSON.
            facts: The result, for JSON.
            text: The result as one line, for people; control characters are escaped. None: people see no line.
        """
        if self.as_json:
            typer.echo(json.dumps({"event": event, **facts}, ensure_ascii=False, default=str))
        elif text is not None:
            typer.echo(printable(text))

    def table(self, event: str, rows: Sequence[Mapping[str, Any]], texts: Sequence[Mapping[str, str]]) -> None:
        """Print results of one kind: rows as JSON objects, or texts as a table whose head is their keys."""
        if self.as_json:
            for row in rows:
                self.event(event, row)
        elif texts:
            for line in aligned([list(texts[0]), *([printable(cell) for cell in text.values()] for text in texts)]):
                typer.echo(line)

    def summary(self, facts: Mapping[str, Any], text: str) -> None:
        """Print the last line: facts as JSON, or text for people unless quiet."""
        if self.as_json or not self.quiet:
            self.event("summary", facts, text)

    def byte_progress(self, doing: str) -> AbstractContextManager[Advance]:
        """Show a progress bar of bytes on standard error while the block runs, if that is a terminal and not quiet."""
        return self._bar(doing, lambda p: [p.DownloadColumn(binary_units=True), p.TransferSpeedColumn()])

    def count_progress(self, doing: str) -> AbstractContextManager[Advance]:
        """Show a progress bar of a count of items, under the same conditions as byte_progress()."""
        return self._bar(doing, lambda p: [p.MofNCompleteColumn()])

    @contextmanager
    def _bar(self, doing: str, figures: Callable[[ModuleType], list[Any]]) -> Iterator[Advance]:
        if self.quiet or not sys.stderr.isatty():
            yield _no_progress
            return
        # Imported only where a bar is shown, because rich costs each start of the command 20 ms.
        from rich import console, progress

        columns = [progress.TextColumn("{task.description}"), progress.BarColumn(), *figures(progress)]
        stderr = console.Console(stderr=True)
        with progress.Progress(*columns, progress.TimeRemainingColumn(), console=stderr, transient=True) as bar:
            task = bar.add_task(doing, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return one line per row, with aligned columns; a column of numbers or sizes is right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [all(cell[:1].isdigit() or not cell for cell in column) for column in zip(*rows[1:], strict=True)]
    right = right or [False] * len(widths)
    return [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in rows
    ]


def count(n: int, one: str, many: str = "") -> str:
    """Return a number with its noun: "1 shard", "1,200 records"."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def confirm(question: str, otherwise: str) -> None:
    """Ask at the terminal whether to continue; if not, print otherwise and exit with FAILED.

    Raises:
        ValueError: Standard input is no terminal.
    """
    if not sys.stdin.isatty():
        raise ValueError("cannot ask for confirmation, because standard input is not a terminal; give --yes")
    if not typer.confirm(question, err=True):
        _print_line(otherwise)
        raise typer.Exit(FAILED)


def _no_progress(_done: int, _total: int) -> None:
    pass


FAILED = 1
USAGE = 2
PARTIAL = 3
CORRUPT = 4
PENDING = 5
UNCONFIRMED = 7
INTERRUPTED = 130
_DONE = "everything was already done"


# Options of every verb.
_Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print the results as JSON, one object per line.")]
_Quiet: TypeAlias = Annotated[bool, typer.Option("--quiet", "-q", help="Print neither progress nor a summary.")]
_Verbose: TypeAlias = Annotated[bool, typer.Option("--verbose", "-v", help="Also print the traceback of a failure.")]
_COMMON_OPTIONS = {"as_json": _Json, "quiet": _Quiet, "verbose": _Verbose}


def command(verb: Callable[..., object], *, how_to_go_on: str) -> Callable[..., None]:
    """Return a verb as typer's command: with the options --json, --quiet and --verbose, which make its Output.

    Its errors become one line on standard error and an exit code. With --verbose, the traceback precedes the line.
    Exceptions other than TierCacheError, ValueError, TypeError, OSError and KeyboardInterrupt are bugs and keep their
    traceback, which a bug report needs.

    Args:
        verb: The verb's function; its first parameter is output.
        how_to_go_on: Advice that is printed after Ctrl-C.
    """

    def run(*, as_json: bool = False, quiet: bool = False, verbose: bool = False, **options: Any) -> None:
        is_done = False
        try:
            with warnings.catch_warnings(), _shown_log(), fail_fast_if_unreachable():
                warnings.showwarning = show_warning
                is_done = verb(Output(as_json, quiet), **options) is None
        except BrokenPipeError:
            raise  # the reader of the pipe closed it, e.g. head: typer ends without a message
        except KeyboardInterrupt as error:  # has a text only if our own code raised it: that advice is more precise
            _print_line(f"interrupted: {_one_line(error) or (_DONE if is_done else how_to_go_on)}")
            raise typer.Exit(INTERRUPTED) from None
        except (TierCacheError, ValueError, TypeError, OSError) as error:
            if verbose:
                traceback.print_exc()
            _print_line(f"error: {_one_line(error) or type(error).__name__}")
            raise typer.Exit(exit_code_of(error)) from None

    # Typer reads the options from the signature.
    own = [parameter for parameter in signature(verb, eval_str=True).parameters.values() if parameter.name != "output"]
    common = [Parameter(n, Parameter.KEYWORD_ONLY, default=False, annotation=o) for n, o in _COMMON_OPTIONS.items()]
    run.__name__, run.__doc__ = verb.__name__, verb.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *common)}
    run.__signature__ = Signature([*own, *common])  # type: ignore[attr-defined]
    return run


class _LogToStderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        show_warning(" ".join(record.getMessage().split()))


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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _print_line(text: str) -> None:
    typer.echo(f"tiercache: {text}", err=True)


def show_warning(message: Warning | str, *_rest: object, **_named: object) -> None:
    """Print a warning on standard error, in the form of warnings.showwarning()."""
    _print_line(f"warning: {message}")
