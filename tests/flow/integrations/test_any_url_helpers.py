"""Helpers of `tiercache::`: readahead, paths, names of servers, and the identity of objects."""

from __future__ import annotations

from contextlib import closing
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st
from tests.flow.integrations.conftest import CountedFileSystem

from tiercache.cache.names import name_of_object
from tiercache.integrations.fsspec import (
    LEAST_AHEAD_BYTES,
    MOST_AHEAD_BYTES,
    SMALL_BYTES,
    ObjectReader,
    TargetFileSystem,
    split_path,
    without_protocol,
)
from tiercache.model import ByteRange, ObjectInfo


class Lease:
    """A copy of zeros that is there as a whole, and what was asked of it ahead."""

    def __init__(self):
        self.asked = []

    def present(self, ranges):
        return True

    def read(self, spans):
        return True

    def prefetch(self, ranges):
        self.asked += ranges


class Copies:
    """A cached store of one such copy."""

    def __init__(self):
        self.lease = Lease()

    def open_copy(self, spec):
        return self.lease


def reader(most_bytes=MOST_AHEAD_BYTES):
    copies = Copies()
    spec = SimpleNamespace(key="k", n_bytes=1 << 40)
    return ObjectReader(copies, spec, most_bytes), copies.lease.asked


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 1 << 10)), max_size=50), st.integers(1, 1 << 23))
def test_readahead_is_at_most_the_bytes_read_in_sequence(reads, most_bytes):
    (file, asked), end, run_bytes = reader(most_bytes), 0, 0
    for goes_on, n_bytes in reads:
        start = end if goes_on else end + 1
        run_bytes = n_bytes + (run_bytes if goes_on else 0)
        end = start + n_bytes
        file.read_range(ByteRange(start, end))
        ahead_bytes = asked.pop().end - end if asked else 0
        assert ahead_bytes <= min(max(run_bytes, LEAST_AHEAD_BYTES), most_bytes)


def test_readahead_starts_at_the_third_small_or_the_eighth_large_read():
    for n_bytes, expected in ((SMALL_BYTES, 3), (SMALL_BYTES + 1, 8)):
        file, asked = reader()
        for number in range(1, expected + 1):
            assert not asked
            file.read_range(ByteRange(number * n_bytes, (number + 1) * n_bytes))
        assert len(asked) == 1
        file.read_range(ByteRange(0, n_bytes))
        assert len(asked) == 1, "it does not go on"


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


def test_the_protocol_is_removed_from_paths():
    assert without_protocol("tiercache::s3://b/k/") == "s3://b/k/"
    assert without_protocol("tiercache://b/k") == "b/k"
    assert without_protocol("b/tiercache::x") == "b/tiercache::x"


def test_a_weak_etag_identifies_a_copy_only_with_a_date():
    def name(**facts):
        return name_of_object("s3://b/k", ObjectInfo("k", 1, **facts))

    assert name(etag='W/"a"') is None
    assert name(etag='W/"a"', modified_s=1.0) != name(etag='W/"a"', modified_s=2.0)
    assert name(etag='W/"a"', modified_s=1.0) != name(etag='W/"b"', modified_s=1.0)
    assert name(etag='"a"', modified_s=1.0) == name(etag='"a"', modified_s=2.0)
    assert name(etag='W/"a"', version="1") == name(etag='W/"b"', version="1")


def test_the_url_of_a_target_contains_servers_and_no_secrets():
    def url(**options):
        target = TargetFileSystem(lambda: CountedFileSystem(skip_instance_cache=True, **options))
        with closing(target.store("/b")) as store:
            return store.url

    assert url() == "counted:///b"
    assert url(token="hunter2", password="hunter2") == "counted:///b"
    assert url(host="h", port=22) == "counted://h/22/b"
    assert url(client_kwargs={"endpoint_url": "http://me:hunter2@at:1/?sig=hunter2"}) == "counted://at:1/b"
    assert url(endpoint_url="weird\nname") == "counted:///b"
