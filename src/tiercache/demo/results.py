"""What a training process of the demo is asked for and returns, and the claims that the demo checks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Phase: TypeAlias = Literal["cold", "warm", "stop", "resume", "moved"]

BATCH_SIZE = 64
SEED = 7


@dataclass(frozen=True, slots=True)
class Job:
    """The work of one training process: both models, in one phase.

    It contains the S3 server's key, so it goes through a pipe and never into a file.

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


@dataclass(frozen=True, slots=True)
class KilledJob:
    """The work of the process of tiercache.demo.killed. It contains the S3 server's key, as a Job does.

    Attributes:
        url: URL of the data set.
        storage_options: Storage options of the URL and of the checkpoints.
        cache: Folder of the cache.
        cache_bytes: Size limit of the cache.
        checkpoints: URL below which the checkpoints of both runs are kept.
        local: Folder for the local copies of the checkpoints.
        n_kills: Number of kills.
    """

    url: str
    storage_options: Mapping[str, Any]
    cache: str
    cache_bytes: int
    checkpoints: str
    local: str
    n_kills: int


@dataclass(frozen=True, slots=True)
class KilledTraining:
    """What a training that was killed, and one that was not, ended with.

    Attributes:
        n_kills: Number of kills.
        whole: SHA-256 of the weights of the training that was not killed.
        killed: SHA-256 of the weights of the other one.
    """

    n_kills: int
    whole: str
    killed: str


@dataclass(frozen=True, slots=True)
class Epoch:
    """An epoch, or a part of one, with training.

    Attributes:
        model: Name of the model.
        epoch: Epoch, counted from 1.
        mode: "cold", "warm", "whole", "stopped", "resumed" or "moved".
        n_samples: Number of records.
        elapsed_s: Duration in seconds.
        fetched_bytes: Bytes fetched from the store.
        hit_ratio: Fraction of the cache's requests that were hits; 1.0 without requests.
        loss: Mean loss over the training records.
        accuracy: Accuracy on held-out records; None if there are none.
        digests: SHA-256 of each training batch, in order.
        weights: SHA-256 of the model after the epoch.
    """

    model: str
    epoch: int
    mode: str
    n_samples: int
    elapsed_s: float
    fetched_bytes: int
    hit_ratio: float
    loss: float
    accuracy: float | None
    digests: list[str]
    weights: str


@dataclass(frozen=True, slots=True)
class Claim:
    """A promise of tiercache, whether it held, and what was found."""

    text: str
    holds: bool
    found: str


def warm_fetched_nothing(warm: Collection[Epoch]) -> Claim:
    """Return the claim that epoch 2 fetched no byte from the store, by the loaders' own counters."""
    n_bytes = sum(epoch.fetched_bytes for epoch in warm)
    text = "epoch 2, in a new process, fetches 0 bytes of shards, footers and segments"
    return Claim(text, bool(warm) and n_bytes == 0, f"{n_bytes} bytes")


def resumed_exactly(whole: Epoch, stopped: Epoch, resumed: Epoch) -> Claim:
    """Return the claim that two parts of an epoch have the batches of the whole one, and leave the same model."""
    served = stopped.digests + resumed.digests
    holds = bool(stopped.digests and resumed.digests) and served == whole.digests and resumed.weights == whole.weights
    found = f"{len(stopped.digests)} + {len(resumed.digests)} batches, {_equal(served, resumed, whole)}"
    return Claim(f"{whole.model}: a stopped and resumed epoch equals an uninterrupted one", holds, found)


def killed_alike(found: KilledTraining, n_kills: int) -> Claim:
    """Return the claim that a training that was killed n_kills times ends with the weights of one that was not."""
    is_equal = bool(found.whole) and found.whole == found.killed
    text = f"a training that is killed {n_kills} times ends with the weights of an uninterrupted one, bit by bit"
    return Claim(
        text,
        is_equal and found.n_kills == n_kills,
        f"{found.n_kills} kills, {'equal' if is_equal else 'other'} weights",
    )


def trained_alike(before: Epoch, after: Epoch) -> Claim:
    """Return the claim that an epoch over moved data has the batches as before the move, and leaves the same model."""
    is_equal = bool(before.digests) and before.digests == after.digests and before.weights == after.weights
    found = f"{_equal(after.digests, after, before)}; {after.fetched_bytes} bytes fetched"
    text = f"{before.model}: training reads the moved data without a change"
    return Claim(text, is_equal and after.fetched_bytes > 0, found)


def _equal(digests: list[str], last: Epoch, expected: Epoch) -> str:
    same = sum(a == b for a, b in zip(digests, expected.digests, strict=False))
    weights = "the same" if last.weights == expected.weights else "other"
    return f"{same} of {len(expected.digests)} equal by SHA-256; {weights} weights"


def all_archived(name: str, shards: Collection[str], standard: Collection[str], archive: Collection[str]) -> Claim:
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
    text = "every checkpoint file still exists, with its original bytes"
    return Claim(text, holds, f"{kept} of {len(before)}: {spread}")


def newest_stayed(model: str, steps_before: Collection[int], steps_hot: Collection[int]) -> Claim:
    """Return the claim that the newest checkpoint of a model, and no older one, is in the hot tier."""
    holds = set(steps_hot) == {max(steps_before, default=None)} and len(steps_before) > 1
    found = f"of {len(steps_before)} steps, {sorted(steps_hot)} are hot"
    return Claim(f"{model}: only the newest checkpoint is still in the hot tier", holds, found)
