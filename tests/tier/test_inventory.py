"""The inventory of several tiers: groups and their copies, and whether these are whole, verified and complete."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tier.scripted_tiers import NOW_S, OLD_S, SETTLE_S, ListedStore, ScriptedCatalog, Tiers, scripted

from tiercache.tier.model import ARCHIVED, FILE, NO_RUN, NO_STEP, READABLE, RESTORED, RESTORING


@pytest.fixture
def tiers(tmp_path, request):
    found = scripted(tmp_path, request.node.name)
    yield found
    found.clear()


# -- groups and copies ------------------------------------------------------------------------------------------------


def test_an_object_of_two_tiers_is_one_group_with_two_copies(tiers):
    tiers.hot.add("a/x.bin", 10)
    tiers.archive.add("a/x.bin", 10)
    by_name = tiers.take()
    assert (by_name.paths, by_name.snapshot.group.tolist(), by_name.snapshot.tier.tolist()) == (
        ["a/x.bin"],
        [0, 0],
        [0, 2],
    )


def test_groups_are_sorted_by_path(tiers):
    for key in ("b", "step-10.pt", "a/x", "step-9.pt"):
        tiers.hot.add(key)
    assert tiers.take().paths == ["a/x", "b", "step-10.pt", "step-9.pt"]


def test_a_file_has_neither_step_nor_series_and_is_complete(tiers):
    tiers.hot.add("a/x", modified_s=NOW_S)
    by_name = tiers.take()
    assert [by_name.of("a/x", name) for name in ("kind", "step", "run", "complete")] == [
        FILE,
        NO_STEP,
        NO_RUN,
        True,
    ]


def test_a_copy_of_a_checkpoint_has_the_totals_of_its_objects(tiers):
    tiers.hot.add("step-1/a.pt", 10, modified_s=OLD_S)
    tiers.hot.add("step-1/b.pt", 30, modified_s=OLD_S + 5)
    by_name = tiers.take()
    facts = [by_name.has("step-1", "hot", name) for name in ("n_objects", "n_bytes", "smallest_bytes", "modified_s")]
    assert facts == [2, 40, 10, OLD_S + 5]


def test_a_group_was_created_when_its_oldest_copy_was_written(tiers):
    tiers.hot.add("x", modified_s=OLD_S)
    tiers.standard.add("x", modified_s=OLD_S + 50)
    assert tiers.take().of("x", "created_s") == OLD_S


def test_a_copy_has_the_first_write_time_of_the_catalog(tiers):
    tiers.archive.add("x", modified_s=NOW_S)
    tiers.catalog.verify(tiers.archive, "x", written_s=OLD_S)
    by_name = tiers.take()
    assert (by_name.of("x", "created_s"), by_name.has("x", "archive", "modified_s")) == (OLD_S, NOW_S)


@pytest.mark.parametrize("written", [{"etag": '"another"'}, {"n_bytes": 101}, {"etag": None}])
def test_a_rewritten_object_has_its_own_date(tiers, written):
    tiers.archive.add("x", modified_s=NOW_S - 60)
    tiers.catalog.verify(tiers.archive, "x", written_s=OLD_S)
    tiers.archive.add("x", **{"n_bytes": 100, "modified_s": NOW_S, **written})
    assert tiers.take().of("x", "created_s") == NOW_S


def test_a_checkpoint_has_the_date_of_its_newest_object(tiers):
    for key, written_s in (("step-1/a.pt", OLD_S), ("step-1/b.pt", OLD_S + 5)):
        tiers.archive.add(key, modified_s=NOW_S)
        tiers.catalog.verify(tiers.archive, key, written_s=written_s)
    assert tiers.take().of("step-1", "created_s") == OLD_S + 5


def test_a_catalog_entry_with_only_a_date_does_not_verify_an_object(tiers):
    tiers.archive.add("x", modified_s=NOW_S)
    tiers.catalog.verify(tiers.archive, "x", None, verified=False, written_s=OLD_S)
    by_name = tiers.take()
    assert (by_name.of("x", "created_s"), by_name.has("x", "archive", "verified")) == (OLD_S, False)


def test_a_move_is_no_use(tiers):
    tiers.archive.add("x", modified_s=NOW_S)
    tiers.catalog.verify(tiers.archive, "x", written_s=OLD_S)
    assert tiers.take().of("x", "last_use_s") == OLD_S


def test_an_object_without_a_date_has_the_time_of_the_listing(tiers):
    tiers.hot.add("x", modified_s=None)
    assert tiers.take().of("x", "created_s") == NOW_S


def test_a_copy_that_lacks_an_object_is_not_whole(tiers):
    for key in ("step-1/a.pt", "step-1/b.pt"):
        tiers.hot.add(key)
    tiers.standard.add("step-1/a.pt")
    by_name = tiers.take()
    assert (by_name.has("step-1", "hot", "whole"), by_name.has("step-1", "standard", "whole")) == (True, False)


def test_two_copies_with_different_sizes_are_both_not_whole(tiers):
    tiers.hot.add("x", 10)
    tiers.standard.add("x", 11)
    by_name = tiers.take()
    assert (by_name.snapshot.whole.tolist(), by_name.facts["conflicts"]) == ([False, False], (1, ("x",)))


def test_two_copies_with_different_checksums_are_both_not_whole(tiers):
    tiers.hot.add("x", crc32c=1)
    tiers.standard.add("x", crc32c=2)
    assert tiers.take().snapshot.whole.tolist() == [False, False]


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


def test_a_tier_without_a_copy_has_no_objects(tiers):
    tiers.hot.add("x")
    assert tiers.take().objects("x", "archive") == ()


def test_empty_tiers_have_an_empty_inventory(tiers):
    by_name = tiers.take()
    assert (by_name.snapshot.n_groups, by_name.snapshot.n_copies, by_name.facts["n_objects"]) == (0, 0, 0)


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


def test_unfinished_objects_and_invalid_keys_are_left_out_and_reported(tiers):
    for key in ("x.tmp", "tmp-checkpoint-5/model.bin", "folder/"):
        tiers.hot.add(key)
    by_name = tiers.take()
    assert by_name.paths == []
    assert by_name.facts["unfinished"] == (2, ("tmp-checkpoint-5/model.bin", "x.tmp"))
    assert by_name.facts["no_keys"] == (1, ("folder/",))


def test_the_own_objects_of_tiercache_belong_to_no_group(tiers):
    tiers.standard.add("_tiercache/tier.lock")
    tiers.standard.add("set/_tiercache/usage/m.json")
    by_name = tiers.take()
    assert (by_name.paths, by_name.facts["n_own"]) == ([], 2)


def test_the_inventory_does_not_depend_on_the_order_of_listings(tiers):
    keys = [f"run/step-{n}/{name}" for n in (1, 10, 9) for name in (".metadata", "__0_0.distcp")] + ["a", "b/c"]
    for key in keys:
        tiers.hot.add(key)
    first = tiers.take()
    tiers.hot.infos = dict(reversed(tiers.hot.infos.items()))
    second = tiers.take()
    assert first.paths == second.paths
    for name in ("step", "run", "complete", "group", "n_bytes", "whole"):
        assert getattr(first.snapshot, name).tolist() == getattr(second.snapshot, name).tolist()


# -- verified ---------------------------------------------------------------------------------------------------------


def test_a_copy_is_verified_if_the_catalog_has_its_present_state(tiers):
    tiers.standard.add("x")
    tiers.catalog.verify(tiers.standard, "x")
    by_name = tiers.take()
    assert by_name.has("x", "standard", "verified")
    assert by_name.objects("x", "standard")[0].crc32c == 7


@pytest.mark.parametrize("change", [{"etag": '"new"'}, {"n_bytes": 99}, {"etag": None}])
def test_a_copy_that_has_changed_since_is_not_verified(tiers, change):
    tiers.standard.add("x")
    tiers.catalog.verify(tiers.standard, "x")
    tiers.standard.add("x", **change)
    by_name = tiers.take()
    assert not by_name.has("x", "standard", "verified")
    assert by_name.objects("x", "standard")[0].crc32c is None


def test_a_copy_with_one_unverified_object_is_not_verified(tiers):
    for key in ("step-1/a.pt", "step-1/b.pt"):
        tiers.hot.add(key)
    tiers.catalog.verify(tiers.hot, "step-1/a.pt")
    assert not tiers.take().has("step-1", "hot", "verified")


def test_a_copy_is_verified_beside_a_source_that_is_equal(tiers):
    tiers.hot.add("x")
    tiers.standard.add("x")
    tiers.catalog.verify(tiers.hot, "x")
    tiers.catalog.verify(tiers.standard, "x")
    assert tiers.take().has("x", "standard", "verified")


def test_a_copy_is_not_verified_beside_a_rewritten_source(tiers):
    tiers.hot.add("x")
    tiers.standard.add("x")
    tiers.catalog.verify(tiers.hot, "x")
    tiers.catalog.verify(tiers.standard, "x")
    tiers.hot.add("x", etag='"new, of the same size"')
    assert not tiers.take().has("x", "standard", "verified")


def test_two_copies_with_different_checksums_in_the_catalog_are_not_whole(tiers):
    tiers.hot.add("x")
    tiers.standard.add("x")
    tiers.catalog.verify(tiers.hot, "x", crc32c=1)
    tiers.catalog.verify(tiers.standard, "x", crc32c=2)
    by_name = tiers.take()
    assert (by_name.snapshot.whole.any(), by_name.snapshot.verified.any()) == (False, False)


# -- complete ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_without_a_final_object_is_complete_after_the_quiet_period(tiers):
    tiers.hot.add("step-1/a.pt", modified_s=OLD_S)
    tiers.hot.add("step-1/b.pt", modified_s=NOW_S - SETTLE_S + 1)
    assert not tiers.take().of("step-1", "complete")
    assert tiers.take(now_s=NOW_S + 1).of("step-1", "complete")


def test_a_checkpoint_whose_final_object_is_the_newest_is_complete_at_once(tiers):
    tiers.hot.add("step-1/__0_0.distcp", modified_s=NOW_S)
    tiers.hot.add("step-1/.metadata", modified_s=NOW_S)
    assert tiers.take().of("step-1", "complete")


def test_a_checkpoint_that_is_being_overwritten_is_not_complete(tiers):
    tiers.hot.add("step-1/.metadata", modified_s=OLD_S)
    tiers.hot.add("step-1/__0_0.distcp", modified_s=NOW_S)
    assert not tiers.take().of("step-1", "complete")


def test_a_final_object_in_a_subfolder_does_not_complete_a_checkpoint(tiers):
    tiers.hot.add("step-1/model/__0_0.distcp", modified_s=NOW_S)
    tiers.hot.add("step-1/model/.metadata", modified_s=NOW_S)
    assert not tiers.take().of("step-1", "complete")
    assert tiers.take(now_s=NOW_S + SETTLE_S).of("step-1", "complete")


def test_a_checkpoint_without_its_required_final_object_is_never_complete(tiers):
    tiers.hot.add("step-1/__0_0.distcp")
    by_name = tiers.take()
    assert not by_name.of("step-1", "complete")
    assert by_name.facts["incomplete"] == {"a .metadata beside each .distcp": 1}


def test_a_checkpoint_with_an_unfinished_object_is_not_complete_at_once(tiers):
    tiers.hot.add("step-1/__0_0.distcp", modified_s=NOW_S)
    tiers.hot.add("step-1/.metadata", modified_s=NOW_S)
    tiers.hot.add("step-1/loader.json.tmp", modified_s=NOW_S)
    assert not tiers.take().of("step-1", "complete")


def test_a_checkpoint_without_a_whole_copy_is_not_complete(tiers):
    tiers.hot.add("step-1/a.pt")
    tiers.standard.add("step-1/b.pt")
    assert not tiers.take().of("step-1", "complete")


def test_a_verified_new_copy_is_a_complete_checkpoint(tiers):
    tiers.archive.add("step-1.pt", modified_s=NOW_S)
    tiers.catalog.verify(tiers.archive, "step-1.pt")
    assert tiers.take().of("step-1.pt", "complete")


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
