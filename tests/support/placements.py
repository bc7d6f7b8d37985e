"""Placements for tests: rows, numbers, and a process that is killed at a crash point."""

from __future__ import annotations

import pytest

from tiercache.crash_points import set_hook
from tiercache.store import placement_log
from tiercache.store.placement_log import PlacementRow


def row(key: str, url: str = "s3://cold/data", **how) -> PlacementRow:
    return PlacementRow(key, url, n_bytes=how.pop("n_bytes", 5), crc32c=how.pop("crc32c", 7), **how)


def rows_of(found: placement_log.Placement) -> dict[str, PlacementRow]:
    return {one.key: one for one in map(found.row, range(len(found)))}


def numbers(store) -> list[int]:
    return sorted(int(info.key[-26:-6]) for info in store.list(placement_log.PLACEMENT_FOLDER))


class _Stop(Exception):
    pass


def stopped_at(point: str, work) -> None:
    """Do work until it reaches a point, as a process that is killed there."""

    def stop(reached: str) -> None:
        if reached == point:
            raise _Stop

    before = set_hook(stop)
    try:
        with pytest.raises(_Stop):
            work()
    finally:
        set_hook(before)
