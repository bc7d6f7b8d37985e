"""Stages of a pipeline together: decoding, the user's functions, packed rows, and the copy to a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.support import decoded
from tests.support.fake_device import FakeDevice, install

import tiercache as tc

FAKE = "privateuseone"
SMALL = {"shuffle_window_bytes": "8KiB", "shuffle_group_bytes": "32KiB", "shuffle_streams": 1, "seed": 5}


@pytest.fixture
def eager(monkeypatch) -> list[FakeDevice]:
    """Fake devices that do everything at once."""
    return install(monkeypatch, is_eager=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Any:
    columns = decoded.make_columns(decoded.N)
    labels = {"label": np.arange(decoded.N) % 10}
    return decoded.write(
        tmp_path_factory.mktemp("stages") / "data", {**columns, **labels}, {**decoded.SCHEMA, "label": "int64"}
    )


def with_noise(record: dict[str, Any]) -> dict[str, Any]:
    image = torch.as_tensor(record["image"]).float()
    noise = torch.rand(image.shape, generator=tc.rng().torch)
    return {"image": image + noise, "id": record["id"], "draw": tc.rng().numpy.random()}


def loader_of(path, decode=decoded.RANDOM, *, transform=None, batch_size=8, workers=0, **options) -> tc.DataLoader[Any]:
    given: dict[str, Any] = {"num_workers": workers, "multiprocessing_context": "fork"} if workers else {}
    dataset = tc.Dataset(path, columns=["image", "id", "label"], decode={"image": decode}, transform=transform)
    return tc.DataLoader(dataset, batch_size, shuffle=True, options=tc.LoaderOptions(**{**SMALL, **options}), **given)


def assert_equal(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for batch, other in zip(found, expected, strict=True):
        assert batch.keys() == other.keys()
        for name, value in batch.items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("workers", [0, 2])
def test_transformed_pictures_on_a_device_are_those_of_the_cpu(pictures, eager, workers):
    plain = list(loader_of(pictures, transform=with_noise))
    loader = loader_of(pictures, transform=with_noise, workers=workers, device=FAKE)
    found = list(loader)
    assert_equal(found, plain)
    assert eager[0].n_copies == len(plain)
    stats = loader.stats()
    assert stats["unpinned"] == len(plain)  # what a transform makes is copied into pinned memory first
    assert stats["stages"]["transform_s"] > 0
    assert stats["stages"]["decode_s"] > 0


@pytest.mark.parametrize("dtype", ["uint8", "bfloat16"])
def test_channels_last_pictures_are_decoded_into_pinned_memory(pictures, eager, dtype):
    mean_std = {} if dtype == "uint8" else {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.3)}
    decode = tc.DecodeImage(
        16, crop="random", flip=True, brightness=0.4, dtype=dtype, layout="channels_last", **mean_std
    )
    plain = list(loader_of(pictures, decode))
    found = list(loader_of(pictures, decode, device=FAKE))
    assert_equal(found, plain)
    assert found[0]["image"].is_contiguous(memory_format=torch.channels_last)
    assert eager[0].n_copies == len(plain)


def test_packed_rows_on_a_device_and_after_a_batch_transform_are_those_of_the_cpu(tmp_path, eager):
    random = np.random.default_rng(0)
    documents = [random.integers(0, 1000, n, np.uint16) for n in random.integers(1, 90, 600)]
    with tc.Writer(tmp_path / "documents", schema={"tokens": tc.Ragged("uint16", (None,))}) as writer:
        writer.write_batch({"tokens": documents})
    rows = tc.pack_sequences(tc.Dataset(tmp_path / "documents"), "tokens", length=64)

    def batches(**options):
        return list(tc.DataLoader(rows, 4, shuffle=True, options=tc.LoaderOptions(seed=1, **options)))

    plain = batches()
    names = [name for name, value in plain[0].items() if isinstance(value, torch.Tensor)]
    assert "cu_seqlens" in names
    assert "labels" in names
    for found in (batches(device=FAKE), batches(batch_transform=dict), batches(batch_transform=dict, device=FAKE)):
        for batch, other in zip(found, plain, strict=True):
            assert all(torch.equal(batch[name], other[name]) for name in names)
            assert batch["max_seqlen"] == other["max_seqlen"]
