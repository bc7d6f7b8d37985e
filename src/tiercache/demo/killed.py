"""A training that is killed again and again: `python -m tiercache.demo.killed`, a KilledJob on standard input.

One process imports torch and forks a child for each attempt. A child goes on from the newest checkpoint, which holds
model, optimizer and loader, and saves every few steps. The parent kills it with SIGKILL at a random moment. The last
child finishes. Standard output has the SHA-256 of its weights, and that of a run that nobody killed, as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from contextlib import suppress
from dataclasses import asdict
from select import select
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from tiercache.cache import Cache
from tiercache.checkpoint.checkpoints import Checkpoints
from tiercache.data.dataset import Dataset
from tiercache.demo.results import BATCH_SIZE, SEED, KilledJob, KilledTraining
from tiercache.demo.train import LEARNING_RATE, Digits, augment_digit
from tiercache.errors import NotFound
from tiercache.keep import Keep
from tiercache.load.loader import DataLoader
from tiercache.load.options import LoaderOptions

N_EPOCHS = 8
STEPS_PER_SAVE = 2
# A child is killed after it has trained this many steps, and up to LATEST_S later.
FEWEST_STEPS, MOST_STEPS, LATEST_S = 3, 12, 0.02


def train(job: KilledJob, run: str, progress_fd: int) -> str:
    """Train to the end, from the newest checkpoint if there is one; return the SHA-256 of the weights.

    Args:
        job: The work.
        run: Name of the run, below the URL of the checkpoints.
        progress_fd: Descriptor that gets a byte for each step.
    """
    torch.manual_seed(SEED)
    model = Digits()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    storage = dict(job.storage_options)
    keep = [Keep(last=2)]
    with (
        Cache(job.cache, size=job.cache_bytes) as cache,
        Checkpoints(
            f"{job.checkpoints}/{run}", local=f"{job.local}/{run}", keep=keep, storage_options=storage
        ) as checkpoints,
    ):
        dataset = Dataset(job.url, cache=cache, transform=augment_digit, storage_options=storage)
        loader: DataLoader[dict[str, Any]] = DataLoader(
            dataset, BATCH_SIZE, shuffle=True, options=LoaderOptions(seed=SEED)
        )
        loader.set_epoch(0)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer, "loader": loader, "step": 0, "epoch": 0}
        with suppress(NotFound):  # there is no checkpoint yet
            checkpoints.load("latest", into=state)
        for epoch in range(state["epoch"], N_EPOCHS):
            if epoch > state["epoch"]:
                loader.set_epoch(epoch)
                state["epoch"] = epoch
            for batch in loader:
                loss = F.cross_entropy(*model(batch))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                state["step"] += 1
                if state["step"] % STEPS_PER_SAVE == 0:
                    checkpoints.save(state["step"], state, metrics={"loss": loss.item()})
                os.write(progress_fd, b".")
        dataset.close()
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def attempt(job: KilledJob, run: str, kill_after: int | None, delay_s: float) -> str | None:
    """Train in a forked child; return the SHA-256 of the weights, or None if the child was killed.

    Args:
        job: The work.
        run: Name of the run.
        kill_after: Number of steps after which the child is killed; None: it is not.
        delay_s: Time from that step to the kill, in seconds.

    Raises:
        RuntimeError: The child failed.
    """
    progress, to_parent = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(progress)
            os.write(to_parent, train(job, run, to_parent).encode())
            code = 0
        except BaseException as error:  # noqa: BLE001 - the top of a process
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        finally:
            sys.stderr.flush()
            os._exit(code)
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


def run_job(job: KilledJob) -> KilledTraining:
    """Train once as a whole, and once killed; return what both ended with."""
    whole = attempt(job, "whole", None, 0.0)
    draws, n_kills, killed = np.random.default_rng(SEED), 0, None
    while killed is None:
        steps = int(draws.integers(FEWEST_STEPS, MOST_STEPS, endpoint=True)) if n_kills < job.n_kills else None
        killed = attempt(job, "killed", steps, draws.random() * LATEST_S)
        n_kills += killed is None
    return KilledTraining(n_kills, whole or "", killed)


def main() -> int:
    """Run the job on standard input."""
    job = KilledJob(**json.load(sys.stdin))
    torch.set_num_threads(1)  # a forked child cannot use the threads of its parent
    sys.stdout.write(json.dumps(asdict(run_job(job))) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
