"""What somebody writes where a copy is on its way is his, and stays."""

import pytest
from tests.tier.jobs import fill
from tests.tier.world import World

from tiercache.catalog.tiers import TierCatalog
from tiercache.store import LocalFolder
from tiercache.tier.move.deletions import settle
from tiercache.tier.move.executor import apply_plan
from tiercache.tier.move.mover import open_mover
from tiercache.tier.stores import Stores

KEY, MINE = "files/a.bin", b"written while a copy was under way"


class Contested(LocalFolder):
    """Somebody writes an object of the name under which an upload has begun."""

    def create(self, key):
        upload = super().create(key)
        if key == KEY:
            self.put(key, MINE)
        return upload


@pytest.mark.parametrize("is_small", [True, False])
def test_an_object_that_comes_while_a_copy_is_made_is_not_overwritten(tmp_path, monkeypatch, is_small):
    if not is_small:
        monkeypatch.setattr("tiercache.tier.move.transfer._SMALL_BYTES", 0)
    world = World(tmp_path, "local")
    with world.entered():
        fill(world)
        plan = world.plan()
        file, cold = world.file(), Contested(world.places["cold"].root)
        with (
            Stores(file, stores={"archive": cold}) as stores,
            TierCatalog(tmp_path / "state" / "tiers.sqlite") as catalog,
            open_mover(file, stores, catalog) as context,
        ):
            applied = apply_plan(context, plan)
            world.days_pass(1.5)
            settle(context)
    assert [one.path for one in applied.stopped] == [KEY]
    assert world.path("cold", KEY).read_bytes() == MINE
    assert world.path("hot", KEY).exists()
