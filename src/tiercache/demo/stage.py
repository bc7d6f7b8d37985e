"""Folders, URLs and the S3 server of the demo, and the start of its training processes."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tiercache.demo.events import Epoch, Event
from tiercache.demo.jobs import Job, Phase
from tiercache.demo.process import run_job
from tiercache.testing.s3_server import S3Server

NAMES = ("digits/train", "digits/test", "python")
CACHE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class DemoSetup:
    """Folders and URLs of the demo.

    Attributes:
        folder: Folder of everything that the demo writes.
        server: The S3 server.
    """

    folder: Path
    server: S3Server

    @property
    def cache(self) -> Path:
        """Return the folder of the cache that all training processes share."""
        return self.folder / "cache"

    @property
    def hot(self) -> Path:
        """Return the folder of the checkpoints, which is later the hot tier."""
        return self.folder / "nvme"

    @property
    def standard_url(self) -> str:
        """Return the URL of all data sets, which is later the standard tier."""
        return f"{self.server.url}/data"

    @property
    def archive_url(self) -> str:
        """Return the URL that is later the archive tier."""
        return f"{self.server.url}/cold"

    def url(self, name: str) -> str:
        """Return the URL of a data set."""
        return f"{self.standard_url}/{name}"

    def run(self, phase: Phase) -> Generator[Event, None, list[Epoch]]:
        """Run a training process; yield its events and return its epochs."""
        job = Job(
            phase=phase,
            urls={name: self.url(name) for name in NAMES},
            storage_options=self.server.storage_options,
            cache=str(self.cache),
            cache_bytes=CACHE_BYTES,
            folder=str(self.folder),
            checkpoints=str(self.hot / "checkpoints"),
        )
        epochs = []
        with closing(run_job(job)) as events:
            for event in events:
                if isinstance(event, Epoch):
                    epochs.append(event)
                yield event
        return epochs
