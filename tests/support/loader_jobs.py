"""What the ranks of the tests' jobs do: a few lines of a user's script each, run by child.py."""

from __future__ import annotations

import json
import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import tiercache as tc
from tiercache.waiting import SYSTEM_CLOCK


def serve(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every case with the same process group; what each served this rank."""
    dist.init_process_group("gloo")
    found = [serve_case(**case) for case in cases]
    dist.destroy_process_group()
    return found


def serve_case(
    url: str,
    loader: dict[str, Any],
    options: dict[str, Any] | None = None,
    rank_options: list[dict[str, Any]] | None = None,
    rank_versions: list[int | None] | None = None,
    n_epochs: int = 1,
    resumed: dict[str, Any] | None = None,
    stop_after: int | None = None,
    by_numpy: bool = False,
) -> dict[str, Any]:
    """Batches of ids by epoch, and what the loader says; or the error. rank_options, rank_versions: by rank."""
    rank = dist.get_rank()
    torch.manual_seed(rank)  # each rank would draw a seed of its own
    np.random.seed(rank)
    mine = {**(options or {}), **(rank_options[rank] if rank_options else {})}
    own_loader = {"shuffle": True, **loader, **mine.pop("loader", {})}
    dataset = tc.Dataset(url, version=rank_versions[rank] if rank_versions else None)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            make = partial(tc.NumpyLoader if by_numpy else tc.DataLoader, dataset)
            made = make(options=tc.LoaderOptions(**mine), **own_loader)
            if resumed is not None:
                made.load_state_dict(resumed)
            epochs = [take(made, stop_after) for _ in range(n_epochs)]
        except ValueError as error:
            return {"error": str(error)}
    found = {"epochs": epochs, "length": len(made), "state": made.state_dict(), "padded": made.stats()["padded"]}
    found["exposed"] = made.stats(across_ranks=True)["exposed_wait_s"]
    return found | {"warned": [str(w.message) for w in warned], "repr": repr(made)}


class OwnRecords(tc.Dataset):
    """A data set that says itself what a record is."""

    def __getitem__(self, index: Any) -> Any:
        return {"id": super().__getitem__(index)["id"]}


def only_ids(record: dict[str, Any]) -> dict[str, Any]:
    return {"id": record["id"]}


def ids_together(records: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": torch.tensor([int(record["id"]) for record in records])}


def serve_ways(url: str, batch_size: int) -> dict[str, dict[str, Any]]:
    """Two epochs with functions of the user, with workers and without, and without any; no seed is given."""
    dist.init_process_group("gloo")
    whole = tc.Dataset(url)
    ways: dict[str, tuple[Any, dict[str, Any]]] = {
        "native": (whole, {}),
        "collate_fn": (whole, {"collate_fn": ids_together}),
        "transform": (tc.Dataset(url, transform=only_ids), {}),
        "subclass": (OwnRecords(url), {}),
        "batch_size=None": (whole, {"batch_size": None}),
    }
    found = {}
    for name, (dataset, more) in ways.items():
        workers = 2 if name in ("transform", "subclass") else 0
        torch.manual_seed(dist.get_rank())  # each rank would draw a seed of its own
        arguments = {"batch_size": batch_size, "shuffle": True, "num_workers": workers, **more}
        loader = tc.DataLoader(dataset, **arguments)
        epochs = [[torch.as_tensor(b["id"]).reshape(-1).tolist() for b in loader] for _ in range(2)]
        found[name] = {"epochs": epochs, "length": len(loader), "state": loader.state_dict(), "repr": repr(loader)}
    dist.destroy_process_group()
    return found


def take(loader: tc.DataLoader, stop_after: int | None) -> list[list[int]]:
    iterator = iter(loader)
    n_batches = stop_after if stop_after is not None else len(iterator)
    batches = [next(iterator)["id"].tolist() for _ in range(n_batches)]
    if stop_after is None:
        assert next(iterator, None) is None
    iterator.close()
    return batches


def train(
    url: str, folder: str, batch_size: int, save_every: int, resume: bool, workers: int | None = None
) -> list[list[Any]]:
    """One epoch in lockstep, as DDP's collectives force it; rank 0 saves the loader's state every few steps.

    What is served are ids, or, if a number of workers is given, rows of augmented pictures.
    """
    dist.init_process_group("gloo")
    rank, state_path, seed = dist.get_rank(), Path(folder) / "state.json", None if resume else 11
    if workers is not None:
        loader = augmented_loader(url, batch_size, workers, seed)
    else:
        options = tc.LoaderOptions(seed=seed, shuffle_window_bytes="4KiB", shuffle_group_bytes="16KiB")
        loader = tc.DataLoader(tc.Dataset(url), batch_size=batch_size, shuffle=True, options=options)
    if resume:
        loader.load_state_dict(json.loads(state_path.read_text()))
    served = []
    with (Path(folder) / f"served-{rank}.jsonl").open("a") as log:
        for step, batch in enumerate(loader, start=1):
            served.append(batch if workers is not None else batch["id"].tolist())
            print(json.dumps(served[-1]), file=log, flush=True)
            SYSTEM_CLOCK.sleep(0.004)  # a step takes its time: whoever kills in mid-epoch must come before its end
            dist.all_reduce(torch.ones(1))
            if step % save_every == 0:
                save(state_path, {**loader.state_dict()})
    dist.destroy_process_group()
    return served


def augment_record(record: dict[str, Any]) -> dict[str, Any]:
    """A decoded picture with noise of every origin that is a function of the position."""
    noise = torch.rand((), generator=tc.rng().torch) + tc.rng().numpy.random()
    return {"id": int(record["id"]), "sum": float(record["image"].sum()), "noise": float(noise)}


def collate_rows(records: list[dict[str, Any]]) -> list[list[Any]]:
    return [[record["id"], record["sum"], record["noise"]] for record in records]


def augmented_loader(url: str, batch_size: int, workers: int, seed: int | None) -> tc.DataLoader[Any]:
    """Decode with random crops, a transform and a collate function."""
    decode = {"image": tc.DecodeImage(8, crop="random", flip=True)}
    order = {"shuffle_streams": 2, "shuffle_window_bytes": "4KiB", "shuffle_group_bytes": "32KiB"}
    options = tc.LoaderOptions(seed=seed, threads=1, **order)
    more = {"num_workers": workers, "multiprocessing_context": "fork"} if workers else {}
    dataset = tc.Dataset(url, transform=augment_record, decode=decode)
    return tc.DataLoader(dataset, batch_size, shuffle=True, collate_fn=collate_rows, options=options, **more)


def save(path: Path, state: dict[str, Any]) -> None:
    """By rank 0, whole or not at all; it is the same on every rank."""
    if dist.get_rank() == 0:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(state))
        os.replace(temporary, path)  # noqa: PTH105 -- the same, and named as what it is: atomic
