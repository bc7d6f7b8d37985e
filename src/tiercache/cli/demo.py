"""The verb demo: tells the story of `tiercache.demo` and prints its tables."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import typer

from tiercache.cli.common import Output, count
from tiercache.demo.story import Story, run_story
from tiercache.errors import TierCacheError
from tiercache.model import format_bytes


def demo(output: Output, keep: Path | None) -> None:
    """Run the story in the folder keep, or in a temporary folder, and print its events and tables.

    Raises:
        typer.Exit: With 1 if a claim does not hold.
    """

    def show(kind: str, facts: Mapping[str, Any], text: str) -> None:
        if kind == "step" and not output.as_json:
            typer.echo()
        output.event(kind, facts, text)

    started_s = time.monotonic()
    with _ended_by_sigterm(), _work_folder(keep) as folder:
        story = run_story(folder, show)
    _print_tables(output, story)
    failed = [claim for claim in story.claims if not claim.holds]
    for claim in failed:
        if not output.as_json:
            output.event("claim", {}, f"FAILS: {claim.text} ({claim.found})")
    elapsed_s = time.monotonic() - started_s
    where = f"; kept in {keep}" if keep is not None else ""
    text = f"{count(len(story.claims), 'claim')} checked, {len(failed)} failed, in {elapsed_s:.0f} s{where}"
    output.summary({"claims": len(story.claims), "failed": len(failed), "elapsed_s": round(elapsed_s, 1)}, text)
    if failed:
        raise typer.Exit(1)


@contextmanager
def _work_folder(keep: Path | None) -> Iterator[Path]:
    """Yield the folder keep, which is created if needed, or a temporary folder, which is removed at the end.

    Raises:
        TierCacheError: The folder keep is not empty.
    """
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="tiercache-demo-", ignore_cleanup_errors=True) as name:
            yield Path(name)
        return
    keep.mkdir(parents=True, exist_ok=True)
    if any(keep.iterdir()):
        raise TierCacheError(f"{keep} is not empty: --keep takes a new or empty folder", path=str(keep))
    yield keep.absolute()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Make SIGTERM raise SystemExit inside the block, so that the server, processes and folder are cleaned up."""

    def end(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_tables(output: Output, story: Story) -> None:
    """Print the epochs by model, and the contents and dollars of each tier before and after the moves."""
    if not output.as_json:  # as JSON, each epoch was printed when it ended
        typer.echo("\nEpochs; the time includes training")
        epochs = [
            {
                "model": epoch.model,
                "epoch": str(epoch.epoch),
                "read": epoch.mode,
                "samples/s": f"{epoch.n_samples / epoch.elapsed_s:,.0f}",
                "fetched": format_bytes(epoch.fetched_bytes),
                "hit ratio": f"{epoch.hit_ratio:.0%}",
                "loss": f"{epoch.loss:.3f}",
                "accuracy": "" if epoch.accuracy is None else f"{epoch.accuracy:.1%}",
            }
            for epoch in sorted(story.epochs, key=lambda epoch: epoch.model)
        ]
        output.table("epoch", [], epochs)
        typer.echo("\nTiers, before and after the rules were applied")
    rows: list[dict[str, object]] = []
    texts: list[dict[str, str]] = []
    for tier, totals in story.tiers.items():
        rows.append({"tier": tier})
        texts.append({"tier": tier})
        for when, found in zip(("before", "after"), totals, strict=True):
            facts = {"objects": found.n_objects, "bytes": found.n_bytes, "dollars_month": found.dollars_month}
            rows[-1] |= {f"{name}_{when}": value for name, value in facts.items()}
            cells = (str(found.n_objects), format_bytes(found.n_bytes), f"{found.dollars_month:.7f}")
            texts[-1] |= {f"{name} {when}": c for name, c in zip(("objects", "bytes", "$ a month"), cells, strict=True)}
    output.table("tier", rows, texts)
