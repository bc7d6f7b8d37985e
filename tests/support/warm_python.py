"""Python programs that start in milliseconds: forked from a process that has imported tiercache and torch (2 s)."""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from tests.support import ROOT

# Libraries that start threads when they are imported, unless they are told not to: numpy's BLAS, Arrow's jemalloc.
WITHOUT_THREADS = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}

# What the programs of tests import.
WARM_MODULES = (
    "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "torch.distributed.tensor.parallel",
    "torch._dynamo", "torch.utils.data", "tiercache.checkpoint.dcp",
    "tiercache.integrations.accelerate",
    "boto3", "obstore", "s3fs", "tiercache.cli.app", "tiercache.cli.cache",
    "tiercache.cli.data",
    "tiercache.cli.warm", "tiercache.cli.tier", "tiercache.images.decoder", "tiercache.load.loader",
    "tiercache.packer.pack", "tiercache.shard.writer",
)  # fmt: skip


def run_warm(
    arguments: list[str], *, timeout_s: float = 150.0, more: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python, with one thread at its start, from the repository's root; its output as text.

    Such a process may be forked from, and may have whatever must stand before libc.
    """
    environment = {**os.environ, **WITHOUT_THREADS, **(more or {})}
    command = [sys.executable, "-W", "error", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=timeout_s, cwd=ROOT, env=environment
    )


class WarmProcess:
    """A program in a fork of a warm process. It is killed when the warm process ends."""

    def __init__(self, warm: WarmPython, pid: int) -> None:
        self._warm = warm
        self.pid = pid
        self.returncode: int | None = None
        self._pidfd = os.pidfd_open(pid)

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def poll(self) -> int | None:
        """Return the exit code; None while the program runs."""
        return self.wait(0.0)

    def wait(self, timeout_s: float = 150.0) -> int | None:
        """Return the exit code as subprocess does; None if the program runs longer."""
        if self.returncode is None and select.select([self._pidfd], [], [], timeout_s)[0]:
            self.returncode = int(self._warm.ask({"wait": self.pid}))
            os.close(self._pidfd)
        return self.returncode


class WarmPython:
    """Runs Python programs, each in a new fork of a warm process. One thread at a time may use it.

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

    def ask(self, request: dict[str, Any]) -> str:
        """Return the warm process's answer to a request."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the warm process ended"
        return answer

    def start(
        self,
        arguments: Sequence[str],
        *,
        out: IO[str],
        errors: IO[str],
        cwd: Path = ROOT,
        environment: Mapping[str, str] | None = None,
        is_strict: bool = False,
    ) -> WarmProcess:
        """Start a program as ``python ARGUMENTS`` would.

        Args:
            arguments: A script, ``-m`` and a module, or ``-c`` and code; then the arguments of that.
            out: Open file for its standard output.
            errors: Open file for its standard error.
            cwd: Folder in which it runs.
            environment: All of its environment variables. Those of this process if None.
            is_strict: Whether warnings are errors.
        """
        request = {
            "arguments": list(arguments),
            "cwd": str(cwd),
            "environment": dict(os.environ if environment is None else environment),
            "is_strict": is_strict,
            "streams": [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in (out, errors)],
        }
        return WarmProcess(self, int(self.ask(request)))

    def run(
        self,
        arguments: Sequence[str],
        *,
        cwd: Path,
        environment: Mapping[str, str] | None = None,
        is_strict: bool = False,
        timeout_s: float = 150.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program as start() does, and return its exit code and output. It is killed after timeout_s seconds."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
            process = self.start(
                arguments, out=out, errors=errors, cwd=cwd, environment=environment, is_strict=is_strict
            )
            code = process.wait(timeout_s)
            if code is None:
                process.kill()
                process.wait()
            out.seek(0)
            errors.seek(0)
            found = subprocess.CompletedProcess(list(arguments), code or 0, out.read(), errors.read())
        assert code is not None, f"{found.args} took longer than {timeout_s} s:\n{found.stderr}"
        return found


def _serve() -> None:
    """Fork for each program."""
    for name in WARM_MODULES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:  # the environment of `make integration` lacks some packages
            if (error.name or "").startswith("tiercache"):
                raise
    n_threads = len(list(Path("/proc/self/task").iterdir()))
    assert n_threads == 1, f"{n_threads} threads: a fork would have their locks, and not them"
    gc.freeze()  # a fork's collector would copy every page
    prctl = ctypes.CDLL(None).prctl
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
            continue
        ready, begun = os.pipe()
        pid = os.fork()
        if pid == 0:
            prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            _open_streams(request["streams"])
            os.close(ready)
            os.close(begun)
            _end(_become(request))
        os.close(begun)
        os.read(ready, 1)  # until the fork has opened its streams: the test may close them then
        os.close(ready)
        print(pid, flush=True)


def _open_streams(paths: Sequence[str]) -> None:
    for number, path in enumerate([os.devnull, *paths]):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)


def _become(request: dict[str, Any]) -> int:
    """Run the program, and return its exit code."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - what was read ahead are requests
    warnings.resetwarnings()
    warnings.simplefilter("error" if request["is_strict"] else "default")
    program, *arguments = request["arguments"]
    try:
        if program == "-m":
            sys.path[0] = request["cwd"]
            sys.argv = arguments
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        elif program == "-c":
            sys.argv = ["-c", *arguments[1:]]
            exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            script = Path(program).resolve()
            sys.path[0] = str(script.parent)
            sys.argv = [program, *arguments]
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:  # noqa: BLE001 - the process's top: the test shows it
        traceback.print_exc()
        return 1
    return 0


def _end(code: int) -> NoReturn:
    """End as the interpreter does, except that it does not free torch's modules, which takes 0.9 s of a processor."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
