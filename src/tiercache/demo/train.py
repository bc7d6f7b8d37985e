"""A training process of the demo: `python -m tiercache.demo.train`, a job on standard input, results as JSON lines.

It is written like a user's training script: a Dataset, a DataLoader, torch, and checkpoints of model, optimizer and
loader. A job has a phase, the URLs and storage options of the data sets, and the folders of cache and checkpoints.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from select import select
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from tiercache.cache import Cache
from tiercache.checkpoint.checkpoints import Checkpoints
from tiercache.data.dataset import Dataset
from tiercache.errors import NotFound
from tiercache.keep import Keep
from tiercache.load.loader import DataLoader
from tiercache.load.loader_options import LoaderOptions
from tiercache.transform_rng import rng

BATCH_SIZE = 64
SEED = 7
CHECKPOINTS_PER_EPOCH = 4
# The training that is killed: a child is killed after it has trained this many steps, and up to LATEST_S later.
N_EPOCHS = 8
FEWEST_STEPS, MOST_STEPS, LATEST_S = 3, 12, 0.02

Job: TypeAlias = Mapping[str, Any]


def read_digit(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with its image as float32[8, 8] from 0 to 1, with noise that a resumed run repeats."""
    pixels = np.asarray(Image.open(io.BytesIO(record["image"])), np.float32) / 255
    noise = rng().numpy.normal(0, 0.05, pixels.shape)
    return {"image": pixels + noise.astype(np.float32), "label": record["label"]}


def new_state(job: Job, cache: Cache) -> dict[str, Any]:
    """Return model, optimizer and loader before the first step: the same weights in all runs."""
    torch.manual_seed(SEED)
    convolutions = (nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU())
    model = nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 16, 10))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    dataset = Dataset(job["digits"], cache=cache, transform=read_digit, storage_options=job["storage_options"])
    loader: DataLoader[dict[str, Any]] = DataLoader(dataset, BATCH_SIZE, shuffle=True, options=LoaderOptions(seed=SEED))
    loader.set_epoch(0)
    return {"model": model, "optimizer": optimizer, "loader": loader, "step": 0, "epoch": 0}


def train(
    state: dict[str, Any],
    until_step: int,
    checkpoints: Checkpoints | None,
    steps_per_save: int,
    on_step: Callable[[], object] = bool,
) -> tuple[list[str], float]:
    """Train until a step, with checkpoints; return the SHA-256 of each batch, and the mean loss."""
    model, optimizer, loader = state["model"], state["optimizer"], state["loader"]
    digests, losses = [], []
    while state["step"] < until_step:
        for batch in loader:
            loss = F.cross_entropy(model(batch["image"][:, None]), batch["label"])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            state["step"] += 1
            digests.append(hashlib.sha256(batch["image"].numpy().tobytes() + batch["label"].numpy().tobytes()))
            losses.append(loss.item())
            is_last = state["step"] == until_step
            if checkpoints is not None and (is_last or state["step"] % steps_per_save == 0):
                checkpoints.save(state["step"], state, metrics={"loss": losses[-1]})
            on_step()
            if is_last:
                break
        else:
            state["epoch"] += 1
            loader.set_epoch(state["epoch"])
    return [digest.hexdigest() for digest in digests], sum(losses) / max(len(losses), 1)


def weights_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def run_phase(job: Job) -> Iterator[dict[str, Any]]:
    with Cache(job["cache"], size=job["cache_bytes"]) as cache, Checkpoints(job["checkpoints"]) as checkpoints:
        state = new_state(job, cache)
        n = len(state["loader"])
        # By phase: the name of each part of the training, the step to which it goes on, and the one where it ends.
        parts: list[tuple[str, int, int]] = {
            "cold": [("cold", 0, n)],
            "warm": [("warm", n, 2 * n)],
            "stop": [("whole", 2 * n, 3 * n), ("stopped", 2 * n, 2 * n + n // 2)],
            "resume": [("resumed", 2 * n + n // 2, 3 * n)],
            "moved": [("moved", 0, n)],
        }[job["phase"]]
        counted_bytes = 0
        for mode, from_step, until_step in parts:
            if from_step:
                checkpoints.load(from_step, into=state)
            kept = None if mode in ("whole", "moved") else checkpoints
            digests, loss = train(state, until_step, kept, n // CHECKPOINTS_PER_EPOCH)
            fetched_bytes = cache.stats()["bytes_fetched"]
            yield {
                "mode": mode,
                "epoch": from_step // n + 1,
                "fetched_bytes": fetched_bytes - counted_bytes,
                "loss": loss,
                "digests": digests,
                "weights": weights_digest(state["model"]),
            }
            counted_bytes = fetched_bytes
        state["loader"].dataset.close()


def train_to_the_end(job: Job, run: str, progress_fd: int) -> str:
    """Train from the newest checkpoint; return the digest of the weights. progress_fd gets a byte for each step."""
    storage = job["storage_options"]
    with (
        Cache(job["cache"], size=job["cache_bytes"]) as cache,
        Checkpoints(
            f"{job['runs']}/{run}", local=f"{job['local']}/{run}", keep=[Keep(last=2)], storage_options=storage
        ) as checkpoints,
    ):
        state = new_state(job, cache)
        with suppress(NotFound):  # there is no checkpoint yet
            checkpoints.load("latest", into=state)
        n_steps = N_EPOCHS * len(state["loader"])
        train(state, n_steps, checkpoints, 2, lambda: os.write(progress_fd, b"."))
        state["loader"].dataset.close()
    return weights_digest(state["model"])


def attempt(job: Job, run: str, kill_after: int | None, delay_s: float) -> str | None:
    """Train in a forked child, killed delay_s after a number of steps; return the digest of the weights, or None."""
    progress, to_parent = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(progress)
            os.write(to_parent, train_to_the_end(job, run, to_parent).encode())
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 - the top of a process
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
    os.close(to_parent)
    n_steps, text = 0, b""
    while found := os.read(progress, 4096):
        n_steps += found.count(b".")
        text = (text + found)[-64:]
        if kill_after is not None and n_steps >= kill_after:
            select([], [], [], delay_s)
            os.kill(pid, signal.SIGKILL)
            break
    os.close(progress)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and kill_after is not None:
        return None
    if status != 0:
        raise RuntimeError(f"a training process of run {run} ended with status {status}")
    return text.decode()


def run_killed(job: Job) -> dict[str, Any]:
    whole = attempt(job, "whole", None, 0.0)
    draws, n_kills, killed = np.random.default_rng(SEED), 0, None
    while killed is None:
        steps = int(draws.integers(FEWEST_STEPS, MOST_STEPS, endpoint=True)) if n_kills < job["n_kills"] else None
        killed = attempt(job, "killed", steps, draws.random() * LATEST_S)
        n_kills += killed is None
    return {"n_kills": n_kills, "whole": whole, "killed": killed}


def main() -> None:
    job = json.load(sys.stdin)
    # A small model does not gain from more threads, and a forked child cannot use the threads of its parent.
    torch.set_num_threads(1)
    for result in [run_killed(job)] if job["phase"] == "killed" else run_phase(job):
        sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
