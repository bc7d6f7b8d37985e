"""A state machine of all that can befall tiers, against an outside oracle: no last copy goes, no byte is wrong."""

import shutil
import tempfile
from collections import Counter
from itertools import count
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from tests.support.disk_bucket import Died
from tests.support.tier_world import CLASSES, World, content, pool

from tiercache import crash_points
from tiercache.errors import ArchivedShards, TierCacheError

GROUPS = [group.name for group in pool()]
CHECKPOINTS = [name for name in GROUPS if name.startswith("checkpoints/")]
KEYS = [key for group in pool() for key in group.keys]
SIZES = (1, 700, 20_000)
VERBS = ("head", "read_into", "read_tail", "get", "put", "put_if_absent", "create", "put_part", "complete", "delete",
         "list", "set_class", "copy_from")  # fmt: skip

# Where a batch has asked for pins for the last time, and where its deletions and changes of class are made.
DECIDED = ("tier_drop.decided", "tier_move.decided", "tier_move.withdrawing")
LOOKS = "tier_drop.unplaced"  # before the objects of a batch are looked at for the last time
DONE = ("tier_drop.reclassed", "tier_move.reclassed", "tier_move.withdrawn")

groups = st.sampled_from(GROUPS)
keys = st.sampled_from(KEYS)
hands = st.sampled_from(["hot", "home"])
numbers = st.integers(0, 1 << 16)
# What a store acknowledges of placements and the lock is what it received: only copies of data are verified by us.
faults = st.lists(
    st.tuples(st.sampled_from(VERBS), st.integers(1, 12), st.sampled_from(["error", "lost", "flip"])).filter(
        lambda fault: fault[2] != "flip" or fault[0] not in ("put", "put_if_absent")
    ),
    max_size=2,
)


def check(problems):
    """Raise if there are problems."""
    if problems:
        raise AssertionError("\n".join(problems))


class TierMachine(RuleBasedStateMachine):
    """Rules over one world. The oracle checks the tiers after each step, and at every crash point."""

    seen: ClassVar[Counter] = Counter()  # what has happened, in all examples

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="tiercache-tiers-"))
        self.version = 0
        self.plans: list = []
        self.handled: set[str] = set()  # groups that people have changed object by object

    def teardown(self) -> None:
        try:
            if hasattr(self, "world"):
                self.end_well()
        finally:
            if hasattr(self, "world"):
                self.inside.__exit__(None, None, None)
            shutil.rmtree(self.root)

    @initialize(shape=st.sampled_from(list(CLASSES)), is_full=st.sampled_from([True, True, True, False]))
    def begin(self, shape, is_full):
        self.world = World(self.root, shape, jobs=1)  # what comes in between comes in one place
        self.inside = self.world.entered()
        self.inside.__enter__()
        if is_full:
            self.world.fill()

    # -- what people do ---------------------------------------------------------------------------------------------

    @rule(name=groups, place=hands, size=st.sampled_from(SIZES), is_same=st.booleans())
    def write_a_group(self, name, place, size, is_same):
        """Write new bytes, or the same bytes into another tier, as a user who copies a group does."""
        self.version += not is_same
        if any(
            key in objects for objects in self.world.picture().values() for key in self.world.oracle.groups[name].keys
        ):
            self.handled.add(name)
        for key in self.world.oracle.groups[name].keys:
            self.world.write(place, key, content(key, self.version, size))

    @rule(key=keys, place=hands, size=st.sampled_from(SIZES))
    def write_one_object(self, key, place, size):
        self.version += 1
        self.handle(key)
        self.world.write(place, key, content(key, self.version, size))

    @rule(number=numbers)
    def write_an_object_anew_with_its_size(self, number):
        there = self.there("hot", "home")
        if there:
            place, key = there[number % len(there)]
            self.version += 1
            self.handle(key)
            n_bytes = len(self.world.oracle.before[place][key].data)
            self.world.write(place, key, content(key, self.version, n_bytes))

    @rule(number=numbers)
    def remove_an_object(self, number):
        there = self.there()
        if there:
            place, key = there[number % len(there)]
            self.handle(key)
            self.world.remove(place, key)

    @rule(number=numbers)
    def a_bit_turns(self, number):
        there = self.there()
        if there:
            self.world.rot(*there[number % len(there)])

    @rule(names=st.sets(groups, max_size=3))
    def pin(self, names):
        self.world.pin(*names)

    @rule(days=st.sampled_from([0.01, 0.5, 1.1, 3.0, 15.0, 40.0]))
    def days_pass(self, days):
        self.world.days_pass(days)

    def handle(self, key):
        self.handled.add(self.world.oracle.group_of[key])

    def there(self, *places):
        """Return (tier, key) of all objects that users wrote, except the data set."""
        picture = self.world.picture()
        return [(p, key) for p in places or picture for key in picture[p] if key in KEYS]

    # -- what the library does ----------------------------------------------------------------------------------------

    @rule()
    def read_all_records(self):
        """Reading gives the correct records, or an error that names what must be restored."""
        try:
            wrong = self.world.read_data_set()
        except ArchivedShards:
            assert not self.data_is_readable(), "a shard that can be read was said to be archived"
            return
        assert wrong == ""

    def data_is_readable(self) -> bool:
        picture = self.world.picture()
        shards = [name for name in self.world.oracle.groups if name.endswith(".tcs")]
        return all(any(key in objects and objects[key].readable for objects in picture.values()) for key in shards)

    @rule()
    def plan(self):
        self.plans = [*self.plans[-2:], self.world.plan()]

    @rule(number=st.integers(0, 2), faults=faults, nth=st.integers(0, 30))
    def apply(self, number, faults, nth):
        """Apply a stored plan with failing stores, in a process that dies at the nth point (0: it lives)."""
        if self.plans:
            plan = self.plans[number % len(self.plans)]
            self.watched(lambda: self.world.apply(plan), faults, nth)

    @rule(faults=faults, nth=st.integers(0, 30))
    def run_due_deletions(self, faults, nth):
        self.watched(self.world.run_due_deletions, faults, nth)

    @rule(faults=faults, nth=st.integers(0, 40))
    def run_once(self, faults, nth):
        self.watched(self.world.run_once, faults, nth)

    @rule(
        at=st.integers(1, 80),
        number=numbers,
        what=st.sampled_from(["write", "remove", "rot", "pin", "run", "write", "remove"]),
        is_planned=st.booleans(),
    )
    def somebody_comes_in_between(self, at, number, what, is_planned):
        """Somebody changes something before the nth call about an object in a run."""

        def come():
            if what == "run":
                self.another_run()
            elif what == "pin":
                self.world.pin(GROUPS[number % len(GROUPS)])
            else:
                there = self.there("hot", "home")
                if there:
                    place, key = there[number % len(there)]
                    if what != "rot":
                        self.handle(key)
                    {"write": self.write_anew, "remove": self.world.remove, "rot": self.world.rot}[what](place, key)

        work = self.world.run_once
        if is_planned and self.plans:
            plan = self.plans[-1]
            work = lambda: self.world.apply(plan)  # noqa: E731
        self.watched(work, (), 0, at, come)

    def write_anew(self, place, key):
        self.version += 1
        self.world.write(place, key, content(key, self.version, len(self.world.oracle.before[place][key].data)))

    def another_run(self):
        try:
            self.world.run_once()
        except TierCacheError:
            return  # it is told that somebody is at work

    def watched(self, work, faults, nth, at=0, come=None):
        """Do the work; check at each crash point; die at the nth; let somebody act before the call number `at`."""
        self.world.begin_job()
        script, found = self.world.script, []
        n_points, n_calls = count(1), count(1)

        def hook(name):
            if script.dead:
                raise Died
            found.extend(f"at {name}: {problem}" for problem in self.world.look())
            if name == LOOKS:
                self.world.oracle.looks_for_the_last_time()
            if name in DECIDED or name in DONE:
                self.world.oracle.decides(is_decided=name in DECIDED)
            if name.startswith("tier_") and next(n_points) == nth:
                script.dead = True
                self.seen[f"died at {name}"] += 1
                raise Died

        def on_call(verb, key):
            if come is not None and key in KEYS and next(n_calls) == at:
                script.on_call = None
                crash_points.set_hook(None)
                found.extend(f"before somebody came: {problem}" for problem in self.world.look())
                come()
                self.seen[f"somebody came before {verb}"] += 1
                crash_points.set_hook(hook)

        script.faults, script.on_call = [list(fault) for fault in faults], on_call
        before = crash_points.set_hook(hook)
        try:
            work()
        except (Died, TierCacheError, OSError) as error:
            self.seen[type(error).__name__] += 1
        finally:
            crash_points.set_hook(before)
            script.dead, script.faults, script.on_call = False, [], None
        found += self.world.look()
        self.world.oracle.decides(is_decided=False)
        check(found)

    # -- what holds ---------------------------------------------------------------------------------------------------

    @invariant()
    def nothing_is_wrong(self):
        if hasattr(self, "world"):
            check(self.world.look())

    def end_well(self):
        """Undisturbed runs, days apart, leave no group half copied.

        Except groups that users changed object by object.
        """
        for days in (0.0, 1.5, 1.5):
            self.world.days_pass(days)
            self.world.begin_job()
            self.world.run_once()
            check(self.world.look())
        check(self.world.oracle.at_rest(self.world.picture(), self.handled))
        self.read_all_records()


TestTierMachine = TierMachine.TestCase
TestTierMachine.settings = settings(max_examples=5, stateful_step_count=25)


@pytest.mark.stress
@pytest.mark.timeout(7200)
def test_tens_of_thousands_of_steps_lose_nothing(capsys):
    TierMachine.seen.clear()
    run_state_machine_as_test(TierMachine, settings=settings(max_examples=800, stateful_step_count=50))
    with capsys.disabled():
        print("\ntiers:", ", ".join(f"{what} {n}" for what, n in sorted(TierMachine.seen.items())))
