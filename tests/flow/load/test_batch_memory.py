"""Memory of batches: whose it is, when it is used again, and what a consumer holds that keeps a column of them."""

from __future__ import annotations

import gc
import io
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import decoded
from tests.support.fake_device import install

import tiercache as tc
from tiercache._native.ring import held_bytes
from tiercache.load.batch import BatchMemory, lent_bytes
from tiercache.load.decode import _DecodeQueue, _Job

N, ROWS, WIDTH = 640, 64, 3000
FAKE = "privateuseone"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("kept") / "data"
    schema = {
        "image": tc.Tensor("uint8", (WIDTH,)),
        "label": "int64",
        "boxes": tc.Ragged("float32", (None, 4)),
        "mask": tc.Tensor("uint8", (WIDTH,)),
    }
    with tc.Writer(path, schema=schema, compression="none") as writer:
        for i in range(N):
            image = np.full(WIDTH, i % 251, np.uint8)
            writer.write({"image": image, "label": i, "boxes": np.full((i % 3, 4), i, np.float32), "mask": image ^ 255})
    return path


def as_is(batch: Any) -> Any:
    return batch


def loader_of(path: Path, *, workers: int = 0, sampler: Any = None, columns: Any = None, **options) -> tc.DataLoader:
    return tc.DataLoader(
        tc.Dataset(path, columns=columns),
        batch_size=ROWS,
        num_workers=workers,
        sampler=sampler,
        options=tc.LoaderOptions(threads=2, **options),
    )


def held() -> int:
    gc.collect()
    return held_bytes() + lent_bytes()


def kept_of(batches: Iterable[Any], name: str) -> list[Any]:
    return [batch[name] for batch in batches]


def saved_bytes(tensor: torch.Tensor) -> int:
    file = io.BytesIO()
    torch.save(tensor, file)
    return file.tell()


WAYS = {
    "native": {},
    "a transform in the training thread": {"batch_transform": as_is},
    "worker processes": {"batch_transform": as_is, "workers": 1},
}


@pytest.mark.parametrize("way", WAYS)
def test_kept_labels_hold_their_own_bytes(path, way):
    before = held()
    loader = loader_of(path, **WAYS[way])
    labels = kept_of(loader, "label")
    assert held() - before == 8 * N
    assert loader.stats()["held_bytes"] - before == 8 * N
    assert torch.cat(labels).tolist() == list(range(N))
    assert all(label.untyped_storage().nbytes() == 8 * ROWS for label in labels)
    assert all(label.data_ptr() % 64 == 0 for label in labels)
    assert saved_bytes(labels[0]) < 8 * ROWS + 3000
    del labels
    assert held() == before


@pytest.mark.parametrize(("layout", "library"), [("list", "torch"), ("buffer", "numpy"), ("padded", "torch")])
def test_kept_values_of_varying_length_hold_their_own_bytes(path, layout, library):
    before = held()
    dataset = tc.Dataset(path, layouts={"boxes": layout})
    batches = tc.DataLoader(dataset, ROWS) if library == "torch" else tc.NumpyLoader(dataset, ROWS)
    kept = [(batch["boxes"], batch.get("boxes.lengths")) for batch in batches]
    for number, (boxes, _lengths) in enumerate(kept):
        for row, value in enumerate(boxes):
            i = number * ROWS + row
            assert value[: i % 3].tolist() == [[i] * 4] * (i % 3)
    assert 0 < held() - before < 100 * N  # a record has 6 KB
    del kept, boxes, value, _lengths
    assert held() == before


def test_kept_labels_on_a_device_hold_their_own_bytes(path, monkeypatch):
    install(monkeypatch, is_eager=True)
    before = held()
    labels = kept_of(loader_of(path, device=FAKE, batch_transform=as_is), "label")
    assert torch.cat(labels).tolist() == list(range(N))
    assert held() - before == 8 * N
    assert labels[0].untyped_storage().nbytes() == 8 * ROWS
    assert saved_bytes(labels[0]) < 8 * ROWS + 3000
    del labels
    assert held() == before


def test_only_some_columns_take_copies_of_their_own_on_a_device(tmp_path, monkeypatch):
    made = install(monkeypatch, is_eager=True)
    schema = {f"c{i}": tc.Tensor("uint8", (64,)) for i in range(40)}
    with tc.Writer(tmp_path / "data", schema=schema) as writer:
        writer.write_batch({name: np.full((64, 64), i, np.uint8) for i, name in enumerate(schema)})
    [batch] = tc.DataLoader(tc.Dataset(tmp_path / "data"), 64, options=tc.LoaderOptions(device=FAKE))
    assert all(batch[name].tolist() == [[i] * 64] * 64 for i, name in enumerate(schema))
    assert made[0].n_copies <= 9


@pytest.mark.parametrize("collate", [None, tc.collate])
def test_kept_labels_of_torchs_path_hold_their_own_bytes(path, collate):
    if collate is None:
        loader = loader_of(path, sampler=torch.utils.data.WeightedRandomSampler(torch.ones(N), N))
    else:
        loader = torch.utils.data.DataLoader(tc.Dataset(path), ROWS, collate_fn=collate)
    before = held()
    labels = kept_of(loader, "label")
    assert held() - before <= 8 * N
    assert all(label.untyped_storage().nbytes() == 8 * ROWS for label in labels)


def test_a_large_column_that_is_kept_is_not_copied_and_is_counted(path):
    before = held()
    images = kept_of(loader_of(path), "image")
    assert held() - before >= 2 * N * WIDTH  # with the mask, which has the same size
    assert [image[0, 0] for image in images] == [ROWS * i % 251 for i in range(len(images))]
    del images
    assert held() == before


def test_a_column_of_a_loader_that_ended_keeps_all_slots_of_its_ring_and_they_are_counted(path):
    before = held()
    loader = loader_of(path)
    *_, last = kept_of(loader, "image")
    n_bytes = last.nbytes
    del _, loader
    assert held() - before > 3 * n_bytes
    del last
    assert held() == before


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return decoded.write(tmp_path_factory.mktemp("pictures") / "data", decoded.make_columns(decoded.N))


@pytest.fixture
def made(monkeypatch):
    """Size and address of all batch memory that was lent."""
    made, lend = set(), BatchMemory.lend

    def seen(self, n_bytes, size_bytes):
        lent = lend(self, n_bytes, size_bytes)
        made.add((size_bytes, lent.ctypes.data))
        return lent

    monkeypatch.setattr(BatchMemory, "lend", seen)
    return made


def test_an_epoch_reuses_the_memory_of_the_epoch_before(pictures, made):
    loader = decoded.loader_of(pictures)
    n_batches = len(list(loader))  # all are held at once
    assert len(made) == n_batches
    for _ in range(2):
        for _batch in loader:
            pass
    assert len(made) == n_batches
    iterator = iter(loader)
    kept = next(iterator)
    content = kept["image"].clone()
    del loader
    assert len(list(iterator)) == n_batches - 1
    assert torch.equal(kept["image"], content)


def test_no_batch_is_opened_after_a_corrupt_image():
    line, broken = _DecodeQueue(ahead=4), _Job({}, columns=(None,), n_rows=1)
    line.next_task()
    line.add(broken)
    assert line.next_task() == (broken, 0)
    assert line.next_task()[1] == -1  # another thread opens the next batch, while the picture turns out to be broken
    line.done(broken, 0, ValueError("broken"), 1)
    line.add(_Job({}, columns=(None,), n_rows=1))
    assert line.next_task()[1] == 0
    closing = threading.Timer(0.05, line.close)
    closing.start()
    assert line.next_task() is None
    closing.join()


def test_memory_beyond_the_batches_ahead_is_freed():
    owner = BatchMemory(keep=2)
    lent = [owner.lend(10, 16) for _ in range(5)]
    addresses = {array.ctypes.data for array in lent}
    assert len(addresses) == 5
    assert all(array.size == 10 for array in lent)
    other = owner.lend(24, 24)
    del lent
    again = [owner.lend(16, 16) for _ in range(2)]
    assert {array.ctypes.data for array in again} <= addresses
    assert other.ctypes.data not in addresses
    assert not owner._free[16]
    del again
    assert len(owner._free[16]) == 2


def test_a_batch_that_is_kept_keeps_no_encoded_pictures(pictures):
    before = held_bytes()
    kept = list(decoded.loader_of(pictures))
    assert held_bytes() - before == 8 * decoded.N  # the column `id`
    assert [i for b in kept for i in b["id"].tolist()] != list(range(decoded.N))


def test_memory_that_the_consumer_holds_of_decoded_batches_is_counted(pictures):
    loader = decoded.loader_of(pictures)
    iterator = iter(loader)
    before = loader.stats()["held_bytes"]
    batches = list(iterator)
    held = loader.stats()["held_bytes"] - before
    assert held >= sum(b["image"].nbytes for b in batches[6:])
    view = batches[0]["image"].numpy()[0]
    content = view.copy()
    del batches
    assert len(list(decoded.loader_of(pictures))) == 9
    assert np.array_equal(view, content)
