"""Copies never overwrite an object that is not theirs to replace: conditions of stores, races, corrupt sources."""

from dataclasses import replace

import pytest
from tests.flow.tier.test_transfer_s3 import LARGE, SMALL, Bucket, bucket  # noqa: F401 - a fixture
from tests.support.disk_bucket import flipped, read_object, write_object
from tests.support.tier_folders import Folders
from tests.support.tier_moves import GRACE_S, PARTS, HookAt, Killed, World, moved_away

from tiercache.errors import ObjectChanged
from tiercache.store import LocalFolder
from tiercache.tier.mover import run_once
from tiercache.tier.stores import Stores

SIZES = pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
SOURCES = pytest.mark.parametrize("src", ["hot", "standard"])
THEIRS = b"theirs"
OLD_ETAG = '"0123456789abcdef0123456789abcdef"'


def last_look_sees(here, monkeypatch, etag):
    """Make the last check see this ETag, as if another writer replaced the object just afterwards."""
    head = here.stores.head
    monkeypatch.setattr(
        here.stores, "head", lambda n, k: replace(head(n, k), etag=etag) if n == "other" else head(n, k)
    )


@pytest.mark.s3
@SIZES
@SOURCES
def test_an_object_that_was_written_since_is_not_overwritten(bucket, src, data):  # noqa: F811
    bucket.stores.store("other").put("a", b"old")
    bucket.stores.store(src).put("a", data)
    etag = bucket.stores.head("other", "a").etag
    bucket.stores.store("other").put("a", THEIRS)
    with pytest.raises(ObjectChanged):
        bucket.copy(src, "other", replaces=etag)
    assert bucket.stores.store("other").get("a") == THEIRS


@pytest.mark.s3
@SIZES
@SOURCES
def test_the_server_keeps_an_object_that_was_written_after_the_last_check(s3_server, tmp_path, monkeypatch, src, data):
    """SeaweedFS checks If-Match of all three requests; moto only that of a put."""
    here = Bucket(s3_server, tmp_path)
    last_look_sees(here, monkeypatch, OLD_ETAG)
    with here.transfer, here.stores:
        here.stores.store("other").put("a", THEIRS)
        here.stores.store(src).put("a", data)
        with pytest.raises(ObjectChanged):
            here.copy(src, "other", replaces=OLD_ETAG)
        assert here.stores.store("other").get("a") == THEIRS


@pytest.mark.s3
@SIZES
def test_a_missing_object_to_replace_is_an_error(bucket, data):  # noqa: F811
    bucket.stores.store("hot").put("a", data)
    with pytest.raises(ObjectChanged):
        bucket.copy("hot", "other", replaces=OLD_ETAG)


@pytest.mark.s3
@SIZES
def test_without_boto3_the_destination_is_checked_before_the_upload_completes(s3_server, tmp_path, monkeypatch, data):
    monkeypatch.setattr("tiercache.tier.stores.has_boto3", lambda: False)
    here = Bucket(s3_server, tmp_path)
    here.stores.store("hot").put("a", data)
    here.stores.store("other").put("a", THEIRS)
    with here.transfer, here.stores, pytest.raises(ObjectChanged, match="changed concurrently: it is not overwritten"):
        here.copy("hot", "other", replaces='"old"')
    assert here.stores.store("other").get("a") == THEIRS
    here.stores.close()


# -- objects that are created during a copy ------------------------------------------------------------------------


KEY, MINE = "files/a.bin", b"written while a copy was under way"


class ContestedFolder(LocalFolder):
    """Another writer puts an object of the name of which an upload has begun."""

    def create(self, key, **options):
        upload = super().create(key, **options)
        if key == KEY:
            self.put(key, MINE)
        return upload


@pytest.mark.parametrize("is_small", [True, False])
def test_an_object_created_during_a_copy_is_not_overwritten(tmp_path, monkeypatch, is_small):
    if not is_small:
        monkeypatch.setattr("tiercache.tier.transfer._SMALL_BYTES", 0)
    folders = Folders(tmp_path, rules='[[rules]]\nmatch = "**"\nafter = "1h"\nto = "archive"\n')
    folders.write("hot", KEY, b"x" * 1000)
    with Stores(folders.file, stores={"archive": ContestedFolder(tmp_path / "archive")}) as stores:
        reports = [run_once(folders.file, stores=stores) for _ in range(2)]
    assert [one.path for one in reports[0].stopped] == [KEY]
    assert (tmp_path / "archive" / KEY).read_bytes() == MINE
    assert (tmp_path / "hot" / KEY).exists()


# -- corrupt sources, and copies that are made again ---------------------------------------------------------------


def unsummed(move):
    """Return the move with objects whose checksums are unknown."""
    return replace(move, objects=tuple(one._replace(crc32c=None) for one in move.objects))


@pytest.mark.parametrize("keys", [("f",), PARTS])
def test_a_corrupt_source_does_not_replace_an_archived_copy_in_a_store_without_checksums(tmp_path, keys):
    """The mover was killed when the server had copied it: only the ETag is known."""
    world = World(tmp_path / "world", classes=True)
    for name in ("standard", "archive"):
        world.inner[name].says_sums = False
    world.put("standard", *keys)
    path = keys[0].rpartition("/")[0] or keys[0]
    move = unsummed(world.move(path, "standard", "archive", keys=keys, kind="checkpoint" if len(keys) > 1 else "file"))
    with HookAt("tier_move.copied"), pytest.raises(Killed):
        world.apply(world.plan(move, name="1"))
    file = world.inner["standard"]._path(keys[0])
    about, data = read_object(file)
    write_object(file, about, flipped(data))
    assert world.apply(world.plan(move, name="2")).stopped == ()
    world.later()
    assert world.run_due_deletions().n_made == 1
    assert all(world.where(key) == ["archive"] for key in keys)


@pytest.mark.parametrize("point", ["tier_move.object", "tier_move.copied", "tier_move.recorded"])
def test_a_copy_made_again_with_the_same_etag_starts_a_new_grace_period(tmp_path, point):
    """Where ETags are derived from bytes, the entry of the lost copy matches the new one before it is recorded."""
    world = World(tmp_path / "world", classes=True, cold_class="STANDARD_IA")
    moved_away(world, "f")
    world.later(GRACE_S / 2)
    world.inner["archive"].delete(["f"])
    with HookAt(point), pytest.raises(Killed):
        world.apply(world.plan(world.move("f", "standard", "archive"), name="tomorrow"))
    world.apply(world.plan(world.move("f", "standard", "archive"), name="again"))
    world.later(GRACE_S / 2 + 1)
    assert world.run_due_deletions().waiting_drops == 1
    assert world.where("f") == ["standard", "archive"]
    world.later(GRACE_S / 2)
    assert world.run_due_deletions().n_made == 1
