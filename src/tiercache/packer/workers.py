"""Worker processes that run tasks and report their progress: on this machine, or those of a Ray cluster."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeAlias, cast

from tiercache.errors import TierCacheError
from tiercache.ray_tasks import call_in_ray

Work: TypeAlias = "Callable[[Any, Report], object]"
Report: TypeAlias = Callable[[int, int], object]  # takes numbers of records and bytes
# Time to finish a batch and abort its upload. A process that takes longer is killed, which leaves no more behind than
# an abort does.
_STOP_S = 10.0


def run_in_processes(work: Work, tasks: Sequence[Any], n_processes: int, report: Report) -> None:
    """Run work(task, report) for all tasks, in n_processes processes.

    Processes are spawned: forked ones would inherit the threads and clients of stores, which do not survive a fork.
    An exception of work, and TierCacheError for a process that died, is raised after the others have been stopped.
    """
    context = get_context("spawn")
    workers: dict[Connection, SpawnProcess] = {}
    pending, n_done = iter(tasks), 0

    def send_next(connection: Connection) -> None:
        for task in islice(pending, 1):
            connection.send(task)

    try:
        for _ in range(min(n_processes, len(tasks))):
            ours, theirs = context.Pipe()
            workers[ours] = context.Process(target=_serve, args=(theirs, work), daemon=True)
            # A process that is starting inherits the mask, so that Ctrl-C does not end it with a traceback.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            try:
                workers[ours].start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
            send_next(ours)
        while n_done < len(tasks):
            for connection in wait(list(workers)):
                kind, value = _receive(cast("Connection", connection), workers)
                if kind == "report":
                    report(*value)
                elif kind == "failed":
                    raise value
                else:
                    n_done += 1
                    send_next(cast("Connection", connection))
    finally:
        _stop(workers)


def _receive(connection: Connection, workers: Mapping[Connection, SpawnProcess]) -> tuple[str, Any]:
    try:
        return cast("tuple[str, Any]", connection.recv())
    except (EOFError, OSError) as error:
        process = workers[connection]
        process.join(_STOP_S)
        hint = "; the system may have killed it for lack of memory" if process.exitcode == -signal.SIGKILL else ""
        message = f"a worker process died (exit code {process.exitcode}){hint}; the same command continues"
        raise TierCacheError(message) from error


def _stop(workers: Mapping[Connection, SpawnProcess]) -> None:
    for connection in workers:
        connection.close()
    for process in workers.values():
        if process.pid is not None:
            process.join(_STOP_S)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()


def _serve(connection: Connection, work: Work) -> None:
    """Run a worker process: receive tasks, send reports and one answer each, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent stops the workers
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    with connection, suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            task = connection.recv()
            try:
                work(task, lambda *done: connection.send(("report", done)))
                answer: tuple[str, Any] = ("done", None)
            except Exception as error:  # noqa: BLE001 - top-level function of a process: the error goes to the parent
                answer = ("failed", error)
            connection.send(answer)


def run_in_ray(work: Work, tasks: Sequence[Any], report: Report) -> None:
    """Run work(task, report) for all tasks as tasks of Ray. Progress is that of whole tasks."""
    with closing(call_in_ray(partial(_counted, work), tasks)) as results:
        for done in results:
            report(*done)


def _counted(work: Work, task: Any) -> tuple[int, int]:
    done = [0, 0]

    def report(n_records: int, n_bytes: int) -> None:
        done[:] = done[0] + n_records, done[1] + n_bytes

    work(task, report)
    return done[0], done[1]
