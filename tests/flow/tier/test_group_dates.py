"""Dates of groups: a move does not change when a group was first written, wherever it lies."""

import os
from dataclasses import replace

import pytest
from tests.flow.tier.test_run_once import Tiers as Folders
from tests.support.clock import JumpingClock
from tests.support.tier_moves import TIERS, HookAt, Killed, World, content

from tiercache.tier.inventory import take_inventory
from tiercache.tier.journal import TierCatalog
from tiercache.tier.mover import catalog_path
from tiercache.tier.stores import Stores

HOUR_S, DAY_S = 3600.0, 86_400.0
SPRING_S = 1_700_000_000.0
RULES = '[[rules]]\nmatch = "ck/**"\nkeep_standard = { last = 1 }\nthen = "archive"\nafter = "1h"\n'
STEPS = tuple(range(1, 9))


@pytest.fixture
def folders(tmp_path):
    """Eight checkpoints, two hours apart."""
    folders = Folders(tmp_path)
    write_rules(folders, RULES)
    for step in STEPS:
        write(folders, step, SPRING_S + 2 * HOUR_S * step)
    return folders


def write_rules(folders, rules, tiers=TIERS):
    text = f'state_dir = "{folders.root / "state"}"\n'
    text += "".join(f'[tiers.{name}]\nurl = "{folders.root / name}"\n' for name in tiers) + rules
    (folders.root / "tiercache.toml").write_text(text)


def write(folders, step, date_s, tier="standard", data=b""):
    folders.write(tier, name(step), data or f"step {step}".encode())
    os.utime(folders.root / tier / name(step), (date_s, date_s))


def name(step):
    return f"ck/run/step-{step}.pt"


def move_all(folders, clock_s=DAY_S + 1):
    """Make the moves of the rule, and delete their sources."""
    folders.run()
    with JumpingClock() as clock:
        clock.jump(clock_s)
        folders.run()
    assert folders.keys("standard") == [name(STEPS[-1])]


def look(folders):
    with Stores(folders.file) as stores, TierCatalog(catalog_path(folders.file)) as catalog:
        catalog.bind({tier.name: tier.url for tier in folders.file.tiers})
        return take_inventory(folders.file, stores, catalog, now_s=SPRING_S + 400 * DAY_S).snapshot


def ages(folders):
    snapshot = look(folders)
    return dict(zip(snapshot.paths.to_pylist(), snapshot.created_s.tolist(), strict=True))


@pytest.mark.parametrize(
    "change", [lambda path: path.chmod(0o600), lambda path: os.link(path, f"{path}.bak")], ids=["chmod", "hard link"]
)
def test_the_date_of_a_moved_group_survives_a_change_of_its_files_attributes(folders, change):
    before = ages(folders)
    move_all(folders)
    for step in STEPS[:-1]:
        change(folders.root / "archive" / name(step))
    after = ages(folders)
    assert {path: after[path] for path in before} == before


def test_a_checkpoint_that_is_rewritten_under_its_path_gets_a_new_date(folders):
    move_all(folders)
    (folders.root / "archive" / name(3)).unlink()
    write(folders, 3, SPRING_S + 300 * DAY_S, data=b"another")
    assert ages(folders)[name(3)] == SPRING_S + 300 * DAY_S


def test_without_the_catalog_files_that_were_moved_between_folders_have_their_dates(folders):
    before = ages(folders)
    move_all(folders)
    for path in catalog_path(folders.file).parent.glob("tiers.sqlite*"):
        path.unlink()
    assert ages(folders) == before


@pytest.mark.parametrize("point", ["tier_move.object", "tier_move.copied", "tier_move.recorded", "tier_drop.dropped"])
def test_the_date_of_a_group_survives_a_killed_mover(folders, point):
    before = ages(folders)
    if point == "tier_drop.dropped":
        folders.run()
    with JumpingClock() as clock:
        clock.jump(DAY_S + 1)
        with HookAt(point), pytest.raises(Killed):
            folders.run()
    move_all(folders, 2 * DAY_S + 2)
    assert ages(folders) == before


# -- classes -----------------------------------------------------------------------------------------------------------


def shared(tmp_path, cold_class):
    """One bucket is standard and archive: the archive is a class of it, and a change of class changes the date."""
    world = World(tmp_path / "world", classes=True, shared=True, cold_class=cold_class)
    world.put("standard", "f")
    return world


def written_s(world):
    inner = {tier: world.inner[tier] for tier in TIERS}
    archives = {tier: inner[tier] for tier in ("standard", "archive")}
    with Stores(world.file, stores=inner, s3_classes=archives) as stores, TierCatalog(world.catalog_path) as catalog:
        catalog.bind({tier.name: tier.url for tier in world.file.tiers})
        snapshot = take_inventory(world.file, stores, catalog, now_s=world.now_s).snapshot
        return snapshot.created_s.item(), snapshot.modified_s.item()


@pytest.mark.parametrize("cold_class", ["STANDARD_IA", "GLACIER"])
def test_the_date_of_a_group_survives_a_change_of_storage_class(tmp_path, cold_class):
    world = shared(tmp_path, cold_class)
    before, _ = written_s(world)
    with JumpingClock() as clock:
        clock.jump(DAY_S)
        world.apply(world.plan(world.move("f", "standard", "archive", action="reclass")))
        world.later()
        world.run_due_deletions()
    assert (world.inner["standard"].head("f").storage_class, content("f")) == (cold_class, world._raw("standard", "f"))
    after, dated = written_s(world)
    assert after == before
    assert dated > before


def test_an_unverified_object_keeps_its_date_and_stays_unverified(tmp_path):
    world = shared(tmp_path, "STANDARD_IA")
    world.inner["standard"].says_sums = False
    before, _ = written_s(world)
    move = world.move("f", "standard", "archive", action="reclass")
    move = replace(move, objects=tuple(one._replace(crc32c=None) for one in move.objects))
    with JumpingClock() as clock:
        clock.jump(DAY_S)
        assert world.apply(world.plan(move)).stopped == ()
    after, dated = written_s(world)
    assert (after, dated > before) == (before, True)
    with TierCatalog(world.catalog_path) as catalog:
        assert not catalog.entries(world.url("archive"), ["f"])["f"].verified
