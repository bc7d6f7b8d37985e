"""What the demo asks of a training process, as JSON on its standard input; events come back, one a line."""

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
    """One process's work: all tasks through one phase.

    urls: data set by name ("digits/train", "digits/test", "python"). folder: where models and loader states lie
    between processes. cache, cache_bytes: the cache that all processes share. checkpoints: folder for those by step.
    """

    phase: Phase
    urls: Mapping[str, str]
    storage_options: Mapping[str, Any]
    cache: str
    cache_bytes: int
    folder: str
    checkpoints: str

    def to_json(self) -> str:
        """As text; it holds the embedded server's key, so it goes through a pipe and never into a file."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The job that to_json wrote."""
        return cls(**json.loads(text))


def event_to_line(event: Event) -> str:
    """One line of JSON: {"event": kind, fields...}."""
    return json.dumps({"event": type(event).__name__.lower(), **asdict(event)})


def event_from_line(line: str) -> Event:
    """The event of a line that event_to_line wrote."""
    fields = json.loads(line)
    kind = EVENTS[fields.pop("event")]
    if kind is Epoch:
        fields["digests"] = tuple(fields["digests"])
    return kind(**fields)
