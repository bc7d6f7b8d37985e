"""What must hold at the end: pure functions of what was seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tiercache.demo.events import Claim, Epoch


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
