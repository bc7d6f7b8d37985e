"""Runs a training process and yields its events."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator

from tiercache.demo.events import Event
from tiercache.demo.jobs import Job, event_from_line
from tiercache.errors import TierCacheError

END_S = 10.0
TAIL_CHARACTERS = 4000


def run_job(job: Job) -> Generator[Event, None, None]:
    """Run job in a new Python process and yield its events as they come. Closing the iterator ends the process.

    Raises:
        TierCacheError: The process failed; the message has the end of its standard error.
    """
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tiercache.demo.train"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
        try:
            yield from _talk(process, job)
            if process.wait() != 0:
                errors.seek(0)
                text = errors.read()[-TAIL_CHARACTERS:].strip()
                raise TierCacheError(f"the training process ({job.phase}) ended with {process.returncode}:\n{text}")
        finally:
            _end(process)


def _talk(process: subprocess.Popen[str], job: Job) -> Iterator[Event]:
    if process.stdin is None or process.stdout is None:
        raise AssertionError("stdin and stdout are pipes")
    with process.stdin, process.stdout:
        process.stdin.write(job.to_json())
        process.stdin.close()
        for line in process.stdout:
            yield event_from_line(line)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
