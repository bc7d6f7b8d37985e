"""Runs tasks in processes of their own.

Each process has one pipe to this one, and no lock is shared: a process that is killed can neither hold up the others
nor be mistaken for a slow one, because its pipe ends. A process whose parent is gone finds its pipe closed at its
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

Report: TypeAlias = Callable[[Any], None]
# To end a batch and abort its upload; a process that takes longer is killed, which leaves no more than an abort does.
_STOP_S = 10.0


@dataclass(slots=True)
class _Worker:
    process: SpawnProcess
    connection: Connection
    task: int = -1


def run_in_processes(
    work: Callable[[Any, Report], Any],
    tasks: Sequence[Any],
    n_processes: int,
    report: Report,
    keep: Callable[[int, Any], None],
) -> None:
    """Run work(task, report) for each task in n_processes.

    report, and keep(task's index, result), are called in this thread. work: a function of a module; tasks, results
    and reports are pickled. Processes are spawned: forked ones would inherit the threads and clients of stores, which
    do not live through it.

    Raises:
        TierCacheError: a process died. What work raises is raised here; the other processes have been stopped by then.
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
        hint = "; it may have been killed for its memory" if code == -signal.SIGKILL else ""
        raise TierCacheError(f"a process died (exit code {code}){hint}; nothing was committed") from error
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


def _serve(connection: Connection, work: Callable[[Any, Report], Any]) -> None:
    """A worker's whole life: tasks in, reports and one result each out, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent says what is to end
    with connection, suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            task = connection.recv()
            try:
                answer = ("done", work(task, lambda value: connection.send(("report", value))))
            except Exception as error:  # noqa: BLE001 - the top of a process: the error goes to the consumer
                answer = ("failed", error)
            connection.send(answer)
