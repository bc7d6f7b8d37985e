"""Moved checkpoints: where else the tier engine may have put one, and the restore of one in an archive."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiercache import config
from tiercache.errors import ArchivedShards, CorruptShard, StoreError, UnsupportedFormat
from tiercache.model import format_bytes
from tiercache.prices import prices_if_known
from tiercache.store import Store, open_store, redact
from tiercache.store.placement.locations import FileLocator
from tiercache.store.placement.resolver import is_remote, is_same_service, options_of
from tiercache.tier.costs import RESTORE_DAYS
from tiercache.tier.restore import RestorePlan, plan_restore, request_restore, wait_restored
from tiercache.tier.rules import RuleFile, Tier, load_rule_file
from tiercache.tier.stores import Stores
from tiercache.waiting import SYSTEM_CLOCK, Clock

logger = logging.getLogger("tiercache")

REMOTE = "remote"
_OWN_TIERS = ("local", REMOTE)


@dataclass(frozen=True, slots=True)
class OtherTiers:
    """The tiers other than the URL in which its checkpoints may be.

    Attributes:
        urls: URL of the folder of the checkpoints in each tier, by its name in the rule file, or by the URL.
        placed: Names of the checkpoints that the placement states to be in each tier, by the URL.
        home: URL of the folder of the checkpoints in the home; None if none was found.
        problem: Reason why the placement could not be read; "" if it was.
    """

    urls: Mapping[str, str]
    placed: Mapping[str, Sequence[str]]
    home: str | None = None
    problem: str = ""


class MovedCheckpoints:
    """Checkpoints of a URL that the tier engine has moved: to other tiers, or into an archive.

    The tiers are those of the rule file that applies to the working folder, and those that the placement names: that
    of the home above the URL, or of the home to which a marker of the URL's tier leads.

    Args:
        url: URL of the checkpoints.
        storage_options: Options of its store; None: they are not known, so that no other store with them is opened.
        open_stores: Function that opens the stores of a rule file's tiers; tests replace it.
        clock: Clock of waits.
    """

    def __init__(
        self,
        url: str,
        storage_options: Mapping[str, Any] | None = None,
        *,
        open_stores: Callable[[RuleFile], Stores] = Stores,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.url = url if "://" in url else os.path.abspath(url)  # noqa: PTH100 - resolve() would follow links
        self._options = None if storage_options is None else dict(storage_options)
        self._open_stores, self._clock = open_stores, clock
        self._locator = FileLocator(self.open)

    def open(self, url: str) -> Store:
        """Return a new store of a folder in another tier. Raises ValueError."""
        own = self._options if self._options and is_same_service(url, self.url) else {}
        return open_store(url, **(own | options_of(url)))

    def close(self) -> None:
        """Close the stores of other tiers."""
        self._locator.close()

    def store(self, url: str) -> Store:
        """Return the store of a folder in another tier, opened once. Raises StoreError if it cannot be opened."""
        try:
            return self._locator.store(url)
        except ValueError as error:
            raise StoreError(f"its store cannot be opened: {error}", url=redact(url)) from error

    def tiers(self) -> OtherTiers:
        """Return the tiers other than the URL in which its checkpoints may be."""
        follows, problem = self._options is not None or not is_remote(self.url), ""
        try:
            found = self._locator.find_tiers(self.url, follows_placement=follows)
        except (StoreError, CorruptShard, UnsupportedFormat, ValueError) as error:
            problem = f"the placement of moved checkpoints cannot be read: {error}"
            found = self._locator.find_tiers(self.url, follows_placement=False)
        urls = {redact(url) if name in _OWN_TIERS else name: url for name, url in found.urls.items()}
        placed: dict[str, dict[str, None]] = {}
        for key, url in found.placed.items():
            placed.setdefault(url, {})[key.partition("/")[0]] = None
        return OtherTiers(urls, {url: [*names] for url, names in placed.items()}, found.home, problem)

    def _rules(self) -> tuple[RuleFile, str]:
        """Return the rule file that applies, or one that has the tiers of the placement, and the folder below them.

        Raises:
            ValueError: There is a rule file, and it is invalid.
        """
        path = config.find_file(Path.cwd())
        if path is not None and config.parse_toml(path, config.read_file(path)).get("tiers"):
            file = load_rule_file(path)
            for tier in file.tiers:
                folder = _folder_below(tier.url, self.url)
                if folder is not None:
                    return file, folder
        urls = {REMOTE: self.url, **self.tiers().urls}
        options = self._options or {}
        tiers = [
            Tier(
                name=name,
                role="archive",
                url=url,
                storage_options=(options if is_same_service(url, self.url) else {}) | options_of(url),
            )
            for name, url in urls.items()
        ]
        return RuleFile(path=Path(config.FILE_NAME), sha256="", tiers=tuple(tiers)), ""

    def restore(self, keys: Sequence[str], *, wait: bool) -> None:
        """Restore objects of the checkpoints for some days, where they lie, after a message with cost and duration.

        Args:
            keys: Keys below the URL of the checkpoints.
            wait: Whether to request the restore and to wait for it. It may take hours.

        Raises:
            ArchivedShards: wait is False and an object is archived. The error has cost, duration and command.
            NotFound: An object is in no tier.
            StoreError: A store failed, or cannot restore.
        """
        file, folder = self._rules()
        with self._open_stores(file) as stores:
            prices = [prices_if_known(tier) for tier in file.tiers]
            plan = plan_restore(file, stores, [f"{folder}{key}" for key in keys], prices, days=RESTORE_DAYS)
            if not plan.objects:
                return
            text = restore_text(plan)
            if not wait:
                command = plan.command if file.is_from_file else ""
                get = f"tiercache tier get {shlex.quote(redact(self.url))}/NAME --wait"
                how = f"run `{command}`" if command else f"run `{get}` in a folder with the rule file"
                how = f"{how}, or call load(..., wait=True)"
                raise ArchivedShards(
                    f"{self.url}: {text}; to restore it, {how}",
                    names=plan.names,
                    url=self.url,
                    n_bytes=plan.n_bytes,
                    command=command,
                )
            logger.warning("%s: %s; restoring", self.url, text)
            request_restore(stores, plan)
            wait_restored(stores, plan, clock=self._clock)


def restore_text(plan: RestorePlan) -> str:
    """Return what a restore costs and how long it takes, as text for people."""
    n = len(plan.objects)
    cost = "an unknown price" if plan.cost is None else f"${plan.cost:,.2f}" if plan.cost >= 0.01 else "less than $0.01"
    hours = "an unknown time" if plan.hours is None else f"at most {plan.hours:g} hours"
    what = f"{n} archived {'object' if n == 1 else 'objects'} ({format_bytes(plan.n_bytes)})"
    return f"{what} must be restored, which costs {cost} and takes {hours}"


def _folder_below(tier_url: str, url: str) -> str | None:
    """Return the folder of a URL below a tier's URL, "" or a path with "/" at its end; None if it is not below it."""
    base, whole = _plain(tier_url), _plain(url)
    return whole[len(base) + 1 :] + "/" if whole.startswith(f"{base}/") else "" if whole == base else None


def _plain(url: str) -> str:
    return url.removeprefix("file://").rstrip("/")
