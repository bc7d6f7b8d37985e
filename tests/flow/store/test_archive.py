"""Storage classes, restores and batches by boto3: moto restores, SeaweedFS keeps checksums and conditions."""

from __future__ import annotations

import os
import time

import pytest

from tiercache._native.checksum import crc32c
from tiercache.errors import NotFound, ObjectChanged, StoreError
from tiercache.store import open_store
from tiercache.store.archive import S3StorageClasses

PART = 5 << 20  # the smallest that S3 takes
pytestmark = pytest.mark.s3
WHOLE_OR_PARTS = pytest.mark.parametrize("whole_bytes", [1 << 30, 1])


def open_archive(url, **options):
    return S3StorageClasses(open_store(url, **options))


@pytest.fixture
def opened():
    found = []

    def open_it(door, folder="", **sizes):
        store = open_store(f"{door.server.url}/{door.prefix}{folder}", **door.server.storage_options)
        archive = S3StorageClasses(store)
        vars(archive).update(sizes)
        found.append(archive)
        return archive

    yield open_it
    for archive in found:
        archive.close()


@pytest.fixture
def archive(s3, opened):
    return opened(s3)


def put(archive, key, data, storage_class=None):
    with archive.create(key, storage_class=storage_class) as upload:
        upload.put_part(0, data)
        return upload.complete()


# -- writing and looking --------------------------------------------------------------------------------------------


def test_parts_in_any_order_are_joined_by_number(archive, s3):
    parts = [os.urandom(PART), os.urandom(PART), b"the end"]
    with archive.create("big") as upload:
        for number in (2, 0, 1):
            upload.put_part(number, parts[number])
        info = upload.complete()
    whole = b"".join(parts)
    assert s3.get("big") == whole
    assert (info.n_bytes, upload.crc32c, archive.head("big").crc32c) == (len(whole), *[crc32c(whole)] * 2)
    assert upload.is_confirmed


def test_an_aborted_upload_leaves_nothing(archive, s3):
    with archive.create("a") as upload:
        upload.put_part(0, b"x" * PART)
        upload.put_part(1, b"y")
    assert s3.uploads() == []
    with pytest.raises(NotFound):
        archive.head("a")


def test_an_upload_that_was_neither_completed_nor_aborted_is_listed_until_it_is_aborted(s3, opened):
    archive = opened(s3)
    assert [*archive.unfinished_uploads()] == []
    upload = archive.create("a/b")
    upload.put_part(0, os.urandom(PART))
    upload.put_part(1, b"end")
    (found,) = archive.unfinished_uploads()
    assert found.key == "a/b"
    assert abs(found.started_s - time.time()) < 3600
    archive.abort(found.key, found.upload_id)
    assert [*archive.unfinished_uploads()] == []


def test_a_missing_part_is_named_and_nothing_appears(archive):
    with archive.create("a") as upload:
        upload.put_part(0, b"x" * PART)
        upload.put_part(2, b"y")
        with pytest.raises(ValueError, match="part 1 is missing"):
            upload.complete()
    with pytest.raises(NotFound):
        archive.head("a")


@pytest.mark.parametrize("n_parts", [1, 2])
def test_an_upload_that_must_be_new_replaces_nothing(archive, s3, n_parts):
    s3.put("a", b"first")
    with archive.create("a") as upload:
        for number in range(n_parts):
            upload.put_part(number, b"x" * PART)
        assert upload.complete(if_absent=True) is None
    assert s3.get("a") == b"first"


def test_a_corrupted_part_is_refused(s3, opened, monkeypatch):
    monkeypatch.setattr("tiercache.store.archive.crc32c_to_text", lambda crc: "AAAAAA==")
    archive = opened(s3)
    with pytest.raises(StoreError, match="BadDigest"):
        put(archive, "a", b"data")


# -- listing --------------------------------------------------------------------------------------------------------


def test_a_listing_has_classes_and_only_keys_below_the_folder(archive):
    put(archive, "a/1", b"1", "GLACIER_IR")
    put(archive, "a/2", b"22")
    put(archive, "ab", b"3")
    found = {info.key: info for info in archive.list("a/")}
    assert sorted(found) == ["a/1", "a/2"]
    for key, listed in found.items():
        head = archive.head(key)
        assert (listed.n_bytes, listed.etag, listed.storage_class) == (head.n_bytes, head.etag, head.storage_class)


def test_a_listing_reads_all_pages(archive, s3, monkeypatch):
    ask = archive._ask
    for number in range(5):
        s3.put(f"k{number}", b"")
    monkeypatch.setattr(
        archive,
        "_ask",
        lambda op, where, **more: ask(op, where, **({"MaxKeys": 2} if "list" in op else {}), **more),
    )
    assert sorted(info.key for info in archive.list()) == [f"k{number}" for number in range(5)]


def test_temporary_objects_and_folder_markers_are_not_listed(archive, s3):
    s3.put("a/.tiercache-tmp-1", b"")
    s3.client.put_object(Bucket=s3.server.bucket, Key=f"{s3.prefix}/folder/", Body=b"")
    s3.put("b", b"")
    assert [info.key for info in archive.list()] == ["b"]


# -- classes --------------------------------------------------------------------------------------------------------


@WHOLE_OR_PARTS
def test_bytes_and_metadata_stay_when_the_class_changes(s3, opened, whole_bytes):
    archive = opened(s3, whole_bytes=whole_bytes, part_bytes=PART)
    full, data = f"{s3.prefix}/a", os.urandom(2 * PART + 5)
    s3.client.put_object(
        Bucket=s3.server.bucket, Key=full, Body=data, Metadata={"made-by": "me"}, ContentType="text/x-own"
    )
    assert archive.set_class("a", "STANDARD_IA").storage_class == "STANDARD_IA"
    assert s3.get("a") == data
    head = s3.client.head_object(Bucket=s3.server.bucket, Key=full)
    assert (head["Metadata"], head["ContentType"]) == ({"made-by": "me"}, "text/x-own")


def test_tags_stay_when_the_class_of_a_large_object_changes(moto, opened):
    archive = opened(moto, whole_bytes=1, part_bytes=PART)
    bucket, full = moto.server.bucket, f"{moto.prefix}/a"
    moto.client.put_object(Bucket=bucket, Key=full, Body=b"x" * PART, Tagging="team=a+b")
    archive.set_class("a", "STANDARD_IA")
    assert moto.client.get_object_tagging(Bucket=bucket, Key=full)["TagSet"] == [{"Key": "team", "Value": "a b"}]


@WHOLE_OR_PARTS
def test_the_class_of_a_changed_object_is_not_changed(s3, opened, whole_bytes):
    archive = opened(s3, whole_bytes=whole_bytes, part_bytes=PART)
    put(archive, "a", b"x" * PART)
    with pytest.raises(ObjectChanged):
        archive.set_class("a", "STANDARD_IA", if_match='"0123456789abcdef0123456789abcdef"')
    assert (archive.head("a").storage_class, s3.uploads()) == ("STANDARD", [])


def test_an_archived_object_keeps_its_class_until_it_is_restored(moto, opened):
    archive = opened(moto)
    put(archive, "a", b"data", "GLACIER")
    with pytest.raises(StoreError, match="must be restored") as caught:
        archive.set_class("a", "STANDARD")
    assert caught.value.details["archived"]


# -- copies by the server -------------------------------------------------------------------------------------------


@WHOLE_OR_PARTS
def test_the_server_copies_between_folders_with_the_class(s3, opened, whole_bytes):
    src, dst = opened(s3), opened(s3, "-cold", whole_bytes=whole_bytes, part_bytes=PART)
    data = os.urandom(PART + 1)
    s3.put("a ä", data)
    info = dst.copy_from(src, "a ä", "b", storage_class="GLACIER_IR")
    assert (info.n_bytes, info.storage_class) == (len(data), "GLACIER_IR")
    store = s3.server.store(f"{s3.prefix}-cold")
    assert store.get("b") == data
    store.close()


def test_between_two_servers_the_server_cannot_copy(s3, moto, opened):
    src, dst = opened(s3), opened(moto)
    assert not dst.can_copy_from(src)
    with pytest.raises(ValueError, match="cannot copy from"):
        dst.copy_from(src, "a", "a")


# -- restores -------------------------------------------------------------------------------------------------------


def test_an_archived_object_is_read_when_it_was_restored(moto, opened):
    archive = opened(moto)
    put(archive, "a", b"data", "DEEP_ARCHIVE")
    assert archive.restore("a", days=2, speed="bulk") == "started"
    assert 'ongoing-request="false"' in archive.head("a").restore
    assert archive.restore("a", days=2, speed="bulk") == "done"
    put(archive, "readable", b"data")
    assert archive.restore("readable", days=1, speed="standard") == "done"
    assert moto.get("a") == b"data"


def test_seaweedfs_reports_that_it_cannot_restore(s3, opened):
    archive = opened(s3)
    put(archive, "a", b"data", "GLACIER")
    with pytest.raises(StoreError, match="only labels") as caught:
        archive.restore("a", days=1, speed="standard")
    assert (caught.value.details["unable"], caught.value.status) == (True, 405)


def meanwhile(archive, monkeypatch, operation, do, *, after=False):
    """Do something before (or after) the first request of an operation."""
    ask, waiting = archive.call, [do]

    def call(name, key, **request):
        is_it = name == operation and bool(waiting)
        if is_it and not after:
            waiting.pop()()
        said = ask(name, key, **request)
        if is_it and after:
            waiting.pop()()
        return said

    monkeypatch.setattr(archive, "call", call)


@WHOLE_OR_PARTS
def test_an_object_written_during_a_class_change_stays(s3, opened, monkeypatch, whole_bytes):
    archive = opened(s3, whole_bytes=whole_bytes, part_bytes=PART)
    put(archive, "a", b"x" * PART)
    last = "copy_object" if whole_bytes > 1 else "complete_multipart_upload"
    meanwhile(archive, monkeypatch, last, lambda: s3.put("a", b"new"))
    with pytest.raises(ObjectChanged):
        archive.set_class("a", "STANDARD_IA")
    assert (s3.get("a"), s3.uploads()) == (b"new", [])


@WHOLE_OR_PARTS
def test_a_server_side_copy_that_must_be_new_replaces_nothing(s3, opened, whole_bytes):
    src, dst = opened(s3), opened(s3, "-cold", whole_bytes=whole_bytes, part_bytes=PART)
    put(src, "a", b"x" * PART)
    assert dst.copy_from(src, "a", "free", replaces=False).n_bytes == PART
    put(dst, "a", b"mine")
    with pytest.raises(ObjectChanged):
        dst.copy_from(src, "a", "a", replaces=False)
    assert dst.head("a").n_bytes == len(b"mine")
    assert dst.copy_from(src, "a", "a").n_bytes == PART


@WHOLE_OR_PARTS
def test_an_object_written_over_a_new_copy_is_not_taken_for_the_copy(s3, opened, monkeypatch, whole_bytes):
    src, dst = opened(s3), opened(s3, "-cold", whole_bytes=whole_bytes, part_bytes=PART)
    put(src, "a", b"x" * PART)
    last = "copy_object" if whole_bytes > 1 else "complete_multipart_upload"
    meanwhile(dst, monkeypatch, last, lambda: put(dst, "a", b"theirs"), after=True)
    with pytest.raises(ObjectChanged, match="another writer"):
        dst.copy_from(src, "a", "a")


# -- deletes --------------------------------------------------------------------------------------------------------


def test_a_changed_object_is_not_deleted(s3, opened):
    archive = opened(s3)
    etags = [put(archive, key, b"old").etag for key in "ab"]
    s3.put("b", b"new")
    failed = archive.delete_many(["a", "b", "gone"], if_match=[*etags, etags[0]])
    assert [key for key, _ in failed] == ["b"]
    assert [info.key for info in archive.list()] == ["b"]


# -- opening --------------------------------------------------------------------------------------------------------


def test_without_boto3_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr("tiercache.store.archive.has_boto3", lambda: False)
    with pytest.raises(ValueError, match=r"tiercache-data\[archive\]"):
        open_archive("s3://bucket/folder", access_key_id="a", secret_access_key="b")


def test_an_endpoint_of_the_environment_applies_to_the_archive(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.server.endpoint)
    keys = {name: s3.server.storage_options[name] for name in ("access_key_id", "secret_access_key")}
    s3.put("a", b"data")
    archive = open_archive(f"{s3.server.url}/{s3.prefix}", **keys)
    assert [info.key for info in archive.list()] == ["a"]
    archive.close()
