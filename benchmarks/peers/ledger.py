"""Results of tasks, stored as they finish, so that an interrupted comparison can be resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from peers.job import Job


class Ledger:
    """Results by task and repetition, one JSON line each in a file that only grows. One process at a time.

    resume: Whether the file's content is used; otherwise the file begins anew.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if resume and path.exists() else ""
        # The last line of a killed run may be torn; nothing must be appended to it.
        whole = text[: text.rfind("\n") + 1]
        path.write_text(whole)
        entries = [json.loads(line) for line in whole.splitlines()]
        self._found: dict[str, dict[str, Any]] = {entry["task"]: entry["found"] for entry in entries}

    def get(self, job: Job, repetition: int) -> dict[str, Any] | None:
        """Return the stored result of a task, if it was completed."""
        return self._found.get(_task(job, repetition))

    def put(self, job: Job, repetition: int, found: dict[str, Any]) -> None:
        """Store the result of a task."""
        task = _task(job, repetition)
        self._found[task] = found
        with self._path.open("a") as file:
            file.write(json.dumps({"task": task, "found": found}) + "\n")


def _task(job: Job, repetition: int) -> str:
    """Return the key of a task, without the folders, which may move."""
    return json.dumps([replace(job, source_folder="", folder="", library_folder="").as_json(), repetition])
