"""The story: pack, list, train cold, train warm in a new process, stop, resume, evict, tier; with claims to check."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tiercache.cache import Cache
from tiercache.dataset import Dataset
from tiercache.demo import events
from tiercache.demo.events import (
    Claim,
    Epoch,
    Event,
    Job,
    Note,
    PackedDataSet,
    Phase,
    Step,
    TierContents,
    event_from_line,
)
from tiercache.errors import TierCacheError
from tiercache.model import format_bytes
from tiercache.pack import pack
from tiercache.shard.read.verify import verify_dataset
from tiercache.shard.schema import Tensor
from tiercache.shard.write.dataset_writer import Writer
from tiercache.store import open_store
from tiercache.testing.s3_server import S3Server
from tiercache.tier.model import Plan, TierTotals
from tiercache.tier.plan.plan_file import read_plan

HELD_OUT_EVERY = 6
GREY_STEP = 15  # scikit-learn's digits have 17 shades, 0 to 16

TEXT_PACKAGES = ("sklearn", "numpy")
TEXT_BYTES = 1 << 20
WINDOW_BYTES = 128


def check_packages(names: tuple[str, ...]) -> None:
    """Check that the packages of the extra `demo` are installed.

    Raises:
        TierCacheError: A package is missing; the message says how to install it.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise TierCacheError(
            f"the demo needs {', '.join(missing)}: pip install 'tiercache[demo]'", missing=tuple(missing)
        )


def write_digits(folder: Path) -> tuple[int, int]:
    """Write scikit-learn's digits as folder/{train,test}/<digit>/<number>.png, 8 x 8 grey pixels each.

    Returns:
        The numbers of images in train and in test.
    """
    # These packages belong to an extra, so this module must be importable without them.
    datasets: Any = import_module("sklearn.datasets")
    pillow: Any = import_module("PIL.Image")
    digits = datasets.load_digits()
    counts = {"train": 0, "test": 0}
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        part = "test" if number % HELD_OUT_EVERY == 0 else "train"
        path = folder / part / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pillow.fromarray((pixels * GREY_STEP).astype(np.uint8)).save(path)
        counts[part] += 1
    return counts["train"], counts["test"]


def python_windows(n_bytes: int = TEXT_BYTES) -> npt.NDArray[np.uint8]:
    """Return installed Python source as byte tokens: uint8[n, WINDOW_BYTES + 1], each window with its next byte.

    Files are read in the order of their paths, until there are n_bytes.
    """
    packages = Path(sysconfig.get_paths()["purelib"])
    text = bytearray()
    for package in TEXT_PACKAGES:
        for path in sorted((packages / package).rglob("*.py")):
            text += path.read_bytes()
            if len(text) >= n_bytes:
                break
    width = WINDOW_BYTES + 1
    n_windows = min(len(text), n_bytes) // width
    return np.frombuffer(bytes(text[: n_windows * width]), np.uint8).reshape(n_windows, width)


END_S = 10.0
TAIL_CHARACTERS = 4000


def run_job(job: Job) -> Generator[Event, None, None]:
    """Run job in a new Python process and yield its events as they come. Closing the iterator ends the process.

    Raises:
        TierCacheError: The process failed; the message has the end of its standard error.
    """
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tiercache.demo.train"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
        try:
            yield from _talk(process, job)
            if process.wait() != 0:
                errors.seek(0)
                text = errors.read()[-TAIL_CHARACTERS:].strip()
                raise TierCacheError(f"the training process ({job.phase}) ended with {process.returncode}:\n{text}")
        finally:
            _end(process)


def _talk(process: subprocess.Popen[str], job: Job) -> Iterator[Event]:
    if process.stdin is None or process.stdout is None:
        raise AssertionError("stdin and stdout are pipes")
    with process.stdin, process.stdout:
        process.stdin.write(job.to_json())
        process.stdin.close()
        for line in process.stdout:
            yield event_from_line(line)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


NAMES = ("digits/train", "digits/test", "python")
CACHE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class DemoSetup:
    """Folders and URLs of the demo.

    Attributes:
        folder: Folder of everything that the demo writes.
        server: The S3 server.
    """

    folder: Path
    server: S3Server

    @property
    def cache(self) -> Path:
        """Return the folder of the cache that all training processes share."""
        return self.folder / "cache"

    @property
    def hot(self) -> Path:
        """Return the folder of the checkpoints, which is later the hot tier."""
        return self.folder / "nvme"

    @property
    def standard_url(self) -> str:
        """Return the URL of all data sets, which is later the standard tier."""
        return f"{self.server.url}/data"

    @property
    def archive_url(self) -> str:
        """Return the URL that is later the archive tier."""
        return f"{self.server.url}/cold"

    def url(self, name: str) -> str:
        """Return the URL of a data set."""
        return f"{self.standard_url}/{name}"

    def run(self, phase: Phase) -> Generator[Event, None, list[Epoch]]:
        """Run a training process; yield its events and return its epochs."""
        job = Job(
            phase=phase,
            urls={name: self.url(name) for name in NAMES},
            storage_options=self.server.storage_options,
            cache=str(self.cache),
            cache_bytes=CACHE_BYTES,
            folder=str(self.folder),
            checkpoints=str(self.hot / "checkpoints"),
        )
        epochs = []
        with closing(run_job(job)) as events:
            for event in events:
                if isinstance(event, Epoch):
                    epochs.append(event)
                yield event
        return epochs


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
    yield from _move(rules, stage.folder)
    yield from _holdings("after", _plan(rules, stage.folder / "after.jsonl"))
    yield from _check(stage, shards, files)
    yield Step("The next training, unchanged, in a fifth process with an empty cache")
    moved = yield from stage.run("moved")
    yield from events.trained_alike([epoch for epoch in warm if epoch.mode == "warm"], moved)


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


def _move(rules: Path, folder: Path) -> Iterator[Event]:
    """Yield the events of planning, applying and running."""
    stored = folder / "plan.jsonl"
    plan = _plan(rules, stored)
    yield from _holdings("before", plan)
    n_shards = sum(move.kind == "shard" for move in plan.moves)
    yield Note(
        f"tiercache tier plan --out plan.jsonl: {len(plan.moves)} moves, {n_shards} of shards and "
        f"{len(plan.moves) - n_shards} of checkpoints; {format_bytes(sum(move.n_bytes for move in plan.moves))}"
    )
    yield Note(f"the first of them: {plan.moves[0].path} to {plan.moves[0].dst}, {plan.moves[0].reason}")
    yield Note(f"tiercache tier apply plan.jsonl: {_command('apply', str(stored), '--yes', rules=rules)}")
    for _ in range(N_RUNS):
        yield Note(f"tiercache tier run --once, as cron would: {_command('run', '--once', rules=rules)}")


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
    yield events.moved_whole(COLD, shards, standard, archive)
    hot = _checkpoint_files(stage.hot)
    remote = {name: _digests(stage, url) for name, url in _remote(stage).items()}
    yield events.nothing_lost(files, {"hot": hot} | remote)
    for task in TASKS:
        yield events.newest_stayed(task, _steps(files, task), _steps(hot, task))


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


PACKAGES = ("torch", "torchdata", "sklearn", "PIL")


def run_story(folder: Path) -> Generator[Event, None, None]:
    """Yield the events of the whole story in a folder. A claim that does not hold does not end the story.

    The S3 server runs until the iterator is closed or exhausted.

    Raises:
        TierCacheError: A package of the extra `demo` is missing, the server does not start, or a step failed.
    """
    check_packages(PACKAGES)
    yield Step("An object store")
    with _started(folder / "server") as server:
        stage = DemoSetup(folder, server)
        yield _about(server)
        yield from _pack(stage)
        yield from _look(stage)
        warm = yield from _train(stage)
        yield from _evict(stage)
        yield from run_tiering(stage, warm)


@contextmanager
def _started(folder: Path) -> Iterator[S3Server]:
    """Yield a running server, which is stopped even if its start is interrupted."""
    with ExitStack() as stack:
        try:
            server = S3Server(folder)
            stack.callback(server.stop)
            server.start()
        except RuntimeError as error:
            raise TierCacheError(str(error)) from error
        yield server


def _about(server: S3Server) -> Note:
    if server.kind == "moto":
        return Note(f"moto's S3 server, because SeaweedFS has no package for this platform, at {server.endpoint}")
    return Note(f"SeaweedFS, a real S3 server, one process on this machine, at {server.endpoint}")


def _pack(stage: DemoSetup) -> Iterator[Event]:
    yield Step("Pack two data sets, from files of installed packages, to s3://")
    images = stage.folder / "digits"
    n_train, n_test = write_digits(images)
    yield Note(f"scikit-learn's digits: {n_train + n_test} PNG images, one folder per digit, {n_test} held out")
    options = stage.server.storage_options
    for part in ("train", "test"):
        pack(
            images / part, stage.url(f"digits/{part}"), shard_size="64KiB", block_size="16KiB", storage_options=options
        )
        raw_bytes = sum(path.stat().st_size for path in (images / part).rglob("*.png"))
        yield _packed(stage, f"digits/{part}", raw_bytes)
    windows = python_windows()
    yield Note(
        f"Python source of installed packages: {len(windows)} windows of {WINDOW_BYTES} bytes and their next byte"
    )
    schema = {"tokens": Tensor("uint8", (WINDOW_BYTES + 1,))}
    with Writer(
        stage.url("python"), schema=schema, shard_size="64KiB", block_size="32KiB", storage_options=options
    ) as writer:
        writer.write_batch({"tokens": windows})
    yield _packed(stage, "python", windows.nbytes)


def _packed(stage: DemoSetup, name: str, raw_bytes: int) -> PackedDataSet:
    dataset = Dataset(stage.url(name), cache=False, storage_options=stage.server.storage_options)
    shards_bytes = dataset.__tiercache__().source.shard_bytes
    columns = ", ".join(dataset.column_names)
    return PackedDataSet(
        name, stage.url(name), columns, len(dataset), len(shards_bytes), raw_bytes, int(shards_bytes.sum())
    )


def _look(stage: DemoSetup) -> Iterator[Event]:
    yield Step("List the data sets and verify every byte")
    for name in NAMES:
        with closing(open_store(stage.url(name), **stage.server.storage_options)) as store:
            names = [info.key for info in store.list("")]
            findings = list(verify_dataset(store))
        shards = sum(1 for key in names if key.endswith(".tcs"))
        yield Note(f"{stage.url(name)}: {len(names)} objects: {shards} shards, and the files of its versions")
        yield Claim(
            f"{name} contains what was written", not findings, "; ".join(map(str, findings)) or "no damage found"
        )


def _train(stage: DemoSetup) -> Generator[Event, None, Sequence[Epoch]]:
    """Yield the events of three epochs; return the epochs of the second."""
    yield Step("Epoch 1, cold: shards are fetched from S3 while the models train on them")
    yield from stage.run("cold")
    yield Step("Epoch 2, warm: a new process, the same cache")
    warm = yield from stage.run("warm")
    yield events.warm_fetched_nothing(warm)
    yield Step("Epoch 3, in a third process: once as a whole, then again up to its middle")
    before = yield from stage.run("stop")
    yield Step("The rest of epoch 3, resumed in a fourth process")
    after = yield from stage.run("resume")
    yield from events.resumed_exactly(before, after)
    return warm


def _evict(stage: DemoSetup) -> Iterator[Event]:
    yield Step("Evict: the cache frees its disk space; the store still has everything")
    with Cache(stage.cache, size=CACHE_BYTES) as cache:
        used_bytes, n_copies = cache.stats()["bytes_used"], len(cache.entries())
        freed_bytes = cache.evict()
        left_bytes = cache.stats()["bytes_used"]
    yield Note(f"{n_copies} cached files, {format_bytes(used_bytes)}; {format_bytes(freed_bytes)} freed")
    yield Claim("the cache is empty after eviction", left_bytes == 0, f"{left_bytes} bytes left")
