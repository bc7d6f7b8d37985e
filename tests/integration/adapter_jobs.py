"""Users' scripts that save with `tc.Checkpoints` through a framework, or log checkpoints; run by child.py."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from tests.support.faults import Fault, FaultStore

import tiercache as tc


def digest(state: Any) -> str:
    """A hash of the tensors of a state dict."""
    found = hashlib.sha256()
    for key, value in sorted(state.items()):
        found.update(key.encode() + value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


# -- Lightning -------------------------------------------------------------------------------------------------------


def fit(url: str, folder: str, resume: str | None = None, save_top_k: int = -1) -> dict[str, Any]:
    """Two epochs, with a checkpoint every 3 steps that best:score finds; the ids of each step, and what is stored."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint
    from tests.integration.lightning_jobs import Model

    from tiercache.integrations.lightning import TierCacheCheckpointIO

    warnings.filterwarnings("ignore", module="lightning.*")

    class ScoredModel(Model):
        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            self.log("score", float(abs(9 - self.global_step)))
            return super().training_step(batch, number)

    torch.manual_seed(1)
    model = ScoredModel()
    checkpoints = tc.Checkpoints(f"{folder}/remote", local=f"{folder}/local")
    loader = tc.DataLoader(tc.Dataset(url), batch_size=8, shuffle=True, options=tc.LoaderOptions(seed=1))
    policy = {"monitor": "score", "save_top_k": save_top_k}
    saves = ModelCheckpoint(dirpath=f"{folder}/runs", filename="{step}", every_n_train_steps=3, **policy)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[saves], plugins=[TierCacheCheckpointIO(checkpoints)],
    )  # fmt: skip
    trainer.fit(model, loader, ckpt_path=resume)
    checkpoints.close()
    listed = [(info.step, info.metrics) for info in checkpoints.list()]
    return {"seen": model.seen, "weights": digest(model.state_dict()), "listed": listed, "written": _names(folder)}


def _names(folder: str) -> list[str]:
    runs = Path(folder, "runs")
    return sorted(path.name for path in runs.rglob("*") if path.is_file()) if runs.exists() else []


# -- Hugging Face's Trainer ------------------------------------------------------------------------------------------


def train(url: str, folder: str, stop_after: int = -1, which: str | int = "latest") -> dict[str, Any]:
    """Two epochs, with a checkpoint every 3 steps, from the newest one if there is one; the ids of each step."""
    from tests.integration.transformers_jobs import Model, NativeTrainer
    from transformers import TrainerCallback, TrainingArguments

    from tiercache.integrations.transformers import CheckpointCallback, LoaderStateCallback

    class Stop(TrainerCallback):
        def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= state.global_step == stop_after

    class NoisyModel(Model):
        def forward(self, id: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:  # noqa: A002
            found = super().forward(id, values)
            return {"loss": found["loss"] + torch.nn.functional.dropout(self.layer.weight).square().mean()}

    torch.manual_seed(1)
    model = NoisyModel()
    checkpoints = tc.Checkpoints(f"{folder}/remote", local=f"{folder}/local")
    saves = CheckpointCallback(checkpoints)
    settings = TrainingArguments(
        output_dir=f"{folder}/runs", num_train_epochs=2, per_device_train_batch_size=8, report_to=[],
        disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, save_steps=3, logging_steps=3,
    )  # fmt: skip
    trainer = NativeTrainer(
        model=model, args=settings, train_dataset=tc.Dataset(url), data_collator=tc.collate,
        callbacks=[saves, LoaderStateCallback(), Stop()],
    )  # fmt: skip
    resumed = saves.restore(f"{folder}/resumed", which)
    trainer.train(resume_from_checkpoint=resumed)
    checkpoints.close()
    listed = [(info.step, sorted(info.metrics)) for info in checkpoints.list()]
    return {
        "seen": model.seen, "weights": digest(model.state_dict()), "listed": listed, "written": _names(folder),
        "resumed": None if resumed is None else Path(resumed).name,
    }  # fmt: skip


# -- Accelerate ------------------------------------------------------------------------------------------------------


def loop(url: str, folder: str, way: str, stop_after: int | None = None) -> dict[str, Any]:
    """An epoch that resumes where a checkpoint stands; way: "functions" or "hook"."""
    from accelerate import Accelerator

    from tiercache.integrations.accelerate import CheckpointHook, load_state, prepare, save_state

    torch.manual_seed(1)
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(17, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    options = tc.LoaderOptions(seed=1)
    loader = prepare(tc.DataLoader(tc.Dataset(url), batch_size=8, shuffle=True, options=options), accelerator)
    checkpoints = tc.Checkpoints(f"{folder}/remote", rank=accelerator.process_index)
    step, state_folder, seen = 0, f"{folder}/state", []
    hook = CheckpointHook(accelerator, checkpoints, lambda: step) if way == "hook" else None
    if checkpoints.list():
        accelerator.load_state(state_folder) if hook else load_state(accelerator, checkpoints)
        step = checkpoints.list()[-1].step
    for batch in loader:
        accelerator.backward(model(batch["values"]).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seen.append(batch["id"].tolist())
        step += 1
        if step == stop_after:
            accelerator.save_state(state_folder) if hook else save_state(accelerator, checkpoints, step)
            break
    if hook:
        hook.remove()
    checkpoints.close()
    rate = schedule.get_last_lr()
    written = sorted(path.name for path in Path(state_folder).glob("*"))
    weights = digest(accelerator.unwrap_model(model).state_dict())
    return {"seen": seen, "weights": weights, "rate": rate, "written": written}


# -- trackers --------------------------------------------------------------------------------------------------------


def saves(url: str, folder: str, make_log: Any) -> dict[str, Any]:
    """Save three checkpoints with a log; the last one fails. The names of the others, and their data set."""
    import torch.distributed.checkpoint as dcp

    loader = tc.DataLoader(tc.Dataset(url), batch_size=8)
    for _ in loader:
        pass
    with tc.Checkpoints(f"{folder}/remote") as checkpoints:
        log = make_log(checkpoints)
        first = checkpoints.save(1, {"weights": torch.ones(3)}, metrics={"loss": 0.5})
        log(first, metrics={"loss": 0.5}, loader=loader)
        first.wait()
        warnings.simplefilter("ignore")  # torch's, about one process
        writer = checkpoints.dcp_writer(2)
        dcp.save({"weights": torch.ones(3)}, storage_writer=writer)
        log(writer, metrics={"loss": 0.25}, loader=loader)
        remote = checkpoints.file_writers[-1]
        remote.store = FaultStore(remote.store, [Fault("complete", retryable=False)])
        log(checkpoints.save(3, {"weights": torch.ones(3)}), metrics={"loss": 9.0}, loader=loader)
        log.close()
        error = ""
        try:
            checkpoints.wait()
        except tc.StoreError as failure:  # the log has not swallowed it
            error = str(failure)
        names = [info.name for info in checkpoints.list() if info.state == "complete"]
        dataset = loader.dataset
        facts = {"version": dataset.version, "fingerprint": dataset.fingerprint}
        return {"names": names, "error": error, **facts}


def log_to_mlflow(url: str, folder: str) -> dict[str, Any]:
    """What MLflow's file store has of a run."""
    os.environ["MLFLOW_TRACKING_URI"] = f"file://{folder}/mlruns"
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    import mlflow

    from tiercache.integrations.mlflow import MlflowCheckpointLog

    with mlflow.start_run() as run:
        found = saves(url, folder, MlflowCheckpointLog)
    client = mlflow.MlflowClient()
    stored = client.get_run(run.info.run_id)
    losses = [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, "loss")]
    artifacts = [one.path for one in client.list_artifacts(run.info.run_id, "checkpoints")]
    return {**found, "tags": stored.data.tags, "losses": losses, "metrics": stored.data.metrics, "artifacts": artifacts}


def log_to_wandb(url: str, folder: str) -> dict[str, Any]:
    """What an offline run of Weights & Biases has in its summary, and the rows that it was given."""
    os.environ.update(WANDB_MODE="offline", WANDB_DIR=folder, WANDB_SILENT="true")
    import wandb

    from tiercache.integrations.wandb import WandbCheckpointLog

    run = wandb.init(project="tiercache", dir=folder)
    found = saves(url, folder, WandbCheckpointLog)
    summary = {key: value for key, value in dict(run.summary).items() if key.startswith("checkpoint/")}
    run.finish()
    files = [path.name for path in Path(folder).rglob("*.wandb")]
    return {**found, "summary": summary, "files": files}


def log_to_comet(url: str, folder: str) -> dict[str, Any]:
    """The messages in the archive that an offline experiment of Comet wrote."""
    import comet_ml

    from tiercache.integrations.comet import CometCheckpointLog

    Path(folder, "comet").mkdir(parents=True)
    experiment = comet_ml.OfflineExperiment(
        offline_directory=f"{folder}/comet", project_name="tiercache", log_code=False, log_graph=False,
        log_git_metadata=False, log_git_patch=False, auto_output_logging=False, display_summary_level=0,
    )  # fmt: skip
    found = saves(url, folder, lambda checkpoints: CometCheckpointLog(checkpoints, experiment))
    experiment.end()
    (archive,) = Path(folder, "comet").glob("*.zip")
    with zipfile.ZipFile(archive) as opened:
        messages = [json.loads(line) for line in opened.read("messages.json").decode().splitlines()]
    return {**found, "messages": messages}
