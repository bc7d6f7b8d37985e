"""Eight processes of four threads on one cache that is too small for them: no wrong byte, no byte over the limit."""

import multiprocessing
from dataclasses import dataclass, field

import pytest
from tests.stress.crowd import work
from tests.stress.scene import SIZES, Scene
from tests.support.folder_check import Expected, FolderCheck, allocated_at_once

from tiercache.waiting import SYSTEM_CLOCK

# From Python 3.12 on: what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

STARTS = ("fork", "spawn", "forkserver")
LIMIT_BYTES = 1_500_000
SAMPLE_S = 0.01
JOIN_S = 200.0


@dataclass
class Seen:
    """What was sampled from outside while they worked."""

    n_samples: int = 0
    most_bytes: int = 0
    breaches: list[str] = field(default_factory=list)


class Crowd:
    """The processes of one test: every way to start one in turn, and the policies too."""

    def __init__(self, root, *, n_processes: int, seconds: float, policies: tuple[str, ...]) -> None:
        self.scene = Scene(root)
        self.expected = Expected({self.scene.names[key]: self.scene.data[key] for key in SIZES})
        self.scene.cache(LIMIT_BYTES).close()
        self.answers = multiprocessing.get_context("spawn").Queue()
        self.processes = []
        for number in range(n_processes):
            context = multiprocessing.get_context(STARTS[number % len(STARTS)])
            policy = policies[number % len(policies)]
            settings = {"seconds": seconds, "size": LIMIT_BYTES, "policy": policy, "n_threads": 4}
            self.processes.append(context.Process(target=work, args=(str(root), settings, number, self.answers)))

    def run(self) -> tuple[Seen, list]:
        """Start all, sample until they have ended, and take their answers."""
        seen, answers = Seen(), []
        for process in self.processes:
            process.start()
        end_s = SYSTEM_CLOCK.monotonic() + JOIN_S + 1000
        while any(process.is_alive() for process in self.processes) and SYSTEM_CLOCK.monotonic() < end_s:
            self.sample(seen)
            while not self.answers.empty():  # a process ends only when its answer was taken
                answers.append(self.answers.get())
            SYSTEM_CLOCK.sleep(SAMPLE_S)
        for process in self.processes:
            process.join(JOIN_S)
            if process.is_alive():
                process.kill()
                process.join()
                answers.append((-1, 0, 0, [f"{process.name} hangs"]))
        while not self.answers.empty():
            answers.append(self.answers.get())
        self.answers.close()
        self.answers.join_thread()
        return seen, answers

    def sample(self, seen: Seen) -> None:
        """The blocks on the disk, and the books, at this instant."""
        taken_bytes = allocated_at_once(self.scene.cache_root / "copies")
        if taken_bytes is not None:
            seen.n_samples += 1
            seen.most_bytes = max(seen.most_bytes, taken_bytes)
            if taken_bytes > LIMIT_BYTES:
                seen.breaches.append(f"the files take {taken_bytes} bytes of {LIMIT_BYTES}")
        seen.breaches += FolderCheck(self.scene.cache_root, self.expected).over_limit()

    def problems(self) -> list[str]:
        """What the next process does not find in order."""
        self.scene.cache(LIMIT_BYTES).close()
        return FolderCheck(self.scene.cache_root, self.expected).problems()


def check(crowd: Crowd, seen: Seen, answers: list) -> int:
    """Returns how many reads there were."""
    assert [error for _, _, _, errors in answers for error in errors] == []
    assert len(answers) == len(crowd.processes)
    assert seen.breaches == []
    assert crowd.problems() == []
    assert seen.most_bytes > LIMIT_BYTES // 2, "the cache was never full: nothing was tried"
    assert all(n_by_cache for _, _, n_by_cache, _ in answers)
    return sum(n_reads for _, n_reads, _, _ in answers)


@pytest.mark.timeout(300)
def test_a_crowd_under_pressure_reads_right_bytes_within_the_limit(tmp_path):
    crowd = Crowd(tmp_path, n_processes=3, seconds=2.0, policies=("lru", "plan"))
    assert check(crowd, *crowd.run()) > 0


@pytest.mark.stress
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("policy", ["lru", "plan"])
def test_eight_processes_of_four_threads_keep_to_the_limit_for_minutes(tmp_path, capsys, policy):
    crowd = Crowd(tmp_path, n_processes=8, seconds=120.0, policies=(policy,))
    seen, answers = crowd.run()
    with capsys.disabled():
        n_reads, n_by_cache = (sum(answer[i] for answer in answers) for i in (1, 2))
        print(
            f"\ncrowd, {policy}: {n_reads} reads, {n_by_cache} by the cache; {seen.n_samples} samples of at most "
            f"{seen.most_bytes} bytes of {LIMIT_BYTES}; {len(seen.breaches)} over the limit"
        )
    check(crowd, seen, answers)
