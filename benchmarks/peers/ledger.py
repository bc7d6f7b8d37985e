"""What tasks found, kept on disk as they end, so that a comparison that was stopped goes on where it was."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from peers.job import Job


class Ledger:
    """Results by task and repetition, one JSON line each in a file that only grows. One process at a time.

    resume: whether what the file holds is used; else it begins anew.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if resume and path.exists() else ""
        # The last line of a run that was killed may be torn; what follows shall not be written behind it.
        whole = text[: text.rfind("\n") + 1]
        path.write_text(whole)
        entries = [json.loads(line) for line in whole.splitlines()]
        self._found: dict[str, dict[str, Any]] = {entry["task"]: entry["found"] for entry in entries}

    def get(self, job: Job, repetition: int) -> dict[str, Any] | None:
        """What the task found, if it was run to its end before."""
        return self._found.get(_task(job, repetition))

    def put(self, job: Job, repetition: int, found: dict[str, Any]) -> None:
        """Keep what a task found."""
        task = _task(job, repetition)
        self._found[task] = found
        with self._path.open("a") as file:
            file.write(json.dumps({"task": task, "found": found}) + "\n")


def _task(job: Job, repetition: int) -> str:
    """The task without the folders, which may move."""
    return json.dumps([replace(job, source_folder="", folder="", library_folder="").as_json(), repetition])
