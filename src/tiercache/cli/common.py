"""What the verbs share: their options, the parsers of option values, output, and exit codes.

Results and a summary go to standard output; progress, questions and errors go to standard error.
"""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from tiercache.errors import TierCacheError
from tiercache.model import format_bytes, parse_bytes, parse_duration
from tiercache.waiting import SYSTEM_CLOCK, fail_fast_if_unreachable

if TYPE_CHECKING:
    from types import ModuleType

FAILED = 1
USAGE = 2
PARTIAL = 3
CORRUPT = 4
PENDING = 5
UNCONFIRMED = 7
INTERRUPTED = 130


def option(flags: str, metavar: str | None, text: str, **more: Any) -> Any:
    """Return typer's description of an option with a value. flags: Its names, separated by spaces."""
    return typer.Option(*flags.split(), metavar=metavar, help=text, **more)


def flag(flags: str, text: str) -> Any:
    return option(flags, None, text)


def argument(metavar: str, text: str) -> Any:
    return typer.Argument(metavar=metavar, help=text)


Url: TypeAlias = Annotated[str, argument("URL", "Data set: a local path, or a URL such as s3://bucket/name.")]
DryRun: TypeAlias = Annotated[bool, flag("--dry-run", "Print what would be done, and change nothing.")]
Yes: TypeAlias = Annotated[bool, flag("--yes -y", "Do not ask for confirmation.")]
Jobs: TypeAlias = Annotated[
    int, typer.Option("--jobs", "-j", min=0, help="Number of shards to process at a time; 0: one per CPU.")
]
EngineName: TypeAlias = Annotated[
    str, option("--engine", "ENGINE", "process (this machine), or ray: a Ray cluster, by default at RAY_ADDRESS.")
]
Include: TypeAlias = Annotated[
    list[str] | None,
    option("--include", "GLOB", "Only names that match, e.g. '*.jpg' or 'train/**'. May be repeated."),
]
Exclude: TypeAlias = Annotated[list[str] | None, option("--exclude", "GLOB", "Skip names that match. May be repeated.")]
VersionNumber: TypeAlias = Annotated[
    str | None,
    option("--at", "VERSION", "Number or tag of the data set version to use; default: the newest."),
]
Columns: TypeAlias = Annotated[
    str | None,
    option("--columns", "A,B", "Names of the columns to use, in this order; default: all."),
]
StorageOptions: TypeAlias = Annotated[
    list[str] | None,
    option("--storage-option", "KEY=VALUE", "Option of the URL's store, e.g. region=eu-central-1. May be repeated."),
]
CacheDir: TypeAlias = Annotated[
    str | None, option("--cache", "DIR", "Folder of the cache; default: the configured folder.")
]
CacheSize: TypeAlias = Annotated[
    str | None,
    option("--cache-size", "SIZE", "Size limit of the cache, e.g. 200GB, or 80% (of its disk)."),
]
Rules: TypeAlias = Annotated[
    Path | None,
    option("--rules", "FILE", "Rule file; default: the nearest tiercache.toml, from this folder upwards."),
]


def parse_storage_options(pairs: Sequence[str] | None) -> dict[str, Any]:
    """Return the options that KEY=VALUE texts give. true, false and {JSON objects} are parsed.

    Numbers stay text, because a key or an account name may look like a number; back ends parse numbers from text.
    """
    options: dict[str, Any] = {}
    for pair in pairs or ():
        key, found, text = pair.partition("=")
        if not found or not key:
            raise ValueError("--storage-option takes KEY=VALUE, e.g. region=eu-central-1")
        with errors_name(f"--storage-option {key}: not a JSON object"):
            options[key] = json.loads(text) if text in ("true", "false") or text.startswith("{") else text
    return options


def parse_columns(text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ValueError(f"--columns takes names separated by commas, got {text!r}")
    return names


@contextmanager
def errors_name(option: str) -> Iterator[None]:
    """Let a ValueError in the block name the option."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def parse_size(option: str, text: str, *, whole_bytes: int | None = None) -> int:
    with errors_name(option):
        return parse_bytes(text, whole_bytes=whole_bytes)


def parse_age(option: str, text: str) -> float:
    with errors_name(option):
        return parse_duration(text)


# Arguments of the library's functions whose flags have another name.
_OTHER_NAMES = {"schema": "column", "storage_options": "storage_option", "source_options": "source_option"}
# The value that a message gives an argument: exclude=['*.txt'], schema={'x': 'str?'}, mode="append", overwrite=True.
_VALUE = r"""\{'[^}]*\}|\['[^']*'\]|"[^"]*"|'[^']*'|\w+|(?![\[{])"""


def name_flags(message: str, flags: Mapping[str, str]) -> str:
    """Return a message of the library with flags where it names arguments, as in exclude= or mode="append".

    flags: Flag of each argument that has one.
    """

    def replace(found: re.Match[str]) -> str:
        try:
            value = ast.literal_eval(found["value"] or "True")
        except ValueError:
            value = found["value"]
        if isinstance(value, dict):
            value = [f"{key}={one}" for key, one in value.items()]
        values = value if isinstance(value, list) else [value]
        given = [shlex.quote(str(one)) for one in values if one is not True]
        return " ".join([flags[found["name"]], *given])

    if not flags:
        return message
    names = "|".join(map(re.escape, flags))
    return re.sub(rf"(?<![\w.-])(?P<name>{names})(?:=(?P<value>{_VALUE})|(?= must be ))", replace, message)


def _flags_of(parameters: Iterable[Parameter]) -> dict[str, str]:
    """Return the flags of a verb's parameters by the names of the library's arguments."""
    described: dict[str, Any] = {p.name: getattr(p.annotation, "__metadata__", (None,))[0] for p in parameters}
    # In an annotation, the first flag is what typer calls the default.
    flags = {name: one.default for name, one in described.items() if str(getattr(one, "default", "")).startswith("--")}
    return flags | {theirs: flags[ours] for theirs, ours in _OTHER_NAMES.items() if ours in flags}


# Line ends, control characters and text direction marks: file names may contain them, and a terminal would obey them.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

Advance: TypeAlias = Callable[[int, int], None]
"""Callback of a progress bar; its arguments are the amount done and the total."""
Figures: TypeAlias = "Callable[[ModuleType], list[Any]]"
PROGRESS_LINE_S = 30.0
_DURATION_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


def printable(text: str) -> str:
    """Return text as one line, with escapes for control characters and text direction marks."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


@dataclass(frozen=True, slots=True)
class Output:
    """Prints results for people, or as JSON objects for programs, one per line, each with its kind in `event`."""

    as_json: bool = False
    quiet: bool = False

    def event(self, event: str, facts: Mapping[str, Any], text: str | None = None) -> None:
        """Print one result: facts as JSON, or for people text as one line without control characters; None: no line."""
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
        """Show the progress in bytes on standard error while the block runs, unless quiet.

        A terminal has a bar; elsewhere, a line is printed every PROGRESS_LINE_S.
        """
        figures: Figures = lambda p: [p.DownloadColumn(binary_units=True), p.TransferSpeedColumn()]  # noqa: E731
        return self._bar(doing, figures, format_bytes)

    def count_progress(self, doing: str) -> AbstractContextManager[Advance]:
        return self._bar(doing, lambda p: [p.MofNCompleteColumn()], "{:,}".format)

    @contextmanager
    def _bar(self, doing: str, figures: Figures, text: Callable[[int], str]) -> Iterator[Advance]:
        if self.quiet:
            yield lambda _done, _total: None
            return
        if not sys.stderr.isatty():
            yield _progress_lines(doing, text)
            return
        # Imported only where a bar is shown, because rich costs each start of the command 20 ms.
        from rich import console, progress

        columns = [progress.TextColumn("{task.description}"), progress.BarColumn(), *figures(progress)]
        stderr = console.Console(stderr=True)
        with progress.Progress(*columns, progress.TimeRemainingColumn(), console=stderr, transient=True) as bar:
            task = bar.add_task(doing, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def format_duration(seconds: float) -> str:
    """Return a duration as "12 d", "3 h" or "40 s": in the largest unit of which it has at least two."""
    for length_s, unit in _DURATION_UNITS:
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:,.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _progress_lines(doing: str, text: Callable[[int], str]) -> Advance:
    """Return a function that prints the progress every PROGRESS_LINE_S at most, with the rate and the time left."""
    start_s = SYSTEM_CLOCK.monotonic()
    next_s = start_s + PROGRESS_LINE_S
    n_before: int | None = None  # what an earlier run has done says nothing of the rate

    def advance(done: int, total: int) -> None:
        nonlocal next_s, n_before
        now_s = SYSTEM_CLOCK.monotonic()
        n_before = done if n_before is None else n_before
        if now_s >= next_s:
            next_s = now_s + PROGRESS_LINE_S
            line = f"tiercache: {doing}: {text(done)} of {text(total)} ({done / max(total, 1):.0%})"
            if done > n_before:
                rate = (done - n_before) / (now_s - start_s)
                line += f", {text(round(rate))}/s, {format_duration(max(total - done, 0) / rate)} left"
            typer.echo(line, err=True)

    return advance


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
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def confirm(question: str, otherwise: str) -> None:
    """Ask at the terminal whether to continue; if not, print otherwise and exit with FAILED. Raises ValueError."""
    if not sys.stdin.isatty():
        raise ValueError("cannot ask for confirmation, because standard input is not a terminal; give --yes")
    if not typer.confirm(question, err=True):
        _print_line(otherwise)
        raise typer.Exit(FAILED)


_COMMON_OPTIONS = {
    "as_json": Annotated[bool, flag("--json", "Print the results as JSON, one object per line.")],
    "quiet": Annotated[bool, flag("--quiet -q", "Print neither progress nor a summary.")],
    "verbose": Annotated[bool, flag("--verbose -v", "Also print the traceback of a failure.")],
}


def verb(*, after_ctrl_c: str) -> Callable[[Callable[..., object]], Callable[..., None]]:
    """Make a function, whose first parameter is output, typer's command: with --json, --quiet and --verbose.

    Its errors become one line on standard error and an exit code. With --verbose, the traceback precedes the line.
    Exceptions other than TierCacheError, ValueError, TypeError, OSError and KeyboardInterrupt are bugs and keep it.

    after_ctrl_c: Advice that is printed after Ctrl-C.
    """

    def decorate(function: Callable[..., object]) -> Callable[..., None]:
        def run(*, as_json: bool = False, quiet: bool = False, verbose: bool = False, **options: Any) -> None:
            try:
                with warnings.catch_warnings(), _shown_log(), fail_fast_if_unreachable():
                    warnings.showwarning = show_warning
                    function(Output(as_json, quiet), **options)
            except BrokenPipeError:
                raise  # the reader of the pipe closed it, e.g. head: typer ends without a message
            except KeyboardInterrupt as error:  # has a text only if our own code raised it: that advice is more precise
                _print_line(f"interrupted: {_one_line(error) or after_ctrl_c}")
                raise typer.Exit(INTERRUPTED) from None
            except (TierCacheError, ValueError, TypeError, OSError) as error:
                if verbose:
                    traceback.print_exc()
                _print_line(f"error: {name_flags(_one_line(error), flags) or type(error).__name__}")
                raise typer.Exit(exit_code_of(error)) from None

        # Typer reads the options from the signature.
        parameters = signature(function, eval_str=True).parameters.values()
        own = [parameter for parameter in parameters if parameter.name != "output"]
        flags = _flags_of(own)
        common = [Parameter(n, Parameter.KEYWORD_ONLY, default=False, annotation=o) for n, o in _COMMON_OPTIONS.items()]
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *common)}
        run.__signature__ = Signature([*own, *common])  # type: ignore[attr-defined]
        return run

    return decorate


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
    if isinstance(error, TierCacheError):
        return error.exit_code
    return USAGE if isinstance(error, ValueError | TypeError) else FAILED


def _one_line(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror and text.startswith("[Errno "):  # the system's own words
        names = [os.fspath(name) for name in (error.filename, error.filename2) if isinstance(name, str | os.PathLike)]
        text = f"{' and '.join(names)}: {error.strerror}" if names else error.strerror
    return " ".join(text.split())


def _print_line(text: str) -> None:
    typer.echo(f"tiercache: {text}", err=True)


def show_warning(message: Warning | str, *_rest: object, **_named: object) -> None:
    _print_line(f"warning: {message}")
