"""Output of a verb: results and a summary on standard output, progress and errors on standard error, and exit codes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

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
        return self._bar(doing, DownloadColumn(binary_units=True), TransferSpeedColumn())

    def count_progress(self, doing: str) -> AbstractContextManager[Advance]:
        """Show a progress bar of a count of items, under the same conditions as progress()."""
        return self._bar(doing, MofNCompleteColumn())

    @contextmanager
    def _bar(self, doing: str, *figures: ProgressColumn) -> Iterator[Advance]:
        if self.quiet or not sys.stderr.isatty():
            yield _no_progress
            return
        columns = (TextColumn("{task.description}"), BarColumn(), *figures, TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
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


def _no_progress(_done: int, _total: int) -> None:
    pass
