"""What the ranks of jobs that save and load checkpoints do, run by child.py."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tests.support.faults import Fault, FaultStore
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import tiercache as tc
from tiercache import crash_points

KINDS = ("fsdp", "tp", "fsdp x tp", "hsdp")
TP_PLAN = {"0": ColwiseParallel(), "2": RowwiseParallel()}


class Model(torch.nn.Sequential):
    """A model of 6 outputs, which 4 ranks cannot share evenly, and a buffer that all ranks have."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(10, 36), torch.nn.ReLU(), torch.nn.Linear(36, 6))
        self.register_buffer("scale", torch.arange(3.0))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return super().forward(values).clone()


def make(kind: str, seed: int = 0) -> tuple[Model, torch.optim.Optimizer]:
    """The model on all ranks, and its optimizer."""
    n = dist.get_world_size() if dist.is_initialized() else 1
    torch.manual_seed(seed)
    model = Model()
    if kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (n,)))
    elif kind == "tp":
        parallelize_module(model, init_device_mesh("cpu", (n,)), TP_PLAN)
    elif kind == "fsdp x tp":
        mesh = init_device_mesh("cpu", (n // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], TP_PLAN)
        fully_shard(model, mesh=mesh["dp"])
    elif kind == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, n // 2), mesh_dim_names=("replicas", "shards")))
    return model, torch.optim.AdamW(model.parameters(), foreach=False)


def train(model: Model, optimizer: torch.optim.Optimizer, n_steps: int = 2) -> None:
    for number in range(n_steps):
        optimizer.zero_grad()
        model(torch.full((4, 10), float(number + 1))).square().mean().backward()
        optimizer.step()


def state_of(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations
        model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state, "loader": {"epoch": 3, "served": [1, 2]}}


def digest(state: Any) -> str:
    """A hash of keys, types, shapes and bits of a state, whatever ranks its tensors are on."""
    found = hashlib.sha256()

    def add(path: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key in sorted(value, key=str):
                add(f"{path}.{key}", value[key])
        elif isinstance(value, list):
            add(path, dict(enumerate(value)))
        elif isinstance(value, torch.Tensor):
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            found.update(f"{path} {whole.dtype} {tuple(whole.shape)}".encode())
            found.update(whole.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(f"{path} {value!r}".encode())

    add("", state)
    return found.hexdigest()


def save(url: str, local: str | None, kinds: list[str]) -> dict[str, str]:
    """Save one checkpoint of each kind of parallelism, at step 0, 1, ...; the digests of the states.

    The last one is saved by async_save while the state changes.
    """
    dist.init_process_group("gloo")
    checkpoints = tc.Checkpoints(url, local=local)
    found = {}
    for step, kind in enumerate(kinds):
        model, optimizer = make(kind)
        train(model, optimizer)
        state = state_of(model, optimizer)
        found[kind] = digest(state)
        writer = checkpoints.dcp_writer(step, metrics={"loss": 1.0 / (step + 1)})
        if kind != kinds[-1]:
            dcp.save(state, storage_writer=writer)
            continue
        saved = dcp.async_save(state, storage_writer=writer)
        with torch.no_grad():
            for tensor in state["model"].values():
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
        saved.result()
    checkpoints.close()
    dist.destroy_process_group()
    return found


def load(url: str, local: str | None, kinds: list[str]) -> dict[str, list[str]]:
    """Load what save() wrote into other models; the digests of the states, before and after they are set."""
    dist.init_process_group("gloo")
    checkpoints = tc.Checkpoints(url, local=local)
    found = {}
    for step, kind in enumerate(kinds):
        model, optimizer = make(kind, seed=1)
        state = state_of(model, optimizer)
        state["loader"] = {"epoch": 0, "served": []}
        dcp.load(state, storage_reader=checkpoints.dcp_reader(step))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        found[kind] = [digest(state), digest(state_of(model, optimizer))]
    checkpoints.close()
    dist.destroy_process_group()
    return found


class Killer:
    """A hook of crash points that kills this process when it reaches one of them for the n-th time."""

    def __init__(self, point: str, nth: int = 1) -> None:
        self._point, self._n_left, self._lock = point, nth, Lock()

    def __call__(self, name: str) -> None:
        if name == self._point:
            with self._lock:
                self._n_left -= 1
                if self._n_left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)


def fail(url: str, local: str, answers: str) -> None:
    """Save step 0; fail at step 1, where rank 1 cannot upload; die at step 2, where rank 1 is killed while it writes.

    answers: Folder into which each rank writes the digest of step 0 and the error of step 1.
    """
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    checkpoints = tc.Checkpoints(url, local=local)
    model, optimizer = make("fsdp")
    train(model, optimizer)
    state = state_of(model, optimizer)
    dcp.save(state, storage_writer=checkpoints.dcp_writer(0))
    found = {"digest": digest(state)}
    train(model, optimizer)
    remote = checkpoints._house.writers[-1]
    whole = remote.store
    if rank == 1:
        remote.store = FaultStore(whole, [Fault("complete", retryable=False, status=403)])
    try:
        dcp.save(state_of(model, optimizer), storage_writer=checkpoints.dcp_writer(1))
    except CheckpointException as error:
        found["error"] = str(error)
    remote.store = whole
    Path(answers, f"{rank}.json").write_text(json.dumps(found))
    if rank == 1:
        crash_points.set_hook(Killer("dcp.written"))
    dcp.save(state_of(model, optimizer), storage_writer=checkpoints.dcp_writer(2))


def die(url: str, local: str, point: str) -> None:
    """Save step 0, and die at a point of the save of step 1, on the only rank."""
    dist.init_process_group("gloo")
    checkpoints = tc.Checkpoints(url, local=local)
    for step in (0, 1):
        crash_points.set_hook(Killer(point) if step else None)
        dcp.save({"step": torch.full((1000,), step)}, storage_writer=checkpoints.dcp_writer(step))


def save_on_machines(url: str, local: str, n_saves: int) -> list[int]:
    """Save some steps, each rank to a local folder of its own, as on a machine of its own, and load the last one.

    Returns:
        Steps of which the rank's folder has files.
    """
    dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (dist.get_world_size(),))
    checkpoints = tc.Checkpoints(url, local=f"{local}-{rank}", keep=[tc.Keep(last=1)])
    for step in range(n_saves):
        state = {"weights": distribute_tensor(torch.full((40, 3), step), mesh, [Shard(0)])}
        dcp.save(state, storage_writer=checkpoints.dcp_writer(step))
    checkpoints.join()
    state["weights"].zero_()
    dcp.load(state, storage_reader=checkpoints.dcp_reader())
    assert state["weights"].full_tensor().tolist() == [[n_saves - 1] * 3] * 40
    assert checkpoints.verify().is_right
    checkpoints.close()
    dist.destroy_process_group()
    return sorted(int(path.name[5:17]) for path in Path(f"{local}-{rank}").glob("step-*"))


def killed_at(kill: dict[str, Any] | None, counts: str = "") -> Callable[[], None]:
    """Set the hook of crash points: die at a point, or count how often each is reached.

    Args:
        kill: Arguments of Killer; None: this process counts.
        counts: File for the counts, as JSON; "": none.

    Returns:
        Function that writes the counts at the end of the work.
    """
    found: Counter[str] = Counter()
    crash_points.set_hook(Killer(**kill) if kill else lambda name: found.update([name]))
    return lambda: Path(counts).write_text(json.dumps(found)) if counts else None


def state_at(step: int) -> dict[str, Any]:
    """The state of a step: a tensor for all ranks together, one that never changes, one that does, and a number."""
    values = torch.Generator().manual_seed(step)
    return {
        "weights": torch.randn(40, 3, generator=values),
        "frozen": torch.full((1 << 18,), 7.0),
        "moving": torch.randn(1 << 18, generator=values),
        "step": step,
    }


def save_until_killed(
    url: str,
    locals_: list[str],
    n_saves: int,
    saved: str,
    keep_last: int,
    kill: dict[str, Any] | None,
    rank: int,
    counts: str = "",
) -> None:
    """Save some steps more, while a rank is killed when it reaches a point for the n-th time.

    Args:
        url: URL of the checkpoints.
        locals_: Local folder of each rank.
        n_saves: Number of steps.
        saved: File to which rank 0 appends each step once its save has returned.
        keep_last: Number of checkpoints that stay.
        kill: What kills `rank`, or None.
        rank: Rank that is killed.
        counts: Beginning of the files for the counts of the ranks.
    """
    dist.init_process_group("gloo")
    me, mesh = dist.get_rank(), init_device_mesh("cpu", (dist.get_world_size(),))
    checkpoints = tc.Checkpoints(url, local=locals_[me], keep=[tc.Keep(last=keep_last)])
    first = [1 + int((Path(saved).read_text().split() or [-1])[-1]) if Path(saved).exists() else 0]
    dist.broadcast_object_list(first)
    end = killed_at(kill if me == rank else None, counts and f"{counts}-{me}")
    for step in range(first[0], first[0] + n_saves):
        state = state_at(step)
        state["weights"] = distribute_tensor(state["weights"], mesh, [Shard(0)])
        dcp.save(state, storage_writer=checkpoints.dcp_writer(step))
        if me == 0:
            with Path(saved).open("a") as file:
                file.write(f"{step}\n")
    checkpoints.close()
    end()
