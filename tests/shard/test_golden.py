"""Shards that were written once, and must be read for as long as their version is."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from tiercache.model import ShardInfo
from tiercache.shard.reader import ShardReader
from tiercache.shard.values import as_records
from tiercache.shard.verify import verify_shard
from tiercache.store.memory import MemoryStore


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_golden", Path(__file__).parent / "make_golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


golden = load_script()


def equal(got: object, written: object) -> bool:
    if isinstance(got, torch.Tensor):
        return got.dtype == torch.bfloat16 and got.float().item() == written
    if isinstance(written, np.ndarray):
        return isinstance(got, np.ndarray) and got.dtype == written.dtype and np.array_equal(got, written)
    return bool(got == written)


@pytest.fixture
def stored(request: pytest.FixtureRequest) -> tuple[MemoryStore, ShardInfo]:
    info = ShardInfo(**json.loads((golden.FOLDER / "infos.json").read_text())[request.param])
    store = MemoryStore(f"read-golden-{request.param}")
    store.put(info.name, (golden.FOLDER / f"{request.param}.tcs").read_bytes())
    return store, info


every_shard = pytest.mark.parametrize("stored", golden.COMPRESSIONS, indirect=True)


@every_shard
def test_a_golden_shard_gives_the_records_that_were_written(stored):
    store, info = stored
    reader = ShardReader(store, info.name, info=info)
    assert reader.schema == golden.SCHEMA
    assert reader.footer.metadata == {"made by": "make_golden.py"}
    records = as_records(reader.take(range(reader.n_records), range(len(reader.schema))))
    assert len(records) == len(golden.RECORDS)
    for got, written in zip(records, golden.RECORDS, strict=True):
        assert [name for name in written if not equal(got[name], written[name])] == []


@every_shard
def test_a_golden_shard_passes_verification(stored):
    store, info = stored
    assert list(verify_shard(store, info.name, info, info.identity("any"))) == []


def test_what_is_written_today_differs_from_the_golden_shards_only_where_it_may():
    """Ids are random and zstd may improve, so raw chunks and the tables that describe them are what must not change."""
    info, data = golden.write("none")
    old = ShardInfo(**json.loads((golden.FOLDER / "infos.json").read_text())["none"])
    kept = (golden.FOLDER / "none.tcs").read_bytes()
    assert info["footer_offset"] == old.footer_offset
    assert data[64 : old.footer_offset] == kept[64 : old.footer_offset]
