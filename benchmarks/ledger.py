"""Results that are stored as they are measured, so that an interrupted run can be resumed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


class Ledger:
    """Results by case, one JSON line each in a file that only grows; the last one of a case counts.

    One process at a time may use the file.

    resume: Whether the file's content is used; otherwise the file begins anew.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if resume and path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # The last line of a killed run may be torn.
        path.write_text(whole)
        rows = [json.loads(line) for line in whole.splitlines()]
        self._found: dict[str, dict[str, Any]] = {_key(row["case"]): row for row in rows}

    def get(self, case: Any) -> dict[str, Any] | None:
        """Return the stored result of a case, if it was completed."""
        row = self._found.get(_key(case))
        return None if row is None else row["found"]

    def put(self, case: Any, found: dict[str, Any]) -> None:
        """Store the result of a case."""
        row = self._found[_key(case)] = {"case": case, "found": found}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def all(self) -> list[tuple[Any, dict[str, Any]]]:
        """Return all cases and results, in the order in which the cases were first measured."""
        return [(row["case"], row["found"]) for row in self._found.values()]


def _key(case: Any) -> str:
    return json.dumps(case, sort_keys=True)
