"""Child processes that run one task of one contender each, with a timeout, and the reasons of failures."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peers.job import Job

BENCHMARKS = Path(__file__).parents[1]
REASON_LENGTH = 300
READ_BYTES = 8 << 20


class FailedError(Exception):
    """A task failed, served wrong records or took too long; the message says which."""


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs tasks. logs: Folder for their stderr. timeout_s: Timeout of a task in seconds."""

    logs: Path
    timeout_s: float

    def run(self, python: Path, job: Job, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Return the result of a task.

        Args:
            python: Interpreter of the contender.
            job: The task.
            environment: Environment of the process; None: this process's.

        Raises:
            FailedError: The task failed, served wrong records, or took too long.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        if job.task != "pack" and not job.url:
            read_through(job.path if job.path.exists() else Path(job.source_folder))
        form = job.form.replace(" ", "_")
        log = self.logs / f"{job.workload.name}-{job.peer}-{job.task}-{job.shuffle}-{form}-{job.workers}.log"
        return run_child(
            [str(python), "-m", "peers.child", json.dumps(job.as_json())], log, self.timeout_s, environment
        )


def run_child(
    command: list[str], log: Path, timeout_s: float, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the JSON in the last line of a command's output. log: File for its stderr. Raises FailedError."""
    with log.open("w") as errors:
        child = subprocess.Popen(
            command,
            cwd=BENCHMARKS,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            start_new_session=True,
        )
        try:
            said, _ = child.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise FailedError(f"took longer than {timeout_s:.0f} s") from error
        finally:
            _end_group(child)
    if child.returncode:
        raise FailedError(f"{_reason(log)} (exit {child.returncode}; {log.name})")
    return json.loads(said.splitlines()[-1])


def read_through(folder: Path) -> None:
    """Read all files of a folder into the page cache: some kernels evict files that were not read for minutes."""
    memory = memoryview(bytearray(READ_BYTES))
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(memory):
                pass


def _end_group(child: subprocess.Popen[str]) -> None:
    """Kill the remains of the child and of its workers, which would disturb the next tasks."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _reason(log: Path) -> str:
    """Return the last line of a traceback, even if other lines follow it."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception", "error"))]
    return ([*lines[-1:], *errors[-1:]] or ["no message"])[-1][:REASON_LENGTH]
