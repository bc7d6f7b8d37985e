"""The permissions of the folder, folders of other users, and symbolic links."""

import os
import shutil
import stat
import subprocess
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from tiercache import DataLoader, Dataset, Writer
from tiercache.cache import Cache
from tiercache.cache import folder as folder_module
from tiercache.cache.folder import MARKER, Folder, charge_bytes

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


@pytest.mark.parametrize("below", ["copies", "owners"])
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


@pytest.fixture
def small_disk(world):
    """A disk of 2 MB for the cache."""
    target = world.root / "cache"
    target.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", target], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"tmpfs cannot be mounted here: {done.stderr.decode().strip()}")
    yield target
    subprocess.run(["umount", "-l", target], check=True)


def fill(path):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        with suppress(OSError):
            while True:
                os.write(fd, bytes(4096))
    finally:
        os.close(fd)


@needs_root
def test_a_really_full_disk_is_bypassed_and_used_again_once_there_is_space(world, small_disk):
    world.put("small", 10_000)
    world.put("large", 300_000)
    cache = world.cache("10MB")
    store = world.store(cache)
    world.fetch(store, "small")
    filler = small_disk / "filler"
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


@needs_root
def test_a_cache_on_a_full_disk_is_opened_serves_its_copies_and_can_be_emptied(world, small_disk):
    filler = small_disk / "filler"
    for key in "abcd":
        world.put(key, 100_000)
    with world.cache() as cache:
        for key in "abc":
            world.fetch(world.store(cache), key)
        figures, names = cache.status()["figures"], {entry.name for entry in cache.entries()}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fill(filler)
        with world.cache() as cache:
            assert cache.status()["n_copies"] == 3
            for key in "abc":
                world.fetch(world.store(cache), key)
            assert cache.verify().is_right
            assert {entry.name for entry in cache.entries()} == names
            assert cache.evict([min(names)]) > 100_000
            filler.unlink()
            world.fetch(world.store(cache), "d")
            assert (
                sum(entry.n_bytes for entry in cache.entries())
                == cache.stats()["bytes_used"]
                == 3 * charge_bytes(100_000)
            )
            fill(filler)
            assert cache.evict() == 3 * charge_bytes(100_000)
            assert cache.stats()["bytes_used"] == 0
        filler.unlink()
        with world.cache() as cache:
            assert cache.stats()["bytes_used"] == 0
            assert cache.status()["figures"]["bytes_fetched"] == figures["bytes_fetched"] + 100_000
    assert not told, [str(one.message) for one in told]


@needs_root
@pytest.mark.parametrize("size", ["10MB", "80%"])
def test_a_data_set_is_read_with_one_warning_if_its_new_cache_is_on_a_full_disk(small_disk, size):
    url = f"memory://full-disk-{len(size)}/numbers"
    with Writer(url) as writer:
        writer.write_batch({"id": np.arange(1000)})
    fill(small_disk / "filler")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        cache = Cache(small_disk / "new", size=size)
        dataset = Dataset(url, cache=cache)
        for _ in range(2):
            ids = [batch["id"].numpy() for batch in DataLoader(dataset, batch_size=100)]
            assert np.array_equal(np.concatenate(ids), np.arange(1000))
        dataset.close()
    assert len(told) == 1, [str(one.message) for one in told]
    assert "bypassing the cache" in str(told[0].message)
