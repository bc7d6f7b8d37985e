"""Late uploads: checkpoints that are only in the local folder, because their upload failed or their process ended."""

import logging
import signal
import subprocess
import sys

import pytest
import torch
from tests.checkpoint.files import write_checkpoint
from tests.checkpoint.plain_reader import leftovers, read_checkpoint, same
from tests.checkpoint.saves import WAIT_S, GateStore, a_state, opened
from tests.support.faults import Fault, FaultStore

import tiercache as tc
from tiercache.checkpoint.checkpoints import Checkpoints
from tiercache.checkpoint.layout import NOT_UPLOADED_NAME, list_names, manifest_key, reference_key, tombstone_key
from tiercache.checkpoint.staging import SHARED_MIN_BYTES
from tiercache.errors import StoreError
from tiercache.store import LocalFolder, MemoryStore
from tiercache.store.contract import WrapperStore


@pytest.fixture
def folders(tmp_path):
    return LocalFolder(tmp_path / "local"), LocalFolder(tmp_path / "remote")


class SwitchedStore(WrapperStore):
    """A store that cannot be reached while it is off."""

    is_on = True

    def around(self, method, key, call):
        if not self.is_on:
            raise StoreError("scripted: cannot be reached", url=key, retryable=True)
        return call()


def saved_locally(folders, *steps, state=a_state, **options):
    """Names of checkpoints that a process has committed in the local folder, and whose uploads have failed."""
    local, remote = folders
    with opened(
        FaultStore(remote, [Fault("create", times=10**6, retryable=False)]), local=local.root, **options
    ) as run:
        names = []
        for step in steps:
            saved = run.save(step, state(step), metrics={"loss": step})
            with pytest.raises(StoreError):
                saved.wait("remote", WAIT_S)
            names.append(saved.name)
            run.join()
    return names


def save(folders, step, state=a_state, **options):
    """The name of a checkpoint that a process saves, which then has nothing more to do."""
    local, remote = folders
    with Checkpoints(options.pop("remote", remote), local=local.root, **options) as run:
        saved = run.save(step, state(step), metrics={"loss": step})
        assert saved.wait("remote", WAIT_S)
    return saved.name


def marks(local):
    return [info.key for info in local.list() if info.key.endswith(NOT_UPLOADED_NAME)]


def test_the_next_process_that_saves_uploads_what_was_not_uploaded_the_oldest_first(folders):
    local, remote = folders
    names = saved_locally(folders, 1, 2)
    assert list_names(remote) == []
    assert len(marks(local)) == 2
    commits = []

    class Watching(GateStore):
        def put_if_absent(self, key, data):
            commits.append(key.partition("/")[0])
            return self.inner.put_if_absent(key, data)

    with Checkpoints(Watching(remote, "nothing"), local=local.root) as run:
        assert list_names(remote) == [], "a process that only reads uploads nothing"
        run.list()
        names.append(run.save(3, a_state(3)).name)
    assert list_names(remote) == list_names(local) == names
    assert [name for name in commits if name in names[:2]] == names[:2]
    for step, name in enumerate(names, start=1):
        assert same(read_checkpoint(remote, name)[1], a_state(step))
    assert marks(local) == []


def test_an_upload_that_a_kill_has_ended_is_made_up_for(folders):
    local, remote = folders
    code = f"""if True:
        import os, signal
        from tests.checkpoint.saves import a_state
        from tiercache.checkpoint.checkpoints import Checkpoints
        from tiercache.store import LocalFolder
        from tiercache.store.contract import WrapperStore

        class Killing(WrapperStore):
            def around(self, method, key, call):
                if method == "complete" and key.endswith("state.json"):
                    os.kill(os.getpid(), signal.SIGKILL)
                return call()

        store = Killing(LocalFolder({str(remote.root)!r}))
        Checkpoints(store, local={str(local.root)!r}, writers=1).save(1, a_state(1))
    """
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=WAIT_S)
    assert done.returncode == -signal.SIGKILL
    (killed,) = list_names(local)
    assert list_names(remote) == []
    assert len(leftovers(remote)) == 1, "other files of the upload"
    newer = save(folders, 2)
    assert list_names(remote) == [killed, newer]
    assert same(read_checkpoint(remote, killed)[1], a_state(1))
    assert leftovers(remote) == {}


def test_a_failed_upload_is_made_up_for_after_the_next_save_and_the_save_is_then_done(folders):
    local, remote = folders
    with opened(FaultStore(remote, [Fault("create", retryable=False)]), local=local.root) as run:
        failed = run.save(1, a_state(1))
        with pytest.raises(StoreError, match="and a later save uploads it"):
            failed.wait("remote", WAIT_S)
        run.join()
        assert list_names(remote) == [], "not before the next save"
        assert run.list()[0].error
        assert run.save(2, a_state(2)).wait("remote", WAIT_S)
        run.join()
        assert (failed.state, failed.error, failed.wait("remote", WAIT_S)) == ("done", None, True)
        assert [(one.state, one.error, one.tiers) for one in run.list()] == [("complete", "", ("local", "remote"))] * 2
        run.close()
    assert same(read_checkpoint(remote, failed.name)[1], a_state(1))


def test_a_store_that_is_still_down_is_tried_again_after_each_save(folders, caplog):
    local, remote = folders
    (first,) = saved_locally(folders, 1)
    store = FaultStore(remote, [Fault("create", keys=f"{first}/*", times=2, retryable=False)])
    with caplog.at_level(logging.WARNING, "tiercache"), opened(store, local=local.root) as run:
        for step in (2, 3, 4):
            assert run.save(step, a_state(step)).wait("remote", WAIT_S), "training goes on"
            run.join()
        run.close()
    assert f"the earlier checkpoint {first} was not uploaded" in caplog.text
    assert first in list_names(remote)


def test_saves_do_not_wait_for_a_late_upload(folders):
    local, remote = folders
    (first,) = saved_locally(folders, 1)

    class Gate(GateStore):
        def around(self, method, key, call):
            return super().around(method, key, call) if first in key else call()

    gate = Gate(remote, "create")
    with opened(gate, local=local.root) as run:
        for step in (2, 3, 4):
            assert run.save(step, a_state(step)).wait("remote", WAIT_S)
        assert gate.arrived.wait(WAIT_S)
        assert first not in list_names(remote)
        with pytest.raises(ValueError, match="is being saved"):
            run.delete(first)
    assert first in list_names(remote)


def test_only_what_the_rules_of_the_store_keep_is_uploaded(folders):
    local, remote = folders
    names = saved_locally(folders, 1, 2, 3, 4)
    with Checkpoints(remote, local=local.root) as run:
        run.pin(2, "release")
    newest = save(folders, 5, keep=[tc.Keep(last=2, tier="remote"), tc.Keep(last=5, tier="local")])
    assert list_names(remote) == [names[1], names[3], newest]
    with Checkpoints(remote) as run:
        assert [one.why_pinned for one in run.list()] == ["release", "", ""], "the pin goes with it"


def test_a_checkpoint_that_was_at_the_store_and_is_gone_does_not_come_back(folders):
    local, remote = folders
    name = save(folders, 1)
    with Checkpoints(remote) as run:  # the store alone, as `tiercache ckpt rm URL`, or a rule that moves it
        run.delete(1)
    newer = save(folders, 2)
    assert list_names(local) == [name, newer]
    assert list_names(remote) == [newer]


def test_a_checkpoint_whose_upload_was_dropped_is_not_uploaded_later(folders):
    local, remote = folders
    gate = GateStore(remote)
    with opened(gate, local=local.root, pending=2, when_busy="drop") as run:
        run.save(1, a_state(1))
        assert gate.arrived.wait(WAIT_S)
        dropped = run.save(2, a_state(2))
        assert dropped.wait("local", WAIT_S)
        run.save(3, a_state(3))
        assert dropped.state == "dropped"
        gate.gate.set()
        run.close()
    save(folders, 4)
    assert len(list_names(remote)) == 3
    assert dropped.name not in list_names(remote)


def test_a_checkpoint_that_the_store_has_already_is_not_written_again(folders):
    """The process was killed after the commit, before it removed the mark."""
    local, remote = folders
    name = save(folders, 1)
    local.put(f"{name}/{NOT_UPLOADED_NAME}", local.get("run.json"))
    before = {info.key: info.etag for info in remote.list(name)}
    save(folders, 2)
    assert {info.key: info.etag for info in remote.list(name)} == before
    assert marks(local) == []


def test_files_of_a_half_finished_upload_are_overwritten(folders):
    local, remote = folders
    (name,) = saved_locally(folders, 1)
    for info in local.list(name):
        if not info.key.endswith((NOT_UPLOADED_NAME, "checkpoint.json")):
            remote.put(info.key, b"half")
    save(folders, 2)
    assert same(read_checkpoint(remote, name)[1], a_state(1))


def test_a_local_checkpoint_that_is_corrupt_is_not_uploaded_and_does_not_stop_the_others(folders, caplog):
    local, remote = folders
    names = saved_locally(folders, 1, 2)
    path = next((local.root / names[0]).glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING, "tiercache"):
        for step in (3, 4):
            save(folders, step)
    assert names[0] not in list_names(remote)
    assert names[1] in list_names(remote)
    assert caplog.text.count("it was not uploaded") == 1, "it is tried once"


def test_a_checkpoint_that_is_deleted_while_it_is_uploaded_does_not_come_back(folders):
    local, remote = folders
    (first,) = saved_locally(folders, 1)
    gate = GateStore(remote, "complete")
    with opened(gate, local=local.root) as run:
        gate.gate.set()
        run.save(2, a_state(2))
        run.join()
    assert first in list_names(remote)
    (third,) = saved_locally(folders, 3)

    class Deleting(GateStore):
        def around(self, method, key, call):
            if method == "create" and key.startswith(third) and key.endswith("state.json"):
                found = call()
                Checkpoints(LocalFolder(local.root)).delete(third)  # another process
                return found
            return call()

    with opened(Deleting(remote, "nothing"), local=local.root, writers=1) as run:
        run.save(4, a_state(4))
        run.join()
    assert third not in list_names(remote)
    assert third not in list_names(local)


def test_nothing_is_uploaded_late_to_the_store_of_another_run(folders, tmp_path, caplog):
    """The store could not be reached when it was opened with the wrong folder."""
    local, _ = folders
    (wrong,) = saved_locally(folders, 1)
    other = LocalFolder(tmp_path / "other")
    save((LocalFolder(tmp_path / "other-local"), other), 1, lambda step: {"n": step})
    store = SwitchedStore(other)
    store.is_on = False
    with caplog.at_level(logging.WARNING, "tiercache"), opened(store, local=local.root) as run:
        with pytest.raises(StoreError):
            run.save(2, a_state(2)).wait("remote", WAIT_S)
        store.is_on = True
        assert run.save(3, a_state(3)).wait("remote", WAIT_S)
        run.join()
        assert wrong not in list_names(other)
    assert "has local copies of other checkpoints" in caplog.text


def test_a_folder_that_got_no_id_because_its_store_was_down_is_not_uploaded_to_another_url(folders, tmp_path):
    local, remote = folders
    store = SwitchedStore(remote)
    store.is_on = False
    with opened(store, local=local.root) as run:
        saved = run.save(1, a_state(1))
        assert saved.wait("local", WAIT_S)
    other = LocalFolder(tmp_path / "other")
    newer = save((local, other), 2)
    assert list_names(other) == [newer]
    (local.root / "run.json").unlink()
    save(folders, 3)
    assert saved.name in list_names(remote)


def test_shared_tensors_of_a_late_upload_are_written_once(folders):
    _, remote = folders
    frozen = torch.arange(SHARED_MIN_BYTES // 4)

    def state(step):
        return {"frozen": frozen, "n": step}

    names = saved_locally(folders, 1, 2, state=state, dedup=True)
    names.append(save(folders, 3, state, dedup=True))
    assert list_names(remote) == names
    assert len([*remote.list("tensors/")]) == 1
    for step, name in enumerate(names, start=1):
        assert same(read_checkpoint(remote, name)[1], state(step))


def test_a_checkpoint_whose_upload_always_fails_does_not_stop_the_others(folders):
    _, remote = folders
    failing, other = saved_locally(folders, 1, 2)
    newer = []
    for step in (3, 4):
        refusing = FaultStore(remote, [Fault("create", times=10**6, retryable=False, keys=f"{failing}/*")])
        with Checkpoints(refusing, local=folders[0].root) as run:
            for number in range(2):
                saved = run.save(step, a_state(number))
                assert saved.wait("remote", WAIT_S)
                newer.append(saved.name)
                run.join()
    assert list_names(remote) == [other, *newer]


@pytest.mark.parametrize("is_killed", [False, True], ids=["fails", "is killed"])
def test_the_reference_of_a_late_upload_is_put_before_its_manifest(folders, is_killed):
    """It is not the newest checkpoint, so the tier engine may move it as soon as it has a manifest."""
    local, remote = folders

    def state(step):
        return {"frozen": torch.full((SHARED_MIN_BYTES // 4,), float(step))}

    (late,) = saved_locally(folders, 1, state=state, dedup=True)

    class Dying(WrapperStore):
        """A store that has the reference of the late upload, and does not take its manifest."""

        def around(self, method, key, call):
            if method == "put_if_absent" and key == manifest_key(late):
                raise StoreError("scripted: killed", url=key)
            if is_killed and method == "delete" and key == reference_key(late):
                raise StoreError("scripted: killed", url=key)
            return call()

    newer = save(folders, 2, state, remote=Dying(remote), dedup=True)
    assert list_names(remote) == [newer]
    left = {reference_key(late), reference_key(newer)} if is_killed else {reference_key(newer)}
    assert {info.key for info in remote.list("references/")} == left
    assert len(marks(local)) == 1, "the upload is repeated"
    newest = save(folders, 3, state, dedup=True)
    assert list_names(remote) == [late, newer, newest]
    assert same(read_checkpoint(remote, late)[1], state(1))


def test_a_deletion_gives_up_the_tensors_of_a_late_upload_that_ended_before_its_manifest(folders):
    _, remote = folders
    name = write_checkpoint(remote, 1, {"w": torch.ones(3)}, share=True)
    remote.delete([manifest_key(name)])
    with Checkpoints(remote) as run:
        run.delete(name)
        assert run.list() == []
    assert [info.key for info in remote.list("references/")] == [tombstone_key(name)]


def test_checkpoints_without_a_mark_are_left_alone(folders):
    """Of an earlier release, or copied by hand: nobody knows whether the store had them."""
    local, remote = folders
    write_checkpoint(local, 1)
    newer = save(folders, 2)
    assert list_names(remote) == [newer]


def test_a_memory_store_of_the_same_process_works_too(tmp_path):
    store = MemoryStore(f"late-{tmp_path.name}-{id(tmp_path)}", "run")
    local = LocalFolder(tmp_path / "local")
    names = saved_locally((local, store), 1)
    names.append(save((local, store), 2))
    assert list_names(store) == names
