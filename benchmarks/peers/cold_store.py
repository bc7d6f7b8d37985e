"""The S3 server that the contenders read in cold epochs, in processes of its own."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import obstore
import obstore.store

from peers.runner import read_through
from support import S3Server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from peers.job import Job
    from peers.runner import Runner

UPLOADS = 8


@dataclass(frozen=True, slots=True)
class ColdStore:
    """Packed data of contenders in an S3 server, and the tasks that read it."""

    server: S3Server

    def upload(self, folder: Path, name: str) -> str:
        """Upload all files below a folder, and return the URL of their folder in the store."""
        options: dict[str, Any] = {"config": self.server.storage_options, "client_options": {"allow_http": True}}
        store = obstore.store.S3Store(self.server.bucket, prefix=name, **options)
        paths = [path for path in folder.rglob("*") if path.is_file()]
        with ThreadPoolExecutor(UPLOADS) as pool:
            list(pool.map(lambda path: obstore.put(store, path.relative_to(folder).as_posix(), path), paths))
        return f"{self.server.url}/{name}"

    def run(self, runner: Runner, python: Path, job: Job) -> dict[str, Any]:
        """Return the result of a task, with the bytes that the server sent meanwhile if it counts them.

        The data is in the server's page cache. The task finds the server's address and keys in its environment.

        Raises:
            FailedError: The task failed.
        """
        read_through(self.server.folder)
        usual = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        before = self.server.bytes_sent()
        direct = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")
        found = runner.run(python, job, {**usual, **self.server.environment, **direct})
        after = self.server.bytes_sent()
        return found if before is None or after is None else {**found, "sent_bytes": after - before}


@contextmanager
def cold_store(folder: Path) -> Iterator[ColdStore]:
    """Yield an empty store, which ends with the block. folder: Folder of the server, which is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with S3Server(folder) as server:
            yield ColdStore(server)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
