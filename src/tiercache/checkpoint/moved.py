"""Moved checkpoints: where else the tier engine may have put one, and the restore of one in an archive."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tiercache import config
from tiercache.errors import ArchivedShards
from tiercache.model import format_bytes
from tiercache.prices import prices_if_known
from tiercache.store import LocalFolder, Store, open_store
from tiercache.tier.costs import RESTORE_DAYS
from tiercache.tier.restore import RestorePlan, plan_restore, request_restore, wait_restored
from tiercache.tier.rules import RuleFile, Tier, load_rule_file
from tiercache.tier.stores import Stores
from tiercache.waiting import SYSTEM_CLOCK, Clock

logger = logging.getLogger("tiercache")

REMOTE = "remote"


class MovedCheckpoints:
    """Checkpoints of a URL that the tier engine has moved: to other tiers of the rule file, or into an archive.

    The rule file is the one that applies; without one, the URL is the only tier.

    Args:
        url: URL of the checkpoints.
        storage_options: Options of its store.
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
        self._options = dict(storage_options or {})
        self._open_stores, self._clock = open_stores, clock

    def _rules(self) -> tuple[RuleFile, str, str]:
        """Return the rule file that applies, the tier of the URL, and the folder of the checkpoints below its URL.

        Raises:
            ValueError: There is a rule file, and it is invalid.
        """
        path = config.find_file(Path.cwd())
        if path is not None and config.parse_toml(path, config.read_file(path)).get("tiers"):
            file = load_rule_file(path)
            for tier in file.tiers:
                folder = _folder_below(tier.url, self.url)
                if folder is not None:
                    return file, tier.name, folder
        tier = Tier(name=REMOTE, role="archive", url=self.url, storage_options=self._options)
        return RuleFile(path=Path(config.FILE_NAME), sha256="", tiers=(tier,)), REMOTE, ""

    @contextmanager
    def other_stores(self) -> Iterator[dict[str, Store]]:
        """Yield the stores of the folders below the other tiers to which the checkpoints may have been moved.

        Raises:
            ValueError: There is a rule file, and it is invalid.
        """
        file, name, folder = self._rules()
        with self._open_stores(file) as stores:
            others = [tier for tier in file.tiers if not stores.same_url(tier.name, name)]
            opened = {tier.name: _open_below(tier, folder) for tier in others}
            try:
                yield opened
            finally:
                for store in opened.values():
                    store.close()

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
        file, _, folder = self._rules()
        with self._open_stores(file) as stores:
            prices = [prices_if_known(tier) for tier in file.tiers]
            plan = plan_restore(file, stores, [f"{folder}{key}" for key in keys], prices, days=RESTORE_DAYS)
            if not plan.objects:
                return
            text = restore_text(plan)
            if not wait:
                command = plan.command if file.is_from_file else ""
                how = f"run `{command}`, or call load(..., wait=True)" if command else "call load(..., wait=True)"
                raise ArchivedShards(
                    f"{self.url}: {text}; to restore it, {how}",
                    names=plan.names,
                    url=self.url,
                    n_bytes=plan.n_bytes,
                    cost=plan.cost,
                    hours=plan.hours,
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


def _open_below(tier: Tier, folder: str) -> Store:
    url = f"{tier.url.rstrip('/')}/{folder}".rstrip("/")
    return LocalFolder(_plain(url)) if tier.is_local else open_store(url, **tier.storage_options)
