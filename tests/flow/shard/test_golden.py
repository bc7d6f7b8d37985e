"""Golden files of format version 1: they never change, and every release reads them."""

import hashlib
import json
import math
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from tests.support import golden_files as golden

import tiercache as tc
from tiercache.model import ShardInfo
from tiercache.shard.reader import ShardReader
from tiercache.shard.values import as_records
from tiercache.shard.verify import verify_dataset, verify_shard
from tiercache.shard.versions import latest, list_versions, read_shards, read_version
from tiercache.store.local import LocalFolder
from tiercache.store.memory import MemoryStore

FOLDER = golden.FOLDER
INFOS = {
    name: ShardInfo(**{field: value for field, value in row.items() if field != "stats_json"})
    for name, row in json.loads((FOLDER / "infos.json").read_text()).items()
}
# The first 128 bits of each file's SHA-256. Never change a line of this, and never take one out: these files must be
# readable for ever. Another format version gets a folder and a list of its own.
FROZEN = {
    "auto.arrow": "802282aebd9ca8f2d0a7eb0208935e27",
    "auto.tcs": "6e70576c896274acbcc04f471b4e10f8",
    "dataset/_tiercache/latest": "f0b5c2c2211c8d67ed15e75e656c7862",
    "dataset/_tiercache/segments/56442fe93bb65dad0e7b3bb3cc125478.arrow": "29eb6da056d3d4f47b0888c2cabea250",
    "dataset/_tiercache/segments/c4bc706337e687b9e97e83f21c89746e.arrow": "747fdab58fe855d7bb632ab8d3b0c497",
    "dataset/_tiercache/segments/ce71c0961e389c2c1504f3c835fa1084.arrow": "3a133aedff54abc03870a59d1d4ad77a",
    "dataset/_tiercache/segments/f209cd06474eafe7f5c064d00499453e.arrow": "2ccee3056ab16496c0d337966bed543e",
    "dataset/_tiercache/segments/f5f56c89fb985f28ecfee5151f010903.arrow": "6cdfc6c354c19400aabff5dfd224cc97",
    "dataset/_tiercache/versions/00000000000000000001.json": "9d1b66199f95a593f1db574939b028bf",
    "dataset/_tiercache/versions/00000000000000000002.json": "ee280311a512aa9b82589e428c2cbabc",
    "dataset/_tiercache/versions/00000000000000000003.json": "3625d207a179a66de7731f1ed5c3788f",
    "dataset/_tiercache/versions/00000000000000000004.json": "78405a53a857181c4e088f8c02fa5177",
    "dataset/_tiercache/versions/00000000000000000005.json": "a68045b02c8f856362694edfa6105a3e",
    "dataset/shards/71bd31c07de29d4d-000000.tcs": "e2a6ebb8b23c0e3b97ed13e0c3000b98",
    "dataset/shards/7b69cd0830257662-000000.tcs": "458532242f7f085ab2db66231d1540a7",
    "dataset/shards/7c7058441d2b9ae8-000000.tcs": "9a77d358678e75d6caf13e7292372514",
    "dataset/shards/7c7058441d2b9ae8-000001.tcs": "e9f9057ee8bda17deb5a4b5b5f1603b8",
    "dataset/shards/7c7058441d2b9ae8-000002.tcs": "1743d03b8a3a1f6548e93f9de7535238",
    "dataset/shards/dc7e1c481b74d7e7-000000.tcs": "9d55922350f74bcc66d0c3798974736b",
    "dataset/shards/f10a1fe48d48e8fc-000000.tcs": "ec7280f95d44371c984834f6a376c5b4",
    "dataset/shards/f10a1fe48d48e8fc-000001.tcs": "24afed6224b40c2c35048c7b72cab2c7",
    "empty.arrow": "477bd84b2fa0e97bc928c0bf8c8c6d7f",
    "empty.tcs": "0840947e58cb4fe19ecc5077eb40c294",
    "fingerprints.json": "ebc5033c32484281ef0328852d9afc52",
    "infos.json": "b45fe1d96280d3f1a05f84ae72dfcf6b",
    "later/_tiercache/latest": "f0b5c2c2211c8d67ed15e75e656c7862",
    "later/_tiercache/segments/04f2aed3e26491f16a78d4e5ee3be134.arrow": "04f2aed3e26491f16a78d4e5ee3be134",
    "later/_tiercache/segments/56442fe93bb65dad0e7b3bb3cc125478.arrow": "29eb6da056d3d4f47b0888c2cabea250",
    "later/_tiercache/segments/8fc6f38f3509dce1acff8c595fe7ed95.arrow": "8fc6f38f3509dce1acff8c595fe7ed95",
    "later/_tiercache/segments/c4bc706337e687b9e97e83f21c89746e.arrow": "747fdab58fe855d7bb632ab8d3b0c497",
    "later/_tiercache/segments/ce71c0961e389c2c1504f3c835fa1084.arrow": "3a133aedff54abc03870a59d1d4ad77a",
    "later/_tiercache/segments/f209cd06474eafe7f5c064d00499453e.arrow": "2ccee3056ab16496c0d337966bed543e",
    "later/_tiercache/segments/f5f56c89fb985f28ecfee5151f010903.arrow": "6cdfc6c354c19400aabff5dfd224cc97",
    "later/_tiercache/versions/00000000000000000001.json": "9d1b66199f95a593f1db574939b028bf",
    "later/_tiercache/versions/00000000000000000002.json": "ee280311a512aa9b82589e428c2cbabc",
    "later/_tiercache/versions/00000000000000000003.json": "3625d207a179a66de7731f1ed5c3788f",
    "later/_tiercache/versions/00000000000000000004.json": "78405a53a857181c4e088f8c02fa5177",
    "later/_tiercache/versions/00000000000000000005.json": "456234465b90b9df71caff5246be7185",
    "later/shards/71bd31c07de29d4d-000000.tcs": "e2a6ebb8b23c0e3b97ed13e0c3000b98",
    "later/shards/7b69cd0830257662-000000.tcs": "458532242f7f085ab2db66231d1540a7",
    "later/shards/7c7058441d2b9ae8-000000.tcs": "9a77d358678e75d6caf13e7292372514",
    "later/shards/7c7058441d2b9ae8-000001.tcs": "e9f9057ee8bda17deb5a4b5b5f1603b8",
    "later/shards/7c7058441d2b9ae8-000002.tcs": "1743d03b8a3a1f6548e93f9de7535238",
    "later/shards/dc7e1c481b74d7e7-000000.tcs": "9d55922350f74bcc66d0c3798974736b",
    "later/shards/f10a1fe48d48e8fc-000000.tcs": "ec7280f95d44371c984834f6a376c5b4",
    "later/shards/f10a1fe48d48e8fc-000001.tcs": "24afed6224b40c2c35048c7b72cab2c7",
    "later.arrow": "802282aebd9ca8f2d0a7eb0208935e27",
    "later.tcs": "bd975c4e9985a77523208c327ca18017",
    "none.arrow": "802282aebd9ca8f2d0a7eb0208935e27",
    "none.tcs": "d1d768f6910709cddffcb90a288c3aa3",
    "nothing/_tiercache/latest": "4355a46b19d348dc2f57c046f8ef63d4",
    "nothing/_tiercache/versions/00000000000000000001.json": "de798c26da6128752100e2392c6cd6b6",
    "wide-zstd.arrow": "b260379171eebd00e817f39235712740",
    "wide-zstd.tcs": "5a0e5ac07ab0a8976b6a992bc0fdb35b",
    "wide.arrow": "b260379171eebd00e817f39235712740",
    "wide.tcs": "a846295a98503c992fe92d29ecb54e75",
    "zstd.arrow": "802282aebd9ca8f2d0a7eb0208935e27",
    "zstd.tcs": "7999fc3fff36c82f1a3357e3cf86f189",
}


def frozen_name(path: Path) -> str:
    return path.relative_to(FOLDER).as_posix()


def equal(got: object, written: object) -> bool:
    """Whether a value that was read is the one that was written."""
    if isinstance(got, torch.Tensor):  # bfloat16
        got = got.float().numpy()
    if isinstance(written, np.ndarray) or isinstance(got, np.ndarray):
        got, written = np.asarray(got), np.asarray(written)
        kinds = got.dtype == written.dtype or got.dtype == np.float32  # bfloat16 is written from float32 or float
        return kinds and got.shape == written.shape and got.tobytes() == written.astype(got.dtype).tobytes()
    if isinstance(written, float) and math.isnan(written):
        return bool(np.isnan(got))
    return bool(got == written)


@pytest.fixture(params=sorted(INFOS))
def stored(request):
    """(name, store, row) of each golden shard."""
    store = MemoryStore(f"read-golden-{request.param}")
    info = INFOS[request.param]
    store.put(info.name, (FOLDER / f"{request.param}.tcs").read_bytes())
    return request.param, store, info


def written(name):
    """(schema, records) of a golden shard."""
    if name.startswith("wide"):
        return golden.WIDE, golden.WIDE_RECORDS
    return golden.SCHEMA, [] if name == "empty" else golden.RECORDS


def test_no_golden_file_has_changed_or_is_missing_and_none_was_added():
    found = {frozen_name(p): hashlib.sha256(p.read_bytes()).hexdigest()[:32] for p in FOLDER.rglob("*") if p.is_file()}
    assert found == FROZEN


def test_a_golden_shard_gives_the_records_that_were_written(stored):
    name, store, info = stored
    schema, expected = written(name)
    reader = ShardReader(store, info.name, info=info)
    assert reader.schema == schema
    assert reader.n_records == len(expected)
    records = as_records(reader.take(range(reader.n_records), range(len(schema)))) if expected else []
    for got, one in zip(records, expected, strict=True):
        assert [column for column in one if not equal(got[column], one[column])] == []


def test_a_golden_shard_gives_the_stored_arrow_arrays(stored):
    name, store, info = stored
    kept = pa.ipc.open_file(pa.OSFile(str(FOLDER / f"{name}.arrow"))).read_all()
    now = golden.tables(store.get(info.name))
    assert now.schema == kept.schema
    for column in now.column_names:  # as text, since a NaN is not equal to itself
        assert repr(now[column].to_pylist()) == repr(kept[column].to_pylist()), column


def test_a_golden_shard_passes_verification(stored):
    _, store, info = stored
    assert list(verify_shard(store, info.name, info, info.identity("any"))) == []


def test_the_golden_shards_cover_all_features_of_the_format(stored):
    """Else a reader could lose a part of it and nobody would see."""
    name, store, info = stored
    footer = ShardReader(store, info.name).footer
    codecs = set(footer.chunks["codec"].ravel().tolist())
    assert codecs == {"none": {0}, "zstd": {0, 1}, "wide": {0}, "wide-zstd": {0, 1}, "empty": set()}.get(name, codecs)
    assert footer.n_blocks > 1 or name == "empty"
    assert footer.n_later_sections == (3 if name == "later" else 0)
    if name == "wide":
        assert footer.chunks["raw"].max() > 65536


def test_a_shard_written_now_equals_the_golden_shard_except_for_random_fields():
    """Ids are random and zstd may improve, so raw chunks and the tables that describe them are what must not change."""
    for name, records in (("none", golden.RECORDS), ("wide", golden.WIDE_RECORDS)):
        info, data = golden.write("none", written(name)[0], records, 600 if name == "none" else 110_000)
        old, kept = INFOS[name], (FOLDER / f"{name}.tcs").read_bytes()
        assert info["footer_offset"] == old.footer_offset
        assert data[64 : old.footer_offset] == kept[64 : old.footer_offset]


@pytest.mark.parametrize("folder", ["dataset", "later"])
@pytest.mark.parametrize("number", sorted(golden.VERSIONS))
def test_each_version_of_a_golden_data_set_gives_its_records(folder, number):
    with closing(tc.Dataset(str(FOLDER / folder), version=number)) as dataset:
        assert dataset.schema == golden.ROWS
        expected = [golden.row(i) for i in golden.VERSIONS[number]]
        assert len(dataset) == len(expected)
        for got, one in zip(dataset, expected, strict=True):
            assert [name for name in one if not equal(got[name], one[name])] == []
        if folder == "dataset":
            assert dataset.fingerprint == json.loads((FOLDER / "fingerprints.json").read_text())[str(number)]
    assert list(verify_dataset(LocalFolder(FOLDER / folder), number)) == []


def test_the_golden_data_set_was_created_appended_to_and_overwritten():
    store = LocalFolder(FOLDER / "dataset")
    versions = [read_version(store, number) for number in list_versions(store)]
    assert [version.kind for version in versions] == ["create", "append", "append", "overwrite", "append"]
    assert [version.parent for version in versions] == [None, 1, 2, 3, 4]
    assert [len(version.segments) for version in versions] == [1, 2, 3, 1, 2]
    assert [len(read_shards(store, version)) for version in versions] == [3, 4, 6, 1, 2]
    assert latest(store).number == 5


def test_the_golden_data_set_without_records_is_readable():
    with closing(tc.Dataset(str(FOLDER / "nothing"))) as dataset:
        assert (len(dataset), dataset.schema, list(dataset)) == (0, golden.ROWS, [])


def test_the_golden_data_set_of_a_later_release_has_unknown_additions():
    version = read_version(LocalFolder(FOLDER / "later"), 5)
    assert (version.kind, version.release, version.software) == ("drop-shards", "1.4", "tiercache 1.4.2")
    assert version.needs_to_write == ("row-ids",)
