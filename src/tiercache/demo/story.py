"""The story: pack, list, train cold, train warm in a new process, stop, resume, kill, evict, tier; with claims."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tiercache.cache import Cache
from tiercache.data.dataset import Dataset
from tiercache.demo import results
from tiercache.demo.results import Claim, Epoch, Job, KilledJob, KilledTraining, Phase
from tiercache.demo.s3_server import S3Server
from tiercache.distribution import install_command
from tiercache.errors import TierCacheError
from tiercache.model import format_bytes
from tiercache.packer import pack
from tiercache.shard.schema import Tensor
from tiercache.shard.verify import verify_dataset
from tiercache.shard.writer import Writer
from tiercache.store import open_store
from tiercache.tier.model import Plan, TierTotals
from tiercache.tier.plan.plan_file import read_plan

PACKAGES = ("torch", "torchdata", "sklearn", "PIL")
HELD_OUT_EVERY = 6
GREY_STEP = 15  # scikit-learn's digits have 17 shades, 0 to 16

TEXT_PACKAGES = ("sklearn", "numpy")
TEXT_BYTES = 1 << 20
WINDOW_BYTES = 128

DATA_SETS = ("digits/train", "digits/test", "python")
COLD = "python"  # the data set that the rules archive
CACHE_BYTES = 1 << 30
N_KILLS = 20
# Real rules have idle = "30d", after = "14d" and grace = "24h". Only storage has a price here, because requests would
# make a move of the demo's small objects cost more than it saves; hot has the price of a cloud disk.
RULES = """\
[tiers.hot]
url = "{hot}"
prices = {{ store_gb_month = 0.08 }}

[tiers.standard]
url = "{standard}"
prices = {{ store_gb_month = 0.023 }}
storage_options = {options}

[tiers.archive]
url = "{archive}"
storage_class = "GLACIER_IR"
prices = {{ store_gb_month = 0.004 }}
storage_options = {options}

[[rules]]
name = "cold data"
match = "python/**"
idle = "0s"
to = "archive"

[[rules]]
name = "checkpoints"
match = "checkpoints/**"
keep_hot = {{ last = 1 }}
keep_standard = {{ last = 2, best = "loss:1" }}
then = "archive"
after = "0s"

[tiering]
grace = "0s"
quiet_period = "0s"
state_dir = "{state}"
"""
COMMAND_S = 300.0  # deadline of one command
ERROR_CHARACTERS = 4000  # of a training process that failed, from the end of its standard error

Show: TypeAlias = Callable[[str, Mapping[str, Any], str], None]
"""Function that prints an event of the story: its kind, its facts, and its text for people."""


def run_story(folder: Path, show: Show) -> Story:
    """Tell the whole story in a folder, and return what it found. A claim that does not hold does not end it.

    Raises:
        TierCacheError: A package of the extra `demo` is missing, the server does not start, or a step failed.
    """
    check_packages(PACKAGES)
    show("step", {"title": "An object store"}, "An object store")
    with ExitStack() as stack:
        try:
            server = S3Server(folder / "server")
            stack.callback(server.stop)
            server.start()
        except RuntimeError as error:
            raise TierCacheError(str(error)) from error
        story = Story(folder, server, show)
        story.pack()
        story.verify()
        warm = story.train()
        story.kill()
        story.evict()
        story.tier(warm)
    return story


class Story:
    """The steps of the demo, in the order of the methods.

    Attributes:
        epochs: Epochs that were trained.
        claims: Claims that were checked.
        tiers: Contents of each tier before and after the rules were applied, by its name.
    """

    def __init__(self, folder: Path, server: S3Server, show: Show) -> None:
        self._folder, self._server, self._show = folder, server, show
        self._cache, self._hot = folder / "cache", folder / "nvme"
        self._standard, self._archive = f"{server.url}/data", f"{server.url}/cold"
        self.epochs: list[Epoch] = []
        self.claims: list[Claim] = []
        self.tiers: dict[str, list[TierTotals]] = {}
        kind = "SeaweedFS, a real S3 server" if server.kind == "seaweedfs" else "moto's S3 server"
        self._note(f"{kind}, one process on this machine, at {server.endpoint}")

    def _step(self, title: str) -> None:
        self._show("step", {"title": title}, title)

    def _note(self, text: str) -> None:
        self._show("note", {"text": text}, f"  {text}")

    def _claim(self, claim: Claim) -> None:
        self.claims.append(claim)
        self._show("claim", asdict(claim), f"  {'holds' if claim.holds else 'FAILS'}: {claim.text} ({claim.found})")

    def _url(self, name: str) -> str:
        return f"{self._standard}/{name}"

    def pack(self) -> None:
        """Pack the digits, and Python source."""
        self._step("Pack two data sets, from files of installed packages, to s3://")
        images, options = self._folder / "digits", self._server.storage_options
        n_train, n_test = write_digits(images)
        self._note(f"scikit-learn's digits: {n_train + n_test} PNG images, one folder per digit, {n_test} held out")
        for part in ("train", "test"):
            url = self._url(f"digits/{part}")
            pack(images / part, url, shard_size="64KiB", block_size="16KiB", storage_options=options)
            self._describe(f"digits/{part}", sum(path.stat().st_size for path in (images / part).rglob("*.png")))
        windows = python_windows()
        self._note(f"Python source of installed packages: {len(windows)} windows of {WINDOW_BYTES + 1} bytes")
        schema = {"tokens": Tensor("uint8", (WINDOW_BYTES + 1,))}
        with Writer(
            self._url("python"), schema=schema, shard_size="64KiB", block_size="32KiB", storage_options=options
        ) as writer:
            writer.write_batch({"tokens": windows})
        self._describe("python", windows.nbytes)

    def _describe(self, name: str, input_bytes: int) -> None:
        with closing(Dataset(self._url(name), cache=False, storage_options=self._server.storage_options)) as dataset:
            columns = ", ".join(dataset.column_names)
            self._note(f"{self._url(name)}: {len(dataset)} records of {columns}; {format_bytes(input_bytes)} of input")

    def verify(self) -> None:
        """List the data sets and verify every byte."""
        self._step("List the data sets and verify every byte")
        for name in DATA_SETS:
            with closing(open_store(self._url(name), **self._server.storage_options)) as store:
                shards = [info for info in store.list("") if info.key.endswith(".tcs")]
                findings = list(verify_dataset(store))
            self._note(f"{self._url(name)}: {len(shards)} shards, {format_bytes(sum(s.n_bytes for s in shards))}")
            found = "; ".join(map(str, findings)) or "no damage found"
            self._claim(Claim(f"{name} contains what was written", not findings, found))

    def train(self) -> list[Epoch]:
        """Train three epochs, each in a process of its own, the last one in two; return those of epoch 2."""
        self._step("Epoch 1, cold: shards are fetched from S3 while the models train on them")
        self._run("cold")
        self._step("Epoch 2, warm: a new process, the same cache")
        warm = self._run("warm")
        self._claim(results.warm_fetched_nothing(warm))
        self._step("Epoch 3, in a third process: once as a whole, then again up to its middle")
        before = self._run("stop")
        self._step("The rest of epoch 3, resumed in a fourth process")
        after = self._run("resume")
        for whole, stopped, resumed in zip(before[::2], before[1::2], after, strict=True):
            self._claim(results.resumed_exactly(whole, stopped, resumed))
        return warm

    def _run(self, phase: Phase) -> list[Epoch]:
        """Run a training process, print its epochs as they end, and return them: those of one model, then the other."""
        urls = {name: self._url(name) for name in DATA_SETS}
        paths = (str(self._cache), CACHE_BYTES, str(self._folder), str(self._hot / "checkpoints"))
        epochs = []
        for epoch in run_job(Job(phase, urls, self._server.storage_options, *paths)):
            epochs.append(epoch)
            facts = asdict(epoch)
            facts["n_batches"] = len(facts.pop("digests"))
            accuracy = "" if epoch.accuracy is None else f", {epoch.accuracy:.1%} accuracy on held-out images"
            text = (
                f"  {epoch.model}, epoch {epoch.epoch} {epoch.mode}: {epoch.n_samples:,} samples in "
                f"{epoch.elapsed_s:.1f} s, {format_bytes(epoch.fetched_bytes)} fetched, loss {epoch.loss:.3f}{accuracy}"
            )
            self._show("epoch", facts, text)
        self.epochs += epochs
        return epochs

    def kill(self) -> None:
        """Kill a training again and again; it goes on from its checkpoints."""
        self._step(f"Checkpoints: a training is killed {N_KILLS} times, and goes on from its newest checkpoint")
        self._note("model, optimizer and loader, saved every other step by tc.Checkpoints to a local folder and to S3")
        checkpoints, local = f"{self._server.url}/runs", str(self._folder / "checkpoints")
        job = KilledJob(
            self._url("digits/train"),
            self._server.storage_options,
            str(self._cache),
            CACHE_BYTES,
            checkpoints,
            local,
            N_KILLS,
        )
        for line in run_process("killed", asdict(job)):
            self._claim(results.killed_alike(KilledTraining(**json.loads(line)), N_KILLS))

    def evict(self) -> None:
        """Empty the cache."""
        self._step("Evict: the cache frees its disk space; the store still has everything")
        with Cache(self._cache, size=CACHE_BYTES) as cache:
            used_bytes, n_copies = cache.stats()["bytes_used"], len(cache.entries())
            freed_bytes = cache.evict()
            left_bytes = cache.stats()["bytes_used"]
        self._note(f"{n_copies} cached files, {format_bytes(used_bytes)}; {format_bytes(freed_bytes)} freed")
        self._claim(Claim("the cache is empty after eviction", left_bytes == 0, f"{left_bytes} bytes left"))

    def tier(self, warm: list[Epoch]) -> None:
        """Archive data and checkpoints by rules, and train again.

        Args:
            warm: Epochs that were read before anything was moved.
        """
        shards = [key for key in self._keys(self._standard) if key.startswith(f"{COLD}/") and key.endswith(".tcs")]
        files = self._hot_checkpoints()
        self._step("Tiers: a rule file sends the cold data set and old checkpoints to an archive tier")
        self._note("hot is a folder, standard and archive are prefixes of the bucket; archive has class GLACIER_IR")
        self._apply_rules()
        self._claim(results.all_archived(COLD, shards, self._keys(self._standard), self._keys(self._archive)))
        hot = self._hot_checkpoints()
        remote = {"standard": self._checkpoints(self._standard), "archive": self._checkpoints(self._archive)}
        self._claim(results.nothing_lost(files, {"hot": hot, **remote}))
        for epoch in warm:
            self._claim(results.newest_stayed(epoch.model, _steps(files, epoch.model), _steps(hot, epoch.model)))
        self._step("The next training, unchanged, in a fifth process with an empty cache")
        for before, after in zip(warm, self._run("moved"), strict=True):
            self._claim(results.trained_alike(before, after))

    def _apply_rules(self) -> None:
        """Write the rule file, then plan, apply and run as a user would."""
        rules, stored = self._folder / "tiers.toml", self._folder / "plan.jsonl"
        rules.touch(mode=0o600)  # it contains the server's key, as the server's own configuration does
        options = ", ".join(f'{name} = "{value}"' for name, value in self._server.storage_options.items())
        urls = {"hot": self._hot, "standard": self._standard, "archive": self._archive}
        rules.write_text(RULES.format(**urls, state=self._folder / "state", options=f"{{ {options} }}"))
        plan = self._plan(rules, stored)
        n_shards = sum(move.kind == "shard" for move in plan.moves)
        counts = f"{len(plan.moves)} moves, {n_shards} of shards and {len(plan.moves) - n_shards} of checkpoints"
        n_bytes = sum(move.n_bytes for move in plan.moves)
        self._note(f"tiercache tier plan --out plan.jsonl: {counts}; {format_bytes(n_bytes)}")
        self._note(f"the first of them: {plan.moves[0].path} to {plan.moves[0].dst}, {plan.moves[0].reason}")
        self._note(f"tiercache tier apply plan.jsonl: {_command('apply', str(stored), '--yes', rules=rules)}")
        for _ in range(2):  # the first run completes the moves, the second finds nothing to do
            self._note(f"tiercache tier run --once, as cron would: {_command('run', '--once', rules=rules)}")
        self._plan(rules, self._folder / "after.jsonl")

    def _plan(self, rules: Path, path: Path) -> Plan:
        _command("plan", "--out", str(path), rules=rules)
        plan = read_plan(path)
        for tier in plan.tiers:
            self.tiers.setdefault(tier.name, []).append(plan.before.get(tier.name, TierTotals()))
        return plan

    def _keys(self, url: str) -> list[str]:
        with closing(open_store(url, **self._server.storage_options)) as store:
            return [info.key for info in store.list("")]

    def _hot_checkpoints(self) -> dict[str, str]:
        """Return the SHA-256 of each checkpoint file in the hot tier, by its path there."""
        files = [path for path in (self._hot / "checkpoints").rglob("*") if path.is_file()]
        return {path.relative_to(self._hot).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def _checkpoints(self, url: str) -> dict[str, str]:
        """Return the SHA-256 of each checkpoint file in a tier of the object store, by its path there."""
        with closing(open_store(url, **self._server.storage_options)) as store:
            keys = [info.key for info in store.list("checkpoints/")]
            return {key: hashlib.sha256(store.get(key)).hexdigest() for key in keys}


def _steps(paths: Mapping[str, str], model: str) -> set[int]:
    """Return the steps of a model's checkpoints, from the paths of their files."""
    names = [path.split("/") for path in paths]
    return {int(step.removeprefix("step-")) for _, run, step, _ in names if run == model}


def check_packages(names: tuple[str, ...]) -> None:
    """Check that the packages of the extra `demo` are installed. Raises TierCacheError, which says how to do it."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise TierCacheError(f"the demo needs {', '.join(missing)}: {install_command('demo')}")


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


def run_job(job: Job) -> Iterator[Epoch]:
    """Run a job in a new Python process and yield its epochs as they end. See run_process()."""
    with closing(run_process("train", asdict(job))) as lines:
        for line in lines:
            yield Epoch(**json.loads(line))


def run_process(module: str, job: Mapping[str, Any]) -> Generator[str]:
    """Run a module of the demo in a new Python process and yield the lines of its output.

    Closing the iterator ends the process.

    Args:
        module: Name of the module.
        job: JSON object for its standard input.

    Raises:
        TierCacheError: The process failed; the message has the end of its standard error.
    """
    command = [sys.executable, "-m", f"tiercache.demo.{module}"]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            if process.stdin is None or process.stdout is None:
                raise AssertionError("stdin and stdout are pipes")
            process.stdin.write(json.dumps(job))
            process.stdin.close()
            yield from process.stdout
            if process.wait() != 0:
                errors.seek(0)
                text = errors.read()[-ERROR_CHARACTERS:].strip()
                name = job.get("phase", module)
                raise TierCacheError(f"the training process ({name}) ended with {process.returncode}:\n{text}")
        finally:
            process.kill()


def _command(*arguments: str, rules: Path) -> str:
    """Run `tiercache tier ...` as a user would; return the last line that it prints."""
    command = [sys.executable, "-m", "tiercache.cli.app", "tier", *arguments, "--rules", str(rules)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise TierCacheError(f"tiercache tier {' '.join(arguments)} took longer than {COMMAND_S:g} s") from error
    if done.returncode != 0:
        message = (done.stderr or done.stdout).strip()
        raise TierCacheError(f"tiercache tier {' '.join(arguments)} ended with {done.returncode}:\n{message}")
    return done.stdout.strip().rpartition("\n")[2]
