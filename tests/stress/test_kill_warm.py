"""SIGKILL at random instants of warming: never a clean-up by hand, never a wrong byte."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tiercache.cache import Cache
from tiercache.waiting import SYSTEM_CLOCK, wait_for

ROOT = Path(__file__).parents[2]
SIZE = "200MB"
N_SMALL, N_LARGE = 20, 3
LONGEST_RUN_S = 60.0
# Work takes this long on an idle machine; a kill later than that finds the child gone and does not count.
WORK_S = 0.3


class Loop:
    """One source, one cache folder, and a child that is killed again and again over the same folder."""

    def __init__(self, root: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.source, self.cache, self.progress = root / "source", root / "cache", root / "progress"
        self.source.mkdir()
        self.data = {}
        for i in range(N_SMALL + N_LARGE):
            n_bytes = 17_000_000 if i < N_LARGE else self.random.randrange(300_000)
            self.data[f"s{i}"] = self.random.randbytes(n_bytes)
            (self.source / f"s{i}").write_bytes(self.data[f"s{i}"])
        self.n_struck = self.n_mid_file = 0

    def start(self) -> subprocess.Popen:
        self.progress.unlink(missing_ok=True)
        arguments = [str(self.source), str(self.cache), str(self.progress), SIZE]
        command = [sys.executable, "-W", "error", "-m", "tests.stress.warming", *arguments]
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        assert wait_for(lambda: self.lines() or child.poll() is not None, LONGEST_RUN_S), "the child never began"
        return child

    def lines(self) -> list[str]:
        return self.progress.read_text().splitlines() if self.progress.exists() else []

    def kill_once(self) -> None:
        """Kill a child somewhere in its work; what was struck counts only if it had begun and not ended."""
        with self.start() as child:
            SYSTEM_CLOCK.sleep(self.random.uniform(0, WORK_S))
            child.send_signal(signal.SIGKILL)
            code = child.wait()
            errors = child.stderr.read()
        assert code in (0, -signal.SIGKILL), errors
        if code == -signal.SIGKILL and "begin" in self.lines() and "end" not in self.lines():
            self.n_struck += 1
            self.n_mid_file += any(self.cache.glob("copies/*.tmp"))
        self.check_contents()

    def check_contents(self) -> None:
        """Whatever has a copy's name is whole and right, at every moment."""
        right = set(self.data.values())
        for path in self.cache.glob("copies/*"):
            if "." not in path.name:
                assert path.read_bytes() in right, path

    def finish(self) -> None:
        """The next run, with no help, warms everything and leaves nothing behind."""
        with self.start() as child:
            errors = child.stderr.read()
            assert child.wait() == 0, errors
        assert self.lines()[-1] == "end"
        self.check_contents()
        copies = [path for path in self.cache.glob("copies/*") if "." not in path.name]
        assert sorted(path.read_bytes() for path in copies) == sorted(self.data.values())
        left = [*self.cache.glob("copies/*.tmp"), *self.cache.glob("locks/*"), *self.cache.glob("owners/*")]
        assert left == []

    def make_room(self) -> None:
        """Give the next child something to do."""
        with Cache(self.cache, size=SIZE, min_free=0) as cache:
            assert cache.status()["reserved_bytes"] == 0
            cache.evict(lambda entry: self.random.random() < 0.7)


def run(root: Path, n_kills: int, seed: int) -> Loop:
    loop = Loop(root, seed)
    n_tries = 0
    while loop.n_struck < n_kills:
        n_tries += 1
        assert n_tries <= 4 * n_kills + 10, f"only {loop.n_struck} of {n_tries} kills struck"
        loop.kill_once()
        if loop.random.random() < 0.2 or loop.n_struck == n_kills:
            loop.finish()
        loop.make_room()
    return loop


@pytest.mark.timeout(120)
def test_a_killed_warming_goes_on_without_a_hand(tmp_path):
    loop = run(tmp_path, 3, seed=5)
    assert loop.n_struck == 3


@pytest.mark.stress
@pytest.mark.timeout(1800)
def test_fifty_kills_of_warming_leave_nothing_wrong(tmp_path, capsys):
    loop = run(tmp_path, 50, seed=6)
    with capsys.disabled():
        print(f"\nwarming: {loop.n_struck} kills struck inside the work, {loop.n_mid_file} of them in mid-file")
    assert loop.n_struck == 50
    assert loop.n_mid_file > 0
