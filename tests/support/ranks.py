"""Real jobs of several ranks on this machine, started as torchrun does: their environment, their end, their results."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.warm_python import WarmPython

from tiercache.waiting import wait_for

# Of a whole job: a bound for hangs.
LONGEST_S = 240.0


class Job:
    """One function, run by n_ranks processes that find each other by torchrun's variables.

    Each rank calls `target` ("module:function") with the arguments, and what that returns, as JSON, is its result.
    A rank is a fork of a warm process, because the import of torch takes two seconds. The end of `with` kills all.
    """

    def __init__(self, python: WarmPython, target: str, n_ranks: int, folder: Path, arguments: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._results = [folder / f"result-{rank}.json" for rank in range(n_ranks)]
        self._errors = [folder / f"errors-{rank}.txt" for rank in range(n_ranks)]
        command = ["-m", "tests.support.rank_child", target, json.dumps(arguments)]
        port = str(_free_port())
        self._processes = []
        for rank, (result, path) in enumerate(zip(self._results, self._errors, strict=True)):
            environment = os.environ | _torchrun_environment(rank, n_ranks, port)
            with path.open("w") as errors:
                process = python.start([*command, str(result)], out=errors, errors=errors, environment=environment)
            self._processes.append(process)

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def kill(self, rank: int) -> None:
        """SIGKILL to one rank."""
        self._processes[rank].send_signal(signal.SIGKILL)

    def is_running(self) -> bool:
        return all(process.poll() is None for process in self._processes)

    def exit_codes(self) -> list[int]:
        """How each rank ended. Fails when one has not within LONGEST_S."""
        ended = wait_for(lambda: all(p.poll() is not None for p in self._processes), LONGEST_S)
        assert ended, f"ranks hang:\n{self.said()}"
        return [process.returncode for process in self._processes]

    def results(self) -> list[Any]:
        """What each rank returned. Fails when one ended otherwise, or hangs."""
        codes = self.exit_codes()
        assert codes == [0] * len(codes), self.said()
        return [json.loads(path.read_text()) for path in self._results]

    def said(self) -> str:
        """What the ranks wrote, errors included."""
        return "\n".join(f"-- rank {rank}\n{path.read_text()}" for rank, path in enumerate(self._errors))


def run_ranks(python: WarmPython, target: str, n_ranks: int, folder: Path, arguments: dict[str, Any]) -> list[Any]:
    """What each of n_ranks processes returned from the function. Fails as `Job.results`."""
    with Job(python, target, n_ranks, folder, arguments) as job:
        return job.results()


def together(parts: Sequence[Sequence[Sequence[Any]]]) -> list[list[Any]]:
    """Global batches, sorted, of what each rank was served: parts[rank][batch] is a list of records."""
    return [sorted(record for part in parts for record in part[i]) for i in range(max(map(len, parts)))]


def _torchrun_environment(rank: int, n_ranks: int, port: str) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(n_ranks),
        "LOCAL_WORLD_SIZE": str(n_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
