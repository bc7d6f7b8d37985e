"""Scripts of users that resume after a move: the examples of docs/guide/recall.md, with the real frameworks.

``python -m tests.integration.recall_jobs FOLDER EXAMPLE``: trains below FOLDER, moves the checkpoints by rules, runs
the example, and prints the step at which it went on.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path

RULES = """
state_dir = "state"
[tiers.hot]
url = "nvme"

[tiers.standard]
url = "store"

[[rules]]
match = "checkpoints/**"
keep_hot = { last = 1 }

[tiering]
grace = "0s"
"""


def command(*arguments: str) -> None:
    """The command, as a user calls it."""
    main = "from tiercache.cli.app import main; main()"
    subprocess.run([sys.executable, "-c", main, *arguments], check=True, stdout=subprocess.DEVNULL)


def move_away(kept: str, moved: str) -> None:
    """Two runs of the mover: the second deletes what the first has copied."""
    for path in Path("nvme").rglob("*.ckpt"):  # a file is complete when it has settled
        os.utime(path, (path.stat().st_mtime - 3600,) * 2)
    command("tier", "run", "--once")
    command("tier", "run", "--once")
    assert Path(kept).exists()
    assert not Path(moved).exists()


def trainer(example: str) -> int:
    """Hugging Face's Trainer goes on from a checkpoint that was recalled."""
    import torch
    from tests.integration.transformers_jobs import Model
    from transformers import Trainer, TrainingArguments

    import tiercache as tc

    records = [{"id": torch.tensor(i), "values": torch.randn(17)} for i in range(32)]
    bert = Path("nvme/checkpoints/bert").absolute()

    def make(steps: int) -> Trainer:
        settings = TrainingArguments(
            output_dir=str(bert),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=4,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        return Trainer(model=Model(), args=settings, train_dataset=records)

    make(6).train()
    move_away(f"{bert}/checkpoint-6", f"{bert}/checkpoint-4")
    command("tier", "get", "checkpoints/bert/checkpoint-4", "--yes")
    names = {"trainer": make(8), "tc": tc, "bert": bert}
    exec(example, names)
    model = names["trainer"].model
    assert names["trainer"].state.global_step == 8
    return 8 - len(model.seen)


def lightning(example: str) -> int:
    """Lightning goes on from a checkpoint where the mover has put it."""
    import lightning
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from tests.integration.lightning_jobs import Model
    from torch.utils.data import DataLoader

    warnings.filterwarnings("ignore", module="lightning.*")
    lit = Path("nvme/checkpoints/lit").absolute()
    records = [{"id": torch.tensor(i), "values": torch.randn(17)} for i in range(40)]

    def make(steps: int) -> lightning.Trainer:
        keep = ModelCheckpoint(dirpath=lit, filename="{epoch}-{step}", every_n_train_steps=2, save_top_k=-1)
        return lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[keep],
        )

    class Fitting(Model):
        def train_dataloader(self) -> DataLoader:
            return DataLoader(records, batch_size=4)

    make(6).fit(Fitting())
    move_away(f"{lit}/epoch=0-step=6.ckpt", f"{lit}/epoch=0-step=4.ckpt")
    names = {"trainer": make(8), "model": Fitting(), "lit": lit}
    exec(example, names)
    assert names["trainer"].global_step == 8
    return 8 - len(names["model"].seen)


def main() -> None:
    folder, example = Path(sys.argv[1]), sys.argv[2]
    (folder / "tiercache.toml").write_text(RULES)
    os.chdir(folder)
    print("went on at", trainer(example) if "resume_from_checkpoint" in example else lightning(example))


if __name__ == "__main__":
    main()
