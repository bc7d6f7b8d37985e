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
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
import typer
from tests.support.clock import JumpingClock
from tests.support.forks import DEADLINE_S, ForkedChild, SendLine, run_forked
from tests.support.named_checkpoints import LAYOUTS, OWN, OWN_RUN, KeepRule, Layout, NamedCheckpoints, Objects
from tests.testing.warm_process import ROOT, WITHOUT_THREADS

from tiercache import Checkpoints, crash_points
from tiercache.cli import tier_recall, tier_verbs  # noqa: F401 - the children need not import them
from tiercache.cli.app import app

# pyarrow imports these on use, if they are installed: 0.2 s in each child.
for _name in ("pandas", "pyarrow.dataset"):
    with suppress(ImportError):
        import_module(_name)

DAY_S = 86_400.0
HOLD_S = 12 * 3600.0
DELETE_AFTER_S = 10 * DAY_S
PRICES = "{ store_gb_month = 0.01 }"
TIERS = {2: ("hot", "standard"), 3: ("hot", "standard", "archive")}
KEEP_LAST = {2: (2,), 3: (1, 4)}
# Saves get these modification times, so that all of them are older than quiet_period and each is newer than the last.
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
    """The n-th time that the command reaches a crash point; "": any crash point."""

    point: str
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


@dataclass(frozen=True, slots=True)
class AfterTime:
    """So many seconds after the start of the command."""

    seconds: float
    end: str = KILL


Interruption = AtPoint | AtCall | AtCopy | AfterTime


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a command.

    Attributes:
        code: Exit code, or minus the number of a signal.
        text: Everything that the command printed.
        is_struck: Whether it was interrupted before its end.
        reached: Number of times that it reached each crash point; of an interrupted one, empty.
        n_calls: Number of changes of files and folders that it made; of an interrupted one, 0.
        seconds: Duration.
    """

    code: int
    text: str
    is_struck: bool
    reached: Counter[str]
    n_calls: int
    seconds: float


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


def _watch_changes(calls: _Counter, copies: _Counter, names: frozenset[str]) -> None:
    """Count every change of a file that this process is about to make. It cannot be undone: only for children."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES):
            calls.count()
        if event in ("os.link", "os.rename") and os.fsdecode(arguments[1]).rpartition("/")[2] in names:
            copies.count()

    sys.addaudithook(hook)


# -- stores ----------------------------------------------------------------------------------------------------------


class RawTiers(Protocol):
    """The tiers of a world, past the library."""

    def url(self, tier: str) -> str:
        """Return the URL of a tier."""

    def put(self, tier: str, key: str, data: bytes, modified_s: float) -> None:
        """Write an object; a store that gives times itself ignores modified_s."""

    def objects(self, tier: str) -> dict[str, bytes]:
        """Return all objects of a tier, without what the library keeps beside the data."""


class FolderTiers:
    """Tiers that are folders below a root."""

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
    """Return a client of botocore for raw access to a server of tests."""
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
        rate: Bytes a second of all copies together; None: no limit.
    """

    layouts: tuple[str, ...] = ("plain",)
    n_tiers: int = 3
    deletes: bool = False
    grace_s: float = 0.0
    jobs: int = 2
    rate: int | None = None


@cache
def _tree_of_verbs() -> Any:
    """Return the application, which typer takes 50 ms to build."""
    return typer.main.get_command(app)


class World:
    """Tiers, a rule file with one rule for checkpoints, and an oracle by name."""

    def __init__(self, root: Path, setting: Setting, tiers: RawTiers | None = None) -> None:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        self.root, self.setting = root, setting
        self.tiers: RawTiers = tiers or FolderTiers(root)
        self.rules_path = root / "tiercache.toml"
        self.began_s = time.time()
        self.ahead_s = 3600.0  # a server gives its own times, and quiet_period must be over
        self.step = 0
        delete_after_s = DELETE_AFTER_S if setting.deletes else None
        self.rule = KeepRule(TIERS[setting.n_tiers], KEEP_LAST[setting.n_tiers], delete_after_s)
        self.oracle = NamedCheckpoints(self.rule)
        self._write_rules()

    def _write_rules(self) -> None:
        text = ""
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
        text += f'\n[tiering]\ngrace = "{self.setting.grace_s:.0f}s"\njobs = {self.setting.jobs}\n'
        text += f"state_dir = {json.dumps(str(self.root / 'state'))}\n"
        if self.setting.rate is not None:
            text += f"rate = {self.setting.rate}\n"
        self.rules_path.write_text(text)

    @property
    def now_s(self) -> float:
        """Return the time of this world."""
        return time.time() + self.ahead_s

    def days_pass(self, days: float) -> None:
        """Set the clock forward."""
        self.ahead_s += days * DAY_S

    # -- what people do ---------------------------------------------------------------------------------------------

    def save(self, n: int = 1) -> None:
        """Save n checkpoints of each run into the fastest tier."""
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
        """Run `tiercache tier run --once`."""
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
            reached, calls = self._watch(interruption)
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
                tell(json.dumps({"code": code, "reached": reached, "n_calls": calls.n}))

        began_s = time.monotonic()
        child = ForkedChild(work)
        ended = child.wait(DEADLINE_S)
        seconds, text = time.monotonic() - began_s, printed.read_text(errors="replace")
        if ended.hung:
            raise RuntimeError(f"{' '.join(arguments)} hung: {text}\n{ended.error}")
        facts = json.loads(ended.lines[-1]) if ended.lines else {"code": ended.code, "reached": {}, "n_calls": 0}
        code = ended.code if ended.code and not ended.lines else facts["code"]
        is_struck = interruption is not None and code in _CODES[interruption.end]
        return Outcome(
            code,
            text + ended.error,
            is_struck,
            Counter() if is_struck else Counter(facts["reached"]),
            0 if is_struck else facts["n_calls"],
            seconds,
        )

    def _watch(self, interruption: Interruption | None) -> tuple[Counter[str], _Counter]:
        """Count the points and the changes of this process, and strike it at one of them."""
        reached: Counter[str] = Counter()
        end = KILL if interruption is None else interruption.end
        at_point = _Counter(interruption.nth if isinstance(interruption, AtPoint) else 0, lambda: _end(end))
        calls = _Counter(interruption.nth if isinstance(interruption, AtCall) else 0, lambda: _end(end))
        copies = _Counter(interruption.nth if isinstance(interruption, AtCopy) else 0, lambda: _end(end))
        names = frozenset(key.rpartition("/")[2] for save in self.oracle.saves for key in save.files)
        wanted = interruption.point if isinstance(interruption, AtPoint) else ""

        def hook(name: str) -> None:
            reached[name] += 1
            if not wanted or name == wanted:
                at_point.count()

        _do_not_sync()
        crash_points.set_hook(hook)
        _watch_changes(calls, copies, names)
        if isinstance(interruption, AfterTime):
            signal.signal(signal.SIGALRM, lambda *_: _end(end))
            signal.setitimer(signal.ITIMER_REAL, interruption.seconds)
        return reached, calls

    # -- looking ----------------------------------------------------------------------------------------------------

    def picture(self) -> dict[str, Objects]:
        """Return all objects as they lie."""
        return {tier: self.tiers.objects(tier) for tier in self.rule.tiers}

    def look(self) -> list[str]:
        """Return what is wrong now."""
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
        """Start the process."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.tier.generations"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, **WITHOUT_THREADS},
        )

    def new_world(self, root: Path, setting: Setting, server: Mapping[str, str] | None = None) -> None:
        """Make a world. server: Facts of an S3 server for s3_client(), its bucket and its environment."""
        self._ask("new_world", root, setting, server)

    def save(self, n: int = 1) -> None:
        """See World."""
        self._ask("save", n)

    def days_pass(self, days: float) -> None:
        """See World."""
        self._ask("days_pass", days)

    def run(self, interruption: Interruption | None = None) -> Outcome:
        """See World."""
        return self._ask("run", interruption)

    def recall(self, path: str, interruption: Interruption | None = None) -> Outcome:
        """See World."""
        return self._ask("recall", path, interruption)

    def look(self) -> list[str]:
        """See World."""
        return self._ask("look")

    def heal(self) -> list[str]:
        """See World."""
        return self._ask("heal")

    def paths(self) -> list[str]:
        """Return the paths of the checkpoints that were saved and that the rule did not allow to be deleted."""
        return self._ask("paths")

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
        """End the process."""
        self._process.communicate()


def _serve() -> None:
    """Answer a WorldProcess on standard input and output."""
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
    import_module("tests.tier.generations")._serve()
