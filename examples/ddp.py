"""Training by several processes, any of which may be killed at any instant: run it again, and it goes on.

    torchrun --nproc-per-node 2 examples/ddp.py --data numbers --folder run
    python examples/ddp.py --data numbers --folder run-alone

The loss of every step and the final weights are those of a run that nobody interrupted, bit by bit: the checkpoint
holds the loader's state beside the model's, and the loader goes on at the very batch. On CPU, with as many processes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import tiercache as tc

N_CLASSES, N_INPUTS = 10, 32


def pack(url: str, n: int = 6000) -> None:
    """Points around ten centres, stored sorted by their class."""
    random = np.random.default_rng(0)
    label = np.sort(random.integers(0, N_CLASSES, n))
    point = random.normal(size=(N_CLASSES, N_INPUTS))[label] + random.normal(size=(n, N_INPUTS)) * 2
    schema = {"point": tc.Tensor("float32", (N_INPUTS,)), "label": "int64"}
    with tc.Writer(url, schema=schema, shard_size="64KiB", block_size="4KiB") as writer:
        writer.write_batch({"point": point.astype("float32"), "label": label})


class Training:
    """A model, its optimizer and its loader: what a checkpoint is of."""

    def __init__(self, url: str, folder: Path, batch_size: int) -> None:
        torch.manual_seed(0)  # the same weights at the start on every rank
        layers = (torch.nn.Linear(N_INPUTS, 64), torch.nn.Tanh(), torch.nn.Linear(64, N_CLASSES))
        self.model: Any = torch.nn.Sequential(*layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3)
        options = tc.LoaderOptions(seed=0)  # the orders of all epochs follow from it and the loader's state
        self.loader = tc.DataLoader(tc.Dataset(url), batch_size=batch_size, shuffle=True, options=options)
        self.step = 0
        self._checkpoint = folder / "checkpoint.pt"
        if dist.is_initialized():
            self.model = DistributedDataParallel(self.model)
        if self._checkpoint.exists():
            self._load()

    def learn(self, batch: dict[str, torch.Tensor]) -> float:
        """One step; the loss of this rank's batch."""
        loss = torch.nn.functional.cross_entropy(self.model(batch["point"]), batch["label"])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def save(self) -> None:
        """By rank 0 alone, whole or not at all: everything in it is the same on every rank."""
        state = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "loader")}
        if not dist.is_initialized() or dist.get_rank() == 0:
            temporary = self._checkpoint.with_suffix(".tmp")
            torch.save({**state, "step": self.step}, temporary)
            temporary.replace(self._checkpoint)

    def _load(self) -> None:
        state = torch.load(self._checkpoint)
        self.step = state.pop("step")
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)

    def digest(self) -> str:
        """Of the weights, bit by bit."""
        weights = b"".join(weight.detach().numpy().tobytes() for weight in self.model.parameters())
        return hashlib.sha256(weights).hexdigest()


def main(data: str, folder: str, epochs: int = 2, batch_size: int = 32, save_every: int = 10) -> str:
    """Train, or go on training; the digest of the weights."""
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    Path(folder).mkdir(parents=True, exist_ok=True)
    if rank == 0 and not Path(data).exists():
        pack(data)
    if dist.is_initialized():
        dist.barrier()
    training = Training(data, Path(folder), batch_size)
    with (Path(folder) / f"losses-{rank}.txt").open("a") as log:
        while training.loader.state_dict()["epoch"] < epochs:
            for batch in training.loader:
                print(training.step, training.learn(batch).hex(), file=log, flush=True)
                if training.step % save_every == 0:
                    training.save()
    digest = training.digest()
    print(f"rank {rank}: {training.step} steps, weights {digest}")
    # First: a model that is the last to refer to the process group ends its thread while it holds the interpreter lock,
    # for which that thread may wait (torch 2.13, gloo): the process then hangs.
    del training
    if dist.is_initialized():
        dist.destroy_process_group()
    return digest


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--save-every", type=int, default=10)
    main(**vars(parser.parse_args()))
