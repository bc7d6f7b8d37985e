"""SIGKILL at random instants of warming: never a clean-up by hand, never a wrong byte."""

from pathlib import Path

import pytest
from tests.stress.kills import KillLoop
from tests.support.warm_python import WarmPython

from tiercache.cache import Cache

SIZE = "200MB"
N_SMALL, N_LARGE = 20, 3
# Work takes this long on an idle machine; a kill later than that finds the child gone and does not count.
WORK_S = 0.3


class Warming:
    """One source, one cache folder, and a child that is killed again and again over the same folder."""

    def __init__(self, python: WarmPython, root: Path, seed: int) -> None:
        self.cache, source = root / "cache", root / "source"
        arguments = [str(source), str(self.cache), SIZE]
        self.loop = KillLoop(python, "tests.stress.warming", root / "progress", arguments, work_s=WORK_S, seed=seed)
        self.n_mid_file = 0
        source.mkdir()
        self.data = []
        for i in range(N_SMALL + N_LARGE):
            n_bytes = 17_000_000 if i < N_LARGE else self.loop.random.randrange(300_000)
            self.data.append(self.loop.random.randbytes(n_bytes))
            (source / f"s{i}").write_bytes(self.data[-1])

    def check(self) -> None:
        """Whatever has a copy's name is whole and right; a run that ended has warmed everything and leaves nothing."""
        copies = [path.read_bytes() for path in self.cache.glob("copies/*") if "." not in path.name]
        assert set(copies) <= set(self.data)
        if "end" in self.loop.lines():
            assert sorted(copies) == sorted(self.data)
            left = [
                *self.cache.glob("copies/*.part"),
                *self.cache.glob("copies/*.map"),
                *self.cache.glob("locks/*"),
                *self.cache.glob("owners/*"),
            ]
            assert left == []
        else:
            self.n_mid_file += any(self.cache.glob("copies/*.part"))
        with Cache(self.cache, size=SIZE, min_free=0) as cache:  # gives the next child something to do
            assert cache.status()["reserved_bytes"] == 0
            cache.evict(lambda entry: self.loop.random.random() < 0.7)

    def run(self, n_kills: int) -> int:
        self.loop.run(n_kills, self.check)
        return self.loop.n_struck


@pytest.mark.timeout(120)
def test_a_killed_warming_continues_without_clean_up(tmp_path, warm_python):
    assert Warming(warm_python, tmp_path, seed=5).run(3) == 3


@pytest.mark.stress
@pytest.mark.timeout(1800)
def test_fifty_kills_of_warming_leave_nothing_wrong(tmp_path, warm_python, capsys):
    warming = Warming(warm_python, tmp_path, seed=6)
    n_struck = warming.run(50)
    with capsys.disabled():
        print(f"\nwarming: {n_struck} kills struck inside the work, {warming.n_mid_file} of them in mid-file")
    assert n_struck == 50
    assert warming.n_mid_file > 0
