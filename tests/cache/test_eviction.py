"""What is deleted, and what never is."""

import mmap
import os
from pathlib import Path

import pytest

from tiercache.cache.record import name_of_identity
from tiercache.model import ByteRange

WHOLE = [ByteRange(0, 10_000)]


def test_a_leased_copy_is_not_evicted(world, locks):
    identity = world.put("a")
    cache = world.cache()
    store = world.store(cache)
    with store.open_local("a", identity) as lease:
        assert lease.wait(WHOLE)
        freed = cache.evict()
        assert os.pread(lease.fd, 10_000, 0) == world.data["a"]
    if locks == "locks hold":
        assert freed == 0
        assert cache.evict() == 12_288


def test_a_mapped_copy_stays_readable_whatever_happens_to_its_name(world):
    identity = world.put("a")
    store = world.store()
    with store.open_local("a", identity) as lease:
        assert lease.wait(WHOLE)
        mapped = mmap.mmap(lease.fd, 10_000, prot=mmap.PROT_READ)
    world.copy("a").unlink()
    world.fetch(store, "a")
    assert mapped[:] == world.data["a"]
    mapped.close()


def test_a_copy_that_lost_its_name_before_it_was_locked_is_a_miss(world, monkeypatch):
    """The evictor comes between open() and flock(): the reader must not keep a file that nobody counts."""
    world.put("a")
    store = world.store()
    world.fetch(store, "a")
    folder = store.cache._open().folder
    really_open = folder.open_copy

    def open_and_lose(name):
        fd = really_open(name)
        if fd is not None:
            Path(folder.copy_path(name)).unlink()
        return fd

    monkeypatch.setattr(folder, "open_copy", open_and_lose)
    with store.open_local("a", world.identity("a")) as lease:
        assert lease.fd == -1


def test_a_copy_without_a_known_source_is_never_deleted(world):
    world.put("a")
    cache = world.cache()
    store = world.store(cache)
    world.fetch(store, "a")
    copy = world.copy("a")
    copy.with_name(copy.name + ".json").unlink()
    cache.close()
    (world.root / "cache" / "catalog.sqlite").unlink()
    assert cache.evict() == 0
    (entry,) = cache.entries()
    assert entry.source == ""
    assert world.copies() == [copy]


def test_a_copy_without_record_is_checked_on_first_use_and_gets_one(world):
    world.put("a")
    cache = world.cache()
    world.fetch(world.store(cache), "a")
    copy = world.copy("a")
    copy.with_name(copy.name + ".json").write_bytes(b"\0" * 200)
    cache.close()
    (world.root / "cache" / "catalog.sqlite").unlink()
    world.fetch(world.store(cache), "a")
    assert world.n_reads() == 1
    assert cache.entries()[0].source.endswith("/a")
    assert cache.evict() == 12_288


def test_a_copy_without_record_that_is_wrong_is_fetched_again(world):
    world.put("a")
    cache = world.cache()
    world.fetch(world.store(cache), "a")
    copy = world.copy("a")
    copy.with_name(copy.name + ".json").unlink()
    copy.chmod(0o644)
    copy.write_bytes(b"\0" * 10_000)
    cache.close()
    (world.root / "cache" / "catalog.sqlite").unlink()
    world.fetch(world.store(cache), "a")
    assert world.n_reads() == 2


def test_foreign_files_are_left_alone(world):
    world.put("a")
    cache = world.cache()
    world.fetch(world.store(cache), "a")
    cache.close()
    foreign = [world.root / "cache" / "copies" / name for name in ("notes.txt", "x.tmp", "f" * 39, "readme.json")]
    for path in foreign:
        path.write_text("mine")
    cache.evict()
    assert [path.read_text() for path in foreign] == ["mine"] * 4


def test_a_link_planted_under_a_copys_name_is_not_followed(world):
    identity = world.put("a")
    precious = world.root / "precious"
    precious.write_bytes(world.data["a"])
    store = world.store()
    name = name_of_identity(identity)
    (world.root / "cache" / "copies" / name).symlink_to(precious)
    assert world.read(store, "a") == world.data["a"]
    store.cache.evict()
    assert precious.read_bytes() == world.data["a"]


def test_a_copies_folder_that_is_a_link_elsewhere_loses_nothing(world):
    world.put("a")
    cache = world.cache()
    world.fetch(world.store(cache), "a")
    copies = world.root / "cache" / "copies"
    elsewhere = world.root / "elsewhere"
    copies.rename(elsewhere)
    copies.symlink_to(elsewhere)
    before = sorted(elsewhere.iterdir())
    with pytest.raises(OSError, match=r"Not a directory|symbolic"):
        cache.evict()
    assert sorted(elsewhere.iterdir()) == before


def test_a_folder_that_is_not_a_cache_is_refused(tmp_path, world):
    (world.root / "home").mkdir()
    (world.root / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not a cache"):
        world.cache(name="home")
    assert [p.name for p in (world.root / "home").iterdir()] == ["thesis.txt"]


def test_evicting_a_selection_takes_only_that(world):
    cache = world.cache()
    store = world.store(cache)
    for key in ("train/a", "train/b", "test/a"):
        world.put(key)
        world.fetch(store, key)
    assert cache.evict(lambda entry: "/train/" in entry.source) == 2 * 12_288
    (left,) = cache.entries()
    assert left.source.endswith("test/a")
    assert cache.evict([left.name]) == 12_288
    assert cache.stats()["evicted"] == 3
