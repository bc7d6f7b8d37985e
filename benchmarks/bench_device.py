"""Batches on a device: host-to-device GB/s, and how long a training step waits for its batch.

    python benchmarks/bench_device.py [--device cuda] [--steps 200] [--repetitions 5] [--folder benchmarks/out/device]

The first table compares copies of one batch from pageable memory, from pinned memory, and whole epochs of our loader.
The second trains a small model with our loader (also with MixUp, and with a function of batches in the training
thread), with torch's loader (pin_memory, non_blocking), and with a prefetcher that copies the next batch on a side
stream. The exposed wait of a step is measured in the same way for all of them: the time between two events of the
training loop's stream, before and after the request of a batch; "host ms" is the time of the request in the training
thread. The ways are interleaved in each repetition; the first steps of each run are not counted. Without an accelerator
nothing is measured.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader

import tiercache as tc
from rows import OUT, spread, table, write_rows
from tiercache.load.device import Backend, find_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tiercache.load.device import Backend

SIDE = 96  # pixels of an image
UNCOUNTED_STEPS = 5
WORKERS = 4


@dataclass(frozen=True)
class Plan:
    """Settings of a measurement. is_pinning: whether torch's own loader pins memory, which needs an accelerator."""

    option: str  # LoaderOptions.device
    backend: Backend
    tensors: torch.device  # device of the model
    n_steps: int
    batch_size: int
    repetitions: int
    n_workers: int = WORKERS
    is_pinning: bool = True


def pack(folder: Path, n_records: int) -> tc.Dataset:
    """Return the data set of images and labels, packed unless it exists."""
    path = folder / f"images-{n_records}"
    if not path.exists():
        numbers = np.random.default_rng(1)
        with tc.Writer(path, schema={"image": tc.Tensor("uint8", (3, SIDE, SIDE)), "label": "int64"}) as out:
            for start in range(0, n_records, 256):
                n = min(256, n_records - start)
                images = numbers.integers(0, 256, (n, 3, SIDE, SIDE), np.uint8)
                out.write_batch({"image": images, "label": numbers.integers(0, 10, n)})
    return tc.Dataset(path)


def ours(
    data: tc.Dataset, plan: Plan, transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield batches of our loader."""
    options = tc.LoaderOptions(seed=1, device=plan.option, batch_transform=transform)
    yield from tc.DataLoader(data, plan.batch_size, shuffle=True, drop_last=True, options=options)


def torchs(data: tc.Dataset, plan: Plan) -> Iterator[dict[str, Any]]:
    """Yield batches of torch's loader, which are moved on the training loop's stream."""
    for batch in _torch_loader(data, plan):
        yield {name: value.to(plan.tensors, non_blocking=True) for name, value in batch.items()}


def prefetched(data: tc.Dataset, plan: Plan) -> Iterator[dict[str, Any]]:
    """Yield batches of torch's loader; the next one is moved on a side stream while the present one is used."""
    backend = plan.backend
    side = backend.new_stream()

    def move(batch: dict[str, Any]) -> tuple[dict[str, torch.Tensor], Any]:
        side.wait_stream(backend.current_stream())
        moved = {}
        for name, value in batch.items():
            there = backend.allocate(value.nbytes)
            backend.copy(there, value.view(-1).view(torch.uint8), side)
            moved[name] = there.view(value.dtype).view(value.shape)
        return moved, backend.record(side)

    loader = iter(_torch_loader(data, plan))
    first = next(loader, None)
    ahead = None if first is None else (first, *move(first))
    while ahead is not None:
        _host, batch, event = ahead  # the host's batch is kept until its copy is done
        backend.current_stream().wait_event(event)
        following = next(loader, None)
        ahead = None if following is None else (following, *move(following))
        yield batch
        event.synchronize()


def _torch_loader(data: tc.Dataset, plan: Plan) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(
        data,
        plan.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=tc.collate,
        num_workers=plan.n_workers,
        pin_memory=plan.is_pinning,
        generator=generator,
    )


def flip(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch whose images are new tensors: mirrored."""
    return {**batch, "image": batch["image"].flip(3)}


WAYS = {
    "tiercache": ours,
    "tiercache, MixUp": partial(ours, transform=tc.MixUp(0.2, n_classes=10)),
    "tiercache, a function": partial(ours, transform=flip),
    "torch, pin_memory": torchs,
    "torch, prefetcher": prefetched,
}


def wait(plan: Plan) -> None:
    """Wait until everything on the training loop's stream is done."""
    plan.backend.record(plan.backend.current_stream()).synchronize()


def copies(plan: Plan, n_bytes: int) -> dict[str, float]:
    """Return the GB/s of copies of n_bytes from pageable and from pinned memory."""
    backend = plan.backend
    there = backend.allocate(n_bytes)
    found = {}
    for name, here in (("pageable", torch.empty(n_bytes, dtype=torch.uint8)), ("pinned", backend.pin(n_bytes))):
        here.zero_()
        for n_times in (2, 10):
            wait(plan)
            begin = time.perf_counter()
            for _ in range(n_times):
                backend.copy(there, here, backend.current_stream())
            wait(plan)
            found[name] = n_times * n_bytes / (time.perf_counter() - begin) / 1e9
    return found


def loader_rate(data: tc.Dataset, plan: Plan) -> float:
    """Return the GB/s at which our loader serves batches on the device, from its second batch on."""
    batches = ours(data, plan)
    next(batches)
    wait(plan)
    begin, n_bytes = time.perf_counter(), 0
    for batch in batches:
        n_bytes += sum(value.nbytes for value in batch.values())
    wait(plan)
    return n_bytes / (time.perf_counter() - begin) / 1e9


def train(batches: Iterator[dict[str, Any]], plan: Plan) -> dict[str, float]:
    """Train a small model. Return the exposed wait (mean, p99) and the host's wait in ms, and the steps per second."""
    backend, stream = plan.backend, plan.backend.current_stream()
    torch.manual_seed(1)
    width = (SIDE - 8) // 4 + 1
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 8, stride=4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32 * width**2, 10)
    ).to(plan.tensors)
    events: list[tuple[Any, Any]] = []
    begin_s = host_s = 0.0
    for step in range(plan.n_steps + UNCOUNTED_STEPS):
        before, asked_s = backend.record(stream, timed=True), time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            break
        got_s = time.perf_counter()
        events.append((before, backend.record(stream, timed=True)))
        if step == UNCOUNTED_STEPS:
            wait(plan)
            begin_s = time.perf_counter()
        elif step > UNCOUNTED_STEPS:
            host_s += got_s - asked_s
        loss = torch.nn.functional.cross_entropy(model(batch["image"].float() / 255), batch["label"])
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-4 * parameter.grad
    wait(plan)
    took_s = time.perf_counter() - begin_s
    exposed = [before.elapsed_time(after) for before, after in events[UNCOUNTED_STEPS:]]
    return {
        "mean_ms": float(np.mean(exposed)),
        "p99_ms": float(np.quantile(exposed, 0.99)),
        "host_ms": 1e3 * host_s / max(len(exposed) - 1, 1),
        "steps_per_s": len(exposed) / took_s,
    }


def measure(data: tc.Dataset, plan: Plan, card: str) -> list[dict[str, Any]]:
    """Return the rows of all ways."""
    n_bytes = plan.batch_size * (3 * SIDE * SIDE + 8)
    rates: dict[str, list[float]] = {}
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for _ in range(plan.repetitions):
        for name, rate in {**copies(plan, n_bytes), "tiercache": loader_rate(data, plan)}.items():
            rates.setdefault(name, []).append(rate)
        for name, way in WAYS.items():
            batches = way(data, plan)
            steps[name].append(train(batches, plan))
            batches.close()  # type: ignore[attr-defined]  # a generator
    rows: list[dict[str, Any]] = [
        {"benchmark": "device", "card": card, "case": name, "copy_GB_s": spread(values)}
        for name, values in rates.items()
    ]
    for name, runs in steps.items():
        figures = {key: spread([run[key] for run in runs]) for key in runs[0]}
        rows.append({"benchmark": "device", "card": card, "case": f"steps, {name}", **figures})
    return rows


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=OUT / "device")
    asked = parser.parse_args()
    try:
        device = find_device(asked.device)
    except ValueError as error:
        print(f"nothing is measured: {error}")
        return
    if device is None:
        parser.error("--device takes an accelerator")
    plan = Plan(asked.device, Backend(device), device, asked.steps, asked.batch_size, asked.repetitions)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    data = pack(asked.folder, (asked.steps + UNCOUNTED_STEPS + 1) * asked.batch_size)
    rows = measure(data, plan, card)
    write_rows(asked.folder / "device.jsonl", rows)
    copied = [(row["case"], f"{row['copy_GB_s']['median']:.1f}") for row in rows if "copy_GB_s" in row]
    print(f"{card}\n{table(('from', 'GB/s'), copied)}\n")
    waited = [
        (
            row["case"],
            *(f"{row[key]['median']:.3f}" for key in ("mean_ms", "p99_ms", "host_ms")),
            f"{row['steps_per_s']['median']:.1f}",
        )
        for row in rows
        if "mean_ms" in row
    ]
    print(table(("exposed wait of", "mean ms", "p99 ms", "host ms", "steps/s"), waited))


if __name__ == "__main__":
    main()
