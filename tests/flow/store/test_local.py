"""Local folders."""

from __future__ import annotations

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from tests.support.store_suite import LocalStoreSuite, StoreSuite, WriteSuite, read_ranges

from tiercache.errors import NotFound, StoreError
from tiercache.model import ByteRange
from tiercache.store import LocalFolder, local
from tiercache.store.local import TEMP_PREFIX
from tiercache.waiting import wait_for


class InFolder:
    @pytest.fixture
    def store(self, tmp_path):
        return LocalFolder(tmp_path / "root")

    def raw_put(self, store, key, data):
        path = store.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(data)

    def raw_get(self, store, key):
        return (store.root / key).read_bytes()


class TestLocalFolder(InFolder, LocalStoreSuite, StoreSuite):
    pass


def refuse_nameless_files(monkeypatch):
    real_open = os.open

    def refusing(path, flags, *args, **kwargs):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no O_TMPFILE here")
        return real_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(local.os, "open", refusing)


WITHOUT = pytest.mark.parametrize(
    "without", ["nothing", "nameless files", "hard links"], ids=lambda name: f"without {name}"
)
OLD_NS = 1_500_000_000_123_456_789


def refuse(monkeypatch, without):
    """Take from the file system what some file systems lack."""
    if without != "nothing":
        refuse_nameless_files(monkeypatch)
    if without == "hard links":

        def refusing(*args, **kwargs):
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(local.os, "link", refusing)


class TestLocalFolderWithoutNamelessFiles(InFolder, WriteSuite):
    """File systems without O_TMPFILE (network file systems, most FUSE) use a temporary name."""

    @pytest.fixture(autouse=True)
    def no_tmpfile(self, monkeypatch):
        refuse_nameless_files(monkeypatch)

    def test_no_temporary_name_is_left(self, store):
        store.put("a", b"1")
        store.put("a", b"2")
        store.put_if_absent("a", b"3")
        with store.create("b") as upload:
            upload.put_part(0, b"x")
            assert list(store.root.glob(f"{TEMP_PREFIX}*"))
        assert list(store.root.iterdir()) == [store.root / "a"]

    def test_temporary_files_of_a_killed_writer_are_removed_after_a_day(self, store):
        store.root.mkdir()
        for name, age_s in (("old", 90_000), ("young", 3600)):
            left = store.root / f"{TEMP_PREFIX}{name}"
            left.write_bytes(b"torn")
            os.utime(left, (time.time() - age_s,) * 2)
        store.put("a", b"x")
        assert sorted(path.name for path in store.root.iterdir()) == [f"{TEMP_PREFIX}young", "a"]


class TestLocalFolderWithoutHardLinks(TestLocalFolderWithoutNamelessFiles):
    """FAT and some FUSE file systems have no link(2)."""

    @pytest.fixture(autouse=True)
    def no_links(self, monkeypatch):
        refuse(monkeypatch, "hard links")


@pytest.fixture
def store(tmp_path):
    return LocalFolder(tmp_path / "root")


def test_links_below_the_root_are_never_followed(tmp_path, store):
    secret = tmp_path / "outside" / "secret"
    secret.parent.mkdir()
    secret.write_bytes(b"secret")
    store.put("a/here", b"x")
    (store.root / "file").symlink_to(secret)
    (store.root / "folder").symlink_to(secret.parent)
    for key in ("file", "folder/secret"):
        for call in (store.head, store.get, store.open_local):
            with pytest.raises(StoreError):
                call(key)
    with pytest.raises(StoreError):
        store.put("folder/new", b"x")
    store.put("file", b"replaces the link, not what it points to")
    assert secret.read_bytes() == b"secret"
    assert not (secret.parent / "new").exists()
    assert sorted(info.key for info in store.list()) == ["a/here", "file"]


def test_a_root_that_is_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "real")
    LocalFolder(tmp_path / "root").put("a", b"x")
    assert (tmp_path / "real" / "a").read_bytes() == b"x"


def test_temporary_names_are_neither_keys_nor_listed(store):
    store.put("a/b", b"x")
    (store.root / "a" / f"{TEMP_PREFIX}1234").write_bytes(b"torn")
    assert [info.key for info in store.list()] == ["a/b"]
    with pytest.raises(ValueError, match="unfinished"):
        store.get(f"a/{TEMP_PREFIX}1234")


def test_folders_and_pipes_are_not_objects(store):
    store.put("a/b", b"x")
    os.mkfifo(store.root / "pipe")
    for key in ("a", "pipe", "a/b/c"):
        with pytest.raises(NotFound):
            store.get(key)
    assert [info.key for info in store.list()] == ["a/b"]
    store.delete(["a"])
    assert store.get("a/b") == b"x"


def test_writing_below_a_file_or_over_a_folder_is_an_error(store):
    store.put("a/b", b"x")
    for key in ("a/b/c", "a"):
        with pytest.raises(StoreError) as caught:
            store.put(key, b"y")
        assert not isinstance(caught.value, NotFound)
        assert not caught.value.retryable


def test_a_full_disk_is_not_retryable_and_leaves_nothing(store, monkeypatch):
    store.put("a", b"old")

    def full(*args):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(local.os, "pwrite", full)
    with pytest.raises(StoreError, match="No space left") as caught:
        store.put("a", b"new")
    assert not caught.value.retryable
    assert store.get("a") == b"old"
    assert list(store.root.iterdir()) == [store.root / "a"]


def test_a_file_truncated_during_a_read_is_an_error(store, monkeypatch):
    store.put("a", bytes(1000))
    real_preadv = os.preadv

    def cutting(fd, buffers, offset):
        os.truncate(store.root / "a", 100)
        return real_preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", cutting)
    with pytest.raises(StoreError, match="truncated"):
        read_ranges(store, "a", [ByteRange(0, 1000)])


def test_reading_continues_after_short_reads_of_the_system(store, monkeypatch):
    store.put("a", bytes(range(250)))
    real_preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real_preadv(fd, [buffers[0][:7]], offset))
    ranges = [ByteRange(0, 100), ByteRange(100, 103), ByteRange(103, 250)]
    assert b"".join(read_ranges(store, "a", ranges)) == bytes(range(250))


def test_more_spans_than_one_system_call_takes_are_read(store):
    store.put("a", bytes(range(256)) * 20)
    ranges = [ByteRange(start, start + 1) for start in range(5000)]
    assert b"".join(read_ranges(store, "a", ranges)) == (bytes(range(256)) * 20)[:5000]


def _is_cached(path):
    with path.open("rb") as file:
        try:
            return os.preadv(file.fileno(), [bytearray(4096)], 0, os.RWF_NOWAIT) > 0
        except BlockingIOError:
            return False


def test_forget_cached_drops_the_pages_of_a_file(store):
    store.put("a", bytes(1 << 20))
    if not _is_cached(store.root / "a"):
        pytest.skip("the system does not say what it has cached")

    def is_forgotten():
        store.forget_cached("a")
        return not _is_cached(store.root / "a")

    assert wait_for(is_forgotten, 10), "the kernel keeps pages only while another processor has them in a batch"
    assert store.get("a") == bytes(1 << 20)


def test_ctrl_c_after_a_close_closes_no_descriptor_twice(store, monkeypatch):
    """By then the number may be somebody else's file: what an upload's thread opened meanwhile."""
    store.put("x/y/z", b"123")
    for name, work in {
        "put": lambda: store.put("a/b/c", b"1"),
        "put_if_absent": lambda: store.put_if_absent("a/b/d", b"1"),
        "get": lambda: store.get("x/y/z"),
        "list": lambda: list(store.list()),
        "delete": lambda: store.delete(["x/y/z"]),
        "symlinks": lambda: list(store.symlinks()),
        "remove_empty": lambda: store.remove_empty("x"),
    }.items():
        for strike in range(100):
            if (n_closed := _closes(work, strike, monkeypatch)) is not None:
                assert strike == n_closed > 0, name
                break
        else:
            pytest.fail(f"{name} never ended")


def _closes(work, strike, monkeypatch):
    """Return how many descriptors were closed, if Ctrl-C after that many closes did not end it; else None."""
    real_close, closed = os.close, []

    def close(fd):
        real_close(fd)  # EBADF where it is a second time
        closed.append(fd)
        if len(closed) == strike + 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(local.os, "close", close)
        try:
            work()
        except KeyboardInterrupt:
            return None
    return len(closed)


def test_remove_empty_removes_only_empty_folders(store):
    for folder in ("gone/a/b", "gone/c", "stays/empty", "stays/full"):
        (store.root / folder).mkdir(parents=True)
    (store.root / "stays/full/x").write_bytes(b"1")
    for folder in ("gone", "stays", "not there", "stays/full/x"):
        store.remove_empty(folder)
    assert sorted(str(path.relative_to(store.root)) for path in store.root.rglob("*")) == [
        "stays",
        "stays/full",
        "stays/full/x",
    ]


def test_remove_empty_does_not_follow_links(store, tmp_path):
    (store.root / "a").mkdir(parents=True)
    (tmp_path / "elsewhere/empty").mkdir(parents=True)
    (store.root / "a/link").symlink_to(tmp_path / "elsewhere")
    (store.root / "link").symlink_to(tmp_path / "elsewhere")
    for folder in ("a", "link", "link/empty"):
        store.remove_empty(folder)
    assert (tmp_path / "elsewhere/empty").is_dir()
    assert (store.root / "a/link").is_symlink()


def test_symlinks_lists_links_to_existing_targets(store, tmp_path):
    store.put("runs/a/model", b"1")
    links = {
        "runs/file": "a/model",
        "runs/folder": "a",
        "runs/absolute": store.root / "runs/a/model",
        "runs/chain": "file",
        "runs/outside": tmp_path,
        "runs/nothing": "b",
        "runs/loop": "loop",
    }
    for name, target in links.items():
        (store.root / name).symlink_to(target)
    targets = {"file": "runs/a/model", "folder": "runs/a", "absolute": "runs/a/model", "chain": "runs/a/model"}
    expected = {f"runs/{name}": str((store.root / target).resolve()) for name, target in targets.items()}
    assert dict(store.symlinks()) == expected | {"runs/outside": str(tmp_path.resolve())}
    assert [info.key for info in store.list()] == ["runs/a/model"]


def write_old(path, mode):
    """A file and its folder, with a mode, of long ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"old")
    path.chmod(mode)
    path.parent.chmod(mode | 0o700)
    for one in (path, path.parent):
        os.utime(one, ns=(OLD_NS - 5, OLD_NS))


def copy_with_attributes(src, dst, key, *, if_absent=True):
    with dst.create(key, attributes=src.attributes(key)) as upload:
        upload.put_part(0, src.get(key))
        return upload.complete(if_absent=if_absent)


@WITHOUT
def test_a_copy_with_attributes_has_mode_and_times_of_its_source(tmp_path, monkeypatch, without):
    refuse(monkeypatch, without)
    for mode, if_absent in ((0o600, True), (0o640, False), (0o400, True), (0o664, False), (0o4755, True)):
        src, dst = LocalFolder(tmp_path / f"src{mode}"), LocalFolder(tmp_path / f"dst{mode}")
        write_old(src.root / "folder" / "f", mode)
        made = copy_with_attributes(src, dst, "folder/f", if_absent=if_absent)
        assert made == dst.head("folder/f")
        copy = dst.root / "folder" / "f"
        for one, other in ((copy, src.root / "folder" / "f"), (copy.parent, src.root / "folder")):
            found, expected = one.stat(), other.stat()
            # A copy is no set-user-ID program.
            assert (found.st_mode, found.st_mtime_ns) == (expected.st_mode & ~0o4000, expected.st_mtime_ns), mode
        assert copy.stat().st_atime_ns == OLD_NS - 5


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_copy_with_attributes_by_root_belongs_to_the_owner_of_its_source(tmp_path):
    src, dst = LocalFolder(tmp_path / "src"), LocalFolder(tmp_path / "dst")
    write_old(src.root / "folder" / "f", 0o600)
    os.chown(src.root / "folder" / "f", 12345, 23456)
    os.chown(src.root / "folder", 12346, 23457)
    copy_with_attributes(src, dst, "folder/f")
    file, folder = (dst.root / "folder" / "f").stat(), (dst.root / "folder").stat()
    assert (file.st_uid, file.st_gid, folder.st_uid, folder.st_gid) == (12345, 23456, 12346, 23457)


def test_an_unfinished_copy_of_a_private_file_is_private(tmp_path, monkeypatch):
    refuse_nameless_files(monkeypatch)
    src, dst = LocalFolder(tmp_path / "src"), LocalFolder(tmp_path / "dst")
    write_old(src.root / "f", 0o600)
    with dst.create("f", attributes=src.attributes("f")) as upload:
        upload.put_part(0, b"secret")
        (unfinished,) = dst.root.glob(f"{TEMP_PREFIX}*")
        assert unfinished.stat().st_mode & 0o777 == 0o600


@WITHOUT
def test_copies_with_attributes_leave_the_time_of_a_folder_that_exists(tmp_path, monkeypatch, without):
    refuse(monkeypatch, without)
    src, dst = LocalFolder(tmp_path / "src"), LocalFolder(tmp_path / "dst")
    keys = [f"runs/step-{step}/{name}" for step in (1, 2) for name in "abcdef"]
    for key in keys:
        write_old(src.root / key, 0o644)
    (dst.root / "runs").mkdir(parents=True)
    os.utime(dst.root / "runs", ns=(OLD_NS, OLD_NS + 7))
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda key: copy_with_attributes(src, dst, key), keys))
        abandoned = dst.create("runs/step-1/g", attributes=src.attributes("runs/step-1/a"))
        abandoned.abort()
    assert (dst.root / "runs").stat().st_mtime_ns == OLD_NS + 7
    assert {(dst.root / "runs" / step).stat().st_mtime_ns for step in ("step-1", "step-2")} == {OLD_NS}


def test_a_file_system_that_refuses_owners_and_modes_gets_the_copy(tmp_path, monkeypatch):
    def refusing(*args, **kwargs):
        raise OSError(errno.EPERM, "no owners here")

    src, dst = LocalFolder(tmp_path / "src"), LocalFolder(tmp_path / "dst")
    write_old(src.root / "folder" / "f", 0o640)
    for name in ("fchown", "fchmod"):
        monkeypatch.setattr(local.os, name, refusing)
    copy_with_attributes(src, dst, "folder/f")
    assert dst.get("folder/f") == b"old"


def test_an_error_of_the_disk_while_attributes_are_set_fails_the_copy(tmp_path, monkeypatch):
    def failing(*args, **kwargs):
        raise OSError(errno.EIO, "broken")

    src, dst = LocalFolder(tmp_path / "src"), LocalFolder(tmp_path / "dst")
    write_old(src.root / "f", 0o640)
    monkeypatch.setattr(local.os, "fchmod", failing)
    with pytest.raises(StoreError, match="Input/output"):
        copy_with_attributes(src, dst, "f")
    assert list(dst.list()) == []


def test_other_bytes_of_the_same_size_and_mtime_have_another_etag(tmp_path):
    store = LocalFolder(tmp_path)
    before = store.put("f", b"before")
    dates = (tmp_path / "f").stat()
    (tmp_path / "f").write_bytes(b"later!")
    os.utime(tmp_path / "f", ns=(dates.st_atime_ns, dates.st_mtime_ns))
    after = store.head("f")
    assert (after.n_bytes, after.modified_s) == (before.n_bytes, before.modified_s)
    assert after.etag != before.etag
    assert next(store.list()).etag == after.etag
    assert not store.delete_unchanged("f", before.etag)
    assert store.get("f") == b"later!"
    assert store.delete_unchanged("f", after.etag)
    assert store.delete_unchanged("f", after.etag)
    assert list(store.list()) == []


def test_empty_folders_above_a_key_are_removed_up_to_the_root(store):
    store.put("a/b/c/x", b"1")
    store.put("a/y", b"1")
    store.delete(["a/b/c/x"])
    store.remove_empty_above("a/b/c/x")
    assert [path.name for path in store.root.rglob("*")] == ["a", "y"]
    store.delete(["a/y"])
    store.remove_empty_above("a/y")
    assert list(store.root.iterdir()) == []


@pytest.mark.parametrize(("n_free", "message"), [(0, "put: no free inodes: "), (9, "put: No space left on device")])
def test_a_full_file_system_says_whether_bytes_or_inodes_are_missing(tmp_path, monkeypatch, n_free, message):
    def full(*_given):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(local, "write_all", full)
    monkeypatch.setattr(os, "statvfs", lambda _path: SimpleNamespace(f_files=100, f_favail=n_free))
    with pytest.raises(StoreError, match=message):
        LocalFolder(tmp_path / "missing").put("folder/a", b"x")
