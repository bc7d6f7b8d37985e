"""Python programs that start in milliseconds: forked from a process that has imported tiercache and torch (2 s)."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.testing.warm_process import ROOT, WITHOUT_THREADS


class WarmPython:
    """Runs Python programs, one at a time, each in a new fork of a warm process.

    A program has its own folder, environment, arguments, warning filters, streams and end. It shares with others only
    what was imported before.
    """

    def __init__(self) -> None:
        """Start the warm process."""
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "tests.support.warm_python"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | WITHOUT_THREADS,
            start_new_session=True,
        )

    def __enter__(self) -> WarmPython:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def run(
        self,
        arguments: Sequence[str],
        *,
        cwd: Path,
        environment: Mapping[str, str] | None = None,
        is_strict: bool = False,
        timeout_s: float = 150.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program as ``python ARGUMENTS`` would, and return its exit code and output.

        Args:
            arguments: A script or ``-m`` and a module, and the arguments of that.
            cwd: Folder in which it runs.
            environment: All of its environment variables. Those of this process if None.
            is_strict: Whether warnings are errors.
            timeout_s: Seconds after which it is killed, and the warm process with it.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
            request = {
                "arguments": list(arguments),
                "cwd": str(cwd),
                "environment": dict(os.environ if environment is None else environment),
                "is_strict": is_strict,
                "streams": [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in (out, errors)],
            }
            print(json.dumps(request), file=self._process.stdin, flush=True)
            killer = threading.Timer(timeout_s, os.killpg, (self._process.pid, 9))
            killer.start()
            code = self._process.stdout.readline()
            killer.cancel()
            killer.join()
            out.seek(0)
            errors.seek(0)
            found = subprocess.CompletedProcess(list(arguments), int(code or -9), out.read(), errors.read())
        assert code, f"{found.args} took longer than {timeout_s} s, or its warm process ended:\n{found.stderr}"
        return found


def _serve() -> None:
    """Fork for each request. Returns only in forks, when their program has ended."""
    import torch

    import tiercache
    from tiercache.cli import app

    loaded = [getattr(tiercache, name) for name in tiercache.__all__]
    assert all((torch, app, *loaded))
    n_threads = len(list(Path("/proc/self/task").iterdir()))
    assert n_threads == 1, f"{n_threads} threads: a fork would have their locks, and not them"
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _become(json.loads(line))
            return
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _become(request: dict[str, Any]) -> None:
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, path in enumerate([os.devnull, *request["streams"]]):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - what was read ahead are requests
    warnings.resetwarnings()
    warnings.simplefilter("error" if request["is_strict"] else "default")
    program, *arguments = request["arguments"]
    if program == "-m":
        sys.path[0] = request["cwd"]
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        script = Path(program).resolve()
        sys.path[0] = str(script.parent)
        sys.argv = [program, *arguments]
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    _serve()
