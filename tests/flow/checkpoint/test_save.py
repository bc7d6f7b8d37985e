"""Saves: what is committed, when save() returns, back-pressure, and failures in the background."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.support import ROOT
from tests.support.checkpoint_reader import leftovers, read_checkpoint, same
from tests.support.faults import Fault, FaultKind, FaultStore
from tests.support.forks import in_child
from tests.support.guide_session import blocks
from tests.support.saves import WAIT_S, GateStore, a_state, opened

import tiercache as tc
from tiercache.checkpoint import writer
from tiercache.checkpoint.checkpoints import Checkpoints
from tiercache.checkpoint.format import list_names
from tiercache.checkpoint.housekeeping import GC_AGE_S
from tiercache.errors import CommitConflict, CorruptCheckpoint, StoreError
from tiercache.store import LocalFolder, MemoryStore, open_store
from tiercache.store.contract import WrapperStore

GUIDE = ROOT / "docs" / "guide" / "checkpoints.md"


@pytest.fixture
def memory_store():
    return MemoryStore(f"checkpoints-{uuid.uuid4().hex}", "run")


# -- what is committed ------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_the_same_in_the_local_folder_and_at_the_store(tmp_path):
    with opened(tmp_path / "remote", local=tmp_path / "local") as checkpoints:
        saved = checkpoints.save(7, a_state(), metrics={"loss": 1.5, "n": 3}, note={"why": "test"})
        assert saved.wait("remote", WAIT_S)
        assert saved.done("local")
        for store in (checkpoints.local_store, checkpoints.remote_store):
            manifest, state = read_checkpoint(store, saved.name)
            assert same(state, a_state())
            assert (manifest.step, manifest.metrics, manifest.note) == (7, {"loss": 1.5, "n": 3}, {"why": "test"})
            assert json.loads(store.get(f"{saved.name}/metrics.json")) == {"loss": 1.5, "n": 3}


@pytest.mark.s3
def test_a_checkpoint_in_s3_reads_back_and_only_whole_objects_are_there(s3_server, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "PART_BYTES", 5 << 20)
    store = s3_server.store("checkpoints-save")
    state = {"large": torch.arange(3 << 20), "small": torch.ones(3)}
    for local in (None, tmp_path / "local"):
        with opened(store, local=local, writers=2) as checkpoints:
            saved = checkpoints.save(1, state)
            assert saved.wait(timeout_s=WAIT_S)
            assert same(read_checkpoint(store, saved.name)[1], state)
            checkpoints.close()
    assert leftovers(store) == {}
    store.close()


def test_a_state_may_change_when_save_has_returned(tmp_path):
    store = GateStore(LocalFolder(tmp_path))
    with opened(store) as checkpoints:
        state = a_state()
        saved = checkpoints.save(1, state)
        assert store.arrived.wait(WAIT_S)
        assert not saved.done()
        for tensor in (state["model"]["w"], state["half"]):
            tensor.zero_()
        state["counts"][:] = 0
        state["model"]["b"] = None
        store.gate.set()
        assert saved.wait(timeout_s=WAIT_S)
        assert same(read_checkpoint(store.inner, saved.name)[1], a_state())


def test_a_wrong_argument_is_refused_at_once_and_nothing_is_written(tmp_path):
    for wrong in ({"pending": 0}, {"writers": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            Checkpoints(tmp_path, **wrong)
    checkpoints = Checkpoints(tmp_path)
    for state, message in ((torch.nn.Linear(1, 1), "state is a dict"), ({"x": object()}, r"state\['x'\]")):
        with pytest.raises(TypeError, match=message):
            checkpoints.save(1, state)
    with checkpoints:
        saved = checkpoints.save(1, {"x": 1})
        assert saved.wait(timeout_s=WAIT_S), "the next save works"
        with pytest.raises(ValueError, match="there is no local= folder"):
            saved.wait("local")
        with pytest.raises(ValueError, match="'remote', got 'local'"):
            checkpoints.wait("local")
    names = sorted(info.key.rpartition("/")[2] for info in checkpoints.remote_store.list())
    assert [name for name in names if "step-" not in name] == ["checkpoint.json", "state.json"]


# -- the check at the store -------------------------------------------------------------------------------------------


def failure_of(store, **options):
    """The error of a save to this store."""
    with opened(store, **options) as checkpoints:
        saved = checkpoints.save(1, a_state())
        with pytest.raises(StoreError) as caught:
            saved.wait(timeout_s=WAIT_S)
        assert saved.state == "failed"
        assert saved.error is caught.value
        return caught.value


def flipped(data):
    copy = bytearray(data)
    copy[-1] ^= 1
    return copy


class EditingStore(WrapperStore):
    """A store that changes what it is given, and every call succeeds: DCP's writer through fsspec dropped bytes."""

    def __init__(self, inner, edit):
        super().__init__(inner)
        self.edit = edit

    def create(self, key):
        upload = self.inner.create(key)
        put_part = upload.put_part
        upload.put_part = lambda number, data: put_part(number, self.edit(memoryview(data)))
        return upload


def test_a_store_that_drops_or_changes_bytes_without_an_error_gets_no_manifest(memory_store):
    for edit, text in ((lambda data: data[:-1], "was written"), (lambda data: flipped(data), "CRC-32C")):
        assert text in str(failure_of(EditingStore(memory_store, edit)))
        assert list_names(memory_store) == []


def test_a_local_file_that_has_changed_is_not_uploaded(tmp_path, memory_store):
    gate = GateStore(memory_store, "create")
    with opened(gate, local=tmp_path) as checkpoints:
        saved = checkpoints.save(1, a_state())
        assert saved.wait("local", WAIT_S)
        assert gate.arrived.wait(WAIT_S)
        (path,) = (tmp_path / saved.name).glob("*.safetensors")
        data = bytearray(path.read_bytes())
        data[5000] ^= 1
        path.write_bytes(data)
        gate.gate.set()
        with pytest.raises(StoreError, match="was not uploaded") as caught:
            saved.wait("remote", WAIT_S)
        assert isinstance(caught.value.__cause__, CorruptCheckpoint)
        assert f"it is committed in {tmp_path}" in str(caught.value)
        assert saved.done("local")
    assert list_names(memory_store) == []


# -- the manifest -----------------------------------------------------------------------------------------------------


def test_a_lost_answer_of_the_manifest_s_put_does_not_matter_and_a_put_without_effect_is_repeated(memory_store):
    lost = FaultStore(memory_store, [Fault("put_if_absent", kind=FaultKind.LOST_RESPONSE)])
    for store in (lost, LosingStore(memory_store, 2)):
        with opened(store) as checkpoints:
            saved = checkpoints.save(1, a_state())
            assert saved.wait(timeout_s=WAIT_S)
            assert same(read_checkpoint(memory_store, saved.name)[1], a_state())
    error = failure_of(LosingStore(memory_store, 99))
    assert "answers" in str(error)
    assert len(leftovers(memory_store)) == 1, "files stay if nobody knows whether the manifest was put"


class LosingStore(WrapperStore):
    """Every answer to a conditional put is lost; the first n puts have no effect either."""

    def __init__(self, inner, n_without_effect):
        super().__init__(inner)
        self.n_left = n_without_effect

    def put_if_absent(self, key, data):
        self.n_left -= 1
        if self.n_left < 0:
            self.inner.put_if_absent(key, data)
        raise StoreError("the answer was lost", url=key, maybe_done=True, retryable=True)


def test_another_manifest_under_the_name_is_a_conflict(memory_store):
    class Racing(WrapperStore):
        def put_if_absent(self, key, data):
            self.inner.put(key, b"other")
            return False

    assert isinstance(failure_of(Racing(memory_store)).__cause__, CommitConflict)


# -- failures ---------------------------------------------------------------------------------------------------------


def test_a_failed_save_is_raised_by_the_next_one_and_named(memory_store):
    store = FaultStore(memory_store, [Fault("complete", retryable=False)])
    with opened(store) as checkpoints:
        failed = checkpoints.save(1, a_state(1))
        checkpoints.join()
        assert checkpoints.saves == (failed,)
        with pytest.raises(StoreError, match=r"the checkpoint of step 1 was not saved: .*scripted fault"):
            checkpoints.save(2, a_state(2))
        saved = checkpoints.save(2, a_state(2))
        assert saved.wait(timeout_s=WAIT_S)
        assert checkpoints.saves == (failed,), "it stays named"
        checkpoints.wait(timeout_s=WAIT_S)
    assert list_names(memory_store) == [saved.name]
    assert leftovers(memory_store) == {}, "what it had written is deleted"


def test_a_failed_save_is_raised_by_wait_by_close_and_by_its_handle_alone(memory_store):
    for end in ("wait", "close"):
        with opened(FaultStore(memory_store, [Fault("create", retryable=False)])) as checkpoints:
            checkpoints.save(1, a_state())
            checkpoints.join()
            with pytest.raises(StoreError, match="step 1"):
                getattr(checkpoints, end)()
    with opened(FaultStore(memory_store, [Fault("create", retryable=False)])) as checkpoints:
        saved = checkpoints.save(1, a_state())
        with pytest.raises(StoreError):
            saved.wait(timeout_s=WAIT_S)
        assert checkpoints.save(2, a_state()).wait(timeout_s=WAIT_S)
        assert len(checkpoints._memory._free) == 1, "memory is used again after a failure"
        checkpoints.close()


def test_the_error_that_ends_a_with_block_is_not_hidden_by_a_failed_save(memory_store):
    def save_and(end):
        with Checkpoints(FaultStore(memory_store, [Fault("create", retryable=False)])) as checkpoints:
            checkpoints.save(1, a_state())
            end()

    with pytest.raises(ZeroDivisionError):
        save_and(lambda: 1 / 0)
    with pytest.raises(StoreError, match="step 1"):
        save_and(lambda: None)


@pytest.mark.parametrize(
    "fault",
    [Fault("complete", keys="*state.json", retryable=False), Fault("put_if_absent", retryable=False)],
    ids=["file", "manifest"],
)
def test_a_full_disk_does_not_stay_full_and_the_checkpoint_is_uploaded_from_memory(
    tmp_path, memory_store, fault, caplog
):
    with opened(memory_store, local=tmp_path) as checkpoints:
        checkpoints._local.store = FaultStore(LocalFolder(tmp_path), [fault])
        saved = checkpoints.save(1, a_state())
        assert saved.wait("local", WAIT_S), "it is safe at the store"
        assert saved.state == "done"
        assert (saved.done("local"), saved.done("remote")) == (False, True)
        assert [info.key for info in LocalFolder(tmp_path).list()] == ["run.json"]
        assert same(read_checkpoint(memory_store, saved.name)[1], a_state())
        assert f"{saved.name}: uploaded from memory, because it has no local copy" in caplog.text
        assert checkpoints.save(2, a_state()).wait("remote", WAIT_S)
        assert list_names(LocalFolder(tmp_path)) == list_names(memory_store)[1:]


def test_a_run_that_restarts_where_the_clock_is_behind_keeps_what_it_saves(tmp_path, monkeypatch):
    for seconds, steps in ((0.0, (100, 200)), (-30.0, (210, 220))):
        monkeypatch.setattr(time, "time", lambda real=time.time, ahead_s=seconds: real() + ahead_s)
        with Checkpoints(tmp_path, keep=tc.Keep(last=2)) as checkpoints:
            for step in steps:
                checkpoints.save(step, {"n": step}).wait()
    with Checkpoints(tmp_path) as checkpoints:
        assert [one.step for one in checkpoints.list()] == [210, 220]
        assert checkpoints.load()["n"] == 220


def test_a_local_folder_serves_one_run(tmp_path):
    with pytest.raises(ValueError, match="local= is the folder of the checkpoints itself"):
        Checkpoints(tmp_path, local=tmp_path / ".")
    with Checkpoints(tmp_path / "a", local=tmp_path / "local") as checkpoints:
        checkpoints.save(1, {"n": 1}).wait()
    with pytest.raises(
        ValueError,
        match=r"has local copies of other checkpoints than those at .*/b: give each run a local folder of its own",
    ):
        Checkpoints(tmp_path / "b", local=tmp_path / "local")
    (tmp_path / "a" / "run.json").unlink()  # as a rule of tiers may move it
    with Checkpoints(tmp_path / "a", local=tmp_path / "local") as checkpoints:
        assert checkpoints.load()["n"] == 1
        checkpoints.save(2, {"n": 2}).wait()
    assert (tmp_path / "a" / "run.json").read_bytes() == (tmp_path / "local" / "run.json").read_bytes()


def fill_disk(patch, *methods, key=None):
    """Let these methods of local folders fail, for one key or all. Return the list of the calls that failed."""
    failed = []

    def full(method, write):
        def call(self, written, *arguments):
            if key not in (None, written):
                return write(self, written, *arguments)
            failed.append((method, written))
            raise StoreError(f"cannot write: {os.strerror(errno.ENOSPC)}", url=written)

        return call

    for method in methods:
        patch.setattr(LocalFolder, method, full(method, getattr(LocalFolder, method)))
    return failed


def test_a_local_disk_that_is_full_when_the_run_gets_its_id_loses_no_save(tmp_path, memory_store, monkeypatch):
    with opened(memory_store, local=tmp_path) as checkpoints, monkeypatch.context() as patch:
        fill_disk(patch, "put", key="run.json")
        saved = checkpoints.save(1, a_state())
        assert saved.wait("remote", WAIT_S)
        checkpoints.close()
    assert list_names(LocalFolder(tmp_path)) == [], "nobody would know whose copy it is"
    assert same(read_checkpoint(memory_store, saved.name)[1], a_state())
    with opened(memory_store, local=tmp_path) as checkpoints:  # there is room again
        assert checkpoints.load(saved.name)["epoch"] == 0
        assert checkpoints.save(2, a_state()).wait("local", WAIT_S)
        checkpoints.close()
    assert (tmp_path / "run.json").read_bytes() == memory_store.get("run.json")


@pytest.mark.parametrize("pending", [1, 2])
def test_a_local_disk_that_stays_full_fails_no_save(tmp_path, memory_store, monkeypatch, caplog, pending):
    with opened(memory_store, local=tmp_path, pending=pending) as checkpoints, monkeypatch.context() as patch:
        fill_disk(patch, "put", "put_if_absent", "create")
        saves = [checkpoints.save(step, a_state(step)) for step in range(4)]
        checkpoints.wait("remote", WAIT_S)
        assert list_names(memory_store) == [saved.name for saved in saves]
        assert all(same(read_checkpoint(memory_store, one.name)[1], a_state(step)) for step, one in enumerate(saves))
        assert caplog.text.count("No space left on device") >= 4


def test_a_save_fails_if_neither_the_local_disk_nor_the_store_takes_it_and_the_error_names_both(
    tmp_path, memory_store, monkeypatch
):
    store = FaultStore(memory_store, [Fault("create", retryable=False, times=99)])
    with opened(store, local=tmp_path) as checkpoints, monkeypatch.context() as patch:
        fill_disk(patch, "put", "put_if_absent", "create")
        saved = checkpoints.save(1, a_state())
        with pytest.raises(StoreError, match=r"step 1 was not saved: .*from memory, because .*No space left on device"):
            saved.wait("local", WAIT_S)
        assert list_names(memory_store) == []


@pytest.mark.parametrize("has_local", [False, True])
def test_wrong_credentials_are_reported_by_the_first_save_and_not_by_the_next_one(tmp_path, memory_store, has_local):
    store = FaultStore(memory_store, [Fault("list", retryable=False, status=403, times=1)])
    with opened(store, local=tmp_path if has_local else None) as checkpoints:
        with pytest.raises(StoreError) as caught:
            checkpoints.save(1, a_state())
        assert caught.value.status == 403
        assert checkpoints.saves == ()
        assert checkpoints.save(1, a_state()).wait(timeout_s=WAIT_S), "the store takes it now"


def test_the_first_save_does_not_wait_long_for_a_store_that_does_not_answer(tmp_path, memory_store, monkeypatch):
    monkeypatch.setattr("tiercache.checkpoint.housekeeping.FIRST_LOOK_S", 0.05)
    with opened(memory_store, local=tmp_path) as checkpoints:
        earlier = checkpoints.save(1, {"n": 1})
        assert earlier.wait("remote", WAIT_S)
    monkeypatch.setattr(time, "time", lambda real=time.time: real() - 3600)  # the clock is behind
    gate = GateStore(memory_store, "list")
    with opened(gate, local=tmp_path, pending=2) as checkpoints:
        saved = checkpoints.save(2, a_state())
        assert saved.wait("local", WAIT_S)
        assert gate.arrived.is_set()
        assert not gate.gate.is_set()
        assert list_names(checkpoints.local_store) == [earlier.name, saved.name], "in the order of the writing"
        gate.gate.set()
        assert saved.wait("remote", WAIT_S)


def test_an_upload_that_fails_leaves_the_local_checkpoint_which_can_be_deleted(tmp_path, memory_store):
    store = FaultStore(memory_store, [Fault("put_part", nth=2, retryable=False)])
    with opened(store, local=tmp_path) as checkpoints:
        saved = checkpoints.save(1, a_state())
        with pytest.raises(StoreError):
            saved.wait("remote", WAIT_S)
        assert saved.wait("local", WAIT_S)
        assert same(read_checkpoint(checkpoints.local_store, saved.name)[1], a_state())
        checkpoints.delete(saved.name)
        assert list_names(LocalFolder(tmp_path)) == list_names(memory_store) == []


def test_a_save_is_complete_also_if_no_thread_can_be_started_for_deletions(tmp_path, memory_store, monkeypatch):
    with opened(memory_store, local=tmp_path, keep=tc.Keep(last=1)) as checkpoints:
        assert checkpoints.save(1, a_state(1)).wait("remote", WAIT_S)
        checkpoints.join()

        def cannot_start(task):
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(checkpoints._house._thread, "submit", cannot_start)
        assert checkpoints.save(2, a_state(2)).wait("remote", WAIT_S)
        checkpoints.join()
        assert len(list_names(memory_store)) == 2, "nothing was deleted"
        monkeypatch.undo()
        last = checkpoints.save(3, a_state(3))
        checkpoints.close()
    assert list_names(memory_store) == [last.name]


def test_a_state_that_cannot_be_copied_is_no_checkpoint_and_the_next_save_works(tmp_path, monkeypatch):
    with opened(tmp_path) as checkpoints:
        monkeypatch.setattr("tiercache.checkpoint.staging._Copy.array", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            checkpoints.save(1, a_state())
        monkeypatch.undo()
        saved = checkpoints.save(2, a_state())
        assert saved.wait(timeout_s=WAIT_S)
        checkpoints.close()
        assert checkpoints.saves == ()
        assert list_names(checkpoints.remote_store) == [saved.name]
        assert leftovers(checkpoints.remote_store) == {}


# -- back-pressure ----------------------------------------------------------------------------------------------------


def test_a_save_waits_for_an_unfinished_one(tmp_path):
    gate = GateStore(LocalFolder(tmp_path))
    with opened(gate) as checkpoints:
        first = checkpoints.save(1, a_state(1))
        assert gate.arrived.wait(WAIT_S)
        seen = []
        other = threading.Thread(target=lambda: seen.append(checkpoints.save(2, a_state(2))))
        other.start()
        assert not first.done()
        for wait in (first.wait, checkpoints.wait):
            with pytest.raises(TimeoutError, match=r"after 0\.01 s"):
                wait(timeout_s=0.01)
        gate.gate.set()
        other.join(WAIT_S)
        assert first.done(), "the second save was not begun before the first had ended"
        assert seen[0].wait(timeout_s=WAIT_S)


def test_a_waiting_save_raises_the_failure_for_which_it_waited(memory_store):
    gate = GateStore(FaultStore(memory_store, [Fault("put_part", retryable=False)]))
    with opened(gate) as checkpoints:
        checkpoints.save(1, a_state(1))
        assert gate.arrived.wait(WAIT_S)
        threading.Timer(0.05, gate.gate.set).start()
        with pytest.raises(StoreError, match="step 1"):
            checkpoints.save(2, a_state(2))


def test_as_many_states_as_allowed_are_written_while_an_earlier_one_is_uploaded(tmp_path, memory_store):
    gate = GateStore(memory_store)
    with opened(gate, local=tmp_path, pending=3) as checkpoints:
        saves = [checkpoints.save(step, a_state(step)) for step in range(3)]
        assert gate.arrived.wait(WAIT_S)
        assert all(saved.wait("local", WAIT_S) for saved in saves)
        assert not any(saved.done("remote") for saved in saves)
        gate.gate.set()
        checkpoints.wait(timeout_s=WAIT_S)
    assert len(list_names(memory_store)) == 3


def test_a_delete_that_takes_for_ever_holds_up_no_save(tmp_path):
    gate = GateStore(LocalFolder(tmp_path), "delete")
    with opened(gate, keep=tc.Keep(last=1)) as checkpoints:
        for step in (1, 2, 3):
            assert checkpoints.save(step, a_state(step)).wait(timeout_s=WAIT_S)
        assert gate.arrived.wait(WAIT_S), "the first one is deleted"
        assert checkpoints.save(4, a_state(4)).wait(timeout_s=WAIT_S)
        assert not gate.gate.is_set()


def test_unfinished_uploads_are_looked_for_after_the_first_commit_and_then_once_a_day(memory_store, monkeypatch):
    now_s, ages_s = [0.0], []
    clock = SimpleNamespace(time=time.time, monotonic=lambda: now_s[0])
    monkeypatch.setattr("tiercache.checkpoint.housekeeping.time", clock)

    def abort_uploads(age_s):
        ages_s.append(age_s)
        raise StoreError("scripted: the uploads cannot be listed", url="")

    with opened(memory_store) as checkpoints:
        monkeypatch.setattr(checkpoints._remote, "abort_uploads", abort_uploads)
        looks = []
        for step, after_s in enumerate((0.0, GC_AGE_S - 1, 1.0, 5.0, 2 * GC_AGE_S)):
            now_s[0] += after_s
            assert checkpoints.save(step, {"x": 1}).wait(timeout_s=WAIT_S)
            checkpoints.join()
            looks.append(len(ages_s))
        checkpoints.close()
    assert looks == [1, 1, 2, 2, 3]
    assert ages_s == [GC_AGE_S] * 3, "younger ones may be running"


@pytest.mark.s3
def test_parts_that_a_killed_upload_has_left_are_removed_when_they_are_old(s3_server, monkeypatch):
    store = s3_server.store("checkpoints-parts")
    with opened(store) as checkpoints:
        saved = checkpoints.save(1, {"x": 1})
        assert saved.wait(timeout_s=WAIT_S)
        classes = checkpoints._remote._classes
        for key in (f"{saved.name}/tensors-00001-of-00001.safetensors", "other/file"):
            upload = classes.create(key)
            upload.put_part(0, bytes(5 << 20))
            upload.put_part(1, b"end")
        checkpoints.gc()
        assert len([*classes.unfinished_uploads()]) == 2, "they may be running"
        monkeypatch.setattr("tiercache.checkpoint.housekeeping.GC_AGE_S", -3600)
        checkpoints.gc()
        assert [one.key for one in classes.unfinished_uploads()] == ["other/file"]
        checkpoints.close()


# -- processes --------------------------------------------------------------------------------------------------------


def test_of_several_ranks_only_the_first_writes(tmp_path):
    with opened(tmp_path, rank=1) as other, opened(tmp_path, rank=0) as first:
        skipped = other.save(1, a_state())
        assert skipped.state == "skipped"
        assert not skipped.wait(timeout_s=WAIT_S)
        assert first.save(1, a_state()).wait(timeout_s=WAIT_S)
        assert len(list_names(first.remote_store)) == 1


def test_closed_checkpoints_save_nothing_and_close_twice(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    saved = checkpoints.save(1, a_state())
    checkpoints.close()
    assert saved.done()
    checkpoints.close()
    with pytest.raises(ValueError, match="closed"):
        checkpoints.save(2, a_state())


def test_a_forked_process_cannot_save(tmp_path):
    def save_in_a_fork(checkpoints):
        with pytest.raises(RuntimeError, match="not to a fork"):
            checkpoints.save(2, {"x": 1})
        checkpoints.close()

    with opened(tmp_path) as checkpoints:
        assert checkpoints.save(1, {"x": 1}).wait(timeout_s=WAIT_S)
        checkpoints.join()
        assert in_child(lambda: save_in_a_fork(checkpoints))
        assert checkpoints.save(3, {"x": 1}).wait(timeout_s=WAIT_S)


def test_a_program_without_torch_that_ends_without_close_finishes_its_saves(tmp_path):
    code = f"""if True:
        import sys
        sys.modules["torch"] = None
        import numpy as np
        from tiercache.checkpoint.checkpoints import Checkpoints
        checkpoints = Checkpoints({str(tmp_path / "remote")!r}, local={str(tmp_path / "local")!r}, pending=2)
        checkpoints.save(1, {{"x": np.arange(1 << 20)}})
        checkpoints.save(2, {{"x": np.arange(1 << 20)}})
    """
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=WAIT_S)
    names = list_names(LocalFolder(tmp_path / "remote"))
    assert len(names) == 2
    assert np.array_equal(read_checkpoint(LocalFolder(tmp_path / "remote"), names[1])[1]["x"], np.arange(1 << 20))


def test_a_program_that_handles_sigterm_as_the_guide_says_finishes_its_saves(tmp_path):
    (handler,) = [code for code in blocks(GUIDE.read_text(), "python") if "SIGTERM" in code]
    code = f"""if True:
        import os, threading
        from tests.support.saves import GateStore, a_state
        from tiercache.checkpoint.checkpoints import Checkpoints
        from tiercache.store import LocalFolder

        store = GateStore(LocalFolder({str(tmp_path / "remote")!r}))
        with Checkpoints(store, local={str(tmp_path / "local")!r}) as checkpoints:
            checkpoints.save(1, a_state())
            store.arrived.wait()
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                threading.Event().wait()
            finally:
                store.gate.set()  # the upload goes on when the signal has come
    """
    done = subprocess.run([sys.executable, "-c", handler + code], check=False, timeout=WAIT_S)
    assert done.returncode == 128 + signal.SIGTERM
    (name,) = list_names(LocalFolder(tmp_path / "remote"))
    assert same(read_checkpoint(LocalFolder(tmp_path / "remote"), name)[1], a_state())


@pytest.mark.s3
def test_a_program_that_ends_without_close_finishes_its_uploads_to_s3(s3_server):
    url = f"{s3_server.url}/checkpoints-exit"
    code = f"""if True:
        import numpy as np
        from tiercache.checkpoint.checkpoints import Checkpoints
        checkpoints = Checkpoints({url!r}, storage_options={s3_server.storage_options!r})
        checkpoints.save(1, {{"x": np.arange(4 << 20)}})
    """
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=WAIT_S)
    store = open_store(url, **s3_server.storage_options)
    (name,) = list_names(store)
    assert np.array_equal(read_checkpoint(store, name)[1]["x"], np.arange(4 << 20))
    store.close()


def test_a_program_that_ends_tells_of_a_failed_save(tmp_path):
    (tmp_path / "file").write_text("no folder")
    code = f"""if True:
        from tiercache.checkpoint.checkpoints import Checkpoints
        Checkpoints({str(tmp_path / "file" / "run")!r}).save(1, {{"x": 1}})
    """
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=WAIT_S, capture_output=True, text=True)
    assert "the checkpoint of step 1 was not saved" in done.stderr
