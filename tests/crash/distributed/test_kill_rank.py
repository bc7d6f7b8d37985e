"""A rank that is killed in mid-epoch: the rest of the order is served by fewer, and a training goes on bit by bit."""

import json
import random
import signal
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from tests.support.decoded import make_columns as make_pictures
from tests.support.decoded import write as write_pictures
from tests.support.loader_jobs import augmented_loader
from tests.support.ranks import LONGEST_S, Job, run_ranks, together
from tests.support.warm_python import WarmPython

import tiercache as tc
from tiercache.waiting import wait_for

N, BATCH_SIZE = 2003, 6
pytestmark = pytest.mark.timeout(600)

TRAIN, EXAMPLE = "tests.support.loader_jobs:train", "examples.ddp:main"


def lines_of(path: Path) -> list[str]:
    """Whole lines: a kill may have torn the last."""
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def kill_one(job: Job, progress: Path, after: int, rank: int) -> None:
    """SIGKILL to one rank when `progress` has so many lines; the others end by themselves, and none hangs."""
    ready = wait_for(lambda: len(lines_of(progress)) >= after or not job.is_running(), LONGEST_S, longest_poll_s=0.002)
    assert ready, job.said()
    job.kill(rank)
    codes = job.exit_codes()
    assert codes[rank] == -signal.SIGKILL, job.said()
    assert all(codes), "a rank went on without its peer"


def serve_until_killed(
    python: WarmPython, folder: Path, n_ranks: int, n_records: int, seed: int, arguments: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """What the ranks were served up to the last saved state, when one of them was killed; and that state."""
    chance, save_every = random.Random(seed), arguments["save_every"]
    after = chance.randrange(save_every + 1, n_records // (n_ranks * BATCH_SIZE) - 10)
    with Job(python, TRAIN, n_ranks, folder, {**arguments, "resume": False}) as job:
        kill_one(job, folder / "served-0.jsonl", after, chance.randrange(n_ranks))
    logs = [[json.loads(line) for line in lines_of(folder / f"served-{rank}.jsonl")] for rank in range(n_ranks)]
    state = json.loads((folder / "state.json").read_text())
    n_saved = state["offset"] // (n_ranks * BATCH_SIZE)
    assert n_saved > 0
    assert n_saved % save_every == 0
    return list(chain.from_iterable(chain.from_iterable(log[:n_saved]) for log in logs)), state


def check_resumed_with_fewer(python: WarmPython, url: Path, folder: Path, n_ranks: int, n_left: int, seed: int) -> None:
    arguments = {"url": str(url), "folder": str(folder), "batch_size": BATCH_SIZE, "save_every": 5}
    served, state = serve_until_killed(python, folder, n_ranks, N, seed, arguments)
    parts = run_ranks(python, TRAIN, n_left, folder / "resumed", {**arguments, "resume": True})
    rest = list(chain.from_iterable(chain.from_iterable(parts)))
    assert sorted(served + rest) == list(range(N))
    with_one = tc.DataLoader(tc.Dataset(url), batch_size=n_left * BATCH_SIZE, shuffle=True)
    with_one.load_state_dict(state)
    assert together(parts) == [sorted(batch["id"].tolist()) for batch in with_one]
    with_one.dataset.close()


def test_two_ranks_serve_the_rest_of_a_killed_job_of_three(packed, tmp_path, warm_python):
    check_resumed_with_fewer(warm_python, packed(N), tmp_path, 3, 2, seed=1)


@pytest.mark.stress
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n_ranks", "n_left"), [(2, 1), (3, 1), (4, 3), (4, 2), (4, 1)])
def test_fewer_ranks_serve_the_rest_of_a_killed_job(packed, tmp_path, warm_python, n_ranks, n_left, seed):
    check_resumed_with_fewer(warm_python, packed(N), tmp_path, n_ranks, n_left, seed)


N_PICTURES = 601


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data", make_pictures(N_PICTURES))


def check_augmented_alike(
    python: WarmPython, url: Path, folder: Path, killed: tuple[int, int], resumed: tuple[int, int], seed: int
) -> None:
    """killed, resumed: numbers of ranks and of workers."""
    arguments = {"url": str(url), "folder": str(folder), "batch_size": BATCH_SIZE, "save_every": 3}
    (n_ranks, workers), (n_left, other_workers) = killed, resumed
    rows, _ = serve_until_killed(python, folder, n_ranks, N_PICTURES, seed, {**arguments, "workers": workers})
    arguments |= {"resume": True, "workers": other_workers}
    parts = run_ranks(python, TRAIN, n_left, folder / "resumed", arguments)
    rows += chain.from_iterable(chain.from_iterable(parts))
    loader = augmented_loader(str(url), 50, 0, 11)
    whole = list(chain.from_iterable(loader))
    loader.dataset.close()
    assert sorted(row[0] for row in whole) == list(range(N_PICTURES))
    assert len(rows) - N_PICTURES < n_left  # each record once, but for the padding of the last step
    assert sorted({tuple(row) for row in rows}) == sorted(map(tuple, whole))


def test_a_killed_job_resumes_with_the_same_augmentations_on_other_ranks_and_workers(pictures, tmp_path, warm_python):
    check_augmented_alike(warm_python, pictures, tmp_path, (2, 1), (4, 0), seed=1)


@pytest.mark.stress
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("killed", "resumed"), [((4, 0), (2, 2)), ((4, 1), (3, 0)), ((2, 0), (4, 1)), ((3, 2), (1, 1))], ids=str
)
def test_any_killed_job_resumes_with_the_same_augmentations(pictures, tmp_path, warm_python, killed, resumed, seed):
    check_augmented_alike(warm_python, pictures, tmp_path, killed, resumed, seed)


SAVE_EVERY = 7  # steps


class Trainings:
    """examples/ddp.py on two ranks: once in one go, and once killed again and again."""

    def __init__(self, python: WarmPython, folder: Path, epochs: int) -> None:
        self.folder = folder
        self._python = python
        self._epochs = epochs
        self.weights = self._finish("whole")
        self.losses = [dict(self._steps("whole", rank)) for rank in (0, 1)]

    def kill_and_resume(self, n_kills: int, seed: int) -> int:
        """How many steps were trained again after kills."""
        chance = random.Random(seed)
        for _ in range(n_kills):
            done = self._steps("killed", 0)
            if len(dict(done)) > len(self.losses[0]) - 40:
                break  # too near the end to be struck with certainty
            after = len(done) + chance.randrange(1, 30)
            with Job(self._python, EXAMPLE, 2, self.folder / "job", self._arguments("killed")) as job:
                kill_one(job, self.folder / "killed" / "losses-0.txt", after, chance.randrange(2))
        assert self._finish("killed") == self.weights
        for rank in (0, 1):
            steps = self._steps("killed", rank)
            assert all(loss == self.losses[rank][step] for step, loss in steps)
            # Rank 0 saves when it has its own line; a rank that was killed before its own of that step writes it never.
            missing = self.losses[rank].keys() - dict(steps).keys()
            assert len(missing) <= (n_kills if rank else 0)
            assert all((step + 1) % SAVE_EVERY == 0 for step in missing)
        return len(self._steps("killed", 0)) - len(self.losses[0])

    def _arguments(self, name: str) -> dict[str, Any]:
        folders = {"data": str(self.folder / "data"), "folder": str(self.folder / name)}
        return {**folders, "epochs": self._epochs, "save_every": SAVE_EVERY}

    def _finish(self, name: str) -> str:
        answers = run_ranks(self._python, EXAMPLE, 2, self.folder / "job", self._arguments(name))
        assert answers[0] == answers[1]
        return answers[0]

    def _steps(self, name: str, rank: int) -> list[tuple[int, str]]:
        """(step, loss as hexadecimal digits), as they were trained: some twice where the run was killed."""
        lines = lines_of(self.folder / name / f"losses-{rank}.txt")
        return [(int(step), loss) for step, loss in (line.split() for line in lines)]


def test_a_killed_training_resumes_bit_for_bit(tmp_path, warm_python):
    Trainings(warm_python, tmp_path, epochs=1).kill_and_resume(1, seed=2)


@pytest.mark.stress
@pytest.mark.timeout(1800)
def test_twenty_kills_of_a_training_change_no_bit(tmp_path, warm_python, capsys):
    n_again = Trainings(warm_python, tmp_path, epochs=8).kill_and_resume(20, seed=3)
    with capsys.disabled():
        print(f"\ntwo-rank training: 20 kills, {n_again} steps trained again")
