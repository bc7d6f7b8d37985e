"""Tasks of Ray: calls of a function on the machines of a cluster, and the engines that a caller may choose."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator, Sequence
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from tiercache.errors import TierCacheError

T = TypeVar("T")
# Time for cancelled tasks to end.
_STOP_S = 10.0
TaskEngine: TypeAlias = Literal["process", "ray"]
ENGINES: tuple[TaskEngine, ...] = get_args(TaskEngine)


def check_engine(engine: str) -> None:
    """Raise ValueError for an unknown engine, and for one whose package is not installed."""
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if engine == "ray":
        import_ray()


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
