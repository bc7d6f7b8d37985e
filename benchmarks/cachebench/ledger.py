"""Rows that are stored as they are measured, so that an interrupted run can be resumed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rows import machine

if TYPE_CHECKING:
    from pathlib import Path


class Rows:
    """JSON lines in a file that only grows; of several rows of one case the last one counts. One process at a time.

    resume: Whether the file's content is used; otherwise the file begins anew.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self._path, self._machine = path, machine()
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if resume and path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # The last line of a killed run may be torn.
        path.write_text(whole)
        self._rows = {_key(row["case"]): row for row in map(json.loads, whole.splitlines())}

    def has(self, case: dict[str, Any]) -> bool:
        """Return whether a case has been measured."""
        return _key(case) in self._rows

    def add(self, case: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
        """Store the result of a case. Return the row."""
        row = {**self._machine, **case, **found, "case": case}
        self._rows[_key(case)] = row
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def all(self) -> list[dict[str, Any]]:
        """Return all rows, in the order in which their cases were first measured."""
        return list(self._rows.values())


def _key(case: dict[str, Any]) -> str:
    return json.dumps(case, sort_keys=True)
