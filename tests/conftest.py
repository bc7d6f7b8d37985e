"""What every test gets: a home of its own, a watch for leaks, and hypothesis without a clock."""

import contextlib
import gc
import io
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from pyarrow import csv

pytest_plugins = ["tests.support.fixtures", "tests.support.certificates"]

# Their asserts shall say what was compared; here, because this file is read before any that imports them.
pytest.register_assert_rewrite(
    "tests.support.store_suite",
    "tests.support.cache_machine",
    "tests.support.cache_world",
)

# Time says nothing on a shared machine of two cores; the examples that failed are printed as code. A test of a fast
# path may ask for more examples, and `make fuzz` runs 5,000 of each.
settings.register_profile(
    "tests", max_examples=25, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("fuzz", settings.get_profile("tests"), max_examples=5000)
settings.load_profile("tests")

# Only a test that leaves something behind waits so long; on a loaded machine a thread or a process takes seconds.
JOIN_S = 8.0

# Threads that libraries start once in a process and keep: fsspec's event loop, and one for each connection to a test
# server that outlives the test.
LIBRARY_THREADS = ("fsspecIO", "asyncio_", "process_request_thread", "pytest_timeout", "QueueFeederThread")


def pytest_collection_finish() -> None:
    """Keep the garbage collector off the 660,000 objects of tests and libraries: 0.35 s for each collection."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Cache, state and configuration of the person who runs the tests are neither read nor written."""
    home = tmp_path_factory.mktemp("home")
    patch = pytest.MonkeyPatch()
    for name in [n for n in os.environ if n.startswith(("TIERCACHE_", "AWS_")) and n != "TIERCACHE_KERNEL"]:
        patch.delenv(name)
    patch.setenv("TIERCACHE_CACHE_DIR", str(home / "cache"))
    patch.setenv("TIERCACHE_CACHE_SIZE", "256MiB")
    patch.setenv("XDG_CACHE_HOME", str(home / "xdg-cache"))
    patch.setenv("XDG_CONFIG_HOME", str(home / "xdg-config"))
    patch.setenv("XDG_STATE_HOME", str(home / "xdg-state"))
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    yield home
    patch.undo()


@pytest.fixture(scope="session", autouse=True)
def hear_ctrl_c() -> Iterator[None]:
    """A run that was started in the background ignores SIGINT, and its children would too: tests send them one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="session")
def open_pipe_of_arrow() -> None:
    """The first CSV file that Arrow reads in the main thread opens a pipe for signals, which Arrow keeps."""
    csv.read_csv(io.BytesIO(b"x\n1\n"))


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fails a test that leaves a thread, a descriptor or a shared-memory name behind."""
    threads, files, names = set(threading.enumerate()), _open_files(), _shared_names()
    yield
    problems = [f"thread {thread.name}" for thread in _threads_left(threads)]
    if _open_files() - files:
        gc.collect()  # what a reference cycle of the test held is no leak
        # torch waits five seconds for a worker and then sends it SIGTERM without waiting again; multiprocessing keeps
        # the pipes of a process open until the process has ended and was joined.
        for process in multiprocessing.active_children():
            process.join(5 * JOIN_S)
        for thread in threading.enumerate():
            if thread.name == "QueueFeederThread":  # of a queue that was closed: it closes both ends of its pipe
                thread.join(JOIN_S)
        problems += [f"descriptor {fd} -> {target}" for fd, target in sorted(_open_files() - files)]
    problems += [f"shared memory {name}" for name in sorted(_shared_names() - names)]
    if problems:
        pytest.fail("left behind: " + "; ".join(problems), pytrace=False)


def _threads_left(before: set[threading.Thread]) -> list[threading.Thread]:
    new = [t for t in threading.enumerate() if t not in before and not _is_library_thread(t)]
    if any(t.is_alive() for t in new):
        gc.collect()
    for thread in new:
        thread.join(JOIN_S)  # a thread that was told to end may need a moment
    return [t for t in new if t.is_alive()]


def _is_library_thread(thread: threading.Thread) -> bool:
    if isinstance(thread, threading._DummyThread):  # of a library's own pool, e.g. pyarrow's; nobody can join it
        return True
    return any(name in thread.name for name in LIBRARY_THREADS)


def _open_files() -> set[tuple[int, str]]:
    """(descriptor, target) of this process.

    Sockets and event queues are left out: client libraries keep pools of them for the life of the process, and a Python
    socket that is forgotten is a ResourceWarning, which is an error here. So are the pipes of multiprocessing's two
    helper processes.
    """
    found = set()
    kept = {resource_tracker._resource_tracker._fd, forkserver._forkserver._forkserver_alive_fd}
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor of this listing itself
            target, number = str(link.readlink()), int(link.name)
            library = target.startswith(("socket:", "anon_inode:", "/dev/", "/proc/")) or "site-packages" in target
            if not library and number not in kept:
                found.add((number, target))
    return found


def _shared_names() -> set[str]:
    """Names in /dev/shm that are ours: tiercache makes none, and torch's carry the id of the process that made them."""
    names = {path.name for path in Path("/dev/shm").glob("*")}
    pid = str(os.getpid())
    return {name for name in names if "tiercache" in name or pid in name.split("_")}
