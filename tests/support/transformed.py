"""Transforms that tell what they saw and drew, and loaders that apply them."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch

import tiercache as tc

SMALL = {"shuffle_window_bytes": "2KiB", "shuffle_group_bytes": "9KiB"}


def draw(record: dict[str, Any]) -> dict[str, Any]:
    """The record's id, and what each way to random numbers that is a function of the position gives."""
    own = tc.rng()
    return {
        "id": record["id"],
        "seed": np.int64(own.seed >> 1),
        "numpy": own.numpy.random(),
        "own": torch.rand((), generator=own.torch),
        "pid": os.getpid(),
    }


def draw_globals(record: dict[str, Any]) -> dict[str, Any]:
    """Also from the global generators of torch, NumPy and Python, as foreign augmentations do."""
    return {
        **draw(record),
        "torch": torch.rand(()),
        "dropped": torch.nn.functional.dropout(torch.ones(8), 0.5),
        "python": random.random(),
        "legacy": np.random.rand(),
    }


def together(records: list[dict[str, Any]]) -> dict[str, Any]:
    """A collate function that draws, too."""
    batch = {name: torch.stack([torch.as_tensor(record[name]) for record in records]) for name in records[0]}
    return {**batch, "batch": torch.full((len(records),), tc.rng().numpy.random())}


def fail_at_seven(record: dict[str, Any]) -> dict[str, Any]:
    if record["id"] == 7:
        raise ArithmeticError("no sevens")
    return {"id": record["id"]}


def options(rank: int = 0, world_size: int = 1, seed: int | None = 5, **more: Any) -> tc.LoaderOptions:
    """One stream, so that the order does not depend on the number of ranks at the start."""
    return tc.LoaderOptions(rank=rank, world_size=world_size, seed=seed, **{**SMALL, "shuffle_streams": 1, **more})


def loader_of(
    url: Any, transform: Any = draw, *, workers: int = 0, n: int | None = None, **more: Any
) -> tc.DataLoader[Any]:
    """A shuffled loader of the first n records; workers are forked, because the import of torch takes two seconds."""
    given: dict[str, Any] = {"batch_size": 8, "shuffle": True, "options": options()}
    if workers:
        given |= {"num_workers": workers, "multiprocessing_context": "fork"}
    dataset = tc.Dataset(url, transform=transform)
    return tc.DataLoader(dataset if n is None else dataset.take(n), **{**given, **more})


def rows_of(batches: Any) -> list[tuple[Any, ...]]:
    """Each record of the batches as plain values, without the process that made it."""
    rows = []
    for batch in batches:
        names = sorted(batch.keys() - {"pid"})
        rows += zip(*(batch[name].tolist() for name in names), strict=True)
    return [tuple(tuple(value) if isinstance(value, list) else value for value in row) for row in rows]
