"""The claims that the demo checks, as pure functions of its events and listings."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from tiercache.demo.events import Claim, Epoch, TierContents


def warm_fetched_nothing(warm: Sequence[Epoch]) -> Claim:
    """Return the claim that epoch 2 fetched no byte from the store, by the loaders' own counters."""
    fetched_bytes = sum(epoch.fetched_bytes for epoch in warm)
    holds = bool(warm) and fetched_bytes == 0
    return Claim(
        "epoch 2, in a new process, fetches 0 bytes of shards, footers and segments", holds, f"{fetched_bytes} bytes"
    )


def store_sent_versions_only(sent_bytes: int, version_bytes: int) -> Claim:
    """Return the claim that the store sent only the small version files in epoch 2, by the server's own counter."""
    text = "by the store's own counter, it sent only version files in epoch 2"
    return Claim(text, sent_bytes <= version_bytes, f"{sent_bytes} bytes sent; these files have {version_bytes}")


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


def costs_less(before: Sequence[TierContents], after: Sequence[TierContents]) -> Claim:
    """Return the claim that storage costs less after the move."""
    was, now = (sum(held.dollars_month for held in tiers) for tiers in (before, after))
    return Claim("storage costs less per month", 0 < now < was, f"${now:.2g}, before ${was:.2g}, by the price table")
