"""Retention: what each rule keeps in each tier, deletions in batches, and leftovers."""

import os
import time

import pytest
from tests.support.checkpoint_files import START_S, write_checkpoint
from tests.support.faults import Fault, FaultStore
from tests.support.stores import CountingStore

from tiercache.checkpoint.checkpoints import Checkpoints
from tiercache.checkpoint.format import MANIFEST_NAME, checkpoint_objects, list_names, metrics_key
from tiercache.checkpoint.housekeeping import Retention, plan_retention
from tiercache.checkpoint.run_stores import RunStores
from tiercache.errors import NotFound, StoreError
from tiercache.keep import Keep, encode_pin, parse_pin
from tiercache.model import ObjectInfo
from tiercache.store import LocalFolder, MemoryStore
from tiercache.store.contract import WrapperStore

HOUR_S = 3600.0
DAY_S = 86400.0


class Dated(WrapperStore):
    """A store whose objects have the dates of a clock of the test."""

    def __init__(self, inner, now_s=START_S):
        super().__init__(inner)
        self.now_s = now_s
        self.dates = {}

    def around(self, method, key, call):
        found = call()
        if method in ("put", "put_if_absent", "complete"):
            self.dates[key] = self.now_s
        return found

    def info_outside(self, info):
        return ObjectInfo(info.key, info.n_bytes, info.etag, modified_s=self.dates.get(info.key, self.now_s))


@pytest.fixture
def remote():
    store = Dated(MemoryStore(f"retention-{os.urandom(8).hex()}"))
    yield store
    store.delete([info.key for info in store.list()])


@pytest.fixture
def local(tmp_path):
    return LocalFolder(tmp_path / "local")


def hours(store, *steps, at=0.0, **facts):
    """Checkpoints of these steps, one each hour."""
    return [
        write_checkpoint(store, step, created_s=START_S + (at + number) * HOUR_S, **facts)
        for number, step in enumerate(steps)
    ]


def steps_of(store):
    return sorted(int(name[5:17]) for name in list_names(store))


def retained(store, *keeps, now_s=START_S + 1000 * HOUR_S, local=None):
    """Run retention and return the steps that are left in the store."""
    tiers = {"remote": store} if local is None else {"local": local, "remote": store}
    Retention(RunStores(tiers), keeps, now=lambda: now_s).run()
    return steps_of(store)


# -- rules ---------------------------------------------------------------------------------------------------------


def kept(remote, *keeps, now_s):
    """Steps that a plan leaves in a store. Plans are pure: the same scan gives the same plan."""
    scan = RunStores({"remote": remote}).scan()
    plan, again = (plan_retention(scan, keeps, ("remote",), now_s) for _ in range(2))
    assert plan == again
    return sorted(int(name[5:17]) for name in scan.copies if name not in plan.deletes["remote"])


def test_each_key_keeps_what_the_keep_list_of_a_rule_file_keeps_and_always_the_newest(remote):
    for number, (step, loss, acc) in enumerate(
        [(100, 0.9, 0.8), (200, 0.4, 0.3), (300, 0.2, 0.5), (400, 0.5, 0.6), (500, 0.6, 0.7)]
    ):
        metrics = {"loss": loss, "acc": acc}
        write_checkpoint(remote, step, created_s=START_S + number * HOUR_S, metrics=metrics)
    for keeps, left in (
        ([], [100, 200, 300, 400, 500]),
        ([Keep(last=2)], [400, 500]),
        ([Keep(every_steps=200)], [200, 400, 500]),
        ([Keep(every="2h")], [100, 300, 500]),
        ([Keep(best="loss:2")], [200, 300, 500]),
        ([Keep(best="acc:1:max")], [100, 500]),
        ([Keep(best=["loss:1", "acc:1:max"])], [100, 300, 500]),
        ([Keep(younger_than="3h")], [300, 400, 500]),
        ([Keep(best="los:1")], [100, 200, 300, 400, 500]),  # a misspelt metric deletes nothing
        ([Keep(last=1), Keep(every_steps=200)], [200, 400, 500]),  # any rule keeps
    ):
        assert kept(remote, *keeps, now_s=START_S + 5 * HOUR_S) == left, keeps
    assert retained(remote, Keep(last=2)) == [400, 500]


def test_a_pinned_checkpoint_is_deleted_by_no_rule_and_by_no_call(remote):
    hours(remote, 1, 2, 3)
    checkpoints = Checkpoints(remote)
    checkpoints.pin(1, "the release of May")
    assert retained(remote, Keep(last=1)) == [1, 3]
    with pytest.raises(ValueError, match=r"is pinned \(the release of May\) and was not deleted; unpin\('step-"):
        checkpoints.delete(1)
    first = checkpoints.list()[0]
    assert (first.is_pinned, first.why_pinned) == (True, "the release of May")
    assert first.kept_by["remote"][-1] == "pinned: the release of May"
    checkpoints.unpin(1)
    assert retained(remote, Keep(last=1)) == [3]


def test_a_pin_that_cannot_be_read_counts_as_a_pin(remote):
    names = hours(remote, 1, 2)
    for text in [b"{torn", b'{"pinned": 1}', b'{"pinned": false, "why": 1}']:
        remote.put(f"{names[0]}/pin.json", text)
        assert retained(remote, Keep(last=1)) == [1, 2]
        with pytest.raises(ValueError, match="is pinned"):
            Checkpoints(remote).delete(1)
    for why in (None, "", "the release of May"):
        assert parse_pin(encode_pin(why)) == why
    Checkpoints(remote).unpin(1)
    assert retained(remote, Keep(last=1)) == [2]


def test_the_metrics_of_a_killed_save_are_collected_with_its_files(remote):
    name = write_checkpoint(remote, 1, commit=False)
    remote.put(f"_tiercache/metrics/{name}.json", b"{}")
    Retention(RunStores({"remote": remote}), now=lambda: START_S + 99 * DAY_S).collect()
    assert [*remote.list()] == []


def test_list_says_which_rules_keep_a_checkpoint_in_each_tier(remote, local):
    for store in (local, remote):
        hours(store, 1, 2, metrics={"loss": 0.5})
    checkpoints = Checkpoints(remote, local=local.root, keep=[Keep(last=1, tier="local"), Keep(last=5, best="loss:1")])
    checkpoints.pin(1)
    first, second = checkpoints.list()
    assert first.kept_by == {
        "local": ("last=5, best='loss:1'", "pinned"),
        "remote": ("last=5, best='loss:1'", "pinned"),
    }
    assert second.kept_by["local"] == ("last=1", "last=5, best='loss:1'", "latest")
    assert (first.is_pinned, first.metrics, first.tiers, first.state) == (
        True,
        {"loss": 0.5},
        ("local", "remote"),
        "complete",
    )


# -- tiers ---------------------------------------------------------------------------------------------------------


def test_which_local_and_remote_checkpoints_stay(tmp_path):
    """Steps 1, 2, ... of each tier, one each hour; a step has one name in both."""
    rows = (
        # what is shown, local, remote, rules, left in each
        ("a rule of one tier", (1, 2, 3), (1, 2, 3), [Keep(last=1, tier="local")], [3], [1, 2, 3]),
        ("not uploaded yet", (1, 2, 3), (1,), [Keep(last=1, tier="local")], [2, 3], [1]),
        ("the store would not keep it", (1, 2, 3), (3,), [Keep(last=1)], [3], [3]),
        ("the last one of the store until the next one", (3,), (1, 2), [Keep(every_steps=1000)], [3], [2]),
        ("the next one has come", (3,), (1, 2, 3), [Keep(every_steps=1000)], [3], [3]),
        ("waiting ones displace no uploaded one", (3, 4), (1, 2), [Keep(last=2, tier="remote")], [3, 4], [1, 2]),
    )
    for number, (text, on_local, on_remote, keeps, *left) in enumerate(rows):
        local, remote = LocalFolder(tmp_path / f"local{number}"), Dated(LocalFolder(tmp_path / f"remote{number}"))
        for store, steps in ((local, on_local), (remote, on_remote)):
            for step in steps:
                hours(store, step, at=step)
        assert [retained(remote, *keeps, local=local), steps_of(local)] == left[::-1], text


def test_a_local_checkpoint_that_was_moved_away_from_the_store_stays_only_if_a_rule_keeps_it(remote, local):
    name, *_ = hours(local, 1, 2, 3)
    hours(remote, 2, 3, at=1)
    remote.put(metrics_key(name), b"{}")
    assert retained(remote, Keep(last=1, tier="local"), Keep(last=9, tier="remote"), local=local) == [2, 3]
    assert steps_of(local) == [3]


def test_a_local_checkpoint_stays_while_it_is_uploaded_whatever_the_rules_say(remote, local):
    _, uploading, _ = hours(local, 1, 2, 3)
    hours(remote, 3)
    tiers = {"local": local, "remote": remote}
    Retention(RunStores(tiers), [Keep(last=1)], unfinished=lambda: {uploading}, now=lambda: START_S).run()
    assert steps_of(local) == [2, 3]


def test_files_of_the_ranks_of_one_machine_are_kept_as_long_as_a_local_copy(remote, local):
    deleted = hours(remote, 0, at=-1, commit=False)  # or never committed
    names = hours(remote, 1, 2, 3)
    begun = hours(remote, 4, at=5, commit=False)
    for name in deleted + names + begun:
        local.put(f"{name}/tensors-rank00001-00001-of-00001.safetensors", b"a part")
    retention = Retention(RunStores({"local": local, "remote": remote}), [Keep(last=2)], now=time.time)
    retention.run(["local"])
    assert list_names(local) == []
    assert [*checkpoint_objects(local.list())] == names[1:] + begun
    assert steps_of(remote) == [1, 2, 3], "only the local tier was asked for"
    retention.run()
    assert steps_of(remote) == [2, 3]


def test_a_rule_for_local_without_a_local_folder_is_refused(remote):
    with pytest.raises(ValueError, match="have no local folder"):
        Checkpoints(remote, keep=[Keep(last=1, tier="local")])


def test_an_unfinished_save_is_no_checkpoint_and_displaces_none(remote):
    hours(remote, 1, 2)
    hours(remote, 3, at=5, commit=False)
    assert retained(remote, Keep(last=1), now_s=START_S + 6 * HOUR_S) == [2]
    assert len({info.key.split("/")[0] for info in remote.list()}) == 2


# -- deletions -----------------------------------------------------------------------------------------------------


def test_many_checkpoints_are_deleted_by_few_requests(remote):
    hours(remote, *range(1, 41))
    counting = CountingStore(remote)
    assert retained(counting, Keep(last=1)) == [40]
    assert counting.n_calls("delete") <= 4


def test_a_deletion_removes_every_object_and_folder(remote, local):
    for store in (local, remote):
        hours(store, 1, 2)
    checkpoints = Checkpoints(remote, local=local.root)
    report = checkpoints.delete(1)
    assert report.deleted.keys() == {"local", "remote"}
    assert report.n_bytes > 0
    for store in (local, remote):
        assert {info.key.split("/")[0] for info in store.list()} == {list_names(store)[0]}
    assert len(list(local.root.iterdir())) == 1
    with pytest.raises(NotFound):
        checkpoints.delete(1)


def test_the_manifest_goes_first_so_that_no_reader_sees_a_part_of_a_checkpoint(remote):
    names = hours(remote, 1, 2)
    broken = FaultStore(remote, [Fault("delete", nth=2, retryable=False)])
    with pytest.raises(StoreError):
        Retention(RunStores({"remote": broken}), [Keep(last=1)], now=lambda: START_S).run()
    assert list_names(remote) == names[1:]
    checkpoints = Checkpoints(remote)
    assert [(one.step, one.state) for one in checkpoints.list()] == [(1, "incomplete"), (2, "complete")]
    Retention(RunStores({"remote": remote}), now=lambda: START_S + DAY_S).collect()
    assert {info.key.split("/")[0] for info in remote.list()} == {names[1]}, "the rest goes after a day"


def test_a_save_of_this_process_is_not_deleted(remote):
    (name,) = hours(remote, 1, commit=False)
    retention = Retention(RunStores({"remote": remote}), unfinished=lambda: {name}, now=lambda: START_S + 99 * DAY_S)
    with pytest.raises(ValueError, match="is being saved"):
        retention.delete([name])
    assert retention.collect().n_leftovers == 0


def test_a_save_that_ends_while_the_stores_are_listed_is_deleted_by_no_call(remote):
    """The listing has its files without the manifest: a deletion would leave a manifest without files."""
    name = write_checkpoint(remote, 1, commit=False)
    saving = {name}

    class Ending(RunStores):
        def scan(self, *args):
            found = super().scan(*args)
            saving.clear()
            return found

    retention = Retention(Ending({"remote": remote}), unfinished=lambda: {*saving}, now=lambda: START_S + 9 * DAY_S)
    with pytest.raises(ValueError, match="is being saved"):
        retention.delete([name])
    for act in (retention.run, retention.collect):
        saving.add(name)
        assert act().n_leftovers == 0
    assert retention.collect().n_leftovers > 0


def test_leftovers_of_a_killed_save_are_removed_after_a_day(remote, local):
    hours(remote, 1)
    (name,) = hours(remote, 2, commit=False)
    write_checkpoint(local, 2, commit=False)
    (local.root / "step-000000000009.20270115T080200000Z-00c0de").mkdir()

    def left(now_s):
        Retention(RunStores({"remote": remote}), now=lambda: now_s).collect()
        return any(info.key.startswith(name) for info in remote.list())

    assert left(START_S + DAY_S - 1)
    assert not left(START_S + DAY_S)
    now_s = local.head(next(iter(local.list())).key).modified_s + DAY_S + 1
    Retention(RunStores({"local": local}), now=lambda: now_s).collect()
    assert list(local.list()) == []


# -- plans and reports ---------------------------------------------------------------------------------------------


def test_a_run_deletes_only_complete_checkpoints_and_its_report_names_them(remote):
    names = hours(remote, 1, 2, 3)
    remote.delete([next(info.key for info in remote.list(f"{names[0]}/") if not info.key.endswith(MANIFEST_NAME))])
    report = Retention(RunStores({"remote": remote}), [Keep(last=1)], now=lambda: START_S).run()
    assert report.deleted == {"remote": (names[1],)}
