"""The permissions of the folder, folders of other users, and symbolic links."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
from tests.support.cache_world import World

from tiercache.cache import Cache
from tiercache.cache import folder as folder_module
from tiercache.cache.folder import MARKER, Folder

is_root = os.geteuid() == 0
needs_root = pytest.mark.skipif(not is_root, reason="only root can become somebody else")


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield
    os.umask(before)


def mode_of(path):
    return stat.S_IMODE(os.lstat(path).st_mode)


def use(world, **options):
    """A cache that holds a copy, a pinned one, a lock, a report and a note of poison; all its files."""
    cache = world.cache(**options)
    store = world.store(cache)
    cache.pin(store, [("a", world.put("a"))])
    world.put("b")
    world.fetch(store, "b")
    world.damage("b")
    assert store.remove_if_corrupt("b", world.identity("b"))
    world.fetch(store, "b")
    root = world.root / "cache"
    return cache, [Path(folder) / name for folder, _, names in os.walk(root) for name in names]


# -- rights --


def test_a_cache_is_private_whatever_the_umask(world, umask):
    _, files = use(world)
    root = world.root / "cache"
    assert {mode_of(root), *(mode_of(root / below) for below in Folder.BELOW)} == {0o700}
    copies = set(world.copies())
    assert {mode_of(path) for path in copies} == {0o400}
    wrong = {str(path.relative_to(root)): oct(mode_of(path)) for path in set(files) - copies if mode_of(path) != 0o600}
    assert wrong == {}
    assert {"catalog.sqlite", "catalog.lock", MARKER} <= {path.name for path in files}


def test_an_empty_world_writable_folder_becomes_private(world):
    root = world.root / "cache"
    root.mkdir()
    root.chmod(0o777)
    use(world)
    assert mode_of(root) == 0o700


# -- other people's folders --


@pytest.fixture
def foreign(world, monkeypatch):
    """A cache that belongs to somebody else: by its owner where root runs this, else by who we say that we are."""
    world.put("a")
    world.fetch(world.store(), "a")
    world.caches.pop().close()
    root = world.root / "cache"
    if is_root:
        for path in (root, *root.rglob("*")):
            os.chown(path, 65534, 65534)
    else:
        me = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    return root


def test_the_error_for_a_folder_of_another_user_names_the_user_and_the_remedy(world, foreign):
    before = sorted(foreign.rglob("*"))
    with pytest.raises(PermissionError) as caught:
        world.cache()
    text = str(caught.value)
    assert folder_module.user_name(foreign.stat().st_uid) in text
    assert f"uid {foreign.stat().st_uid}" in text
    assert "folder of your own" in text
    assert f"{foreign}-" in text, "a folder inside somebody else's cannot be made"
    assert sorted(foreign.rglob("*")) == before


def test_no_cache_is_created_in_a_folder_of_another_user(world, tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir()
    if is_root:
        os.chown(tmp_path / "theirs", 65534, 65534)
    else:
        me = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(PermissionError):
        Cache(tmp_path / "theirs", size=1)
    assert list((tmp_path / "theirs").iterdir()) == []


READER = """
import os, sys, warnings
from tests.support.cache_world import World

from tiercache.cache import Cache
from tiercache.model import ByteRange, ShardIdentity
from tiercache.store import LocalFolder
root, source, crc, first, groups = sys.argv[1:]
# What is imported late cannot be read by everybody everywhere.
Cache(first, size="1MB").store(LocalFolder(source)).close()
os.setgroups([int(groups)] if groups else [])
os.setgid(65533)
os.setuid(65533)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        store = Cache(root, size="1MB", shared="group").store(LocalFolder(source))
    except PermissionError as error:
        sys.exit(f"refused: {error}")
    with store.open_local("a", ShardIdentity("d" * 32, "61", 10000, int(crc))) as lease:
        assert lease.wait([ByteRange(0, 10000)]) and len(os.pread(lease.fd, 10000, 0)) == 10000
    assert store.open_local("b", ShardIdentity("d" * 32, "62", 10000, 0)) is None
    assert len(store.cache.entries()) == 1 and store.cache.stats()["bytes_used"] > 10000
print([str(w.message) for w in caught])
"""


def read_as_another(world, identity, group):
    for parent in (world.root, *world.root.parents):
        if parent.stat().st_uid == os.getuid() and not parent.stat().st_mode & 0o005:
            parent.chmod(parent.stat().st_mode | 0o055)
    arguments = [world.root / "cache", world.root / "source", str(identity.crc32c), world.root / "first", group]
    return subprocess.run([sys.executable, "-c", READER, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def public_world():
    """As world, below a folder that all users may enter: each pytest of a user makes those of all of them private."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        yield world
        for cache in world.caches:
            cache.close()


@needs_root
def test_files_of_another_user_in_our_folder_are_replaced(world, monkeypatch):
    """As after a run by sudo: its files cannot be read, but they lie in our folder."""
    world.put("a")
    store = world.store()
    world.fetch(store, "a")
    left = world.copy("a")
    os.chown(left, 65533, 65533)
    really_open = folder_module.open_file

    def refuse(path, *args, **options):
        if Path(path) == left and left.exists() and left.stat().st_uid == 65533:
            raise PermissionError(13, "permission denied", str(path))
        return really_open(path, *args, **options)

    monkeypatch.setattr(folder_module, "open_file", refuse)
    world.fetch(store, "a")
    world.fetch(store, "a")
    assert world.n_reads() == 2
    assert not store.cache.status()["bypassed"]
    assert world.copy("a").stat().st_uid == 0


# -- links --


def test_symbolic_links_under_any_name_of_the_cache_are_not_followed(world, tmp_path):
    """Each file of a cache in use is replaced by a link to a file that must stay as it is."""
    _, files = use(world)
    world.caches.pop().close()
    keep = tmp_path / "keep"
    root = world.root / "cache"
    names = [path.relative_to(root) for path in files if path.name != MARKER]
    owners = root / "owners"
    for name in names:
        shutil.rmtree(root)
        use(world)
        world.caches.pop().close()
        keep.write_bytes(b"must stay")
        keep.chmod(0o644)
        path = root / name
        path.unlink(missing_ok=True)
        path.symlink_to(keep)
        use(world)
        world.caches.pop().close()
        assert (keep.read_bytes(), mode_of(keep)) == (b"must stay", 0o644), name
    assert list(owners.iterdir()) == []


@pytest.mark.parametrize("suffix", ["", ".json", ".pin", ".part", ".map"])
def test_a_link_with_the_name_of_a_copy_is_replaced(world, tmp_path, suffix):
    identity = world.put("a")
    store = world.store()
    world.fetch(store, "a")
    path = Path(f"{world.copy('a')}{suffix}")
    keep = tmp_path / "keep"
    keep.write_bytes(bytes(identity.n_bytes))
    (world.root / "cache" / "copies" / world.copy("a").name).unlink()
    path.unlink(missing_ok=True)
    path.symlink_to(keep)
    world.fetch(store, "a")
    assert keep.read_bytes() == bytes(identity.n_bytes)
    world.fetch(store, "a")
    assert world.n_reads() == 2


@pytest.mark.parametrize("below", Folder.BELOW)
def test_a_link_to_another_folder_is_an_error_at_opening(world, tmp_path, below):
    world.cache().close()
    root = world.root / "cache"
    shutil.rmtree(root / below)
    (tmp_path / "elsewhere").mkdir()
    (root / below).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{below}: a symbolic link"):
        world.cache()
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("below", ["copies", "locks"])
def test_a_folder_replaced_by_a_link_is_bypassed_with_one_warning(world, tmp_path, below):
    world.put("a")
    store = world.store()
    root = world.root / "cache"
    shutil.rmtree(root / below)
    (tmp_path / "elsewhere").mkdir()
    (root / below).symlink_to(tmp_path / "elsewhere")
    with pytest.warns(RuntimeWarning, match="symbolic link"):
        assert world.read(store, "a") is None
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_the_folder_itself_may_be_reached_through_a_link(world, tmp_path):
    (tmp_path / "disk").mkdir()
    (world.root / "cache").symlink_to(tmp_path / "disk")
    world.put("a")
    world.fetch(world.store(), "a")
    assert (tmp_path / "disk" / MARKER).is_file()
    assert mode_of(tmp_path / "disk") == 0o700


# -- deleting --


@pytest.mark.parametrize("marker", ["gone", "a link"])
def test_nothing_is_deleted_without_the_marker(world, tmp_path, marker, monkeypatch):
    world.put("a")
    cache = world.cache()
    world.fetch(world.store(cache), "a")
    root = world.root / "cache"
    (root / MARKER).rename(tmp_path / "marker")
    if marker == "a link":
        (root / MARKER).symlink_to(tmp_path / "marker")
    folder = Folder.__new__(Folder)
    folder.__dict__ = cache._open().folder.__dict__
    assert folder.remove_file("copies", world.copy("a").name) is False
    assert len(world.copies()) == 1


@pytest.mark.parametrize("file", ["../secret", "x/y", "..", "/etc/passwd"])
def test_file_names_that_leave_the_folder_are_refused(tmp_path, file):
    folder = Folder(tmp_path / "c")
    (tmp_path / "secret").write_text("x")
    for call in (lambda: folder.remove_file("copies", file), lambda: folder.remove_file("..", "secret")):
        with pytest.raises((ValueError, OSError)):
            call()
    assert (tmp_path / "secret").exists()


def test_a_folder_with_other_files_is_not_changed(tmp_path):
    (tmp_path / "mine").write_text("x")
    tmp_path.chmod(0o755)
    with pytest.raises(ValueError, match="not a cache"):
        Cache(tmp_path, size=1)
    assert (mode_of(tmp_path), [p.name for p in tmp_path.iterdir()]) == (0o755, ["mine"])


# -- other file systems --


def mounted(kind, options, target):
    done = subprocess.run(["mount", "-t", kind, "-o", options, kind, target], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"{kind} cannot be mounted here: {done.stderr.decode().strip()}")


@pytest.fixture
def unmount():
    mounts = []
    yield mounts.append
    for target in mounts:
        subprocess.run(["umount", "-l", target], check=True)


@needs_root
@pytest.mark.parametrize("kind", ["tmpfs", "overlay"])
def test_a_cache_works_on_tmpfs_and_overlayfs(world, tmp_path, kind, unmount):
    target = world.root / "cache"
    target.mkdir()
    if kind == "tmpfs":
        mounted("tmpfs", "size=1M", target)
    else:
        # The upper layer on a tmpfs: the disk under this test may be an overlay itself, which cannot be one.
        (tmp_path / "layers").mkdir()
        mounted("tmpfs", "size=1M", tmp_path / "layers")
        unmount(tmp_path / "layers")
        for name in ("lower", "upper", "work"):
            (tmp_path / "layers" / name).mkdir()
        layers = [
            f"{option}={tmp_path / 'layers' / name}"
            for option, name in (("lowerdir", "lower"), ("upperdir", "upper"), ("workdir", "work"))
        ]
        mounted("overlay", ",".join(layers), target)
    unmount(target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache, files = use(world)
    assert {mode_of(path) for path in files} == {0o400, 0o600}
    assert cache.verify().is_right
    assert [holder["pid"] for holder in cache.status()["holders"]] == [os.getpid()]
    cache.unpin()
    assert cache.evict() > 0
    cache.close()


def fill(path):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        with suppress(OSError):
            while True:
                os.write(fd, bytes(4096))
    finally:
        os.close(fd)


@needs_root
def test_a_really_full_disk_is_bypassed_and_used_again_once_there_is_space(world, unmount):
    target = world.root / "cache"
    target.mkdir()
    mounted("tmpfs", "size=2M", target)
    unmount(target)
    world.put("small", 10_000)
    world.put("large", 300_000)
    cache = world.cache("10MB")
    store = world.store(cache)
    world.fetch(store, "small")
    filler = target / "filler"
    fill(filler)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert world.read(store, "large") is None
        assert world.read(store, "large") is None
    assert len(told) <= 1, [str(one.message) for one in told]
    filler.unlink()
    world.fetch(store, "large")
    world.fetch(store, "small")
    cache.close()
