"""Benchmarks that run each of their cases in a process of its own, so that peak memory is measured per case."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rows import OUT, table, write_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

MIB = 1 << 20


@dataclass(frozen=True)
class Bench:
    """A benchmark with several cases.

    Attributes:
        name: Name of the file of its rows.
        script: File of the benchmark, which is run once per case with --case.
        doc: Text for --help.
        cases: Names of the cases.
        options: Integer options and their defaults, including "objects" and "repetitions".
        measure: Function (case, options) that returns the row, called in a process that has done nothing else.
        titles: Titles of the printed columns after the case.
        cells: Function that returns a row's cells for these columns.
    """

    name: str
    script: str
    doc: str
    cases: Collection[str]
    options: Mapping[str, int]
    measure: Callable[[str, Mapping[str, int]], dict[str, Any]]
    titles: Sequence[str]
    cells: Callable[[Mapping[str, Any]], Sequence[str]]

    def main(self) -> None:
        """Measure, print and write the rows."""
        given = self._parsed()
        options = {name: getattr(given, name) for name in self.options}
        if given.case:
            print(json.dumps(self.measure(given.case, options)))
            return
        if given.quick:
            options |= {"objects": 5_000, "repetitions": 1}
        rows = [self._in_a_process(case, options) for case in given.only]
        print(table(["case", *self.titles], [[row["case"], *self.cells(row)] for row in rows]))
        write_rows(given.folder / f"{self.name}.jsonl", rows)

    def _parsed(self) -> argparse.Namespace:
        parser = argparse.ArgumentParser(description=self.doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        for name, default in self.options.items():
            parser.add_argument(f"--{name}", type=int, default=default)
        parser.add_argument("--only", nargs="+", choices=self.cases, default=self.cases)
        parser.add_argument("--folder", type=Path, default=OUT, help="Folder for the rows.")
        parser.add_argument("--quick", action="store_true", help="Smoke test: small data.")
        parser.add_argument("--case", choices=self.cases, help=argparse.SUPPRESS)
        return parser.parse_args()

    def _in_a_process(self, case: str, options: Mapping[str, int]) -> dict[str, Any]:
        numbers = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        return asked([self.script, "--case", case, *numbers])


def asked(arguments: Sequence[str]) -> dict[str, Any]:
    """Run a script and return the row that it prints."""
    done = subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def peak_bytes() -> int:
    """Return the peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def mib(n_bytes: int) -> str:
    """Format bytes as MiB."""
    return f"{n_bytes / MIB:.0f}"
