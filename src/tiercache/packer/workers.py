"""Worker processes that run tasks and report their progress: on this machine, or those of a Ray cluster."""

from __future__ import annotations

import importlib
import signal
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args

from tiercache.errors import TierCacheError

T = TypeVar("T")
Work: TypeAlias = "Callable[[Any, Report], object]"
Report: TypeAlias = Callable[[int, int], object]  # takes numbers of records and bytes
# Time to finish a batch and abort its upload. A process that takes longer is killed, which leaves no more behind than
# an abort does.
_STOP_S = 10.0
PackEngine: TypeAlias = Literal["process", "ray"]
ENGINES: tuple[PackEngine, ...] = get_args(PackEngine)


def check_engine(engine: str) -> None:
    """Raise ValueError for an unknown engine, and for one whose package is not installed."""
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if engine == "ray":
        import_ray()


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


def call_in_ray(
    function: Callable[[Any], T], tasks: Sequence[Any], *, on_each_machine: bool = False
) -> Generator[T, None, None]:
    """Yield function(task) for all tasks, as they end, from the Ray cluster of this process, or one that Ray starts.

    Ray places the tasks, and repeats those of a worker that died, so the function may run more than once for a task.
    An exception of the function is raised after the others have been cancelled.

    Args:
        function: Function that Ray's workers can import or unpickle.
        tasks: Arguments of the calls.
        on_each_machine: Whether each task runs on each machine of the cluster.
    """
    ray = import_ray()
    starts = not ray.is_initialized()
    if starts:
        ray.init()  # RAY_ADDRESS names a cluster; without it, Ray starts one on this machine
    try:
        remote, shared = ray.remote(_call), ray.put(function)
        places = [remote]
        if on_each_machine:
            strategies = importlib.import_module("ray.util.scheduling_strategies")
            nodes = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])
            pins = [strategies.NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
            places = [remote.options(num_cpus=0, scheduling_strategy=pin) for pin in pins]
        left = [place.remote(shared, task) for task in tasks for place in places]
        try:
            while left:
                done, left = ray.wait(left)
                yield ray.get(done[0])
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            raise TierCacheError(f"a task failed in Ray: {error}; the same command continues") from error
        finally:
            for one in left:
                ray.cancel(one)
            if left:
                ray.wait(left, num_returns=len(left), timeout=_STOP_S)
    finally:
        if starts:
            ray.shutdown()


def import_ray() -> Any:
    """Return the package ray. Raises ValueError, which says what to install."""
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ValueError("engine='ray' needs the package ray: pip install 'tiercache-data[ray]'") from error


def _call(function: Callable[[Any], T], task: Any) -> T:
    return function(task)


def _counted(work: Work, task: Any) -> tuple[int, int]:
    done = [0, 0]

    def report(n_records: int, n_bytes: int) -> None:
        done[:] = done[0] + n_records, done[1] + n_bytes

    work(task, report)
    return done[0], done[1]
