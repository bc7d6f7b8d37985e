"""What the ranks of the tests' jobs do: a few lines of a user's script each, run by child.py."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

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
) -> dict[str, Any]:
    """Batches of ids by epoch, and what the loader says; or the error. rank_options, rank_versions: by rank."""
    rank = dist.get_rank()
    torch.manual_seed(rank)  # each rank would draw a seed of its own
    mine = {**(options or {}), **(rank_options[rank] if rank_options else {})}
    own_loader = {"shuffle": True, **loader, **mine.pop("loader", {})}
    dataset = tc.Dataset(url, version=rank_versions[rank] if rank_versions else None)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            made = tc.DataLoader(dataset, options=tc.LoaderOptions(**mine), **own_loader)
            if resumed is not None:
                made.load_state_dict(resumed)
            epochs = [take(made, stop_after) for _ in range(n_epochs)]
        except ValueError as error:
            return {"error": str(error)}
    found = {"epochs": epochs, "length": len(made), "state": made.state_dict(), "padded": made.stats()["padded"]}
    return found | {"warned": [str(w.message) for w in warned], "repr": repr(made)}


def take(loader: tc.DataLoader, stop_after: int | None) -> list[list[int]]:
    iterator = iter(loader)
    n_batches = stop_after if stop_after is not None else len(iterator)
    batches = [next(iterator)["id"].tolist() for _ in range(n_batches)]
    if stop_after is None:
        assert next(iterator, None) is None
    iterator.close()
    return batches


def train(url: str, folder: str, batch_size: int, save_every: int, resume: bool) -> list[list[int]]:
    """One epoch in lockstep, as DDP's collectives force it; rank 0 saves the loader's state every few steps."""
    dist.init_process_group("gloo")
    rank, state_path = dist.get_rank(), Path(folder) / "state.json"
    options = tc.LoaderOptions(seed=None if resume else 11, shuffle_window_bytes="4KiB", shuffle_group_bytes="16KiB")
    loader = tc.DataLoader(tc.Dataset(url), batch_size=batch_size, shuffle=True, options=options)
    if resume:
        loader.load_state_dict(json.loads(state_path.read_text()))
    served = []
    with (Path(folder) / f"served-{rank}.jsonl").open("a") as log:
        for step, batch in enumerate(loader, start=1):
            served.append(batch["id"].tolist())
            print(json.dumps(served[-1]), file=log, flush=True)
            SYSTEM_CLOCK.sleep(0.004)  # a step takes its time: whoever kills in mid-epoch must come before its end
            dist.all_reduce(torch.ones(1))
            if step % save_every == 0:
                save(state_path, {**loader.state_dict()})
    dist.destroy_process_group()
    return served


def save(path: Path, state: dict[str, Any]) -> None:
    """By rank 0, whole or not at all; it is the same on every rank."""
    if dist.get_rank() == 0:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(state))
        os.replace(temporary, path)  # noqa: PTH105 -- the same, and named as what it is: atomic
