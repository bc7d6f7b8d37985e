"""A move or a recall through a store without dates of its own: neither is a use, nor makes an old file look new."""

import os

import pytest
from tests.tier.moving import NOW_S, World

from tiercache.store import LocalFolder
from tiercache.tier.inventory.groups import take_inventory
from tiercache.tier.journal import TierCatalog
from tiercache.tier.stores import Stores

OLD_S = 1_500_000_000.25
DAY_S = 86_400.0


@pytest.fixture
def world(tmp_path):
    """Home is a folder with an old file; the archive is a store whose objects have the date of their upload."""
    world = World(tmp_path / "world")
    text = (world.root / "tiercache.toml").read_text()
    (world.root / "tiercache.toml").write_text(text.replace(world.url("standard"), str(tmp_path / "disk")))
    world.inner["standard"] = world.faulty["standard"] = LocalFolder(tmp_path / "disk")
    world.put("standard", "folder/f")
    for path in (file_of(world), file_of(world).parent):
        os.utime(path, (OLD_S, OLD_S))
    return world


def file_of(world):
    return world.inner["standard"].root / "folder" / "f"


def move_away(world):
    world.apply(world.plan(world.move("folder/f", "standard", "archive")))
    world.later()
    assert world.run_due_deletions().n_made == 1
    assert not file_of(world).exists()
    assert world.inner["archive"].head("folder/f").modified_s > OLD_S + DAY_S


def last_use_s(world):
    with Stores(world.file, stores=world.inner) as stores, TierCatalog(world.catalog_path) as catalog:
        catalog.bind({tier.name: tier.url for tier in world.file.tiers})
        snapshot = take_inventory(world.file, stores, catalog, now_s=NOW_S).snapshot
    return dict(zip(snapshot.paths.to_pylist(), snapshot.last_use_s.tolist(), strict=True))


def test_a_move_to_a_store_is_no_use(world):
    before = last_use_s(world)
    move_away(world)
    assert last_use_s(world) == before == {"folder/f": OLD_S}


def test_a_file_that_was_recalled_from_a_store_has_the_date_of_its_first_writing(world):
    move_away(world)
    world.apply(world.plan(world.move("folder/f", "archive", "standard", action="copy"), name="back"))
    assert file_of(world).stat().st_mtime == OLD_S
    assert last_use_s(world) == {"folder/f": OLD_S}
