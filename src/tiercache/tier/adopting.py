"""Use tracking: data sets that a rule or a plan covers get a marker, and machines then report which shards they use."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tiercache.errors import StoreError
from tiercache.tier import placement
from tiercache.tier.below import prefix_store
from tiercache.tier.matching import first_match
from tiercache.tier.model import SHARD
from tiercache.tier.placing import dataset_folder_above

if TYPE_CHECKING:
    from tiercache.tier.inventory import Inventory
    from tiercache.tier.model import Plan
    from tiercache.tier.stores import Stores


def track_ruled(inventory: Inventory, stores: Stores) -> tuple[str, ...]:
    """Start tracking the data sets at home that a rule covers. Return the folders of the newly tracked ones."""
    file, snapshot = stores.file, inventory.snapshot
    shards = snapshot.paths.filter(pa.array(snapshot.kind == SHARD))
    ruled = shards.filter(pa.array(first_match(shards, [(rule.match, rule.exclude) for rule in file.rules]) >= 0))
    return _adopted(
        stores,
        (
            found.folder.rstrip("/")
            for found in inventory.facts.get("datasets", ())
            if not (found.problem or found.is_adopted)
            and stores.same_url(found.tier, file.home.name)
            and np.any(pc.starts_with(ruled, found.folder).to_numpy(zero_copy_only=False))
        ),
    )


def track_planned(plan: Plan, stores: Stores) -> tuple[str, ...]:
    """Start tracking the data sets at home whose shards a plan moves or refuses. Return the newly tracked folders."""
    home = stores.store(stores.file.home.name)
    shards = [one.path for one in plan.moves if one.kind == "shard"]
    shards += [one.path for one in plan.refusals if one.kind == "shard"]
    folders = {path.rpartition("/")[0] for path in shards}
    found = {dataset_folder_above(home, folder) for folder in folders}
    return _adopted(stores, sorted(folder for folder in found if folder is not None))


def _adopted(stores: Stores, folders: Iterable[str]) -> tuple[str, ...]:
    home, adopted = stores.store(stores.file.home.name), []
    for folder in folders:
        # A store that cannot be written: the moves report that.
        with suppress(StoreError):
            if placement.start_tracking(prefix_store(home, folder)):
                adopted.append(folder)
    return tuple(adopted)
