"""Log of uses of single objects that this machine reads through a cache, in the state folder, for the tier planner.

A shard that a `Dataset` reads is counted beside its data set (tier/placement/use_reports.py). Other objects that are
read through `Cache` or `tiercache::` are noted here, by URL. Opening an object appends a line, at most once a minute
per process and object, whatever the spelling of its URL. This costs about 100 us, needs no lock, and survives a killed
process.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

from tiercache import config
from tiercache.catalog.private_files import make_folder, open_file

FOLDER = "uses"
# Minimum time between two lines of a process on one object.
_AGAIN_S = 60.0
_MOST_REMEMBERED = 1 << 16
# Size at which a log is closed, and a new one begun. The planner reduces closed logs to one line per object.
_LOG_BYTES = 8 << 20
# A process may have opened a log just before it was closed, and may write its line shortly after.
_SETTLED_S = 60.0
_UNFIT = re.compile(r"[^A-Za-z0-9.-]+")

Uses = dict[str, tuple[float, int]]

_noted: dict[str, float] = {}


def record_use(url: str) -> None:
    """Note that this process opens the object at url now. Raises nothing, because the read must not fail."""
    now_s = time.time()
    if now_s - _noted.get(url, 0.0) < _AGAIN_S:
        return
    with suppress(OSError, ValueError):
        plain = plain_url(url)
        last_s = _noted.get(plain, 0.0)
        if len(_noted) >= _MOST_REMEMBERED:
            _noted.clear()
        if now_s - last_s < _AGAIN_S:  # noted under another spelling
            _noted[url] = last_s
            return
        _noted[url] = _noted[plain] = now_s
        _append(f"{json.dumps([round(now_s, 3), plain, 1])}\n".encode())


def plain_url(url: str) -> str:
    """Return the URL in a normal form: a local path is absolute, without links."""
    scheme, found, rest = url.partition("://")
    if found and scheme != "file":
        return url
    return os.path.realpath(unquote(rest) if found and "%" in rest else rest if found else url)


def read_uses() -> Uses:
    """Return the last use and the number of noted uses of each object, by URL, from all logs in the state folder.

    Machines that share the folder each have their own logs in it. Raises OSError, ValueError.
    """
    folder = config.state_folder() / FOLDER
    found: Uses = {}
    closed: list[Path] = []
    reduced: Uses = {}
    for path in sorted(folder.glob("*.log*")):
        # The name of a closed log has the time at which it was closed.
        closed_s = path.name.rpartition(".log.")[2]
        is_closed = closed_s.isdecimal() and time.time() - int(closed_s) / 1e9 > _SETTLED_S
        for url, last_s, n in _lines(path):
            _add(found, url, last_s, n)
            if is_closed:
                _add(reduced, url, last_s, n)
        if is_closed:
            closed.append(path)
    if len(closed) > 1:
        with suppress(OSError):  # a folder that cannot be written: the next call reads all its logs again
            _reduce(folder, closed, reduced)
    return found


def uses_under(uses: Uses, url: str) -> Uses:
    """Return the uses of objects below a URL, by key."""
    start = f"{plain_url(url).rstrip('/')}/"
    return {name.removeprefix(start): use for name, use in uses.items() if name.startswith(start)}


def _add(uses: Uses, url: str, last_s: float, n: int) -> None:
    before_s, before_n = uses.get(url, (0.0, 0))
    uses[url] = max(before_s, last_s), before_n + n


def _lines(path: Path) -> Iterator[tuple[str, float, int]]:
    """Yield the lines of a log, without unreadable ones (torn by a power failure)."""
    with suppress(FileNotFoundError), path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError, TypeError):
                last_s, url, n = json.loads(line)
                yield str(url), float(last_s), int(n)


def _append(line: bytes) -> None:
    folder = config.state_folder() / FOLDER
    path = folder / f"{_UNFIT.sub('-', socket.gethostname()) or 'machine'}.log"
    try:
        fd = open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    except FileNotFoundError:
        make_folder(folder, 0o700)
        fd = open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(fd, line)
        n_bytes = os.fstat(fd).st_size
    finally:
        os.close(fd)
    if n_bytes >= _LOG_BYTES:
        path.rename(f"{path}.{time.time_ns()}")


def _reduce(folder: Path, closed: list[Path], uses: Uses) -> None:
    """Merge closed logs into one, and remove them. If it is killed in between, some uses count twice."""
    temp = folder / f"reduced-{os.getpid()}.tmp"
    lines = (f"{json.dumps([last_s, url, n])}\n" for url, (last_s, n) in uses.items())
    temp.write_text("".join(lines), encoding="utf-8")
    temp.rename(closed[0])
    for path in closed[1:]:
        path.unlink(missing_ok=True)
