"""Targets that count what is read of them, and the file system over them."""

from __future__ import annotations

import datetime as dt
import gc
import random
import threading
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.asyn import sync
from fsspec.implementations.memory import MemoryFileSystem
from tests.support.s3 import s3fs_options
from tests.support.s3_server import S3Server

import tiercache as tc
from tiercache.integrations.fsspec import TierCacheFileSystem
from tiercache.waiting import wait_for


class CountedFileSystem(MemoryFileSystem):
    """Memory that counts. All instances share everything, as instances of a remote file system would.

    about: what info() says of a file beyond name, size and type; None: when it was written. before_read: called with
    the path before bytes are given.
    """

    protocol = "counted"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    reads: ClassVar[list[tuple[str, int]]] = []
    heads: ClassVar[list[str]] = []
    about: ClassVar[dict[str, Any] | None] = None
    before_read: ClassVar[Any] = None
    lock = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("counted://"))

    def info(self, path, **kwargs):
        found = super().info(path, **kwargs)
        if found["type"] == "file":
            with self.lock:
                self.heads.append(path)
            if self.about is not None:
                found = {name: found[name] for name in ("name", "size", "type")} | self.about
        return found

    def cat_file(self, path, start=None, end=None, **kwargs):
        if type(self).before_read is not None:
            type(self).before_read(path)
        data = super().cat_file(path, start, end, **kwargs)
        with self.lock:
            self.reads.append((path, len(data)))
        return data

    @classmethod
    def n_bytes_read(cls) -> int:
        """How many bytes were given, and count anew."""
        with cls.lock:
            n_bytes = sum(n for _, n in cls.reads)
            cls.reads.clear()
        return n_bytes

    @classmethod
    def on_source_closed(cls) -> None:
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.reads.clear()
        cls.heads.clear()
        cls.about, cls.before_read = None, None


@pytest.fixture(scope="session", autouse=True)
def _registered():
    fsspec.register_implementation("counted", CountedFileSystem, clobber=True)


@pytest.fixture
def source():
    """The counted target itself: write to it to change an object behind the cache's back."""
    CountedFileSystem.on_source_closed()
    yield CountedFileSystem()
    CountedFileSystem.on_source_closed()


@pytest.fixture
def cache(tmp_path):
    with tc.Cache(tmp_path / "cache", size="64MiB", min_free="0") as cache:
        yield cache


def _open_copies(folder: Path) -> list[str]:
    """Which copies below a folder this process has open."""
    targets = (_target(fd) for fd in Path("/proc/self/fd").iterdir())
    return [target for target in targets if target.startswith(f"{folder}/")]


def _target(fd: Path) -> str:
    try:
        return str(fd.readlink())
    except FileNotFoundError:  # closed meanwhile, as is what the folder was listed by
        return ""


@pytest.fixture
def make(cache, tmp_path):
    """Makes file systems over a target, through the fixture's cache."""
    made = []

    def over(target: str = "counted", **options: Any) -> TierCacheFileSystem:
        if not {"cache", "cache_dir", "cache_size"} & options.keys():
            options["cache"] = cache
        fs = fsspec.filesystem("tiercache", target_protocol=target, skip_instance_cache=True, **options)
        made.append(fs)
        return fs

    yield over
    if _open_copies(tmp_path / "cache" / "copies"):
        # pyarrow's own threads may let go of a file only after the table is there; what stays open, no_leaks finds.
        gc.collect()
        wait_for(lambda: not _open_copies(tmp_path / "cache" / "copies"), deadline_s=10)
    for fs in made:
        fs.close()


@pytest.fixture
def fs(make, source):
    return make()


@pytest.fixture(scope="session")
def moto_server():
    with S3Server(kind="moto") as server:
        yield server


@pytest.fixture(scope="session")
def s3_of():
    """A server's options by s3fs's names. s3fs's client is made once for all tests: that takes 0.2 s."""
    used = []

    def options_of(server):
        options = s3fs_options(server)
        used.append(options)
        return options

    yield options_of
    for options in used:
        s3 = fsspec.filesystem("s3", **options)
        if s3._s3 is not None:  # s3fs closes its connections only when it is collected
            sync(s3.loop, s3._s3.__aexit__, None, None, None)
            s3._s3 = None
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def stamped(number: int) -> dt.datetime:
    return dt.datetime(2026, 1, 1, 0, 0, number, tzinfo=dt.UTC)


DATA = random.Random(1).randbytes(1_000_000)


@pytest.fixture
def path(source):
    """A file of DATA in the counted target."""
    source.pipe_file("/b/x", DATA)
    return "/b/x"
