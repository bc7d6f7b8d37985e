"""The verb demo: runs the story of `tiercache.demo` and prints its events and tables."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import typer
from rich.console import Console
from rich.table import Table

from tiercache.cli.output import Output, count
from tiercache.demo.events import Claim, Epoch, Event, Note, PackedDataSet, Step, TierContents
from tiercache.demo.story import run_story
from tiercache.errors import TierCacheError
from tiercache.model import format_bytes

SHOWN = ("cold", "warm", "whole", "stopped", "resumed", "moved")


def demo(output: Output, keep: Path | None) -> None:
    """Run the story in the folder keep, or in a temporary folder, and print its events and tables."""
    started_s = time.monotonic()
    epochs: list[Epoch] = []
    claims: list[Claim] = []
    held: list[TierContents] = []
    with _ended_by_sigterm(), _work_folder(keep) as folder, closing(run_story(folder)) as events:
        for event in events:
            if isinstance(event, Epoch):
                epochs.append(event)
            elif isinstance(event, Claim):
                claims.append(event)
            elif isinstance(event, TierContents):
                held.append(event)
            if isinstance(event, Step) and not output.as_json:
                typer.echo()
            output.event(type(event).__name__.lower(), _facts(event), _text(event))
    if not output.as_json:
        Console(width=None if sys.stdout.isatty() else 120).print(_table(epochs), _tiers(held))
    _finish(output, claims, elapsed_s=time.monotonic() - started_s, kept=keep)


def _finish(output: Output, claims: Sequence[Claim], *, elapsed_s: float, kept: Path | None) -> None:
    failed = [claim for claim in claims if not claim.holds]
    for claim in failed:
        if not output.as_json:
            typer.echo(str(_text(claim)))
    where = f"; kept in {kept}" if kept is not None else ""
    text = f"{count(len(claims), 'claim')} checked, {len(failed)} failed, in {elapsed_s:.0f} s{where}"
    output.summary({"claims": len(claims), "failed": len(failed), "elapsed_s": round(elapsed_s, 1)}, text)
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


def _facts(event: Event) -> dict[str, object]:
    """Return an event for JSON output; digests serve only the comparison and are left out."""
    facts = asdict(event)
    if isinstance(event, Epoch):
        facts["hit_ratio"] = event.hit_ratio
        facts["n_batches"] = len(facts.pop("digests"))
    return facts


def _text(event: Event) -> str | None:
    """Return an event as a line for people; None: no line."""
    match event:
        case Step(title):
            return title
        case Note(text):
            return f"  {text}"
        case PackedDataSet():
            return (
                f"  {event.url}: {count(event.n_records, 'record')} of {event.columns} in "
                f"{count(event.n_shards, 'shard')}; {format_bytes(event.raw_bytes)} of input, "
                f"{format_bytes(event.stored_bytes)} stored"
            )
        case Epoch():
            accuracy = "" if event.accuracy is None else f", {event.accuracy:.1%} accuracy on held-out images"
            return (
                f"  {event.task}, epoch {event.epoch} {event.mode}: {count(event.n_samples, 'sample')} in "
                f"{event.elapsed_s:.1f} s, {format_bytes(event.fetched_bytes)} fetched, loss {event.loss:.3f}{accuracy}"
            )
        case TierContents():
            return None  # the table of tiers shows it
        case Claim():
            return f"  {'holds' if event.holds else 'FAILS'}: {event.text} ({event.found})"


def _table(epochs: Sequence[Epoch]) -> Table:
    """Return the table of all epochs, by task."""
    table = Table(title="\nEpochs; the time includes training", title_justify="left")
    for name in ("model", "epoch", "read"):
        table.add_column(name)
    for name in ("samples/s", "MB/s", "waited", "fetched", "hit ratio", "loss", "accuracy"):
        table.add_column(name, justify="right")
    for epoch in sorted(epochs, key=lambda e: (e.task, SHOWN.index(e.mode))):
        table.add_row(
            epoch.task,
            str(epoch.epoch),
            epoch.mode,
            f"{epoch.n_samples / epoch.elapsed_s:,.0f}",
            f"{epoch.served_bytes / epoch.elapsed_s / 1e6:.2f}",
            f"{epoch.wait_share:.0%}",
            format_bytes(epoch.fetched_bytes),
            f"{epoch.hit_ratio:.0%}",
            f"{epoch.loss:.3f}",
            "" if epoch.accuracy is None else f"{epoch.accuracy:.1%}",
        )
    return table


def _tiers(held: Sequence[TierContents]) -> Table:
    """Return the table of objects, bytes and dollars per tier, before and after the moves."""
    table = Table(title="\nTiers, before and after the rules were applied", title_justify="left")
    table.add_column("tier")
    for when in ("before", "after"):
        for name in ("objects", "bytes", "$ per month"):
            table.add_column(f"{name} {when}", justify="right")
    for tier in dict.fromkeys(one.tier for one in held):
        cells = [
            cell
            for one in held
            if one.tier == tier
            for cell in (str(one.n_objects), format_bytes(one.n_bytes), f"{one.dollars_month:.7f}")
        ]
        table.add_row(tier, *cells)
    return table
