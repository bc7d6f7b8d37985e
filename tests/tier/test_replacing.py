"""A copy that takes the place of an older one takes the place of that one: what came there since stays."""

from dataclasses import replace

import pytest
from tests.tier.moving import World, moved_away
from tests.tier.test_transfer_s3 import LARGE, SMALL, Bucket, bucket  # noqa: F401 - a fixture

from tiercache.errors import ObjectChanged
from tiercache.store.archive import S3Archive
from tiercache.testing import WrapperStore

SIZES = pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
SOURCES = pytest.mark.parametrize("src", ["hot", "standard"])
THEIRS = b"theirs"
OLD_ETAG = '"0123456789abcdef0123456789abcdef"'


def last_look_sees(here, monkeypatch, etag):
    """Somebody replaces the object after the mover has looked at it for the last time."""
    head = here.stores.head
    monkeypatch.setattr(
        here.stores, "head", lambda n, k: replace(head(n, k), etag=etag) if n == "other" else head(n, k)
    )


@pytest.mark.s3
@SIZES
@SOURCES
def test_what_has_the_etag_that_was_seen_is_replaced(bucket, src, data):  # noqa: F811
    bucket.stores.store("other").put("a", b"old")
    bucket.stores.store(src).put("a", data)
    etag = bucket.stores.head("other", "a").etag
    assert bucket.copy(src, "other", replaces=etag).n_bytes == len(data)
    assert bucket.stores.store("other").get("a") == data


@pytest.mark.s3
@SIZES
@SOURCES
def test_what_came_since_is_not_overwritten(bucket, src, data):  # noqa: F811
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
def test_what_came_after_the_last_look_is_kept_by_the_server(s3_server, tmp_path, monkeypatch, src, data):
    """SeaweedFS looks at If-Match of all three requests; moto at that of a put alone."""
    here = Bucket(s3_server, tmp_path)
    last_look_sees(here, monkeypatch, OLD_ETAG)
    with here.transfer, here.stores:
        here.stores.store("other").put("a", THEIRS)
        here.stores.store(src).put("a", data)
        with pytest.raises(ObjectChanged):
            here.copy(src, "other", replaces=OLD_ETAG)
        assert here.stores.store("other").get("a") == THEIRS


@pytest.mark.s3
def test_moto_keeps_what_came_after_the_last_look_where_it_is_put_whole(moto_server, tmp_path, monkeypatch):
    here = Bucket(moto_server, tmp_path)
    last_look_sees(here, monkeypatch, OLD_ETAG)
    with here.transfer, here.stores:
        here.stores.store("other").put("a", THEIRS)
        here.stores.store("hot").put("a", SMALL)
        with pytest.raises(ObjectChanged):
            here.copy("hot", "other", replaces=OLD_ETAG)
        assert here.stores.store("other").get("a") == THEIRS


@pytest.mark.s3
@SIZES
def test_where_what_was_seen_is_gone_that_is_an_error_that_says_so(bucket, data):  # noqa: F811
    bucket.stores.store("hot").put("a", data)
    with pytest.raises(ObjectChanged):
        bucket.copy("hot", "other", replaces=OLD_ETAG)


@pytest.mark.s3
@SIZES
def test_without_boto3_it_is_looked_once_more(s3_server, tmp_path, monkeypatch, data):
    monkeypatch.setattr("tiercache.tier.stores.has_boto3", lambda: False)
    here = Bucket(s3_server, tmp_path)
    here.stores.store("hot").put("a", data)
    here.stores.store("other").put("a", THEIRS)
    with here.transfer, here.stores, pytest.raises(ObjectChanged, match="changed concurrently: it is not overwritten"):
        here.copy("hot", "other", replaces='"old"')
    assert here.stores.store("other").get("a") == THEIRS
    here.stores.close()


@pytest.mark.s3
def test_a_boto3_that_knows_no_such_condition_looks_and_replaces(s3_server, tmp_path, monkeypatch):
    here = Bucket(s3_server, tmp_path)
    archive = here.stores.archive("other")
    assert isinstance(archive, S3Archive)
    monkeypatch.setattr(type(archive.calls), "supports", lambda *_: False)
    with here.transfer, here.stores:
        here.stores.store("hot").put("a", SMALL)
        here.stores.store("other").put("a", THEIRS)
        etag = here.stores.head("other", "a").etag
        assert here.copy("hot", "other", replaces=etag).n_bytes == len(SMALL)


# -- the mover --------------------------------------------------------------------------------------------------------


class Contested(WrapperStore):
    """Somebody writes where an upload has begun."""

    def create(self, key):
        upload = super().create(key)
        self.inner.put(key, THEIRS)
        return upload


def test_the_mover_says_which_copy_it_replaces(tmp_path):
    world = World(tmp_path / "world")
    moved_away(world, "f")
    world.inner["standard"].put("f", b"anew")
    world.faulty["archive"] = Contested(world.inner["archive"])
    move = world.move("f", "standard", "archive")
    move = replace(move, objects=tuple(one._replace(crc32c=None) for one in move.objects))
    assert "not overwritten" in world.apply(world.plan(move, name="2")).stopped[0].reason
    assert world.inner["archive"].get("f") == THEIRS
    assert world.inner["standard"].get("f") == b"anew"


def test_the_mover_replaces_a_copy_that_is_as_it_was_made(tmp_path):
    world = World(tmp_path / "world")
    moved_away(world, "f")
    world.inner["standard"].put("f", b"anew")
    move = world.move("f", "standard", "archive")
    move = replace(move, objects=tuple(one._replace(crc32c=None) for one in move.objects))
    assert world.apply(world.plan(move, name="2")).stopped == ()
    assert world.inner["archive"].get("f") == b"anew"
