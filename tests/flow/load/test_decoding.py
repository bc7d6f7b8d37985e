"""Pictures decoded on the way: content, order, resume, ranks, errors, closing, forks, memory."""

from __future__ import annotations

import pickle
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tests.support.decoded import RANDOM, N, loader_of, make_columns, write
from tests.support.pictures import encode

import tiercache as tc
from tiercache.images.decoder import Decoder

AUGMENTED = replace(
    RANDOM,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    layout="channels_last",
    dtype="float16",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("pictures") / "data", make_columns(N))


def equal(one, two) -> bool:
    return [b["id"].tolist() for b in one] == [b["id"].tolist() for b in two] and all(
        torch.equal(a["image"], b["image"]) for a, b in zip(one, two, strict=True)
    )


@pytest.mark.parametrize(
    ("dtype", "layout"), [("uint8", "HWC"), ("float32", "CHW"), ("float16", "channels_last"), ("bfloat16", "HWC")]
)
def test_a_batch_is_one_tensor_of_the_pictures_of_its_records(path, dtype, layout):
    options = tc.DecodeImage((12, 16), dtype=dtype, layout=layout)
    dataset = tc.Dataset(path, decode={"image": options})
    served = 0
    for batch in loader_of(path, options):
        n = len(batch["id"])
        assert list(batch) == ["image", "id", "name"]
        assert batch["image"].shape == (n, *options.batch_shape)
        assert batch["image"].dtype == getattr(torch, dtype)
        assert batch["name"] == [f"picture {i}" for i in batch["id"].tolist()]
        expected = dataset[batch["id"].tolist()]["image"]
        assert torch.equal(batch["image"], torch.as_tensor(expected))
        assert batch["image"].stride() == torch.as_tensor(expected).stride()
        in_order = {"memory_format": torch.channels_last} if layout == "channels_last" else {}
        assert batch["image"].is_contiguous(**in_order)
        served += n
    assert served == N


@pytest.mark.parametrize(("size", "dtype", "layout"), [(16, "uint8", "channels_last"), (None, "bfloat16", "CHW")])
def test_torchs_own_loader_serves_the_same(path, size, dtype, layout):
    options = tc.DecodeImage(size, dtype=dtype, layout=layout)
    dataset = tc.Dataset(path, decode={"image": options})
    ours = tc.DataLoader(dataset, batch_size=32)
    theirs = torch.utils.data.DataLoader(dataset, batch_size=32, collate_fn=tc.collate)
    for a, b in zip(ours, theirs, strict=True):
        assert type(a["image"]) is type(b["image"])
        assert all(torch.equal(x, y) for x, y in zip(a["image"], b["image"], strict=True))


def test_whole_pictures_are_a_list_of_tensors(path):
    batch = next(iter(loader_of(path, tc.DecodeImage(None, dtype="float32"), shuffle=False)))
    assert [tuple(p.shape) for p in batch["image"]] == [(3, 20 + i % 7, 30 - i % 5) for i in range(8)]
    assert all(p.dtype == torch.float32 and p.max() <= 1 for p in batch["image"])


def test_random_crops_are_the_same_for_any_number_of_threads_and_differ_by_epoch_and_seed(path):
    loader = loader_of(path, threads=1)
    first, second = list(loader), list(loader)
    assert equal(first, list(loader_of(path, threads=5)))
    loader = loader_of(path, threads=2)
    loader.set_epoch(1)
    assert equal(second, list(loader))
    one = {i: p for b in first for i, p in zip(b["id"].tolist(), b["image"], strict=True)}
    for others in (second, list(loader_of(path, seed=6))):
        two = {i: p for b in others for i, p in zip(b["id"].tolist(), b["image"], strict=True)}
        assert sum(torch.equal(one[i], two[i]) for i in range(N)) < N // 4


@pytest.mark.parametrize("options", [RANDOM, AUGMENTED])
def test_a_run_resumes_bit_for_bit_at_every_batch(path, options):
    loader = loader_of(path, options)
    iterator = iter(loader)
    states, batches = [loader.state_dict()], []
    for batch in iterator:
        batches.append(batch)
        states.append(loader.state_dict())
    for number, state in enumerate(states[:-1]):
        again = loader_of(path, options, batch_size=8, threads=1 + number % 3)
        again.load_state_dict(state)
        assert equal(list(again), batches[number:])


def test_columns_of_one_record_are_cut_alike(tmp_path):
    images = make_columns(20)["image"]
    path = write(tmp_path / "two", {"a": images, "b": images}, {"a": tc.Image("jpeg"), "b": "bytes"})
    dataset = tc.Dataset(path, decode={"a": RANDOM, "b": RANDOM})
    for batch in tc.DataLoader(dataset, batch_size=6, shuffle=True):
        assert torch.equal(batch["a"], batch["b"])
    record = dataset[3]
    assert np.array_equal(record["a"], record["b"])


@pytest.fixture
def with_nulls(tmp_path):
    images = [None if i % 3 == 0 else image for i, image in enumerate(make_columns(24)["image"])]
    schema = {"image": tc.Image("jpeg", nullable=True), "id": "int64"}
    return write(tmp_path / "nulls", {"image": images, "id": np.arange(24)}, schema)


def test_a_null_is_zeros_and_not_valid(with_nulls):
    dataset = tc.Dataset(with_nulls, decode={"image": tc.DecodeImage(8)})
    for _ in range(3):  # memory is used again
        for batch in tc.DataLoader(dataset, batch_size=4, shuffle=True):
            valid = [i % 3 != 0 for i in batch["id"].tolist()]
            assert batch["image.valid"].tolist() == valid
            assert batch["image"].flatten(1).any(1).tolist() == valid
    assert dataset[0]["image"] is None
    assert dataset[1]["image"].any()
    assert dataset[[0, 1]]["image.valid"].tolist() == [False, True]
    assert not dataset[[0, 1]]["image"][0].any()


def test_a_null_among_whole_pictures_is_none(with_nulls):
    dataset = tc.Dataset(with_nulls, decode={"image": tc.DecodeImage(None)})
    ours = next(iter(tc.DataLoader(dataset, batch_size=4)))["image"]
    theirs = tc.collate(dataset.__getitems__(range(4)))["image"]
    for pictures in (ours, theirs):
        assert [p is None for p in pictures] == [True, False, False, True]
        assert isinstance(pictures[1], torch.Tensor)


def test_a_null_may_be_another_picture(with_nulls):
    grey = encode(Image.new("RGB", (9, 9), (128, 128, 128)), "png")
    dataset = tc.Dataset(with_nulls, decode={"image": tc.DecodeImage(8)}, fill_nulls={"image": grey})
    batch = next(iter(tc.DataLoader(dataset, batch_size=4)))
    assert "image.valid" not in batch
    assert (batch["image"][0] == 128).all()
    assert torch.equal(batch["image"], torch.from_numpy(dataset[:4]["image"]))


def broken_at(tmp_path, *numbers):
    columns = make_columns(N)
    for number in numbers:
        columns["image"][number] = columns["image"][number][:-200]
    return write(tmp_path / "broken", columns)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_corrupt_image_is_an_error_in_its_place_that_names_it(tmp_path, threads):
    path = broken_at(tmp_path, 43, 45, 46, 60)
    served = []
    loader = loader_of(path, tc.DecodeImage(8), shuffle=False, threads=threads)
    with pytest.raises(tc.CorruptShard) as caught:
        served.extend(batch["id"].tolist() for batch in loader)
    assert served == [list(range(start, start + 8)) for start in range(0, 40, 8)]
    error = caught.value
    assert (error.record, error.column) == (43, "image")
    assert "record 43" in str(error)
    assert "truncated" in str(error)
    assert error.url.endswith(".tcs") or "/shards/" in error.url
    assert isinstance(error.block, int)
    with pytest.raises(tc.CorruptShard, match="record 43") as by_index:
        tc.Dataset(path, decode={"image": tc.DecodeImage(8)})[43]
    assert (by_index.value.url, by_index.value.block) == (error.url, error.block)


def test_other_errors_of_a_decoder_reach_the_consumer_unchanged(path, monkeypatch):
    def refuse(self, data, draws, out):
        raise MemoryError("no room for a picture")

    monkeypatch.setattr(Decoder, "decode_into", refuse)
    with pytest.raises(MemoryError, match="no room for a picture"):
        next(iter(loader_of(path)))


def decoding_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("tiercache-decode")]


@pytest.fixture
def gate(monkeypatch):
    """Decoders stop at the gate until it is opened; gate.reached is set when the first one does."""
    gate, decode = threading.Event(), Decoder.decode_into
    gate.reached = threading.Event()

    def wait(self, data, draws, out):
        gate.reached.set()
        gate.wait(60)
        return decode(self, data, draws, out)

    monkeypatch.setattr(Decoder, "decode_into", wait)
    yield gate
    gate.set()


def test_closing_wakes_a_consumer_that_waits(path, gate):
    iterator, told = iter(loader_of(path)), []

    def consume():
        try:
            next(iterator)
        except RuntimeError as error:
            told.append(str(error))

    consumer = threading.Thread(target=consume)
    consumer.start()
    assert gate.reached.wait(30)
    start_s = time.monotonic()
    iterator.close()
    consumer.join(30)
    assert "closed" in told[0]
    assert time.monotonic() - start_s < 30


def test_decoders_survive_pickling_and_go_with_their_columns(path):
    dataset = pickle.loads(pickle.dumps(tc.Dataset(path, decode={"image": tc.DecodeImage(16)})))
    assert dataset[0]["image"].shape == (3, 16, 16)
    assert dataset.select_columns(["id"])[0] == {"id": 0}
    assert dataset.select_columns(["image"])[0]["image"].shape == (3, 16, 16)


def test_a_wrong_decode_argument_is_refused(path):
    for decode, error, message in (
        ({"id": RANDOM}, tc.SchemaError, "only images are decoded.*tiercache.Image or of bytes"),
        ({"picture": RANDOM}, tc.SchemaError, "no such column"),
        ({"image": (8, 8)}, TypeError, r"DecodeImage for column 'image', got \(8, 8\)"),
    ):
        with pytest.raises(error, match=message):
            tc.Dataset(path, decode=decode)


def test_a_missing_library_is_an_error_of_iter(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ModuleNotFoundError, match=r"opencv-python-headless.*tiercache-data\[images\]"):
        iter(loader_of(path))
    assert decoding_threads() == []
