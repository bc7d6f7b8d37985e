"""After generations of interrupted moves, every checkpoint is complete under its own name, where the rules want it."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from tests.support.generations import (
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
from tests.support.named_checkpoints import LAYOUTS, OWN


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


CASES = {
    **{layout: (Setting((layout,), jobs=1), AtCopy(5, KILL)) for layout in (*LAYOUTS, OWN)},
    "Ctrl-C": (Setting(jobs=1), AtCopy(5, INT)),
    "two tiers": (Setting(n_tiers=2, jobs=1), AtCopy(8, TERM)),
    "a grace period": (Setting(grace_s=86_400.0, jobs=1), AtCopy(5, KILL)),
    "a rule that deletes": (Setting(deletes=True, jobs=1), AtCopy(11, KILL)),
}


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_second_generation_ends_where_the_rules_want_it(worlds, tmp_path, case):
    setting, at = CASES[case]
    worlds.new_world(tmp_path / "world", setting)
    interrupted = second_generation(worlds, at)
    assert ("nothing was lost; the same command continues" in interrupted.text) is (at.end == INT)
    worlds.save(1)
    worlds.days_pass(20.0 if setting.deletes else 0.0)
    assert worlds.heal() == []


def test_an_interrupted_recall_is_completed_and_held(worlds, tmp_path):
    worlds.new_world(tmp_path / "world", Setting(jobs=1))
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


def facts_of(server) -> dict[str, str]:
    return {"endpoint": server.endpoint, "bucket": server.bucket} | server.environment


@pytest.mark.s3
def test_an_interrupted_generation_in_a_bucket_ends_where_the_rules_want_it(worlds, tmp_path, s3_server):
    worlds.new_world(tmp_path / "world", Setting(jobs=8), facts_of(s3_server))
    second_generation(worlds, AtPoint(76, KILL))  # some objects are copied
    assert worlds.heal() == []


# -- any order -------------------------------------------------------------------------------------------------------

INTERRUPTIONS = st.one_of(
    st.builds(AtCopy, st.integers(1, 12), st.sampled_from(ENDS)),
    st.builds(AtCall, st.integers(1, 120), st.sampled_from(ENDS)),
    st.builds(AtPoint, st.integers(1, 200), st.sampled_from(ENDS)),
)


class Generations(RuleBasedStateMachine):
    """Saves, runs, recalls and interruptions in any order; nothing is lost after each, and all is at rest at the end.

    One job copies, so that the n-th change of a file is the same one each time.
    """

    def __init__(self, worlds, root, setting: Setting, server=None) -> None:
        super().__init__()
        self.worlds = worlds
        worlds.new_world(root / "world", setting, server)
        worlds.save(5)

    @rule(n=st.integers(1, 3))
    def save(self, n):
        self.worlds.save(n)

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


def run_machine(n_examples, n_steps, *arguments):
    run_state_machine_as_test(
        lambda: Generations(*arguments), settings=settings(max_examples=n_examples, stateful_step_count=n_steps)
    )


def test_saves_runs_recalls_and_interruptions_in_any_order_lose_nothing(worlds, tmp_path):
    run_machine(2, 4, worlds, tmp_path, Setting(jobs=1))


@pytest.mark.stress
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("grace_s", [0.0, 86_400.0])
@pytest.mark.parametrize("deletes", [False, True], ids=["kept", "deletes"])
@pytest.mark.parametrize("n_tiers", [2, 3])
def test_hundreds_of_interruptions_in_any_order_lose_nothing(worlds, tmp_path, n_tiers, deletes, grace_s):
    setting = Setting(("dcp", "files"), n_tiers=n_tiers, deletes=deletes, grace_s=grace_s, jobs=1)
    run_machine(20, 15, worlds, tmp_path, setting)


@pytest.mark.stress
@pytest.mark.s3
@pytest.mark.timeout(7200)
def test_many_interruptions_in_buckets_lose_nothing(worlds, tmp_path, s3_server):
    run_machine(20, 15, worlds, tmp_path, Setting(("dcp", OWN), deletes=True, jobs=8), facts_of(s3_server))
