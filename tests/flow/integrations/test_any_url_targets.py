"""What can stand behind `tiercache::`, how it is named, what may be shown of it, and a real server of S3."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

import fsspec
import pytest
from tests.flow.integrations.conftest import DATA, CountedFileSystem
from tests.support.forks import in_child
from tests.support.http_server import HttpFaultServer

import tiercache as tc
from tiercache.integrations.fsspec import (
    split_path,
)
from tiercache.store import open_store
from tiercache.waiting import wait_for

# -- chains, loops, options -----------------------------------------------------------------------------------------


def test_an_archive_is_read_by_ranges_of_its_copy(source, cache):
    import zipfile

    with source.open("/b/a.zip", "wb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("first", DATA)
        archive.writestr("second", b"small")
    source.n_bytes_read()
    url = "zip://second::tiercache::counted://b/a.zip"
    for _ in range(2):
        with fsspec.open(url, tiercache={"cache": cache}) as file:
            assert file.read() == b"small"
    assert source.n_bytes_read() < 40_000
    type(fsspec.filesystem("tiercache", target_protocol="counted", cache=cache)).clear_instance_cache()


def test_a_folder_of_a_target_can_be_the_target(source, cache, path):
    url = "tiercache::dir::counted://b"
    fs, _ = fsspec.url_to_fs(url, cache=cache, skip_instance_cache=True)
    assert fs.ls("", detail=False) == ["x"]
    for _ in range(2):
        assert fs.cat_file("x") == DATA
    fs.close()


def test_a_target_that_a_chain_names_twice_counts_once(source, cache, path):
    """As Hugging Face datasets writes them."""
    fs, name = fsspec.url_to_fs("tiercache::counted://b/x::counted://b/*", cache=cache, skip_instance_cache=True)
    assert name == path
    assert fs.cat_file(name) == DATA
    fs.close()


def test_files_are_read_inside_a_running_event_loop(make, source, path):
    with HttpFaultServer({"x": DATA}) as server:

        async def read_in_a_loop():
            theirs = fsspec.filesystem("http", asynchronous=True, loop=asyncio.get_running_loop())
            fs = fsspec.filesystem("tiercache", fs=theirs, cache=cache_of(make), skip_instance_cache=True)
            try:
                return await asyncio.to_thread(fs.cat_file, f"{server.url}/x"), fs.cat_file(f"{server.url}/x", 0, 5)
            finally:
                fs.close()

        assert asyncio.run(read_in_a_loop()) == (DATA, DATA[:5])
    fsspec.get_filesystem_class("http").clear_instance_cache()


def cache_of(make):
    return make().cache


def test_http_objects_are_cached_by_etag_but_presigned_urls_are_not_and_no_password_is_shown(make, cache):
    with HttpFaultServer({"x": DATA}) as server:
        fs, url = make("https"), server.url.replace("http://", "http://user:hunter2@")
        for _ in range(2):
            with fs.open(f"{url}/x") as file:
                assert file.read() == DATA
                assert type(file).__name__ in repr(file)
                assert "hunter2" not in repr(file)
        sent = server.n_bytes_sent
        assert sent < 1.1 * len(DATA)
        # A reader goes on as soon as its bytes are there, a moment before they are in the books.
        assert wait_for(cache.entries, 30)
        assert [entry.source for entry in cache.entries()] == [f"{server.url}/x"]
        for _ in range(2):
            assert fs.cat_file(f"{server.url}/x?X-Amz-Signature=secret") == DATA
        assert server.n_bytes_sent == sent + 2 * len(DATA)
    fsspec.get_filesystem_class("http").clear_instance_cache()


SECRET = "hunter2hunter2"


def test_no_repr_error_or_file_name_contains_a_secret(make, source, cache, path):
    options = {
        "token": SECRET,
        "secret": SECRET,
        "client_kwargs": {"password": SECRET, "endpoint_url": f"http://me:{SECRET}@at:1/?sig={SECRET}"},
    }
    fs = make(target_options=options)
    assert fs.cat_file(path) == DATA
    with fs.open(path) as file:
        shown = [repr(fs), repr(file), repr(fs._stores)]
        source.rm_file(path)
        source.pipe_file(path, b"x")
        file.seek(0)
    for call in (lambda: fs.cat_file("/b/none"), lambda: make(target_options=options, password=SECRET)):
        with pytest.raises((OSError, TypeError)) as caught:
            call()
        shown += [str(caught.value), repr(caught.value)]
    assert [entry.source for entry in cache.entries()] == ["counted://at:1/b/x"]
    assert not any(SECRET in text for text in shown)
    for file in Path(cache.path).rglob("*"):
        assert SECRET not in file.name
        assert not file.is_file() or SECRET.encode() not in file.read_bytes()


def test_the_same_path_on_another_host_is_another_copy(make, source, path):
    CountedFileSystem.about = {"mtime": 1}
    assert make(target_options={"host": "first"}).cat_file(path) == DATA
    source.pipe_file(path, DATA[::-1])
    assert make(target_options={"host": "second", "port": 22}).cat_file(path) == DATA[::-1]


def test_equal_targets_share_their_connections(make, source, path):
    first, second, other = make(), make(), make(target_options={"host": "other"})
    for fs in (first, second, other):
        fs.cat_file(path)
    inner = [fs._stores["/b"].inner for fs in (first, second, other)]
    assert inner[0] is inner[1] is not inner[2]


def test_invalid_options_are_refused_with_the_remedy(cache):
    for options, error, said in [
        ({}, ValueError, "target_protocol"),
        ({"target_protocol": "memory", "fs": fsspec.filesystem("memory")}, ValueError, "exactly once"),
        ({"target_protocol": "memory", "anon": True}, TypeError, r"does not know anon.*s3=\{"),
        ({"target_protocol": "memory", "asynchronous": True}, ValueError, "AsyncFileSystemWrapper"),
        ({"target_protocol": "no-such"}, ValueError, "no-such"),
        ({"target_protocol": "tiercache"}, ValueError, "name it once"),
    ]:
        with pytest.raises(error, match=said):
            fsspec.filesystem("tiercache", **options)
    with pytest.raises(ValueError, match="remove cache_dir and cache_size"):
        fsspec.filesystem("tiercache", target_protocol="memory", cache=cache, cache_size="1GB")
    with pytest.raises(ValueError, match=r"tiercache::s3://bucket/photos: .* remove tiercache::"):
        open_store("tiercache::s3://bucket/photos")


def test_split_path_returns_bucket_and_key():
    for path, expected in [
        ("bucket/a/b", ("bucket", "a/b")),
        ("/tmp/a/b", ("/tmp", "a/b")),
        ("name", ("", "name")),
        ("https://host:8/a/b", ("https://host:8", "a/b")),
        ("http://user:pw@host/a", ("http://user:pw@host", "a")),
        ("https://host/a?sig=x", None),
        ("https://host/a#token=x", None),  # never sent: it is one object whatever it says, and may be a secret
        ("bucket/a#b", ("bucket", "a#b")),
        ("bucket/a?versionId=1", None),
        ("arn:aws:s3:eu:1:accesspoint/a/b", None),
        ("bucket/a//b", None),
        ("bucket/../b", None),
        ("/name", None),  # a store of "/" would look for it in the working directory
        ("bucket/a\\b", None),
        ("", None),
    ]:
        assert split_path(path) == expected, path


# -- a real server: conditions, forks, errors --------------------------------------------------------------------


@pytest.fixture
def s3_fs(make, s3_server, s3_of):
    return make("s3", target_options=s3_of(s3_server))


@pytest.fixture
def s3_path(s3_server):
    """An object that was written past everything under test."""
    key = f"any-url/{uuid.uuid4().hex[:8]}"
    s3_server.store().put(key, DATA)
    return f"{s3_server.bucket}/{key}"


@pytest.fixture
def behind(s3_server, s3_path):
    """Writes the object behind the cache's back."""
    return lambda data: s3_server.store().put(s3_path.partition("/")[2], data)


@pytest.mark.s3
def test_uncached_bytes_of_a_replaced_s3_object_are_an_error_and_it_is_read_again(s3_fs, s3_path, behind):
    assert s3_fs.info(s3_path)["size"] == len(DATA)
    with s3_fs.open(s3_path) as file:
        assert file.read(10) == DATA[:10]
        behind(DATA[:999_999])
        file.seek(900_000)
        with pytest.raises(tc.ObjectChanged):
            file.read(10)
        file.seek(0)
        assert file.read(10) == DATA[:10]
    assert s3_fs.cat_file(s3_path) == DATA[:999_999]


@pytest.mark.s3
def test_options_of_a_chained_url_are_given_by_protocol(cache, s3_path, s3_server, s3_of):
    with fsspec.open(f"tiercache::s3://{s3_path}", s3=s3_of(s3_server), cache=cache) as file:
        assert file.read() == DATA
    assert [entry.source for entry in cache.entries()] == [
        f"s3://{s3_server.endpoint.removeprefix('http://')}/{s3_path}"
    ]
    kind = fsspec.get_filesystem_class("tiercache")
    for made in list(kind._cache.values()):
        made.close()
    kind.clear_instance_cache()


@pytest.mark.s3
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_lists_and_reads_with_connections_of_its_own(s3_fs, s3_path):
    with s3_fs.open(s3_path) as opened:
        assert opened.read(100_000) == DATA[:100_000]

        def work():
            assert s3_fs.info(s3_path)["size"] == len(DATA)
            assert opened.read(500_000) == DATA[100_000:600_000]
            assert s3_fs.cat_file(s3_path) == DATA

        assert in_child(work)
        assert opened.read(100) == DATA[100_000:100_100]


@pytest.mark.s3
def test_a_forbidden_object_raises_the_error_of_the_target(make, s3_server, s3_of, s3_path):
    options = s3_of(s3_server) | {"secret": "wrong" * 8}
    with pytest.raises(PermissionError) as caught:
        make("s3", target_options=options).cat_file(s3_path)
    assert "wrongwrong" not in str(caught.value)
