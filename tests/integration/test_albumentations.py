"""albumentations in a transform: the seed of each record decides its augmentation, in this process and in workers."""

import itertools
from typing import Any

import numpy as np
import pytest

import tiercache as tc

A = pytest.importorskip("albumentations")
pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

N = 60
PIPELINE = A.Compose(
    [A.RandomCrop(12, 12), A.HorizontalFlip(p=0.5), A.RandomBrightnessContrast(p=0.8), A.GaussNoise(p=0.5)]
)


def augment(record: dict[str, Any]) -> dict[str, Any]:
    PIPELINE.set_random_seed(tc.rng().seed % 2**32)
    return {"id": record["id"], "image": PIPELINE(image=record["image"])["image"]}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("albumentations") / "data"
    images = np.random.default_rng(0).integers(0, 256, (N, 16, 16, 3), np.uint8)
    with tc.Writer(path, schema={"id": "int64", "image": tc.Tensor("uint8", (16, 16, 3))}) as writer:
        writer.write_batch({"id": np.arange(N), "image": images})
    return path


def rows_of(batches):
    return {
        int(number): image.numpy().tobytes() for b in batches for number, image in zip(b["id"], b["image"], strict=True)
    }


def loader_of(path, rank=0, world_size=1, **more):
    options = tc.LoaderOptions(seed=3, rank=rank, world_size=world_size, shuffle_streams=1)
    return tc.DataLoader(tc.Dataset(path, transform=augment), 8, shuffle=True, options=options, **more)


def test_augmentations_follow_from_the_position(path):
    whole = rows_of(loader_of(path))
    assert len(whole) == len(set(whole.values())) == N
    workers = {"num_workers": 2, "multiprocessing_context": "fork"}
    assert rows_of(loader_of(path, **workers)) == whole
    halves = [rows_of(loader_of(path, rank, 2)) for rank in range(2)]
    assert halves[0] | halves[1] == whole
    loader = loader_of(path)
    begun = rows_of(itertools.islice(loader, 3))
    resumed = loader_of(path, **workers)
    resumed.load_state_dict(loader.state_dict())
    assert begun | rows_of(resumed) == whole
    second = loader_of(path)
    second.set_epoch(1)
    assert rows_of(second) != whole
