"""Data sets in an inventory: the shards that versions name, wherever they lie, and their reported uses."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from tests.support.scripted_tiers import NOW_S, InventoryByName, ScriptedCatalog

import tiercache as tc
from tiercache.store import LocalFolder, uses
from tiercache.tier.inventory import take_inventory
from tiercache.tier.rules import load_rule_file
from tiercache.tier.stores import Stores


@pytest.fixture
def local(tmp_path):
    """Three tiers in folders, a data set at home in `sets/a`, written in two versions."""
    path = tmp_path / "tiercache.toml"
    tables = [f'[tiers.{name}]\nurl = "{tmp_path}/{name}"\n' for name in ("hot", "standard", "archive")]
    path.write_text("\n".join(tables))
    home = tmp_path / "standard" / "sets" / "a"
    for mode in ("create", "append"):
        with tc.Writer(home, schema={"id": "int64"}, mode=mode, shard_size="4KiB", block_size="1KiB") as writer:
            writer.write_batch({"id": np.random.default_rng(3).integers(0, 1 << 60, 2000)})

    def take(catalog=None, stores=None, **options):
        file = load_rule_file(path)
        with Stores(file, stores=stores) as stores:
            return InventoryByName(take_inventory(file, stores, catalog or ScriptedCatalog(), now_s=NOW_S, **options))

    names = [p.relative_to(tmp_path / "standard").as_posix() for p in sorted(home.rglob("*.tcs"))]
    return SimpleNamespace(root=tmp_path, home=home, take=take, names=names, store=LocalFolder(home))


def test_a_shard_that_lies_only_in_another_tier_is_a_group_there(local):
    name = local.names[0]
    (local.root / "archive" / name).parent.mkdir(parents=True)
    shutil.move(local.root / "standard" / name, local.root / "archive" / name)
    by_name = local.take()
    assert (by_name.has(name, "archive", "whole"), by_name.facts["missing"]) == (True, (0, ()))


def test_a_missing_shard_is_reported(local):
    (local.root / "standard" / local.names[0]).unlink()
    assert local.take().facts["missing"] == (1, (local.names[0],))


def test_a_shard_that_no_version_names_is_left_out_and_reported(local):
    (local.home / "lost.tcs").write_bytes(b"of a writer that died")
    by_name = local.take()
    assert by_name.paths == local.names
    assert by_name.facts["orphans"] == (1, ("sets/a/lost.tcs",))


def test_an_unreadable_data_set_is_left_out_and_reported(local):
    newest = sorted((local.home / "_tiercache" / "versions").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:-3])
    by_name = local.take()
    assert by_name.paths == []
    (dataset,) = by_name.facts["datasets"]
    assert (dataset.folder, dataset.problem != "") == ("sets/a/", True)
    assert by_name.facts["orphans"][0] == len(local.names)


def test_a_data_set_outside_the_home_tier_is_read_where_it_lies(local):
    shutil.move(local.root / "standard", local.root / "hot")
    by_name = local.take()
    (dataset,) = by_name.facts["datasets"]
    assert (dataset.tier, len(by_name.paths)) == ("hot", len(local.names))


def test_a_shard_whose_checksum_differs_from_the_manifest_is_not_whole(local):
    name = local.names[0]
    (local.root / "archive" / name).parent.mkdir(parents=True)
    shutil.copy(local.root / "standard" / name, local.root / "archive" / name)
    (found,) = local.take().objects(name, "archive")
    catalog = ScriptedCatalog({("archive", name): (found.n_bytes, found.etag, found.crc32c ^ 1, True, None)})
    by_name = local.take(catalog)
    assert [by_name.has(name, tier, "whole") for tier in ("standard", "archive")] == [True, False]


def report(local, machine, **facts):
    local.store.put(uses.usage_key(machine), uses.encode(uses.UseReport(machine, **facts)))


def test_reported_uses_are_in_the_snapshot(local):
    name = local.names[0].removeprefix("sets/a/")
    report(local, "m", reported_s=NOW_S, shards={name: NOW_S - 5})
    by_name = local.take()
    assert by_name.of(local.names[0], "last_use_s") == NOW_S - 5
    assert by_name.of(local.names[1], "last_use_s") == by_name.of(local.names[1], "created_s")


def test_a_shard_that_is_being_read_is_in_use(local):
    name = local.names[0].removeprefix("sets/a/")
    readers = {"1": uses.ActiveReader(NOW_S - 100, NOW_S - 10)}
    report(local, "m", reported_s=NOW_S, readers=readers, shards={name: NOW_S - 5})
    by_name = local.take()
    assert (by_name.of(local.names[0], "in_use"), by_name.of(local.names[1], "in_use")) == (True, False)


def test_a_data_set_counts_as_unreported_while_a_reader_is_silent(local):
    heard_s = NOW_S - 86_400
    report(local, "m", reported_s=heard_s, readers={"1": uses.ActiveReader(heard_s, heard_s)})
    assert local.take().snapshot.unreported.all()


def test_versions_are_read_from_the_home_tier_and_not_from_an_old_copy(local):
    shutil.copytree(local.root / "standard", local.root / "hot")
    with tc.Writer(local.home, schema={"id": "int64"}, mode="append") as writer:
        writer.write_batch({"id": np.arange(3)})
    by_name = local.take()
    (dataset,) = by_name.facts["datasets"]
    assert (dataset.tier, by_name.facts["orphans"]) == ("standard", (0, ()))
