"""What a verb prints: rows and a summary on standard output, progress on standard error."""

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

# Line ends, what terminals obey, and what turns the direction of writing: names of files may hold them.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

Advance: TypeAlias = Callable[[int, int], None]
"""Called with what is done and the total."""


def printable(text: str) -> str:
    """The text in one line, with escapes for what a terminal would not show but do."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


@dataclass(frozen=True, slots=True)
class Output:
    """Prints for people, or as JSON for programs: one object a line, with `event` saying what it is."""

    as_json: bool = False
    quiet: bool = False

    def event(self, event: str, facts: Mapping[str, Any], text: str | None = None) -> None:
        """One result: facts as JSON; text for people as one line, without control characters (None: no line)."""
        if self.as_json:
            typer.echo(json.dumps({"event": event, **facts}, ensure_ascii=False, default=str))
        elif text is not None:
            typer.echo(printable(text))

    def table(self, event: str, rows: Sequence[Mapping[str, Any]], texts: Sequence[Mapping[str, str]]) -> None:
        """Results of one kind: rows as JSON objects, texts as a table with their keys as its head."""
        if self.as_json:
            for row in rows:
                self.event(event, row)
        elif texts:
            for line in aligned([list(texts[0]), *([printable(cell) for cell in text.values()] for text in texts)]):
                typer.echo(line)

    def summary(self, facts: Mapping[str, Any], text: str) -> None:
        """The last line."""
        if self.as_json or not self.quiet:
            self.event("summary", facts, text)

    def progress(self, doing: str) -> AbstractContextManager[Advance]:
        """A bar on standard error while the block runs, if that is a terminal and nobody asked for quiet. Of bytes."""
        return self._bar(doing, DownloadColumn(binary_units=True), TransferSpeedColumn())

    def counting(self, doing: str) -> AbstractContextManager[Advance]:
        """The same, of anything that is counted."""
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
    """Lines with the cells of each column under each other; cells that are numbers or sizes stand to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [all(cell[:1].isdigit() or not cell for cell in column) for column in zip(*rows[1:], strict=True)]
    right = right or [False] * len(widths)
    return [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in rows
    ]


def count(n: int, one: str, many: str = "") -> str:
    """A number with its noun: "1 shard", "1,200 records"."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def _no_progress(_done: int, _total: int) -> None:
    pass
