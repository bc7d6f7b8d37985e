"""The accounts of the cache: by example, and any sequence of calls against a dictionary."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tiercache.cache import accounts as accounts_module
from tiercache.cache.accounts import Accounts

PLENTY = 1 << 50


class FakeFiles:
    """A cache folder made of dictionaries, and its owners."""

    def __init__(self, path):
        self.path = path
        self.living = {"me", "you"}
        self.buried = []
        self.copies = {}

    def seen_by(self, owner):
        """What an owner has in place of an accounts.Owners."""
        return SeenBy(self, owner)

    def ensure(self):
        self.path.mkdir(exist_ok=True)

    def alive(self, owner):
        return owner in self.living

    def remove_files_of(self, owner):
        self.buried.append(owner)

    def charge_of(self, name):
        return self.copies.get(name)

    def charges(self):
        return self.copies


class SeenBy:
    def __init__(self, files, me):
        self.files, self.me = files, me

    def __getattr__(self, name):
        return getattr(self.files, name)


@pytest.fixture
def files(tmp_path):
    return FakeFiles(tmp_path / "c")


@pytest.fixture
def open_accounts(files):
    opened = []

    def open_for(owner, limit=100_000):
        accounts = Accounts(files.path / "catalog.sqlite", files.seen_by(owner))
        opened.append(accounts)
        accounts.register(limit)
        return accounts

    yield open_for
    for accounts in opened:
        accounts.close()


def reserve(accounts, name, charge, spare=PLENTY):
    return accounts.reserve(name, charge, usable_bytes=lambda: spare)


def set_charge(accounts, files, name, charge):
    files.copies[name] = charge
    accounts.set_charge(name, charge)


def test_the_free_space_of_the_disk_bounds_reservations(open_accounts):
    me = open_accounts("me")
    assert not reserve(me, "a", 8_192, spare=8_191)
    assert reserve(me, "a", 8_192, spare=8_192)
    assert not reserve(me, "b", 4_096, spare=8_192)
    assert me.lack_bytes(4_096, usable_bytes=lambda: 8_192) == 4_096


def test_dead_owners_lose_their_limit_and_reservations(open_accounts, files):
    me, you = open_accounts("me"), open_accounts("you", limit=50_000)
    assert reserve(you, "a", 40_000)
    assert not reserve(me, "b", 40_000)
    files.living.remove("you")
    assert reserve(me, "b", 90_000)
    assert "you" in files.buried
    assert me.limit_bytes() == 100_000


def test_a_copy_that_was_fetched_again_before_its_removal_stays_booked(open_accounts, files):
    me = open_accounts("me")
    assert reserve(me, "a", 5_000)
    set_charge(me, files, "a", 5_000)
    me.remove(["a"])
    assert me.sums()[0] == 5_000
    del files.copies["a"]
    me.remove(["a"])
    assert me.sums()[0] == 0


def test_bytes_that_a_dead_owner_did_not_book_are_measured(open_accounts, files):
    me, you = open_accounts("me"), open_accounts("you")
    assert reserve(you, "a", 40_000)
    set_charge(you, files, "a", 40_000)
    assert reserve(you, "a", 30_000)
    files.copies["a"] = 55_000
    files.living.remove("you")
    assert reserve(me, "b", 10)
    assert me.sums()[:2] == (55_000, 10)


def test_an_unbooked_copy_is_measured_by_reconcile(open_accounts, files):
    me = open_accounts("me")
    assert reserve(me, "a", 5_000)
    set_charge(me, files, "a", 5_000)
    files.copies["a"] = 9_000
    me.reconcile()
    assert me.sums()[0] == 9_000
    assert reserve(me, "a", 1_000)
    files.copies["a"] = 9_500
    me.reconcile()
    assert me.sums()[:2] == (9_000, 1_000)


def test_every_process_gets_each_change_once(open_accounts, files):
    me, you = open_accounts("me"), open_accounts("you")
    for name in "ab":
        set_charge(me, files, name, 10)
    since, is_whole, rows, _ = you.changes(("", 0))
    assert is_whole
    assert sorted(row.name for row in rows) == ["a", "b"]
    me.add_uses(["b"])
    del files.copies["a"]
    me.remove(["a"])
    since, is_whole, rows, gone = you.changes(since)
    assert (is_whole, [row.name for row in rows], gone) == (False, ["b"], ["a"])
    assert you.changes(since)[1:] == (False, [], [])


def test_a_query_from_before_the_oldest_known_change_gets_all_rows(open_accounts, files, monkeypatch):
    monkeypatch.setattr(accounts_module, "MOST_GONE", 3)
    me = open_accounts("me", limit=10_000)
    for name in "abcd":
        set_charge(me, files, name, 300)
    before, *_ = me.changes(("", 0))
    files.copies = {"d": 300}
    me.remove("abc")
    assert not me.changes(before)[1]
    set_charge(me, files, "e", 300)
    files.copies = {"d": 300}
    me.remove("e")
    _, is_whole, rows, _ = me.changes(before)
    assert is_whole
    assert [row.name for row in rows] == ["d"]


def test_accounts_of_another_boot_are_rebuilt(open_accounts, files, monkeypatch):
    me = open_accounts("me")
    assert reserve(me, "a", 5_000)
    set_charge(me, files, "a", 5_000)
    me.close()
    files.copies["a"] = 100
    monkeypatch.setattr(accounts_module, "boot_id", lambda: "tomorrow")
    today = open_accounts("me")
    today.reconcile()
    assert today.sums()[0] == 100


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
            accounts = Accounts(self.folder / "c.sqlite", self.files.seen_by(owner))
            accounts.register(limit)
            self.accounts[owner] = accounts

    @rule(owner=owners, name=names, n_bytes=sizes)
    def reserve(self, owner, name, n_bytes):
        before = self.reserved.pop((owner, name), None)
        taken = sum([*self.booked.values(), *self.reserved.values()])
        fits = taken + n_bytes <= self.limit
        assert reserve(self.accounts[owner], name, n_bytes) == fits
        if fits:
            self.reserved[owner, name] = n_bytes
        elif before is not None:
            self.reserved[owner, name] = before

    @rule(owner=owners, name=names, share=st.floats(0.01, 1.0))
    def set_charge(self, owner, name, share):
        """Some or all reserved bytes were written."""
        held = self.reserved.pop((owner, name), 0)
        if held:
            self.booked[name] = self.files.copies[name] = self.booked.get(name, 0) + int(held * share)
            self.accounts[owner].set_charge(name, self.booked[name])

    @rule(owner=owners, name=names)
    def release(self, owner, name):
        self.reserved.pop((owner, name), None)
        self.accounts[owner].release(name)

    @rule(owner=owners, name=names)
    def remove(self, owner, name):
        self.booked.pop(name, None)
        self.files.copies.pop(name, None)
        self.accounts[owner].remove([name])

    @rule()
    def lose_the_file(self):
        for path in self.folder.glob("c.sqlite*"):
            path.unlink()
        for accounts in self.accounts.values():  # each owner tells what it has reserved
            accounts.limit_bytes()

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
            assert used == sum(self.booked.values())
            assert reserved == sum(self.reserved.values())

    def teardown(self):
        if hasattr(self, "accounts"):
            for accounts in self.accounts.values():
                accounts.close()
            shutil.rmtree(self.folder)


TestAccountStates = AccountStates.TestCase
TestAccountStates.settings = settings(stateful_step_count=20)
