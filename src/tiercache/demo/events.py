"""The events that the demo yields, its messages to and from training processes, and the claims that it checks."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias


@dataclass(frozen=True, slots=True)
class Step:
    """A new step of the story begins."""

    title: str


@dataclass(frozen=True, slots=True)
class Note:
    """A sentence about the current step."""

    text: str


@dataclass(frozen=True, slots=True)
class PackedDataSet:
    """A packed data set.

    Attributes:
        name: Name of the data set.
        url: URL of the data set.
        columns: Names of its columns.
        n_records: Number of records.
        n_shards: Number of shards.
        raw_bytes: Bytes of the input.
        stored_bytes: Bytes of the shards.
    """

    name: str
    url: str
    columns: str
    n_records: int
    n_shards: int
    raw_bytes: int
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class Epoch:
    """An epoch, or a part of one, over a data set; with training.

    Attributes:
        task: Name of the model and its data set.
        epoch: Epoch, counted from 1.
        mode: "cold", "warm", "whole", "stopped", "resumed" or "moved".
        n_samples: Number of records.
        elapsed_s: Duration in seconds.
        wait_share: Fraction of the duration spent waiting for the loader.
        served_bytes: Bytes of the batches.
        fetched_bytes: Bytes fetched from the store.
        hits: Number of cache hits.
        misses: Number of cache misses.
        loss: Mean loss over the training records.
        accuracy: Accuracy on held-out records; None if there are none.
        digests: SHA-256 of each training batch, in order.
        weights: SHA-256 of the model after the epoch.
    """

    task: str
    epoch: int
    mode: str
    n_samples: int
    elapsed_s: float
    wait_share: float
    served_bytes: int
    fetched_bytes: int
    hits: int
    misses: int
    loss: float
    accuracy: float | None
    digests: tuple[str, ...] = ()
    weights: str = ""

    @property
    def hit_ratio(self) -> float:
        """Return the fraction of cache requests that were hits; 1.0 without requests."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 1.0


@dataclass(frozen=True, slots=True)
class Claim:
    """A promise of tiercache, whether it held, and what was found."""

    text: str
    holds: bool
    found: str


@dataclass(frozen=True, slots=True)
class TierContents:
    """The contents of a tier and their monthly cost.

    Attributes:
        when: "before" or "after" the moves.
        tier: Name of the tier.
        n_bytes: Bytes in the tier.
        n_objects: Number of objects in the tier.
        dollars_month: Cost in dollars per month.
    """

    when: str
    tier: str
    n_bytes: int
    n_objects: int
    dollars_month: float


Event: TypeAlias = Step | Note | PackedDataSet | Epoch | Claim | TierContents
EVENTS: dict[str, type[Step | Note | PackedDataSet | Epoch | Claim | TierContents]] = {
    kind.__name__.lower(): kind for kind in (Step, Note, PackedDataSet, Epoch, Claim, TierContents)
}


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


def warm_fetched_nothing(warm: Sequence[Epoch]) -> Claim:
    """Return the claim that epoch 2 fetched no byte from the store, by the loaders' own counters."""
    fetched_bytes = sum(epoch.fetched_bytes for epoch in warm)
    holds = bool(warm) and fetched_bytes == 0
    return Claim(
        "epoch 2, in a new process, fetches 0 bytes of shards, footers and segments", holds, f"{fetched_bytes} bytes"
    )


def resumed_exactly(before: Sequence[Epoch], after: Sequence[Epoch]) -> Iterator[Claim]:
    """Yield a claim per task: the stopped and the resumed part together equal the uninterrupted epoch.

    They have the same batches and leave the same model.

    Args:
        before: Epochs "whole" and "stopped" of all tasks.
        after: Epochs "resumed" of all tasks.
    """
    for whole in (e for e in before if e.mode == "whole"):
        parts = [e for e in (*before, *after) if e.task == whole.task and e.mode in ("stopped", "resumed")]
        served = tuple(digest for part in parts for digest in part.digests)
        holds = len(parts) == 2 and all(part.digests for part in parts) and served == whole.digests
        same = sum(a == b for a, b in zip(served, whole.digests, strict=False))
        counts = " + ".join(str(len(part.digests)) for part in parts)
        same_model = bool(parts) and parts[-1].weights == whole.weights
        model = "the same weights" if same_model else "other weights"
        found = f"{counts} batches, {same} of {len(whole.digests)} equal by SHA-256; {model}"
        yield Claim(
            f"{whole.task}: a stopped and resumed epoch equals an uninterrupted one", holds and same_model, found
        )


def moved_whole(name: str, shards: Collection[str], standard: Collection[str], archive: Collection[str]) -> Claim:
    """Return the claim that all shards of a data set are in the archive tier alone, by the store's own listings."""
    arrived, left = set(shards) & set(archive), set(shards) & set(standard)
    holds = bool(shards) and len(arrived) == len(shards) and not left
    found = f"{len(arrived)} of {len(shards)} there, {len(left)} still in standard"
    return Claim(f"all shards of {name} are in the archive tier alone", holds, found)


def nothing_lost(before: Mapping[str, str], after: Mapping[str, Mapping[str, str]]) -> Claim:
    """Return the claim that each checkpoint file is in some tier with its original bytes.

    Args:
        before: SHA-256 by path.
        after: SHA-256 by path, by tier.
    """
    kept = sum(any(files.get(path) == digest for files in after.values()) for path, digest in before.items())
    wrong = sum(path in before and before[path] != digest for files in after.values() for path, digest in files.items())
    spread = ", ".join(f"{len(files)} in {tier}" for tier, files in after.items())
    holds = bool(before) and kept == len(before) and not wrong
    return Claim(
        "every checkpoint file still exists, with its original bytes", holds, f"{kept} of {len(before)}: {spread}"
    )


def newest_stayed(run: str, steps_before: Collection[int], steps_hot: Collection[int]) -> Claim:
    """Return the claim that the newest checkpoint of a run, and no older one, is in the hot tier."""
    newest = max(steps_before, default=None)
    holds = set(steps_hot) == {newest} and len(steps_before) > 1
    found = f"of {len(steps_before)} steps, {sorted(steps_hot)} are hot"
    return Claim(f"{run}: only the newest checkpoint is still in the hot tier", holds, found)


def trained_alike(warm: Sequence[Epoch], moved: Sequence[Epoch]) -> Iterator[Claim]:
    """Yield a claim per task: the epoch after the move has the same batches as before, and leaves the same model."""
    for before in warm:
        for after in (e for e in moved if e.task == before.task):
            same = sum(a == b for a, b in zip(before.digests, after.digests, strict=False))
            same_model = before.weights == after.weights
            found = (
                f"{same} of {len(before.digests)} batches equal by SHA-256; "
                f"{'the same' if same_model else 'other'} weights; {after.fetched_bytes} bytes fetched"
            )
            holds = bool(before.digests) and before.digests == after.digests and same_model and after.fetched_bytes > 0
            yield Claim(f"{before.task}: training reads the moved data without a change", holds, found)
    if {e.task for e in warm} != {e.task for e in moved} or not warm:
        yield Claim("training continues after the move", False, f"{len(moved)} of {len(warm)} trainings ran")
