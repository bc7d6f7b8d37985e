"""The inventory works in parts to limit its memory, with the same results as all at once."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.scripted_tiers import NOW_S, OLD_S, ScriptedCatalog, scripted

from tiercache.tier import checkpoint_names, inventory, listing, text_columns
from tiercache.tier.checkpoint_names import KeyGroups, group_keys
from tiercache.tier.journal import CatalogEntry, TierCatalog

WORDS = r"""
a 0 10 20 step-1 step-2 checkpoint-10 checkpoint-10.pt step-1.pt step-2.pt é iter_0000100 global_step3 *[x]?
epoch=1-step=2-val_loss=0.3.ckpt epoch=2-step=4-val_loss=0.5.ckpt model.pt .metadata __0_0.distcp .metadata.tmp
trainer_state.json training_args.bin metadata.json x.tmp .. optimizer.pt caf\xe9 model-00001-of-00002.bin
model-00002-of-00002.bin
"""
PART = (*WORDS.split(), "x\ny")
keys = st.lists(st.sampled_from(PART), min_size=1, max_size=4).map("/".join)
marked = st.tuples(keys, st.sampled_from(["", "", "", "/"])).map("".join)
key_lists = st.lists(marked, max_size=20, unique=True)


def equal(one, other):
    return (
        one.equals(other) if isinstance(one, pa.Array) else np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    )


@pytest.mark.parametrize("n_rows", [1, 3])
def test_keys_are_grouped_in_parts_as_all_at_once(monkeypatch, n_rows):
    @given(key_lists)
    def check(some):
        texts = pa.array(some, pa.large_string())
        whole = group_keys(texts)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_names, "ROWS_AT_A_TIME", n_rows)
            patch.setattr(text_columns, "ROWS_AT_A_TIME", n_rows)
            parts = group_keys(texts)
        for name in KeyGroups.__slots__:
            assert equal(getattr(whole, name), getattr(parts, name)), name

    check()


@given(key_lists)
def test_an_object_is_on_top_if_it_lies_directly_in_the_folder_of_its_group(some):
    found = group_keys(pa.array(some, pa.large_string()))
    paths = found.paths.to_pylist()
    for key, group, on_top in zip(some, found.group.tolist(), found.on_top.tolist(), strict=True):
        assert on_top == (group >= 0 and key.rpartition("/")[0] == paths[group] and "/" in key)


# -- the books -------------------------------------------------------------------------------------------------------

known = st.tuples(
    st.integers(0, 2),
    st.none() | st.sampled_from(["x", '"y"']),
    st.none() | st.integers(0, 2),
    st.booleans(),
    st.none() | st.sampled_from([OLD_S, NOW_S]),
)


def test_the_catalog_reads_its_entries_in_parts_by_key(tmp_path, monkeypatch):
    monkeypatch.setattr("tiercache.tier.journal._ROWS_AT_A_TIME", 2)
    with TierCatalog(tmp_path / "tiers.sqlite") as catalog:
        catalog.record(("memory://x", key, CatalogEntry(1, "e", 7)) for key in ("é", "b", "a\n", "Z", "a"))
        assert catalog.checksums("memory://x")["key"].to_pylist() == ["Z", "a", "a\n", "b", "é"]


@pytest.mark.parametrize("n_rows", [1, 3])
def test_checksums_are_looked_up_in_parts_as_all_at_once(tmp_path, monkeypatch, n_rows):
    tiers = scripted(tmp_path, f"parts-{n_rows}")

    @settings(max_examples=40)
    @given(st.dictionaries(st.sampled_from("abcdefghé"), known, max_size=8), st.data())
    def check(catalog, data):
        tiers.clear()
        listed = data.draw(st.lists(st.sampled_from("abcdefghé"), unique=True))
        for key in listed:
            tiers.hot.add(key, data.draw(st.integers(0, 2)), etag=data.draw(st.none() | st.sampled_from(["x", '"y"'])))
        tiers.catalog = ScriptedCatalog({("hot", key): one for key, one in catalog.items()})
        with monkeypatch.context() as patch:
            patch.setattr(listing, "ROWS_AT_A_TIME", n_rows)
            by_name = tiers.take()
        for path in by_name.paths:
            (info,) = by_name.objects(path, "hot")
            same = path in catalog and catalog[path][:2] == (info.n_bytes, info.etag) and info.etag is not None
            assert by_name.has(path, "hot", "verified") == (same and catalog[path][3])
            assert info.crc32c == (catalog[path][2] if same else None)

    check()
    tiers.clear()


def test_the_objects_of_many_copies_are_those_of_each_copy(tmp_path):
    tiers = scripted(tmp_path, "pieces")
    for n in range(3):
        tiers.hot.add(f"step-{n}/a.pt", n)
        tiers.archive.add(f"step-{n}/a.pt", n)
        tiers.archive.add(f"step-{n}/b.pt", 7)
    tiers.standard.add("x", 5)
    by_name = tiers.take()
    n_groups = by_name.snapshot.n_groups
    groups, of_tiers = np.repeat(np.arange(n_groups), 3)[::-1], np.tile(np.arange(3), n_groups).astype(np.int8)
    pieces = by_name.inventory.objects_of(groups, of_tiers)
    for i in range(len(groups)):
        wanted = by_name.inventory.objects_of(groups[i : i + 1], of_tiers[i : i + 1])
        assert [*pieces.named(i, i + 1)] == [*wanted.named(0, 1)]
    tiers.clear()


@pytest.mark.parametrize("n_rows", [1, 1 << 16])
def test_metrics_in_names_are_found_in_parts_too(tmp_path, monkeypatch, n_rows):
    monkeypatch.setattr(inventory, "ROWS_AT_A_TIME", n_rows)
    tiers = scripted(tmp_path, f"metrics-{n_rows}")
    tiers.rules = '[[rules]]\nname = "r"\nmatch = "**"\nkeep_hot = { best = "loss:1" }\n'
    for n in range(12):
        tiers.hot.add(f"run/step-{n}-loss={n / 4}.ckpt", 1)
    by_name = tiers.take()
    assert [by_name.snapshot.metrics["loss"][by_name.group(f"run/step-{n}-loss={n / 4}.ckpt")] for n in range(12)] == [
        n / 4 for n in range(12)
    ]
    tiers.clear()
