"""Messages between the demo and its training processes: a job as JSON, and events as lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from tiercache.demo.events import EVENTS, Epoch, Event

Phase: TypeAlias = Literal["cold", "warm", "stop", "resume", "moved"]

BATCH_SIZE = 64
SEED = 7


@dataclass(frozen=True, slots=True)
class Job:
    """The work of one training process: all tasks, in one phase.

    Attributes:
        phase: Phase of the story.
        urls: URLs by data set name ("digits/train", "digits/test", "python").
        storage_options: Storage options of the URLs.
        cache: Folder of the cache that all processes share.
        cache_bytes: Size limit of the cache.
        folder: Folder of models and loader states between processes.
        checkpoints: Folder of checkpoints by step.
    """

    phase: Phase
    urls: Mapping[str, str]
    storage_options: Mapping[str, Any]
    cache: str
    cache_bytes: int
    folder: str
    checkpoints: str

    def to_json(self) -> str:
        """Return the job as text. It contains the S3 server's key, so it goes through a pipe and never into a file."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Return the job that to_json() wrote."""
        return cls(**json.loads(text))


def event_to_line(event: Event) -> str:
    """Return an event as one line of JSON: {"event": kind, fields...}."""
    return json.dumps({"event": type(event).__name__.lower(), **asdict(event)})


def event_from_line(line: str) -> Event:
    """Return the event that event_to_line() wrote."""
    fields = json.loads(line)
    kind = EVENTS[fields.pop("event")]
    if kind is Epoch:
        fields["digests"] = tuple(fields["digests"])
    return kind(**fields)
