"""The books: by example, and any sequence against a dictionary."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tiercache.catalog import Accounts, charge_bytes

PLENTY = 1 << 50


class FakeFiles:
    """A folder as a few dictionaries."""

    def __init__(self, path):
        self.path = path
        self.living = {"me", "you"}
        self.buried = []
        self.copies = {}
        self.making = []
        self.limit = {}

    def ensure(self):
        self.path.mkdir(exist_ok=True)

    def alive(self, owner):
        return owner in self.living

    def bury(self, owner):
        self.buried.append(owner)

    def limits(self):
        return {owner: n for owner, n in self.limit.items() if owner in self.living}

    def coming(self):
        return self.making

    def size_of(self, name):
        return self.copies.get(name)

    def sizes(self):
        return self.copies

    def record(self, name):
        return f"record of {name}"


@pytest.fixture
def files(tmp_path):
    return FakeFiles(tmp_path / "c")


@pytest.fixture
def open_accounts(files):
    opened = []

    def open_for(owner, limit=100_000, boot="b"):
        accounts = Accounts(files.path / "catalog.sqlite", owner, files, wal=True, boot=boot)
        opened.append(accounts)
        files.limit[owner] = limit
        accounts.register(limit)
        return accounts

    yield open_for
    for accounts in opened:
        accounts.close()


def reserve(accounts, name, n_bytes, spare=PLENTY):
    return accounts.reserve(name, n_bytes, spare_bytes=lambda: spare)


def publish(accounts, files, name, n_bytes):
    files.copies[name] = n_bytes
    accounts.publish(name, f"record of {name}", n_bytes)


@pytest.mark.parametrize(("n_bytes", "charged"), [(0, 0), (1, 4096), (4096, 4096), (4097, 8192)])
def test_bytes_are_charged_in_whole_blocks(n_bytes, charged):
    assert charge_bytes(n_bytes) == charged


def test_reservations_and_copies_together_keep_to_the_limit(open_accounts, files):
    me, you = open_accounts("me"), open_accounts("you")
    assert reserve(me, "a", 40_000)
    assert reserve(you, "b", 40_000)
    assert not reserve(me, "c", 40_000)
    publish(me, files, "a", 40_000)
    assert not reserve(me, "c", 40_000)
    you.release("b")
    assert reserve(me, "c", 40_000)
    assert me.sums() == (40_960, 40_960, 100_000)


def test_a_reservation_is_held_once_for_a_name(open_accounts):
    me = open_accounts("me")
    assert reserve(me, "a", 60_000)
    assert reserve(me, "a", 60_000)
    assert me.sums() == (0, 61_440, 100_000)
    assert me.is_reserved("a")
    me.release("a")
    me.release("a")
    assert not me.is_reserved("a")


def test_what_the_disk_has_to_spare_bounds_reservations(open_accounts):
    me = open_accounts("me")
    assert not reserve(me, "a", 8_192, spare=8_191)
    assert reserve(me, "a", 8_192, spare=8_192)
    assert not reserve(me, "b", 4_096, spare=8_192)
    assert me.lack_bytes(4_096, spare_bytes=lambda: 8_192) == 4_096


def test_the_dead_lose_their_limit_and_their_reservations(open_accounts, files):
    me, you = open_accounts("me"), open_accounts("you", limit=50_000)
    assert reserve(you, "a", 40_000)
    assert not reserve(me, "b", 40_000)
    files.living.remove("you")
    assert reserve(me, "b", 90_000)
    assert "you" in files.buried
    assert me.limit_bytes() == 100_000


def test_a_copy_whose_publisher_died_before_booking_it_is_booked_by_others(open_accounts, files):
    me, you = open_accounts("me"), open_accounts("you")
    assert reserve(you, "a", 40_000)
    assert reserve(you, "b", 40_000)
    files.copies["a"] = 40_000
    files.living.remove("you")
    assert reserve(me, "c", 10)
    assert me.sums()[:2] == (40_960, 4_096)


def test_publishing_more_than_was_reserved_is_an_error(open_accounts, files):
    me = open_accounts("me")
    assert reserve(me, "a", 1_000)
    with pytest.raises(RuntimeError, match="more bytes than were reserved"):
        publish(me, files, "a", 50_000)
    assert me.sums() == (0, 4_096, 100_000)


def test_a_copy_published_twice_counts_once(open_accounts, files):
    me, you = open_accounts("me"), open_accounts("you")
    assert reserve(me, "a", 5_000)
    assert reserve(you, "a", 5_000)
    publish(me, files, "a", 5_000)
    publish(you, files, "a", 5_000)
    assert me.sums()[:2] == (8_192, 0)


def test_a_copy_that_came_back_before_it_was_booked_out_stays_booked(open_accounts, files):
    me = open_accounts("me")
    assert reserve(me, "a", 5_000)
    publish(me, files, "a", 5_000)
    me.remove(["a"])
    assert me.sums()[0] == 8_192
    del files.copies["a"]
    me.remove(["a"])
    assert me.sums()[0] == 0


def test_uses_are_counted_and_ordered(open_accounts, files):
    me = open_accounts("me")
    for name in "abc":
        assert reserve(me, name, 10)
        publish(me, files, name, 10)
    me.add_uses({"b": 2, "a": 1})
    assert [(row.name, row.uses) for row in me.rows()] == [("c", 0), ("b", 2), ("a", 1)]


def test_a_lost_catalog_knows_copies_limits_and_what_is_being_fetched(open_accounts, files):
    me = open_accounts("me")
    files.copies = {"a": 5_000, "b": 100}
    files.making = [("me", "c", 9_000), ("ghost", "d", 9_000)]
    for path in files.path.iterdir():
        path.unlink()
    assert me.sums() == (8_192 + 4_096, 12_288, 100_000)
    assert {row.record for row in me.rows()} == {"record of a", "record of b"}


def test_a_copy_that_is_just_being_published_counts_with_its_reservation_until_it_is(open_accounts, files):
    me = open_accounts("me")
    assert reserve(me, "a", 5_000)
    files.copies = {"a": 5_000, "b": 5_000}
    me.reconcile()
    assert me.sums()[:2] == (16_384, 8_192)
    publish(me, files, "a", 5_000)
    assert me.sums()[:2] == (16_384, 0)


def test_books_of_another_boot_are_thrown_away(open_accounts, files):
    me = open_accounts("me", boot="yesterday")
    assert reserve(me, "a", 5_000)
    publish(me, files, "a", 5_000)
    me.close()
    files.copies["a"] = 100
    today = open_accounts("me", boot="today")
    today.reconcile()
    assert today.sums()[0] == 4_096


def test_an_owner_that_leaves_takes_its_reservations_along(open_accounts):
    me, you = open_accounts("me"), open_accounts("you", limit=1)
    me.unregister()
    you.unregister()
    assert me.sums() == (0, 0, 0)


def test_books_that_others_made_anew_know_the_owners_limit_again(files, open_accounts):
    mine = open_accounts("me", 50_000)
    shutil.rmtree(files.path)
    files.limit = {}  # with the folder went the owner files
    open_accounts("you", 70_000)
    assert mine.sums()[2] == 50_000
    assert mine.reserve("a", 1, spare_bytes=lambda: PLENTY)


def test_an_owner_that_left_is_not_registered_again(files, open_accounts):
    mine, yours = open_accounts("me", 50_000), open_accounts("you", 70_000)
    mine.unregister()
    mine.sums()
    assert yours.limit_bytes() == 70_000


def test_openers_that_died_leave_no_rows(files, open_accounts):
    for i in range(5):
        files.living.add(f"worker {i}")
        open_accounts(f"worker {i}", 100_000).close()
        files.living.remove(f"worker {i}")
    mine = open_accounts("me", 50_000)
    mine.reconcile()
    assert set(files.buried) == {f"worker {i}" for i in range(5)}
    files.buried.clear()
    mine.reconcile()
    assert files.buried == []


class AccountStates(RuleBasedStateMachine):
    """Two owners; the model is a dictionary of reservations and one of copies."""

    names = st.sampled_from("abcde")
    sizes = st.integers(0, 40_000)
    owners = st.sampled_from(["me", "you"])

    @initialize(limits=st.tuples(st.integers(0, 120_000), st.integers(0, 120_000)))
    def open(self, limits):
        self.folder = Path(tempfile.mkdtemp())
        self.files = FakeFiles(self.folder)
        self.limit = min(limits)
        self.reserved, self.booked = {}, {}
        self.accounts = {}
        for owner, limit in zip(("me", "you"), limits, strict=True):
            self.files.limit[owner] = limit
            accounts = Accounts(self.folder / "c.sqlite", owner, self.files, wal=True, boot="b")
            accounts.register(limit)
            self.accounts[owner] = accounts

    @rule(owner=owners, name=names, n_bytes=sizes)
    def reserve(self, owner, name, n_bytes):
        self.reserved.pop((owner, name), None)
        taken = sum(map(charge_bytes, [*self.booked.values(), *self.reserved.values()]))
        fits = taken + charge_bytes(n_bytes) <= self.limit
        assert reserve(self.accounts[owner], name, n_bytes) == fits
        if fits:
            self.reserved[owner, name] = n_bytes

    @rule(owner=owners, name=names)
    def publish(self, owner, name):
        if (owner, name) in self.reserved:
            n_bytes = self.reserved.pop((owner, name))
            self.booked[name] = self.files.copies[name] = n_bytes
            self.accounts[owner].publish(name, "r", n_bytes)

    @rule(owner=owners, name=names)
    def release(self, owner, name):
        self.reserved.pop((owner, name), None)
        self.accounts[owner].release(name)

    @rule(owner=owners, name=names)
    def remove(self, owner, name):
        self.booked.pop(name, None)
        self.files.copies.pop(name, None)
        self.accounts[owner].remove([name])

    @rule(owner=owners)
    def lose_the_file(self, owner):
        self.files.making = [(o, n, size) for (o, n), size in self.reserved.items()]
        for path in self.folder.glob("c.sqlite*"):
            path.unlink()

    @rule(owner=owners)
    def reconcile(self, owner):
        self.accounts[owner].reconcile()

    @invariant()
    def sums_agree_and_never_exceed_the_limit(self):
        if not hasattr(self, "accounts"):
            return
        for accounts in self.accounts.values():
            used, reserved, limit = accounts.sums()
            assert used + reserved <= limit == self.limit
            assert used == sum(map(charge_bytes, self.booked.values()))
            assert reserved == sum(map(charge_bytes, self.reserved.values()))

    def teardown(self):
        if hasattr(self, "accounts"):
            for accounts in self.accounts.values():
                accounts.close()
            shutil.rmtree(self.folder)


TestAccountStates = AccountStates.TestCase
TestAccountStates.settings = settings(max_examples=25, stateful_step_count=25)
