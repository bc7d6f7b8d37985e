"""`tiercache::s3://` on a real server: conditions, listings, forks, processes. Bytes are counted by the server."""

from __future__ import annotations

import random
import uuid

import fsspec
import pytest
from tests.support.forks import in_child

import tiercache as tc

pytestmark = pytest.mark.s3

DATA = random.Random(1).randbytes(6_000_000)


@pytest.fixture
def fs(make, s3_server, s3_of):
    return make("s3", target_options=s3_of(s3_server))


@pytest.fixture
def path(s3_server):
    """An object that was written past everything under test."""
    key = f"any-url/{uuid.uuid4().hex[:8]}"
    s3_server.store().put(key, DATA)
    return f"{s3_server.bucket}/{key}"


@pytest.fixture
def behind(s3_server, path):
    """Writes the object behind the cache's back."""
    return lambda data: s3_server.store().put(path.partition("/")[2], data)


def test_uncached_bytes_of_a_replaced_s3_object_are_an_error_and_it_is_read_again(fs, path, behind):
    assert fs.info(path)["size"] == len(DATA)
    with fs.open(path) as file:
        assert file.read(10) == DATA[:10]
        behind(DATA[:5_999_999])
        file.seek(5_000_000)
        with pytest.raises(tc.ObjectChanged):
            file.read(10)
        file.seek(0)
        assert file.read(10) == DATA[:10]
    assert fs.cat_file(path) == DATA[:5_999_999]


def test_options_of_a_chained_url_are_given_by_protocol(cache, path, s3_server, s3_of):
    with fsspec.open(f"tiercache::s3://{path}", s3=s3_of(s3_server), cache=cache) as file:
        assert file.read() == DATA
    assert [entry.source for entry in cache.entries()] == [f"s3://{s3_server.endpoint.removeprefix('http://')}/{path}"]
    kind = fsspec.get_filesystem_class("tiercache")
    for made in list(kind._cache.values()):
        made.close()
    kind.clear_instance_cache()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_lists_and_reads_with_connections_of_its_own(fs, path):
    with fs.open(path) as opened:
        assert opened.read(100_000) == DATA[:100_000]

        def work():
            assert fs.info(path)["size"] == len(DATA)
            assert opened.read(3_000_000) == DATA[100_000:3_100_000]
            assert fs.cat_file(path) == DATA

        assert in_child(work)
        assert opened.read(100) == DATA[100_000:100_100]


def test_a_forbidden_object_raises_the_error_of_the_target(make, s3_server, s3_of, path):
    options = s3_of(s3_server) | {"secret": "wrong" * 8}
    with pytest.raises(PermissionError) as caught:
        make("s3", target_options=options).cat_file(path)
    assert "wrongwrong" not in str(caught.value)
