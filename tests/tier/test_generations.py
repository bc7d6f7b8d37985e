"""After generations of interrupted moves, every checkpoint is complete under its own name, where the rules want it."""

import json
import secrets
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from tests.support.named_checkpoints import LAYOUTS, OWN
from tests.testing.warm_process import run_warm
from tests.tier.generations import (
    ENDS,
    INT,
    KILL,
    TERM,
    AtCall,
    AtCopy,
    AtPoint,
    Interruption,
    Outcome,
    Setting,
    WorldProcess,
)

N_ROUNDS = 1_000  # of `make stress`, each with and without delete_after
N_S3_ROUNDS = 200
SLOW_BYTES_S = 60_000


@pytest.fixture(scope="module")
def worlds():
    """A process for worlds; one for all tests, because it imports the library once."""
    process = WorldProcess()
    yield process
    process.close()


def second_generation(worlds, interruption: Interruption) -> Outcome:
    """Move a generation of checkpoints, save another one, and interrupt its moves."""
    worlds.save(6)
    first = worlds.run()
    assert first.code == 0, first.text
    worlds.save(3)
    interrupted = worlds.run(interruption)
    assert interrupted.is_struck, interrupted.text
    assert worlds.look() == []
    return interrupted


@pytest.mark.parametrize("at", [AtCopy(2, KILL), AtCopy(5, INT)], ids=repr)
@pytest.mark.parametrize("layout", [*LAYOUTS, OWN])
def test_an_interrupted_second_generation_ends_where_the_rules_want_it(worlds, tmp_path, layout, at):
    worlds.new_world(tmp_path / "world", Setting((layout,), jobs=1))
    second_generation(worlds, at)
    assert worlds.heal() == []


@pytest.mark.parametrize("at", [AtCopy(8, TERM), AtCopy(5, KILL)], ids=repr)
def test_two_tiers_after_an_interruption(worlds, tmp_path, at):
    worlds.new_world(tmp_path / "world", Setting(("plain",), n_tiers=2, jobs=1))
    second_generation(worlds, at)
    assert worlds.heal() == []


@pytest.mark.parametrize("end", [INT, TERM, KILL])
def test_a_run_at_a_slow_rate_that_is_interrupted_says_so_and_loses_nothing(worlds, tmp_path, end):
    worlds.new_world(tmp_path / "world", Setting(("plain",), rate=SLOW_BYTES_S))
    interrupted = second_generation(worlds, AtCopy(4, end))
    assert ("nothing was lost; the same command continues" in interrupted.text) is (end == INT)
    assert worlds.heal() == []


@pytest.mark.parametrize("nth", [4, 11])
def test_an_interrupted_generation_of_a_rule_that_deletes_loses_no_protected_checkpoint(worlds, tmp_path, nth):
    worlds.new_world(tmp_path / "world", Setting(("plain",), deletes=True, jobs=1))
    second_generation(worlds, AtCopy(nth, KILL))
    worlds.days_pass(20)
    assert worlds.heal() == []


def test_checkpoints_that_are_saved_between_an_interruption_and_the_next_run_are_moved_too(worlds, tmp_path):
    worlds.new_world(tmp_path / "world", Setting(("dcp",), jobs=1))
    second_generation(worlds, AtCopy(4, KILL))
    worlds.save(2)
    assert worlds.heal() == []


def test_an_interrupted_generation_with_a_grace_period_ends_where_the_rules_want_it(worlds, tmp_path):
    worlds.new_world(tmp_path / "world", Setting(("plain",), grace_s=86_400.0, jobs=1))
    second_generation(worlds, AtCopy(5, KILL))
    assert worlds.heal() == []


def test_an_interrupted_recall_is_completed_and_held(worlds, tmp_path):
    worlds.new_world(tmp_path / "world", Setting(("plain",), jobs=1))
    worlds.save(6)
    assert worlds.heal() == []
    path = worlds.paths()[0]
    assert worlds.recall(path, AtCopy(2, KILL)).is_struck
    worlds.save(1)
    assert worlds.heal() == []
    assert worlds.recall(path).code == 0
    assert worlds.heal() == []
    worlds.days_pass(2)
    assert worlds.heal() == []


@pytest.mark.s3
def test_an_interrupted_generation_in_a_bucket_ends_where_the_rules_want_it(worlds, tmp_path, s3_server):
    facts = {"endpoint": s3_server.endpoint, "bucket": s3_server.bucket} | s3_server.environment
    worlds.new_world(tmp_path / "world", Setting(("plain",), jobs=8), facts)
    second_generation(worlds, AtPoint("", 76, KILL))  # some objects are copied
    assert worlds.heal() == []


# -- any order -------------------------------------------------------------------------------------------------------

INTERRUPTIONS = st.one_of(
    st.builds(AtCopy, st.integers(1, 12), st.sampled_from(ENDS)),
    st.builds(AtCall, st.integers(1, 120), st.sampled_from(ENDS)),
    st.builds(AtPoint, st.just(""), st.integers(1, 200), st.sampled_from(ENDS)),
)


class Generations(RuleBasedStateMachine):
    """Saves, runs, recalls and interruptions in any order; nothing is lost after each, and all is at rest at the end.

    One job copies, so that the n-th change of a file is the same one each time.
    """

    def __init__(self, worlds, root, setting: Setting) -> None:
        super().__init__()
        self.worlds = worlds
        worlds.new_world(root / "world", setting)
        worlds.save(5)
        self.n_saved = 5

    @rule(n=st.integers(1, 3))
    def save(self, n):
        self.worlds.save(n)
        self.n_saved += n

    @rule()
    def run(self):
        self.ends_well(self.worlds.run())

    @rule(at=INTERRUPTIONS)
    def interrupted_run(self, at):
        self.ends_well(self.worlds.run(at))

    @precondition(lambda self: self.worlds.paths())
    @rule(data=st.data())
    def recall(self, data):
        self.ends_well(self.worlds.recall(data.draw(st.sampled_from(self.worlds.paths()))))

    @precondition(lambda self: self.worlds.paths())
    @rule(data=st.data(), at=INTERRUPTIONS)
    def interrupted_recall(self, data, at):
        self.ends_well(self.worlds.recall(data.draw(st.sampled_from(self.worlds.paths())), at))

    @rule(days=st.sampled_from((0.2, 1.5, 4.0)))
    def days_pass(self, days):
        self.worlds.days_pass(days)

    @rule()
    def rest(self):
        assert self.worlds.heal() == []

    def ends_well(self, outcome):
        assert outcome.is_struck or outcome.code == 0, outcome.text
        assert self.worlds.look() == []

    def teardown(self):
        assert self.worlds.heal() == []


def run_machine(worlds, root, setting, n_examples, n_steps):
    run_state_machine_as_test(
        lambda: Generations(worlds, root, setting),
        settings=settings(max_examples=n_examples, stateful_step_count=n_steps),
    )


def test_saves_runs_recalls_and_interruptions_in_any_order_lose_nothing(worlds, tmp_path):
    run_machine(worlds, tmp_path, Setting(("plain",), jobs=1), n_examples=2, n_steps=4)


@pytest.mark.fuzz
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("grace_s", [0.0, 86_400.0])
@pytest.mark.parametrize("deletes", [False, True], ids=["kept", "deletes"])
@pytest.mark.parametrize("n_tiers", [2, 3])
def test_many_orders_of_saves_runs_recalls_and_interruptions(worlds, tmp_path, n_tiers, deletes, grace_s):
    setting = Setting(("dcp", "files"), n_tiers=n_tiers, deletes=deletes, grace_s=grace_s, jobs=1)
    run_machine(worlds, tmp_path, setting, n_examples=20, n_steps=15)


# -- rounds ----------------------------------------------------------------------------------------------------------


def rounds(folder, n_rounds, seed, *more):
    """Return the report of that many interrupted rounds."""
    arguments = ["--rounds", str(n_rounds), "--seed", str(seed), *more]
    done = run_warm(["-m", "tests.stress.tier_generations", str(folder), *arguments], timeout_s=7000)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


@pytest.mark.stress
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("more", [(), ("--delete-after",)], ids=["kept", "deletes"])
def test_a_thousand_interrupted_generations_lose_nothing(tmp_path, capsys, more):
    with ThreadPoolExecutor(2) as pool:  # one has two tiers, the other one three
        both = [*pool.map(lambda n: rounds(tmp_path / str(n), N_ROUNDS // 2, n, *more, "--tiers", str(n)), (2, 3))]
    with capsys.disabled():
        for report in both:
            print(f"\ntiers: {report['n_rounds']} interrupted rounds, {report['n_failed']} failed: {report['by_kind']}")
    assert [report["problems"] for report in both] == [[], []]
    assert sum(report["n_rounds"] for report in both) == N_ROUNDS


@pytest.mark.stress
@pytest.mark.s3
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("more", [(), ("--delete-after",)], ids=["kept", "deletes"])
def test_interrupted_generations_in_buckets_lose_nothing(tmp_path, more):
    report = rounds(tmp_path / secrets.token_hex(4), N_S3_ROUNDS, 11, *more, "--stores", "s3")
    assert report["problems"] == []
    assert report["n_rounds"] == N_S3_ROUNDS
