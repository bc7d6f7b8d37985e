"""SIGKILL at random instants of training: the resumed run serves what the uninterrupted one serves."""

import json
from pathlib import Path

import pytest
from tests.stress.kills import KillLoop
from tests.stress.training import N_EPOCHS, make_loader
from tests.support.records import SCHEMA, check_batch, make_columns
from tests.support.warm_python import WarmPython

import tiercache as tc

N = 1600


class Training:
    """A packed data set, the run that nobody interrupted, and a child that is killed."""

    def __init__(self, python: WarmPython, root: Path, seed: int) -> None:
        self.url, self.cache, self.state, self.log = root / "data", root / "cache", root / "state", root / "log"
        with tc.Writer(self.url, schema=SCHEMA, shard_size="8KiB", block_size="1KiB") as writer:
            writer.write_batch(make_columns(N))
        with tc.Cache(root / "whole", size="64MiB", min_free=0) as cache:
            loader = make_loader(self.url, cache)
            self.expected = {}
            for epoch in range(N_EPOCHS):
                for step, batch in enumerate(loader):
                    self.expected[epoch, step * 8] = check_batch(batch)
            loader.dataset.close()
        arguments = [str(self.url), str(self.cache), str(self.state), str(self.log)]
        self.loop = KillLoop(python, "tests.stress.training", root / "progress", arguments, work_s=0.25, seed=seed)

    def check(self) -> None:
        """Each step served what it must, and at the end each was served; the next run finds an emptier cache."""
        served = {}
        for line in self.log.read_text().splitlines() if self.log.exists() else []:
            epoch, offset, ids = line.split(" ", 2)
            if not ids.endswith("]"):
                continue  # the kill tore the line
            assert json.loads(ids) == self.expected[int(epoch), int(offset)]
            served[int(epoch), int(offset)] = ids
        if "end" in self.loop.lines():
            assert served.keys() == self.expected.keys()
            self.state.unlink(missing_ok=True)
            self.log.unlink(missing_ok=True)
        with tc.Cache(self.cache, size="64MiB", min_free=0) as cache:
            cache.evict(lambda entry: self.loop.random.random() < 0.5)

    def run(self, n_kills: int) -> int:
        self.loop.run(n_kills, self.check)
        return self.loop.n_struck


@pytest.mark.timeout(120)
def test_a_killed_training_resumes_with_the_same_batches(tmp_path, warm_python):
    assert Training(warm_python, tmp_path, seed=3).run(3) == 3


@pytest.mark.stress
@pytest.mark.timeout(1800)
def test_fifty_kills_of_training_serve_no_wrong_record(tmp_path, warm_python, capsys):
    n_struck = Training(warm_python, tmp_path, seed=4).run(50)
    with capsys.disabled():
        print(f"\ntraining: {n_struck} kills struck inside the work")
    assert n_struck == 50
