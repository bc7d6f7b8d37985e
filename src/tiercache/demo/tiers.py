"""The tiering step: rules archive the cold data set and old checkpoints, and the next training reads the moved data."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from tiercache.demo import claims
from tiercache.demo.events import Claim, Epoch, Event, Note, Step, TierContents
from tiercache.demo.stage import DemoSetup
from tiercache.errors import TierCacheError
from tiercache.model import format_bytes
from tiercache.store import open_store
from tiercache.tier.model import Plan, TierTotals
from tiercache.tier.plan.plan import read_plan

COLD = "python"
TASKS = ("digits", "python")
# Real rules have idle = "30d", after = "14d" and grace = "24h". even_if_dearer = true, because the demo's shards have
# 64 KiB and archive classes bill at least 128 KiB per object. The price of hot is that of a cloud disk.
RULES = """\
[tiers.hot]
url = "{hot}"
prices = {{ store_gb_month = 0.08 }}

[tiers.standard]
url = "{standard}"
prices = "aws:us-east-1:STANDARD"
storage_options = {options}

[tiers.archive]
url = "{archive}"
storage_class = "GLACIER_IR"
prices = "aws:us-east-1:GLACIER_IR"
storage_options = {options}

[[rules]]
name = "cold data"
match = "python/**"
idle = "0s"
to = "archive"
even_if_dearer = true

[[rules]]
name = "checkpoints"
match = "checkpoints/**"
keep_hot = {{ last = 1 }}
keep_standard = {{ last = 2, best = "loss:1" }}
then = "archive"
after = "0s"
even_if_dearer = true

[tiering]
grace = "0s"
settle = "0s"
state_dir = "{state}"
"""
# Deadline of one command, in seconds.
COMMAND_S = 300.0
# The first run completes the moves, the second finds nothing to do.
N_RUNS = 2


def run_tiering(stage: DemoSetup, warm: Sequence[Epoch]) -> Generator[Event, None, None]:
    """Yield the events of the tiering step.

    Args:
        stage: Folders and URLs.
        warm: Epochs of the second epoch, which was read before anything was moved.

    Raises:
        TierCacheError: A command failed; the message has the end of its output.
    """
    rules = _write_rules(stage)
    shards = [key for key in _keys(stage, stage.standard_url) if key.startswith(f"{COLD}/") and key.endswith(".tcs")]
    files = _checkpoint_files(stage.hot)
    yield Step("Tiers: a rule file sends the cold data set and old checkpoints to an archive tier")
    yield Note("hot is a folder, standard and archive are prefixes of the bucket; archive has class GLACIER_IR")
    before = yield from _move(rules, stage.folder)
    after = _holdings("after", _plan(rules, stage.folder / "after.jsonl"))
    yield from after
    yield from _check(stage, shards, files)
    yield claims.costs_less(before, after)
    yield Step("The next training, unchanged, in a fifth process with an empty cache")
    moved = yield from stage.run("moved")
    yield from claims.trained_alike([epoch for epoch in warm if epoch.mode == "warm"], moved)


def _write_rules(stage: DemoSetup) -> Path:
    """Write the rule file. It contains the S3 server's key, as the server's own configuration beside it does."""
    path = stage.folder / "tiers.toml"
    path.touch(mode=0o600)
    options = ", ".join(f'{name} = "{value}"' for name, value in stage.server.storage_options.items())
    path.write_text(
        RULES.format(
            hot=stage.hot,
            standard=stage.standard_url,
            archive=stage.archive_url,
            state=stage.folder / "state",
            options=f"{{ {options} }}",
        )
    )
    return path


def _move(rules: Path, folder: Path) -> Generator[Event, None, list[TierContents]]:
    """Yield the events of planning, applying and running; return what each tier held before."""
    stored = folder / "plan.jsonl"
    plan = _plan(rules, stored)
    before = _holdings("before", plan)
    yield from before
    n_shards = sum(move.kind == "shard" for move in plan.moves)
    yield Note(
        f"tiercache tier plan --out plan.jsonl: {len(plan.moves)} moves, {n_shards} of shards and "
        f"{len(plan.moves) - n_shards} of checkpoints; {format_bytes(sum(move.n_bytes for move in plan.moves))}"
    )
    yield Note(f"the first of them: {plan.moves[0].path} to {plan.moves[0].dst}, {plan.moves[0].reason}")
    yield Note(f"tiercache tier apply plan.jsonl: {_command('apply', str(stored), '--yes', rules=rules)}")
    for _ in range(N_RUNS):
        yield Note(f"tiercache tier run --once, as cron would: {_command('run', '--once', rules=rules)}")
    return before


def _plan(rules: Path, path: Path) -> Plan:
    _command("plan", "--out", str(path), rules=rules)
    return read_plan(path)


def _holdings(when: str, plan: Plan) -> list[TierContents]:
    held = ((tier.name, plan.before.get(tier.name, TierTotals())) for tier in plan.tiers)
    return [TierContents(when, name, one.n_bytes, one.n_objects, one.dollars_month) for name, one in held]


def _command(*arguments: str, rules: Path) -> str:
    """Run `tiercache tier ...` as a user would; return the last line that it prints."""
    command = [sys.executable, "-m", "tiercache.cli", "tier", *arguments, "--rules", str(rules)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise TierCacheError(f"tiercache tier {' '.join(arguments)} took longer than {COMMAND_S:g} s") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise TierCacheError(f"tiercache tier {' '.join(arguments)} ended with {done.returncode}:\n{said}")
    return done.stdout.strip().rpartition("\n")[2]


def _check(stage: DemoSetup, shards: Sequence[str], files: dict[str, str]) -> Iterator[Claim]:
    standard, archive = (_keys(stage, url) for url in (stage.standard_url, stage.archive_url))
    yield claims.moved_whole(COLD, shards, standard, archive)
    hot = _checkpoint_files(stage.hot)
    remote = {name: _digests(stage, url) for name, url in _remote(stage).items()}
    yield claims.nothing_lost(files, {"hot": hot} | remote)
    for task in TASKS:
        yield claims.newest_stayed(task, _steps(files, task), _steps(hot, task))


def _remote(stage: DemoSetup) -> dict[str, str]:
    return {"standard": stage.standard_url, "archive": stage.archive_url}


def _steps(paths: dict[str, str], task: str) -> set[int]:
    """Return the steps of a task's checkpoints, from the paths of their files."""
    parts = [path.split("/") for path in paths]
    return {int(step.removeprefix("step-")) for _, run, step, _ in parts if run == task}


def _checkpoint_files(hot: Path) -> dict[str, str]:
    """Return the SHA-256 of each checkpoint file in the hot tier, by its path there."""
    files = [path for path in (hot / "checkpoints").rglob("*") if path.is_file()]
    return {path.relative_to(hot).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _keys(stage: DemoSetup, url: str) -> list[str]:
    with closing(open_store(url, **stage.server.storage_options)) as store:
        return [info.key for info in store.list("")]


def _digests(stage: DemoSetup, url: str) -> dict[str, str]:
    """Return the SHA-256 of each checkpoint file in a tier of the object store, by its path there."""
    with closing(open_store(url, **stage.server.storage_options)) as store:
        keys = [info.key for info in store.list("checkpoints/")]
        return {key: hashlib.sha256(bytes(store.get(key))).hexdigest() for key in keys}
