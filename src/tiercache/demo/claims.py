"""What must hold at the end: pure functions of what was seen."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from tiercache.demo.events import Claim, Epoch, Held


def warm_fetched_nothing(warm: Sequence[Epoch]) -> Claim:
    """The loaders of the second epoch say that they got no byte of a shard, footer or segment from the store."""
    fetched_bytes = sum(epoch.fetched_bytes for epoch in warm)
    holds = bool(warm) and fetched_bytes == 0
    return Claim(
        "epoch 2, in a new process, fetches 0 bytes of shards, footers and segments", holds, f"{fetched_bytes} bytes"
    )


def store_sent_versions_only(sent_bytes: int, version_bytes: int) -> Claim:
    """The server's own count agrees: it sent no more than the small files that name the newest versions, once each."""
    text = "the store's own count agrees: in epoch 2 it sent version files only"
    return Claim(text, sent_bytes <= version_bytes, f"{sent_bytes} bytes, of {version_bytes} that these files have")


def resumed_exactly(before: Sequence[Epoch], after: Sequence[Epoch]) -> Iterator[Claim]:
    """By task: stopped part + resumed part are the uninterrupted epoch, by content, and leave the same model.

    before: epochs "whole" and "stopped"; after: "resumed".
    """
    for whole in (e for e in before if e.how == "whole"):
        parts = [e for e in (*before, *after) if e.task == whole.task and e.how in ("stopped", "resumed")]
        served = tuple(digest for part in parts for digest in part.digests)
        holds = len(parts) == 2 and all(part.digests for part in parts) and served == whole.digests
        same = sum(a == b for a, b in zip(served, whole.digests, strict=False))
        counts = " + ".join(str(len(part.digests)) for part in parts)
        same_model = bool(parts) and parts[-1].weights == whole.weights
        model = "the same weights" if same_model else "other weights"
        found = f"{counts} batches, {same} of {len(whole.digests)} equal by SHA-256; {model}"
        yield Claim(f"{whole.task}: stopped and resumed is the same as never stopped", holds and same_model, found)


def moved_whole(name: str, shards: Collection[str], standard: Collection[str], archive: Collection[str]) -> Claim:
    """By the store's own listing, before and after: a data set's shards lie in the archive tier, and nowhere else."""
    arrived, left = set(shards) & set(archive), set(shards) & set(standard)
    holds = bool(shards) and len(arrived) == len(shards) and not left
    found = f"{len(arrived)} of {len(shards)} there, {len(left)} left where they were"
    return Claim(f"all shards of {name} lie in the archive tier alone", holds, found)


def nothing_lost(before: Mapping[str, str], after: Mapping[str, Mapping[str, str]]) -> Claim:
    """Each checkpoint file is in some tier with the bytes that it was written with.

    before: SHA-256 by path; after: the same by tier.
    """
    kept = sum(any(files.get(path) == digest for files in after.values()) for path, digest in before.items())
    wrong = sum(path in before and before[path] != digest for files in after.values() for path, digest in files.items())
    spread = ", ".join(f"{len(files)} in {tier}" for tier, files in after.items())
    holds = bool(before) and kept == len(before) and not wrong
    return Claim("every checkpoint file is there, with its bytes", holds, f"{kept} of {len(before)}: {spread}")


def newest_stayed(run: str, steps_before: Collection[int], steps_hot: Collection[int]) -> Claim:
    """The newest checkpoint of a run is still on the fast disk, and older ones are not."""
    newest = max(steps_before, default=None)
    holds = set(steps_hot) == {newest} and len(steps_before) > 1
    found = f"of {len(steps_before)} steps {sorted(steps_hot)} are hot"
    return Claim(f"{run}: the newest checkpoint stays on the fast disk, older ones went", holds, found)


def trained_alike(warm: Sequence[Epoch], moved: Sequence[Epoch]) -> Iterator[Claim]:
    """By task: the epoch that was read after the move is the one before it, by content, and leaves the same model."""
    for before in warm:
        for after in (e for e in moved if e.task == before.task):
            same = sum(a == b for a, b in zip(before.digests, after.digests, strict=False))
            same_model = before.weights == after.weights
            found = (
                f"{same} of {len(before.digests)} batches equal by SHA-256; "
                f"{'the same' if same_model else 'other'} weights; {after.fetched_bytes} bytes fetched"
            )
            holds = bool(before.digests) and before.digests == after.digests and same_model and after.fetched_bytes > 0
            yield Claim(f"{before.task}: training finds its data where it is now", holds, found)
    if {e.task for e in warm} != {e.task for e in moved} or not warm:
        yield Claim("training goes on after the move", False, f"{len(moved)} of {len(warm)} trainings ran")


def costs_less(before: Sequence[Held], after: Sequence[Held]) -> Claim:
    """Keeping all of it costs less than before."""
    was, now = (sum(held.dollars_month for held in tiers) for tiers in (before, after))
    return Claim("a month costs less", 0 < now < was, f"${now:.2g} for ${was:.2g}, by the price table")
