"""Data sets among the listed objects: their live shards with size and checksum, and the reported uses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tiercache.errors import CorruptShard, NotFound, UnsupportedFormat
from tiercache.model import OWN_FOLDER
from tiercache.shard import versions as manifest
from tiercache.shard.versions import VERSIONS_FOLDER, SegmentRef, ShardTable, Version, read_segments
from tiercache.store import placement_log, uses
from tiercache.store.placement_log import prefix_store
from tiercache.tier.text_columns import index_in, match_regex

if TYPE_CHECKING:
    from tiercache.tier.inventory.listing import Listing
    from tiercache.tier.rules import RuleFile
    from tiercache.tier.stores import Stores

OWN_KEY = rf"(?:^|/){re.escape(OWN_FOLDER)}"
SHARD_KEY = r"\.tcs$"

_VERSION_KEY = rf"^(?P<folder>(?:.*/)?){re.escape(VERSIONS_FOLDER)}(?P<number>[0-9]{{20}})\.json$"
# Round trips dominate the time to read many small versions.
_THREADS = 16


@dataclass(frozen=True, slots=True)
class FoundDataset:
    folder: str  # folder below the URL of a tier; "" or ending in "/"
    tier: str  # name of the tier from which its versions were read
    n_versions: int  # number of versions, all of which are live
    n_shards: int = 0  # number of shards that any version names
    is_tracked: bool = False  # whether machines report uses of the data set
    problem: str = ""  # reason why the data set is left alone; "": there is none


@dataclass(frozen=True, slots=True, eq=False)
class LiveShards:
    """The live shards of all data sets. Row i of every column is one; keys are unique."""

    keys: pa.Array  # large_string[n], below the URL of a tier
    n_bytes: NDArray[np.int64]  # from the manifests
    crc32c: NDArray[np.int64]  # from the manifests
    last_use_s: NDArray[np.float64]  # NaN where no use was reported
    in_use: NDArray[np.bool_]
    unreported: NDArray[np.bool_]  # whether a machine that may read the data set has not reported
    uses_tracked_since_s: NDArray[np.float64]  # time since which machines report uses; inf: they do not yet

    def __len__(self) -> int:
        return len(self.keys)


def _no_shards() -> LiveShards:
    ints, floats, flags = np.empty(0, np.int64), np.empty(0, np.float64), np.empty(0, np.bool_)
    keys = pa.nulls(0, pa.large_string())  # pa.array() of a list imports pandas, which costs 150 ms
    return LiveShards(keys, ints, ints, floats, flags, flags, floats)


def read_datasets(
    file: RuleFile, stores: Stores, listed: Listing, own: pa.Array, *, now_s: float
) -> tuple[LiveShards, tuple[FoundDataset, ...]]:
    """Read all data sets whose versions are among the listed objects. Raises StoreError.

    own: Rows of tiercache's own objects (in a _tiercache/ folder).
    """
    shards, found = [], []
    own_keys = listed.keys.take(own)
    for (folder, tier), numbers in sorted(_versions_of(file, listed, own, own_keys).items()):
        reader = _DatasetReader(stores, folder, file.tiers[tier].name)
        some, dataset = reader.read(numbers, own_keys, now_s)
        shards.append(some)
        found.append(dataset)
    return _joined(shards), tuple(found)


def _versions_of(
    file: RuleFile, listed: Listing, own: pa.Array, own_keys: pa.Array
) -> dict[tuple[str, int], list[int]]:
    """Return the version numbers of each data set by (folder, tier): from the home tier, or else the first with any."""
    parts = pc.extract_regex(own_keys, _VERSION_KEY)
    rows = np.flatnonzero(np.asarray(pc.is_valid(parts).to_numpy(zero_copy_only=False), np.bool_))
    parts = parts.take(pa.array(rows, pa.int64()))
    tiers = listed.tier[np.asarray(own.to_numpy(zero_copy_only=False), np.int64)[rows]].tolist()
    everywhere: dict[str, dict[int, list[int]]] = {}
    for folder, number, tier in zip(
        pc.struct_field(parts, "folder").to_pylist(), pc.struct_field(parts, "number").to_pylist(), tiers, strict=True
    ):
        if int(number):
            everywhere.setdefault(folder, {}).setdefault(tier, []).append(int(number))
    home = file.index(file.home_tier.name)
    chosen = {folder: home if home in by_tier else min(by_tier) for folder, by_tier in everywhere.items()}
    return {(folder, tier): sorted(everywhere[folder][tier]) for folder, tier in chosen.items()}


class _DatasetReader:
    def __init__(self, stores: Stores, folder: str, tier: str) -> None:
        self._folder, self._tier = folder, tier
        self._store = prefix_store(stores.store(tier), folder)

    def read(self, numbers: Sequence[int], own_keys: pa.Array, now_s: float) -> tuple[LiveShards, FoundDataset]:
        try:
            versions = self._versions(numbers)
            table = self._table(versions)
        except (CorruptShard, UnsupportedFormat) as error:
            return _no_shards(), FoundDataset(self._folder, self._tier, len(numbers), problem=str(error))
        has_tracking_marker = bool(
            match_regex(own_keys, f"^{re.escape(self._folder + placement_log.TRACKING_MARKER_KEY)}$").any()
        )
        reports = match_regex(own_keys, f"^{re.escape(self._folder + uses.USAGE_FOLDER)}").any()
        found = uses.read_reports(self._store) if reports else []
        used = uses.merge_reports(found, table.names, now_s=now_s)
        # Without the tracking marker, readers do not report: a data set that is read daily must not be archived on the
        # day of the first rules. A marker without a date comes from an early release: uses have been tracked for long.
        since_s = (placement_log.tracked_since_s(self._store) or 0.0) if has_tracking_marker else np.inf
        names = pa.concat_arrays([pa.nulls(0, pa.large_string()), *table.names.chunks])
        shards = LiveShards(
            keys=pc.binary_join_element_wise(pa.scalar(self._folder, names.type), names, pa.scalar("", names.type)),
            n_bytes=table.n_bytes,
            crc32c=table.crc32c.astype(np.int64),
            last_use_s=used.last_use_s,
            in_use=used.in_use,
            unreported=np.full(len(table), used.unreported),
            uses_tracked_since_s=np.full(len(table), since_s),
        )
        return shards, FoundDataset(self._folder, self._tier, len(versions), len(table), is_tracked=has_tracking_marker)

    def _versions(self, numbers: Sequence[int]) -> list[Version]:
        def read(number: int) -> Version | None:
            try:
                return manifest.read_version(self._store, number)
            except NotFound:
                return None

        with ThreadPoolExecutor(min(_THREADS, len(numbers)), "tiercache-versions") as pool:
            found = list(pool.map(read, numbers))
        return [version for version in found if version is not None]

    def _table(self, versions: Sequence[Version]) -> ShardTable:
        """Return all shards that any version names, each once. Segments that versions share are read once."""
        refs: dict[tuple[str, str], SegmentRef] = {}
        for version in versions:
            for ref in version.segments:
                refs[version.dataset_id, ref.name] = ref
        tables: list[pa.Table] = []
        for dataset_id in dict.fromkeys(dataset_id for dataset_id, _ in refs):
            tables += read_segments(self._store, dataset_id, [ref for key, ref in refs.items() if key[0] == dataset_id])
        table = ShardTable(tables)
        first = np.flatnonzero(index_in(table.names, table.names) == np.arange(len(table)))
        return table if len(first) == len(table) else ShardTable([table.arrow.take(pa.array(first))])


def _joined(shards: Sequence[LiveShards]) -> LiveShards:
    """Concatenate the shards of all data sets; of duplicate keys, the first is kept."""
    every = [_no_shards(), *shards]
    keys = pa.concat_arrays([one.keys for one in every])
    rows = np.flatnonzero(index_in(keys, keys) == np.arange(len(keys)))

    def column(name: str) -> NDArray[np.float64]:
        joined: NDArray[np.float64] = np.concatenate([getattr(one, name) for one in every])
        return joined[rows]

    columns = {one.name: column(one.name) for one in fields(LiveShards) if one.name != "keys"}
    return LiveShards(keys=keys.take(pa.array(rows, pa.int64())), **columns)  # type: ignore[arg-type]
