"""What the ranks of the tests with Accelerate do: the loop of a user's script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration

import tiercache as tc
from tiercache.integrations.accelerate import prepare


def serve(urls: list[str], batch_size: int, folder: str) -> dict[str, Any]:
    """An epoch of each data set, by ours; then one that is saved in its middle, and a training by both."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    epochs = [serve_epoch(accelerator, url, batch_size) for url in urls]
    return {
        "epochs": epochs,
        "uneven": serve_epoch(uneven(), urls[0], batch_size)["batches"],
        "bare": serve_bare(accelerator, urls[0], batch_size),
        "plain": serve_plain(accelerator, urls[0], batch_size),
        "resumed": save_and_resume(accelerator, urls[0], batch_size, Path(folder)),
        "steps": {who: synced_steps(accelerator, who, urls[0], batch_size) for who in ("ours", "Accelerate's")},
    }


def uneven() -> Accelerator:
    return Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False))


def serve_epoch(accelerator: Accelerator, url: str, batch_size: int) -> dict[str, Any]:
    loader = prepare(tc.DataLoader(tc.Dataset(url), batch_size=batch_size, shuffle=True), accelerator)
    batches, gathered, ends = [], [], []
    for batch in loader:
        batches.append(batch["id"].tolist())
        ends.append(accelerator.gradient_state.end_of_dataloader)
        if accelerator.even_batches:
            gathered += accelerator.gather_for_metrics(batch["id"]).tolist()
    assert not accelerator.gradient_state.in_dataloader
    return {"batches": batches, "gathered": gathered, "ends": ends, "padded": loader.stats()["padded"]}


def serve_bare(accelerator: Accelerator, url: str, batch_size: int) -> dict[str, Any]:
    """An epoch of a loader that nobody prepares, which splits it among ranks, and the same one from its third batch."""

    def make() -> Any:
        return tc.DataLoader(tc.Dataset(url), batch_size=batch_size, shuffle=True, options=tc.LoaderOptions(seed=3))

    batches = [batch["id"].tolist() for batch in make()]
    return {
        "batches": batches,
        "skipped": [batch["id"].tolist() for batch in accelerator.skip_first_batches(make(), 2)],
    }


def serve_plain(accelerator: Accelerator, url: str, batch_size: int) -> dict[str, Any]:
    """An epoch by Accelerate's own prepare, and the same one from its third batch on."""
    torch.manual_seed(7)
    loader = accelerator.prepare(tc.DataLoader(tc.Dataset(url), batch_size=batch_size, shuffle=True))
    batches = [batch["id"].tolist() for batch in loader]
    torch.manual_seed(7)
    again = accelerator.prepare(tc.DataLoader(tc.Dataset(url), batch_size=batch_size, shuffle=True))
    skipped = accelerator.skip_first_batches(again, 2)
    return {"batches": batches, "skipped": [batch["id"].tolist() for batch in skipped]}


def save_and_resume(accelerator: Accelerator, url: str, batch_size: int, folder: Path) -> dict[str, Any]:
    """Batches before and after a save in mid-epoch, and those that a loader made anew serves from there."""
    accelerator.free_memory()
    loader = prepare(tc.DataLoader(tc.Dataset(url), batch_size=batch_size, shuffle=True), accelerator)
    batches = iter(loader)
    before = [next(batches)["id"].tolist() for _ in range(3)]
    accelerator.save_state(str(folder / "checkpoint"))
    accelerator.wait_for_everyone()
    rest = [batch["id"].tolist() for batch in batches]
    accelerator.free_memory()
    again = prepare(tc.DataLoader(tc.Dataset(url), batch_size=batch_size, shuffle=True), accelerator)
    accelerator.load_state(str(folder / "checkpoint"))
    return {"before": before, "rest": rest, "again": [batch["id"].tolist() for batch in again]}


def synced_steps(accelerator: Accelerator, who: str, url: str, batch_size: int) -> list[bool]:
    """Train one epoch and a half; at which steps gradients were synchronised."""
    torch.manual_seed(0)
    loader = tc.DataLoader(tc.Dataset(url), batch_size=batch_size, shuffle=True)
    model = torch.nn.Linear(17, 1)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    if who == "ours":
        loader = prepare(loader, accelerator)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    synced = []
    for n_steps in (len(loader), len(loader) // 2):
        for _, batch in zip(range(n_steps), loader, strict=False):
            with accelerator.accumulate(model):
                accelerator.backward(model(batch["values"]).square().mean())
                optimizer.step()
                optimizer.zero_grad()
            synced.append(accelerator.sync_gradients)
    return synced
