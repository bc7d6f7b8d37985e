"""Cached copies checked, and repaired: what verify does in a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import typer

from tiercache.cli.evict import in_scope, passes
from tiercache.cli.failures import CORRUPT, PARTLY
from tiercache.cli.opening import opened_store
from tiercache.cli.output import Output, count
from tiercache.cli.status import data_set_url
from tiercache.errors import StoreError
from tiercache.model import format_bytes

if TYPE_CHECKING:
    from tiercache.cache import Cache, Entry
    from tiercache.cache.check import Checked, CheckProgress
    from tiercache.store import Store


@dataclass(frozen=True, slots=True)
class CopiesAsked:
    """Which copies are checked, and how. url: of their data set, None: all copies; repair: fetch bad ones again."""

    url: str | None
    include: Sequence[str] | None
    exclude: Sequence[str] | None
    repair: bool
    jobs: int
    storage_options: Sequence[str] | None


def verify_copies(output: Output, cache: Cache, asked: CopiesAsked) -> None:
    """Read the copies and say what is wrong. Ends with CORRUPT where something is, and was not repaired."""
    of_scope = in_scope(asked.url, asked.storage_options)
    entries = [e for e in cache.entries() if of_scope(e) and passes(e, asked.include, asked.exclude)]
    checked: list[Checked] = []
    total_bytes = sum(entry.n_bytes for entry in entries)
    with output.progress("verifying copies") as advance:

        def tell(progress: CheckProgress) -> None:
            checked.append(progress.last)
            advance(sum(one.n_bytes for one in checked), total_bytes)
            _print(output, progress.last)

        for names, store in _batches(entries, asked):
            cache.verify(names=names, repair=asked.repair, store=store, jobs=asked.jobs, on_progress=tell)
    _finish(output, checked, len(entries))


def _batches(entries: Sequence[Entry], asked: CopiesAsked) -> Iterator[tuple[list[str], Store | None]]:
    """Names of copies, with the store that bad ones are fetched from again; None: nobody fetches them now."""
    if not asked.repair:
        yield [entry.name for entry in entries], None
        return
    if asked.url is not None:
        with opened_store(asked.url, asked.storage_options) as store:
            yield [entry.name for entry in entries], store
        return
    for url, group in groupby(sorted(entries, key=store_url), store_url):
        with _source(url, asked.storage_options) as source:
            yield [entry.name for entry in group], source


def store_url(entry: Entry) -> str:
    """URL of the store that an entry came from: its data set, or the folder of its object; "" where unknown."""
    url = data_set_url(entry.source)
    return url if entry.dataset_id is not None or not url else url.rpartition("/")[0]


@contextmanager
def _source(url: str, storage_options: Sequence[str] | None) -> Iterator[Store | None]:
    """The store of a URL that is on record, without credentials; None where it cannot be opened."""
    with ExitStack() as stack:
        store = None
        if url:
            with suppress(StoreError, ValueError, OSError):
                store = stack.enter_context(opened_store(url, storage_options))
        yield store


def _print(output: Output, one: Checked) -> None:
    if not one.where:
        return
    facts = {
        "source": one.source,
        "name": one.name,
        "state": one.state.value,
        "in_part": one.in_part,
        "where": list(one.where),
        "removed": one.removed,
        "repaired": one.repaired,
    }
    ending = ": repaired" if one.repaired else ": removed" if one.removed else ""
    output.event("copy", facts, f"{one.source or one.name}: {'; '.join(one.where)}{ending}")


def _finish(output: Output, checked: Sequence[Checked], n_asked: int) -> None:
    wrong = [one for one in checked if one.where]
    unknown = sum(one.state == "unknown" for one in checked)
    repaired, removed = sum(one.repaired for one in wrong), sum(one.removed for one in wrong)
    facts = {
        "copies": len(checked),
        "gone": n_asked - len(checked),
        "bytes": sum(one.n_bytes for one in checked),
        "damaged": len(wrong),
        "repaired": repaired,
        "removed": removed,
        "unknown": unknown,
    }
    said = f"{len(wrong):,} damaged" if wrong else "nothing is damaged"
    said += f", {repaired:,} of them repaired" if repaired else ""
    said += f", {removed - repaired:,} removed" if removed > repaired else ""
    said += f", {unknown:,} of which nothing is known" if unknown else ""
    output.summary(facts, f"checked {count(len(checked), 'copy', 'copies')}, {format_bytes(facts['bytes'])}: {said}")
    if removed < len(wrong):
        raise typer.Exit(CORRUPT)
    if repaired < len(wrong):
        raise typer.Exit(PARTLY)
