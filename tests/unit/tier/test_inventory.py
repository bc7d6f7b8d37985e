"""The inventory of several tiers: groups and their copies, and whether these are whole, verified and complete."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.scripted_tiers import NOW_S, OLD_S, SETTLE_S, ListedStore, ScriptedCatalog, Tiers

from tiercache.tier.snapshot import ARCHIVED, READABLE, RESTORED, RESTORING

# -- groups and copies ------------------------------------------------------------------------------------------------


def test_a_copy_has_the_first_write_time_of_the_catalog_and_a_checkpoint_that_of_its_newest_object(tiers):
    for key, written_s in (("x", OLD_S), ("step-1/a.pt", OLD_S), ("step-1/b.pt", OLD_S + 5)):
        tiers.archive.add(key, modified_s=NOW_S)
        tiers.catalog.verify(tiers.archive, key, written_s=written_s)
    by_name = tiers.take()
    assert (by_name.of("x", "created_s"), by_name.has("x", "archive", "modified_s")) == (OLD_S, NOW_S)
    assert by_name.of("step-1", "created_s") == OLD_S + 5


def test_an_object_without_a_date_has_the_time_of_the_listing(tiers):
    tiers.hot.add("x", modified_s=None)
    assert tiers.take().of("x", "created_s") == NOW_S


def test_the_final_object_of_a_copy_comes_last(tiers):
    for name in (".metadata", "__0_0.distcp", "a.index.json", "z.txt"):
        tiers.hot.add(f"step-1/{name}")
    keys = [info.key for info in tiers.take().objects("step-1", "hot")]
    assert keys == ["step-1/__0_0.distcp", "step-1/z.txt", "step-1/a.index.json", "step-1/.metadata"]


def test_objects_are_as_the_store_lists_them(tiers):
    tiers.standard.add("x", 5, crc32c=9, storage_class="GLACIER", restore='ongoing-request="true"')
    by_name = tiers.take()
    assert by_name.objects("x", "standard") == (replace(tiers.standard.infos["x"], storage_class=None, restore=None),)
    assert by_name.has("x", "standard", "state") == RESTORING
    assert by_name.snapshot.classes[by_name.has("x", "standard", "storage_class")] == "GLACIER"


@pytest.mark.parametrize(
    ("facts", "state"),
    [
        ({}, READABLE),
        ({"storage_class": "GLACIER"}, ARCHIVED),
        ({"storage_class": "GLACIER", "restore": 'ongoing-request="true"'}, RESTORING),
        ({"storage_class": "GLACIER", "restore": 'ongoing-request="false"'}, RESTORED),
    ],
)
def test_a_copy_has_the_state_of_its_least_readable_object(tiers, facts, state):
    tiers.hot.add("step-1/a.pt", 10, **facts)
    tiers.hot.add("step-1/b.pt", 10)
    assert tiers.take().has("step-1", "hot", "state") == state


def test_a_copy_has_the_storage_class_of_its_largest_object(tiers):
    tiers.hot.add("step-1/a.pt", 10, storage_class="STANDARD")
    tiers.hot.add("step-1/b.pt", 99, storage_class="STANDARD_IA")
    by_name = tiers.take()
    assert by_name.snapshot.classes[by_name.has("step-1", "hot", "storage_class")] == "STANDARD_IA"


def test_unfinished_objects_invalid_keys_and_those_of_tiercache_belong_to_no_group(tiers):
    for key in (
        "x.tmp",
        "tmp-checkpoint-5/model.bin",
        "folder/",
        "_tiercache/tier.lock",
        "set/_tiercache/usage/m.json",
    ):
        tiers.hot.add(key)
    by_name = tiers.take()
    assert by_name.paths == []
    assert by_name.facts["unfinished"] == (2, ("tmp-checkpoint-5/model.bin", "x.tmp"))
    assert by_name.facts["no_keys"] == (1, ("folder/",))


COMPLETE = {  # names below step-1 with their dates, whether it is complete at once, and after the quiet period
    "no final object": ({"a.pt": OLD_S, "b.pt": NOW_S - SETTLE_S + 1}, False, True),
    "the final object is the newest": ({"__0_0.distcp": NOW_S, ".metadata": NOW_S}, True, True),
    "being overwritten": ({".metadata": OLD_S, "__0_0.distcp": NOW_S}, False, True),
    "a final object in a subfolder": ({"model/__0_0.distcp": NOW_S, "model/.metadata": NOW_S}, False, True),
    "an unfinished object": ({"__0_0.distcp": NOW_S, ".metadata": NOW_S, "loader.json.tmp": NOW_S}, False, True),
}


@pytest.mark.parametrize("name", COMPLETE)
def test_a_checkpoint_is_complete_with_its_final_object_or_after_the_quiet_period(tiers, name):
    dates, at_once, later = COMPLETE[name]
    for key, modified_s in dates.items():
        tiers.hot.add(f"step-1/{key}", modified_s=modified_s)
    assert tiers.take().of("step-1", "complete") == at_once
    assert tiers.take(now_s=NOW_S + SETTLE_S).of("step-1", "complete") == later


# -- against a plain one ----------------------------------------------------------------------------------------------

CELLS = st.tuples(st.integers(1, 2), st.sampled_from([None, 1, 2]), st.booleans())
WORLDS = st.dictionaries(
    st.tuples(st.sampled_from(["hot", "standard", "archive"]), st.sampled_from(["f", "step-1/a.pt", "step-1/b.pt"])),
    CELLS,
)


@given(WORLDS)
def test_copies_are_whole_and_verified_as_a_plain_loop_computes(tmp_path_factory, world):
    """world: (tier, key) -> size, checksum on the books, whether it changed since."""
    stores = {name: ListedStore(f"plain-{name}") for name in ("hot", "standard", "archive")}
    catalog = ScriptedCatalog()
    for (tier, key), (n_bytes, crc, changed) in world.items():
        stores[tier].add(key, n_bytes)
        if crc is not None:
            catalog.verify(stores[tier], key, crc)
        if changed:
            stores[tier].add(key, n_bytes, etag='"other"')
    by_name = Tiers(tmp_path_factory.mktemp("look"), stores, catalog).take()
    for path, keys in {"f": ["f"], "step-1": ["step-1/a.pt", "step-1/b.pt"]}.items():
        everywhere = {key for key in keys if any(of == key for _, of in world)}
        for tier in stores:
            mine = {key for key in keys if (tier, key) in world}
            if mine:
                plain = plain_look(world, mine, everywhere, tier)
                assert (by_name.has(path, tier, "whole"), by_name.has(path, tier, "verified")) == plain


def plain_look(world, mine, everywhere, tier):
    def sums(key):
        return {None if changed else crc for (_, of), (_, crc, changed) in world.items() if of == key}

    same = all(
        len({n for (_, of), (n, _, _) in world.items() if of == key}) == 1 and len(sums(key) - {None}) <= 1
        for key in mine
    )
    n_copies = {key: sum(of == key for _, of in world) for key in mine}
    verified = all(
        world[tier, key][1] is not None and not world[tier, key][2] and (n_copies[key] == 1 or None not in sums(key))
        for key in mine
    )
    return same and mine == everywhere, same and verified
