"""A data set of small pictures, and loaders that decode it."""

from __future__ import annotations

import numpy as np
from tests.support.pictures import encode, picture

import tiercache as tc

N = 70
RANDOM = tc.DecodeImage(16, crop="random", flip=True)
SCHEMA = {"image": tc.Image("jpeg"), "id": "int64", "name": "str"}


def make_columns(n: int) -> dict[str, object]:
    images = [encode(picture(20 + i % 7, 30 - i % 5, seed=i)) for i in range(n)]
    return {"image": images, "id": np.arange(n), "name": [f"picture {i}" for i in range(n)]}


def write(path, columns, schema=SCHEMA, **options):
    with tc.Writer(path, schema=schema, **{"shard_size": "16KiB", "block_size": "4KiB", **options}) as writer:
        writer.write_batch(columns)
    return path


def loader_of(path, decode=RANDOM, *, batch_size=8, shuffle=True, seed=5, drop_last=False, **options):
    dataset = tc.Dataset(path, decode={"image": decode})
    asked = tc.LoaderOptions(seed=seed, **options)
    return tc.DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, options=asked)
