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
from tiercache.shard.versions import read_version
from tiercache.store.local import LocalFolder
from tiercache.store.memory import MemoryStore

FOLDER = golden.FOLDER
INFOS = {
    name: ShardInfo(**{field: value for field, value in row.items() if field != "stats_json"})
    for name, row in json.loads((FOLDER / "infos.json").read_text()).items()
}
# The first 128 bits of each file's SHA-256. Never change a line of that list, and never take one out: these files must
# be readable for ever. Another format version gets a folder and a list of its own.
FROZEN = dict(line.split("  ")[::-1] for line in FOLDER.with_name("v1.sums").read_text().splitlines())


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


def test_the_golden_data_set_without_records_is_readable():
    with closing(tc.Dataset(str(FOLDER / "nothing"))) as dataset:
        assert (len(dataset), dataset.schema, list(dataset)) == (0, golden.ROWS, [])


def test_the_golden_data_set_of_a_later_release_has_unknown_additions():
    version = read_version(LocalFolder(FOLDER / "later"), 5)
    assert (version.kind, version.release, version.software) == ("drop-shards", "1.4", "tiercache 1.4.2")
    assert version.needs_to_write == ("row-ids",)
