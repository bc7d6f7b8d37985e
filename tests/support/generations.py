"""Generations of saves, moves and recalls between tiers, by the command alone, and interruptions of it.

The command runs in children that are forked from a warm parent without threads. What is looked at are the raw files
and objects of the tiers; see tests/support/named_checkpoints.py.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import typer
from tests.support import ROOT
from tests.support.clock import JumpingClock
from tests.support.forks import SendLine, run_forked
from tests.support.named_checkpoints import LAYOUTS, OWN, OWN_RUN, KeepRule, Layout, NamedCheckpoints, Objects
from tests.support.warm_python import WITHOUT_THREADS

from tiercache import Checkpoints, crash_points
from tiercache.cli import tier_get  # noqa: F401 - the children need not import them
from tiercache.cli.app import app
from tiercache.tier import mover

# pyarrow imports these on use, if they are installed: 0.2 s in each child.
for _name in ("pandas", "pyarrow.dataset"):
    with suppress(ImportError):
        import_module(_name)

DAY_S = 86_400.0
HOLD_S = 12 * 3600.0
DELETE_AFTER_S = 10 * DAY_S
TIERS = {2: ("hot", "standard"), 3: ("hot", "standard", "archive")}
KEEP_LAST = {2: (2,), 3: (1, 4)}
# Saves get these modification times, so that all of them are older than QUIET_PERIOD_S and each is newer than the last.
SAVED_BEFORE_S, BETWEEN_SAVES_S = 2 * 3600.0, 5.0
_BOOKS = "_tiercache/"  # folder of what the library keeps beside the data
_UNFINISHED = ".tiercache-tmp-"  # prefix of files that are being written

# How a child ends, or is told to end.
KILL, EXIT, INT, TERM = "SIGKILL", "_exit", "SIGINT", "SIGTERM"
ENDS = (KILL, EXIT, INT, TERM)
_EXITED = 77
INTERRUPTED = 130
# What an interrupted command may end with; SIGINT leaves an exit code, or the run was already over.
_CODES = {KILL: {-9}, EXIT: {_EXITED}, INT: {INTERRUPTED}, TERM: {-15, 143, INTERRUPTED}}


# -- interruptions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AtPoint:
    """The n-th crash point that the command reaches."""

    nth: int
    end: str = KILL


@dataclass(frozen=True, slots=True)
class AtCall:
    """The n-th change of a file or a folder that the command is about to make."""

    nth: int
    end: str = KILL


@dataclass(frozen=True, slots=True)
class AtCopy:
    """The n-th time that a file of a checkpoint is about to get its name in a folder."""

    nth: int
    end: str = KILL


Interruption = AtPoint | AtCall | AtCopy


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a command: exit code (or minus a signal), everything that it printed, and whether it was struck."""

    code: int
    text: str
    is_struck: bool


def _end(how: str) -> None:
    if how == EXIT:
        os._exit(_EXITED)
    os.kill(os.getpid(), getattr(signal, how))


class _Counter:
    """Calls `strike` at the n-th of what is counted, exactly once; any thread may count."""

    def __init__(self, nth: int, strike: Callable[[], None]) -> None:
        self._lock, self._nth, self._strike = Lock(), nth, strike
        self.n = 0

    def count(self) -> None:
        with self._lock:
            self.n += 1
            is_it = self.n == self._nth
        if is_it:
            self._strike()


_CHANGES = {"os.rename", "os.remove", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.truncate", "os.utime"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _do_not_sync() -> None:
    """Let this process sync no file. A process is killed here, not a machine: the kernel loses nothing."""
    os.fsync = os.fdatasync = lambda _fd: None  # type: ignore[assignment]


def _watch_changes(counter: _Counter, names: frozenset[str] | None) -> None:
    """Count every change of a file that this process is about to make; names: only files that get one of these names.

    It cannot be undone: only for children.
    """

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if names is not None:
            is_counted = event in ("os.link", "os.rename") and os.fsdecode(arguments[1]).rpartition("/")[2] in names
        else:
            is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES
            is_counted = event in _CHANGES or is_write
        if is_counted:
            counter.count()

    sys.addaudithook(hook)


# -- stores ----------------------------------------------------------------------------------------------------------


class FolderTiers:
    def __init__(self, root: Path) -> None:
        self._root = root

    def url(self, tier: str) -> str:
        return str(self._root / tier)

    def put(self, tier: str, key: str, data: bytes, modified_s: float) -> None:
        path = self._root / tier / key
        path.parent.mkdir(parents=True, exist_ok=True)
        other = path.with_name(f".other-{path.name}")
        other.write_bytes(data)
        os.utime(other, (modified_s, modified_s))
        other.replace(path)

    def objects(self, tier: str) -> dict[str, bytes]:
        found, root = {}, str(self._root / tier)
        for folder, folders, names in os.walk(root):
            if "_tiercache" in folders:
                folders.remove("_tiercache")
            below = folder[len(root) + 1 :]
            for name in names:
                if name.startswith(_UNFINISHED):  # never listed, and removed a day after their writer was killed
                    continue
                found[f"{below}/{name}" if below else name] = Path(folder, name).read_bytes()
        return found


class S3Tiers:
    """Tiers that are folders of a bucket. client: Of botocore, which starts no thread."""

    def __init__(self, client: Any, bucket: str, prefix: str) -> None:
        self._client, self._bucket, self._prefix = client, bucket, prefix

    def url(self, tier: str) -> str:
        return f"s3://{self._bucket}/{self._prefix}/{tier}"

    def put(self, tier: str, key: str, data: bytes, modified_s: float) -> None:
        self._client.put_object(Bucket=self._bucket, Key=f"{self._prefix}/{tier}/{key}", Body=data)

    def objects(self, tier: str) -> dict[str, bytes]:
        found, prefix = {}, f"{self._prefix}/{tier}/"
        for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix):
            for entry in page.get("Contents", ()):
                key = entry["Key"].removeprefix(prefix)
                if f"/{key}".find(f"/{_BOOKS}") < 0:
                    found[key] = self._client.get_object(Bucket=self._bucket, Key=entry["Key"])["Body"].read()
        return found


def s3_client(endpoint: str, access_key_id: str, secret_access_key: str) -> Any:
    from botocore.config import Config
    from botocore.session import Session

    return Session().create_client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=access_key_id,
        aws_secret_access_key=secret_access_key,
        config=Config(proxies={}),
    )


# -- the world -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """What does not change in a world.

    Attributes:
        layouts: Names of LAYOUTS, or OWN; each is a run.
        n_tiers: 2 or 3.
        deletes: Whether the rule has delete_after.
        grace_s: Grace period, in seconds.
        jobs: Number of objects that are copied concurrently.
    """

    layouts: tuple[str, ...] = ("plain",)
    n_tiers: int = 3
    deletes: bool = False
    grace_s: float = 0.0
    jobs: int = 2


@cache
def _tree_of_verbs() -> Any:
    """Return the application, which typer takes 50 ms to build."""
    return typer.main.get_command(app)


class World:
    """Tiers, a rule file with one rule for checkpoints, and an oracle by name."""

    def __init__(self, root: Path, setting: Setting, tiers: FolderTiers | S3Tiers | None = None) -> None:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        self.root, self.setting = root, setting
        self.tiers = tiers or FolderTiers(root)
        self.rules_path = root / "tiercache.toml"
        self.began_s = time.time()
        self.ahead_s = 3600.0  # a server gives its own times, and QUIET_PERIOD_S must be over
        self.step = 0
        delete_after_s = DELETE_AFTER_S if setting.deletes else None
        self.rule = KeepRule(TIERS[setting.n_tiers], KEEP_LAST[setting.n_tiers], delete_after_s)
        self.oracle = NamedCheckpoints(self.rule)
        self._write_rules()

    def _write_rules(self) -> None:
        text = f"state_dir = {json.dumps(str(self.root / 'state'))}\n"
        for name in self.rule.tiers:
            text += (
                f"[tiers.{name}]\nurl = {json.dumps(self.tiers.url(name))}\nprices = {{ store_gb_month = 0.01 }}\n\n"
            )
        text += '[[rules]]\nname = "all"\nmatch = "checkpoints/**"\n'
        for name, n in zip(self.rule.tiers, self.rule.keep_last, strict=False):
            text += f"keep_{name} = {{ last = {n} }}\n"
        text += f"then = {json.dumps(self.rule.tiers[-1])}\n"
        if self.setting.deletes:
            text += f'delete_after = "{DELETE_AFTER_S / DAY_S:.0f}d"\nmax_delete = "100%"\n'
        text += f'\n[tiering]\ngrace = "{self.setting.grace_s:.0f}s"\n'
        self.rules_path.write_text(text)

    @property
    def now_s(self) -> float:
        return time.time() + self.ahead_s

    def days_pass(self, days: float) -> None:
        self.ahead_s += days * DAY_S

    # -- what people do ---------------------------------------------------------------------------------------------

    def save(self, n: int = 1) -> None:
        steps = range(self.step + 1, self.step + n + 1)
        self.step += n
        for name in self.setting.layouts:
            if name == OWN:
                self._save_own(steps)
            else:
                for step in steps:
                    self._save(LAYOUTS[name], step)

    def _save(self, layout: Layout, step: int) -> None:
        written_s = self.began_s - SAVED_BEFORE_S + step * BETWEEN_SAVES_S
        files, beside = layout.files(step), layout.files_beside(step)
        for number, (key, data) in enumerate([*files.items(), *beside.items()]):
            self.tiers.put(self.rule.tiers[0], key, data, written_s + 0.01 * number)
        self.oracle.saved(f"{layout.run}/{layout.checkpoint(step)}", layout.run, files, written_s)
        self.oracle.beside |= beside

    def _save_own(self, steps: range) -> None:
        """Save with the class, in a child. The name of a checkpoint is that of the new folder with its step."""
        hot = self.rule.tiers[0]

        def work(_tell: SendLine) -> None:
            _do_not_sync()
            with JumpingClock() as clock, Checkpoints(f"{self.tiers.url(hot)}/{OWN_RUN}") as checkpoints:
                clock.jump(self.ahead_s)
                for step in steps:
                    numbers = np.random.default_rng(step)
                    state = {"weights": numbers.random(200, np.float32), "bias": numbers.random(17), "step": step}
                    checkpoints.save(step, state).wait()

        ended = run_forked(work)
        if ended.code:
            raise RuntimeError(ended.error)
        files: dict[int, dict[str, bytes]] = {step: {} for step in steps}
        for key, data in self.tiers.objects(hot).items():
            match = re.match(rf"{OWN_RUN}/step-([0-9]+)[.]", key)
            if match is not None and int(match[1]) in files:
                files[int(match[1])][key] = data
        for step in steps:
            path = "/".join(next(iter(files[step])).split("/")[:3])
            self.oracle.saved(path, OWN_RUN, files[step], self.now_s)

    # -- what the command does --------------------------------------------------------------------------------------

    def run(self, interruption: Interruption | None = None) -> Outcome:
        return self._command(["tier", "run", "--once", "--rules", str(self.rules_path)], interruption)

    def recall(self, path: str, interruption: Interruption | None = None) -> Outcome:
        """Run `tiercache tier get` for a checkpoint, and note the hold."""
        outcome = self._command(
            ["tier", "get", path, "--yes", "--hold", f"{HOLD_S:.0f}s", "--rules", str(self.rules_path)], interruption
        )
        self.oracle.held(path, self.now_s + HOLD_S, is_certain=outcome.code == 0)
        return outcome

    def _command(self, arguments: list[str], interruption: Interruption | None) -> Outcome:
        printed, command = self.root / "printed", _tree_of_verbs()

        def work(tell: SendLine) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with printed.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            if interruption is not None:
                self._strike_at(interruption)
            _do_not_sync()
            mover.JOBS = self.setting.jobs
            with JumpingClock() as clock:
                clock.jump(self.ahead_s)
                try:
                    command.main(arguments, prog_name="tiercache")
                    code = 0
                except SystemExit as end:
                    code = end.code or 0
                except KeyboardInterrupt:  # before the verb began
                    code = INTERRUPTED
                sys.stdout.flush()
                tell(str(code))

        ended = run_forked(work)
        text = printed.read_text(errors="replace")
        if ended.hung:
            raise RuntimeError(f"{' '.join(arguments)} hung: {text}\n{ended.error}")
        code = ended.code if ended.code and not ended.lines else int(ended.lines[-1])
        return Outcome(code, text + ended.error, interruption is not None and code in _CODES[interruption.end])

    def _strike_at(self, interruption: Interruption) -> None:
        """Count the points, or the changes of files, of this process, and strike it at one of them."""
        counter = _Counter(interruption.nth, lambda: _end(interruption.end))
        if isinstance(interruption, AtPoint):
            crash_points.set_hook(lambda _name: counter.count())
            return
        names = frozenset(key.rpartition("/")[2] for save in self.oracle.saves for key in save.files)
        _watch_changes(counter, names if isinstance(interruption, AtCopy) else None)

    # -- looking ----------------------------------------------------------------------------------------------------

    def picture(self) -> dict[str, Objects]:
        return {tier: self.tiers.objects(tier) for tier in self.rule.tiers}

    def look(self) -> list[str]:
        return self.oracle.problems_now(self.picture(), self.now_s)

    def paths(self) -> list[str]:
        """Return the paths of the checkpoints that were saved and that the rule did not allow to be deleted."""
        return [save.path for save in self.oracle.saves if save.path not in self.oracle.may_be_gone]

    def heal(self) -> list[str]:
        """Run the command, with grace periods in between, until the tiers are at rest; return what is wrong then.

        Each run must end with 0, and after each of them nothing may be lost. Without a grace period, three runs must
        suffice. With one, a checkpoint may have to wait twice: on its way to the second tier, and to the third.
        """
        wrong: list[str] = []
        n_most = 6 if self.setting.grace_s else 3
        for number in range(n_most):
            if number and self.setting.grace_s:
                self.days_pass(1.5 * self.setting.grace_s / DAY_S)
            outcome = self.run()
            if outcome.code:
                return [f"run {number + 1} ended with {outcome.code}: {outcome.text}"]
            picture, now_s = self.picture(), self.now_s
            lost = self.oracle.problems_now(picture, now_s)
            if lost:
                return [f"after run {number + 1}: {text}" for text in lost]
            wrong = self.oracle.problems_at_rest(picture, now_s)
            if not wrong:
                break
        return [f"after {n_most} runs: {text}" for text in wrong]


# -- worlds in a process of their own --------------------------------------------------------------------------------


class WorldProcess:
    """Worlds in a warm process without threads, for tests, whose own process has threads and cannot be forked.

    Call close() at the end. It has one world at a time.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.generations"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, **WITHOUT_THREADS},
        )

    def new_world(self, root: Path, setting: Setting, server: Mapping[str, str] | None = None) -> None:
        """Make a world. server: Facts of an S3 server for s3_client(), its bucket and its environment."""
        self._ask("new_world", root, setting, server)

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        return partial(self._ask, verb)

    def _ask(self, verb: str, *arguments: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump((verb, arguments), self._process.stdin)
        self._process.stdin.flush()
        is_done, answer = pickle.load(self._process.stdout)
        if not is_done:
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        self._process.communicate()


def _serve() -> None:
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # children may print
    gc.freeze()
    world: World | None = None
    while True:
        try:
            verb, arguments = pickle.load(requests)
        except EOFError:
            return
        try:
            if verb == "new_world":
                world, answer = _made(*arguments), None
            else:
                answer = getattr(world, verb)(*arguments)
            answer = (True, answer)
        except Exception:  # noqa: BLE001 - top of the process: the error goes to the test
            answer = (False, traceback.format_exc())
        pickle.dump(answer, answers)
        answers.flush()


def _made(root: Path, setting: Setting, server: Mapping[str, str] | None) -> World:
    if server is None:
        return World(root, setting)
    os.environ.update({name: value for name, value in server.items() if name.isupper()})
    client = s3_client(server["endpoint"], server["AWS_ACCESS_KEY_ID"], server["AWS_SECRET_ACCESS_KEY"])
    return World(root, setting, S3Tiers(client, server["bucket"], f"generations/{root.name}-{time.time_ns()}"))


if __name__ == "__main__":
    # Under its own name, so that both processes have the same classes.
    import_module("tests.support.generations")._serve()
