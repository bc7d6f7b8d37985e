"""Runs tasks in separate processes.

Each process has its own pipe to this process, and there are no shared locks: a killed process cannot block the others
and is not mistaken for a slow one, because its pipe ends. A process whose parent has died finds its pipe closed at its
next message.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeAlias

from tiercache.errors import TierCacheError

ProgressCallback: TypeAlias = Callable[[Any], None]
# Time to finish a batch and abort its upload. A process that takes longer is killed, which leaves no more behind than
# an abort does.
_STOP_S = 10.0


@dataclass(slots=True)
class _Worker:
    process: SpawnProcess
    connection: Connection
    task: int = -1


def run_in_processes(
    work: Callable[[Any, ProgressCallback], Any],
    tasks: Sequence[Any],
    n_processes: int,
    report: ProgressCallback,
    keep: Callable[[int, Any], None],
) -> None:
    """Run work(task, report) for each task in n_processes processes.

    Processes are spawned: forked ones would inherit the threads and clients of stores, which do not survive a fork.

    Args:
        work: Function of a module. Tasks, results and reports are pickled.
        tasks: Arguments of work.
        n_processes: Number of processes.
        report: Function called in this thread with each value that work reports.
        keep: Function called in this thread with the index of a task and its result.

    Raises:
        TierCacheError: A process died. An exception of work is raised here, after the other processes have been
            stopped.
    """
    context = get_context("spawn")
    workers: list[_Worker] = []
    n_left = len(tasks)
    pending = iter(enumerate(tasks))
    try:
        for _ in range(min(n_processes, len(tasks))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work), daemon=True)
            workers.append(_Worker(process, ours))
            process.start()
            theirs.close()
            _give(workers[-1], pending)
        while n_left:
            for connection in wait([w.connection for w in workers]):
                worker = next(w for w in workers if w.connection is connection)
                kind, value = _receive(worker)
                if kind == "report":
                    report(value)
                elif kind == "failed":
                    raise value
                else:
                    keep(worker.task, value)
                    n_left -= 1
                    _give(worker, pending)
    finally:
        _stop(workers)


def _give(worker: _Worker, pending: Any) -> None:
    task = next(pending, None)
    if task is not None:
        worker.task = task[0]
        worker.connection.send(task[1])


def _receive(worker: _Worker) -> tuple[str, Any]:
    try:
        message: tuple[str, Any] = worker.connection.recv()
    except (EOFError, OSError) as error:
        worker.process.join(_STOP_S)
        code = worker.process.exitcode
        hint = "; the system may have killed it for lack of memory" if code == -signal.SIGKILL else ""
        raise TierCacheError(f"a worker process died (exit code {code}){hint}; nothing was committed") from error
    return message


def _stop(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.connection.close()
    for worker in workers:
        if worker.process.pid is not None:
            worker.process.join(_STOP_S)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.process.close()


def _serve(connection: Connection, work: Callable[[Any, ProgressCallback], Any]) -> None:
    """Run a worker process: receive tasks, send reports and one result each, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent stops the workers
    with connection, suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            task = connection.recv()
            try:
                answer = ("done", work(task, lambda value: connection.send(("report", value))))
            except Exception as error:  # noqa: BLE001 - top-level function of a process: the error goes to the parent
                answer = ("failed", error)
            connection.send(answer)
