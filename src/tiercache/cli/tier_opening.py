"""Opens the tiers of a rule file: its stores, this machine's catalog, prices; and takes stock of what lies in them."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import typer
from numpy.typing import NDArray

from tiercache.catalog.tiers import TierCatalog
from tiercache.cli.output import Output, count, printable
from tiercache.prices import Prices, priced
from tiercache.store import redact
from tiercache.store.urls import Location
from tiercache.tier.inventory import Inventory, take_inventory
from tiercache.tier.losses import Loss, find_losses
from tiercache.tier.marks import absences, no_folder
from tiercache.tier.matching import first_match
from tiercache.tier.run import catalog_path
from tiercache.tier.scores import MetricGap, metric_gaps
from tiercache.tier.stores import Stores
from tiercache.tierfile import TierFile, load_tiers

Rules: TypeAlias = Annotated[
    Path | None,
    typer.Option("--rules", metavar="FILE", help="The rule file, if not the tiercache.toml found here."),
]

_LOSSES_SHOWN = 20
_HERE = ("./", "../")
_SIGNS = "*?[{"


@dataclass(frozen=True, slots=True)
class OpenTiers:
    """A rule file, and what it names. prices: of each tier; None where nothing is known."""

    file: TierFile
    stores: Stores
    catalog: TierCatalog
    prices: tuple[Prices | None, ...]

    def stock(self, output: Output) -> Inventory:
        """All that lies in the tiers now; a line on standard error counts the objects."""
        listed = {tier.name: 0 for tier in self.file.tiers}  # all keys from the start: threads add to it

        with output.counting("listing") as advance:

            def progress(tier: str, n_objects: int) -> None:
                listed[tier] = n_objects
                n_all = sum(listed.values())
                advance(n_all, n_all)

            return take_inventory(self.file, self.stores, self.catalog, now_s=time.time(), on_progress=progress)

    def say_uncounted(self, output: Output, inventory: Inventory, paths: pa.Array) -> None:
        """A note for each data set among paths whose use nobody has counted: that it is idle is not known."""
        for found in inventory.facts.get("datasets", ()):
            if not found.is_adopted and not found.problem and pc.any(pc.starts_with(paths, found.folder)).as_py():
                folder = found.folder.rstrip("/") or "/"
                from_then = "machines report it from the first `tier apply` or `tier run --once` on"
                text = f"{folder}: its use is not counted yet; {from_then}"
                output.event("uncounted", {"data_set": folder}, f"note: {text}")

    def unseen(self, *, but: Collection[str] = ()) -> dict[str, str]:
        """The tiers whose copies cannot be seen now, and why. but: names of tiers that are not asked."""
        return absences(self.file, self.stores, self.catalog, but=but)

    def losses(self, inventory: Inventory) -> tuple[Loss, ...]:
        """Return the objects that should be in a tier and that no tier has."""
        return find_losses(inventory, self.file, self.stores, self.catalog, now_s=inventory.snapshot.now_s)

    def say_unscored(self, output: Output, inventory: Inventory, *, passed_over: bool = False) -> None:
        """A warning for each run without a metric that a keep list asks for; and a note of checkpoints without one."""
        gaps, passed = metric_gaps(inventory.snapshot, self.file, inventory.facts["in_files"])
        say_gaps(output, gaps)
        for one in passed if passed_over else ():
            output.event("passed_over", asdict(one), printable(f"note: {one.text}"))

    def say_left(self, output: Output) -> None:
        """A note for each home, not of this rule file, that moves in the catalog of this machine wait for."""
        for home, n_moves in self.catalog.waiting_homes().items():
            if home != self.file.home.url:
                text = (
                    f"{count(n_moves, 'move')} of another home, {redact(home)}, wait in the catalog of this machine: "
                    f"nothing of them is deleted before `tiercache tier run --once` with a rule file of that home"
                )
                output.event("left", {"home": redact(home), "moves": n_moves}, f"note: {text}")

    def capacities(self) -> list[int | None]:
        """Bytes that may lie in each tier; None: no limit."""
        return [self.stores.capacity(tier.name) for tier in self.file.tiers]

    def without_prices(self) -> str:
        """What must be said of dollars that are not counted; "" where all are."""
        names = [tier.name for tier, prices in zip(self.file.tiers, self.prices, strict=True) if prices is None]
        return f"; dollars without {', '.join(names)}, which has no prices" if names else ""


def say_gaps(output: Output, gaps: Iterable[MetricGap]) -> None:
    """A warning for each run without a metric that a keep list asks for."""
    for gap in gaps:
        output.event("no_metric", asdict(gap), printable(f"warning: {gap.text}"))


def say_losses(output: Output, losses: Sequence[Loss]) -> None:
    """A line for each object that is lost; people get some of many."""
    shown = losses if output.as_json else losses[:_LOSSES_SHOWN]
    for loss in shown:
        output.event("lost", asdict(loss), printable(f"LOST: {loss.text}"))
    if not output.as_json and len(losses) > len(shown):
        typer.echo(f"LOST: ... and {count(len(losses) - len(shown), 'object')} more: --json names all")


def say_unseen(output: Output, file: TierFile, unseen: Mapping[str, str]) -> None:
    """A warning for each tier whose copies cannot be seen, and a note for each other one that has no folder yet."""
    for tier, why in unseen.items():
        text = f"tiers.{tier} cannot be seen: {why}"
        output.event("unseen", {"tier": tier, "reason": why}, printable(f"warning: {text}"))
    say_doubts(output, filter(None, (no_folder(tier) for tier in file.tiers if tier.name not in unseen)))


def say_doubts(output: Output, doubts: Iterable[str]) -> None:
    """A note for each thing that may be, but is hardly meant."""
    for doubt in doubts:
        output.event("doubt", {"text": doubt}, f"note: {doubt}")


@contextmanager
def opened_tiers(rules: Path | None) -> Iterator[OpenTiers]:
    """The tiers of the rule file, closed at the end."""
    file = read_rules(rules)
    prices = tuple(priced(tier) for tier in file.tiers)
    places = {tier.name: tier.url for tier in file.tiers}
    with Stores(file) as stores, TierCatalog(catalog_path(file), places) as catalog:
        yield OpenTiers(file, stores, catalog, prices)


def read_rules(rules: Path | None) -> TierFile:
    """The rule file, with its globs compiled once. Raises ValueError, which names file and key."""
    file = load_tiers(rules)
    nothing = pa.array([], pa.large_string())
    globs = [(f"{rule.name}.match", rule.match) for rule in file.rules]
    globs += [(f"{rule.name}.except", rule.excepted) for rule in file.rules]
    globs += [(f"pins[{i}].match", pin.match) for i, pin in enumerate(file.pins, start=1)]
    globs += [("tiering.gone", file.tiering.gone)]
    globs += [(f"tags[{i}].match", tag.match) for i, tag in enumerate(file.tags, start=1)]
    for key, some in globs:
        try:
            first_match(nothing, [(some, ())])
        except ValueError as error:
            raise ValueError(f"{file.path}: {key}: {error}") from error
    return file


def path_of(file: TierFile, text: str) -> str:
    """The path below the tiers' URLs that a URL, a local path or such a path names; "" is a tier itself.

    A local path is absolute, or begins with "~/", "./" or "../".

    Raises:
        ValueError: a URL or absolute path that lies in no tier.
    """
    place = Location.parse(os.path.abspath(text) if text.startswith(_HERE) else text)  # noqa: PTH100 - keeps links
    if not place.scheme and not Path(place.path).is_absolute():
        return text.strip("/")
    whole = _whole(place)
    for tier in file.tiers:
        root = _whole(Location.parse(tier.url))
        if whole == root:
            return ""
        if whole.startswith(root.rstrip("/") + "/"):
            return whole.removeprefix(root.rstrip("/") + "/")
    known = ", ".join(Location.parse(tier.url).shown for tier in file.tiers)
    raise ValueError(f"{place.shown}: lies in none of the tiers of {file.path}: {known}")


def _whole(place: Location) -> str:
    return place.full.rstrip("/") if place.scheme else os.path.normpath(place.path)


def is_glob(text: str) -> bool:
    """Whether a path on the command line is a glob as rules have it."""
    return any(sign in text for sign in _SIGNS)


def folder_of(text: str) -> str:
    """The folder below which everything lies that a path or glob means; "" for all."""
    if not is_glob(text):
        return text
    first = min(text.index(sign) for sign in _SIGNS if sign in text)
    return text[:first].rpartition("/")[0]


def chosen(paths: pa.Array, wanted: Sequence[str]) -> NDArray[np.bool_]:
    """bool[n]: which of the paths are meant by these: a glob, or a path with all below it; "" is all."""
    found = np.zeros(len(paths), np.bool_)
    for text in wanted:
        if is_glob(text):
            found |= first_match(paths, [((text,), ())]) >= 0
        elif text:
            hits = pc.or_(pc.equal(paths, text), pc.starts_with(paths, f"{text}/"))
            found |= np.asarray(hits.to_numpy(zero_copy_only=False), np.bool_)
        else:
            found[:] = True
    return found
