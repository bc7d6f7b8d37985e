"""Verification and repair of cached copies, for the verb verify."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import typer

from tiercache.cli.evict import data_set_filter, name_matches
from tiercache.cli.failures import CORRUPT, PARTIAL
from tiercache.cli.opening import open_data_set_store
from tiercache.cli.output import Output, count
from tiercache.cli.status import data_set_url
from tiercache.errors import StoreError
from tiercache.model import format_bytes

if TYPE_CHECKING:
    from tiercache.cache import Cache, Entry
    from tiercache.cache.check import CheckProgress, CopyCheck
    from tiercache.store import Store


@dataclass(frozen=True, slots=True)
class CopyVerification:
    """The copies to verify, and how.

    Attributes:
        url: URL of the data set whose copies are verified; None: all copies.
        include: Globs over names inside the data set, of which one must match; None: all names.
        exclude: Globs over names inside the data set, of which none may match.
        repair: Whether damaged copies are fetched again.
        jobs: Number of copies that are read at a time.
        storage_options: KEY=VALUE options of the stores that damaged copies are fetched from.
    """

    url: str | None
    include: Sequence[str] | None
    exclude: Sequence[str] | None
    repair: bool
    jobs: int
    storage_options: Sequence[str] | None


def verify_copies(output: Output, cache: Cache, asked: CopyVerification) -> None:
    """Verify the copies and print each damaged one.

    Raises:
        typer.Exit: With CORRUPT if a damaged copy is still in the cache; with PARTLY if one was removed but not
            repaired.
    """
    of_scope = data_set_filter(asked.url, asked.storage_options)
    entries = [e for e in cache.entries() if of_scope(e) and name_matches(e, asked.include, asked.exclude)]
    checked: list[CopyCheck] = []
    total_bytes = sum(entry.n_bytes for entry in entries)
    with output.byte_progress("verifying copies") as advance:

        def tell(progress: CheckProgress) -> None:
            checked.append(progress.last)
            advance(sum(one.n_bytes for one in checked), total_bytes)
            _print(output, progress.last)

        for names, store in _batches(entries, asked):
            cache.verify(names=names, repair=asked.repair, store=store, jobs=asked.jobs, on_progress=tell)
    _finish_copies(output, checked, len(entries))


def _batches(entries: Sequence[Entry], asked: CopyVerification) -> Iterator[tuple[list[str], Store | None]]:
    """Yield names of copies, each list with the store to fetch damaged ones from; None if they cannot be fetched."""
    if not asked.repair:
        yield [entry.name for entry in entries], None
        return
    if asked.url is not None:
        with open_data_set_store(asked.url, asked.storage_options) as store:
            yield [entry.name for entry in entries], store
        return
    for url, group in groupby(sorted(entries, key=store_url), store_url):
        with _source(url, asked.storage_options) as source:
            yield [entry.name for entry in group], source


def store_url(entry: Entry) -> str:
    """Return the URL of the store that a copy came from, its data set or its object's folder; "" if unknown."""
    url = data_set_url(entry.source)
    return url if entry.dataset_id is not None or not url else url.rpartition("/")[0]


@contextmanager
def _source(url: str, storage_options: Sequence[str] | None) -> Iterator[Store | None]:
    """Yield the store of a recorded URL, which contains no credentials; None if it cannot be opened."""
    with ExitStack() as stack:
        store = None
        if url:
            with suppress(StoreError, ValueError, OSError):
                store = stack.enter_context(open_data_set_store(url, storage_options))
        yield store


def _print(output: Output, one: CopyCheck) -> None:
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


def _finish_copies(output: Output, checked: Sequence[CopyCheck], n_asked: int) -> None:
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
    said += f", {unknown:,} that could not be verified: no checksum is known for them" if unknown else ""
    output.summary(facts, f"checked {count(len(checked), 'copy', 'copies')}, {format_bytes(facts['bytes'])}: {said}")
    if removed < len(wrong):
        raise typer.Exit(CORRUPT)
    if repaired < len(wrong):
        raise typer.Exit(PARTIAL)
