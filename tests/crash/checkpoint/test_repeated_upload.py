"""The start of a run uploads checkpoints that are only in the local folder: their upload failed, or was killed."""

import logging
import signal
import subprocess
import sys

import pytest
from tests.support.checkpoint_reader import leftovers, read_checkpoint, same
from tests.support.faults import Fault, FaultStore
from tests.support.saves import WAIT_S, GateStore, a_state, opened

import tiercache as tc
from tiercache.checkpoint.checkpoints import Checkpoints
from tiercache.checkpoint.format import list_names
from tiercache.errors import StoreError
from tiercache.store import LocalFolder
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


def test_the_next_process_that_saves_uploads_what_was_not_uploaded_the_oldest_first_and_then_its_own(folders):
    local, remote = folders
    names = saved_locally(folders, 1, 2)
    assert list_names(remote) == []
    commits = []

    class Watching(WrapperStore):
        def put_if_absent(self, key, data):
            commits.append(key.partition("/")[0])
            return self.inner.put_if_absent(key, data)

    with Checkpoints(Watching(remote), local=local.root) as run:
        assert list_names(remote) == [], "a process that only reads uploads nothing"
        run.list()
        names.append(run.save(3, a_state(3)).name)
    assert list_names(remote) == list_names(local) == names
    assert [name for name in commits if name in names] == names
    for step, name in enumerate(names, start=1):
        assert same(read_checkpoint(remote, name)[1], a_state(step))


def test_an_upload_that_a_kill_has_ended_is_made_up_for(folders):
    local, remote = folders
    code = f"""if True:
        import os, signal
        from tests.support.saves import a_state
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


def test_a_failed_upload_is_an_error_that_says_when_it_is_repeated_and_training_goes_on(folders):
    local, remote = folders
    with opened(FaultStore(remote, [Fault("create", retryable=False)]), local=local.root) as run:
        failed = run.save(1, a_state(1))
        with pytest.raises(StoreError, match="the next start of the run uploads it"):
            failed.wait("remote", WAIT_S)
        assert run.save(2, a_state(2)).wait("remote", WAIT_S)
        assert failed.name not in list_names(remote)
        run.close()
    save(folders, 3)
    assert len(list_names(remote)) == 3
    assert same(read_checkpoint(remote, failed.name)[1], a_state(1))


def test_a_checkpoint_that_is_uploaded_again_is_not_deleted_meanwhile(folders):
    local, remote = folders
    (first,) = saved_locally(folders, 1)
    gate = GateStore(remote, "create")
    with opened(gate, local=local.root) as run:
        run.save(2, a_state(2))
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


def test_a_checkpoint_that_another_program_has_moved_or_removed_does_not_come_back(folders):
    local, remote = folders
    name = save(folders, 1)
    remote.delete([info.key for info in remote.list(f"{name}/")])  # its metrics stay
    newer = save(folders, 2)
    assert list_names(local) == [name, newer]
    assert list_names(remote) == [newer]
    kept = save(folders, 3, keep=tc.Keep(last=1))
    assert list_names(local) == [kept], "it is not kept for its upload either"


def test_files_of_a_half_finished_upload_are_overwritten(folders):
    local, remote = folders
    (name,) = saved_locally(folders, 1)
    for info in local.list(name):
        if not info.key.endswith("checkpoint.json"):
            remote.put(info.key, b"half")
    save(folders, 2)
    assert same(read_checkpoint(remote, name)[1], a_state(1))


@pytest.mark.parametrize("reason", ["corrupt", "refused"])
def test_a_checkpoint_that_cannot_be_uploaded_does_not_stop_the_others(folders, caplog, reason):
    local, remote = folders
    names = saved_locally(folders, 1, 2)
    faults = []
    if reason == "corrupt":
        path = next((local.root / names[0]).glob("*.safetensors"))
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    else:
        faults.append(Fault("create", times=10**6, retryable=False, keys=f"{names[0]}/*"))
    with caplog.at_level(logging.WARNING, "tiercache"):
        newer = save(folders, 3, remote=FaultStore(remote, faults))
    assert list_names(remote) == [names[1], newer]
    assert f"the earlier checkpoint {names[0]} was not uploaded" in caplog.text


def test_a_checkpoint_that_is_deleted_while_it_is_uploaded_does_not_come_back(folders):
    local, remote = folders
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


def test_nothing_is_uploaded_to_the_store_of_another_run(folders, tmp_path, caplog):
    """The store could not be reached when it was opened with the wrong folder."""
    local, _ = folders
    (wrong,) = saved_locally(folders, 1)
    other = LocalFolder(tmp_path / "other")
    save((LocalFolder(tmp_path / "other-local"), other), 1, lambda step: {"n": step})
    store = SwitchedStore(other)
    store.is_on = False
    with opened(store, local=local.root) as run:
        store.is_on = True
        with pytest.raises(ValueError, match="has local copies of other checkpoints"):
            run.save(2, a_state(2))
    assert wrong not in list_names(other)


def test_a_folder_that_got_no_id_because_its_store_was_down_is_not_uploaded_to_another_url(folders, tmp_path):
    local, remote = folders
    store = SwitchedStore(remote)
    store.is_on = False
    with opened(store, local=local.root) as run:
        saved = run.save(1, a_state(1))
        assert saved.wait("local", WAIT_S)
    with pytest.raises(ValueError, match="has local copies of other checkpoints"):
        Checkpoints(LocalFolder(tmp_path / "other"), local=local.root)
    save(folders, 3)
    assert saved.name in list_names(remote)
    assert local.get("run.json") == remote.get("run.json")
