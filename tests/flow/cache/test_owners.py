"""Owners of files and reservations, disk space, and the breaker."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.clock import FakeClock

from tiercache.cache.accounts import Owner, Owners
from tiercache.cache.folder import Folder, network_file_system
from tiercache.cache.session import Breaker
from tiercache.store.shared_files import boot_id, pid_namespace, start_time

# From Python 3.12 on: what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


def dead_child():
    """A process number that was used and is free (or a zombie's) now."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    return pid


def test_an_owner_can_be_parsed_from_its_text():
    owner = Owner.of_this_process()
    assert Owner.parse(str(owner)) == owner
    assert re.fullmatch(r"[0-9a-f-]+", str(owner))
    assert Owner.parse("../../etc") is None
    assert Owner.of_this_process() != owner


def test_this_process_runs_and_one_that_has_ended_does_not():
    me = Owner.of_this_process()
    assert me.runs() is True
    assert replace(me, started=me.started - 1).runs() is False, "another process with this number"
    assert replace(me, boot="0" * 16).runs() is False, "of an earlier boot"
    pid = dead_child()
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert start_time(pid) is None, "a zombie holds nothing"
    os.waitpid(pid, 0)
    assert start_time(pid) is None


def test_the_lock_decides_about_owners_of_another_container(tmp_path, monkeypatch):
    here = Owners(Folder(tmp_path / "c"))
    there = Owners(Folder(tmp_path / "c"))
    stranger = Owner(there.me.boot, there.me.namespace + 1, there.me.pid, there.me.started, there.me.nonce)
    file = tmp_path / "c" / "owners" / str(there.me)
    file.rename(file.with_name(str(stranger)))
    assert stranger.runs() is None
    assert here.alive(str(stranger))
    there.close()
    assert not here.alive(str(stranger))
    here.remove_files_of(str(stranger))
    assert [path.name for path in file.parent.iterdir()] == [str(here.me)]
    here.close()


def test_the_machine_has_an_identity_without_proc(monkeypatch):
    def refuse(*args, **kwargs):
        raise FileNotFoundError

    boot_id.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", refuse)
        patch.setattr(Path, "stat", refuse)
        assert (boot_id(), pid_namespace(), start_time(1)) == ("0", 0, None)
    boot_id.cache_clear()


def test_the_type_of_the_mount_tells_a_network_file_system(tmp_path, monkeypatch):
    assert network_file_system(tmp_path) is None
    assert network_file_system(tmp_path / "nothing") is None
    device = tmp_path.stat().st_dev
    mount = f"36 35 {os.major(device)}:{os.minor(device)} / /mnt rw,noatime shared:1 - {{}} server:/export rw\n"
    for kind, found in (("nfs4", "nfs4"), ("fuse.sshfs", "fuse.sshfs"), ("fuseblk", None), ("ext4", None)):
        monkeypatch.setattr(Path, "read_text", lambda *_, _kind=kind, **__: mount.format(_kind))
        assert network_file_system(tmp_path) == found


@pytest.mark.parametrize("mended", [True, False])
def test_the_breaker_lets_one_probe_through_at_a_time(mended):
    clock = FakeClock()
    breaker = Breaker(clock, probe_after_s=10)
    assert breaker.allows()
    breaker.trip()
    assert (breaker.allows(), breaker.is_open) == (False, True)
    clock.advance(10)
    assert [breaker.allows() for _ in range(3)] == [True, False, False]
    if mended:
        breaker.reset()
    assert (breaker.allows(), breaker.is_open) == (mended, not mended)
