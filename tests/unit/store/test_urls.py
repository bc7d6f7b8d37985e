"""URLs and storage options."""

from __future__ import annotations

import pickle
from datetime import timedelta
from pathlib import Path

import pytest

from tiercache.errors import StoreError
from tiercache.stats import Counters
from tiercache.store import CloudStore, FsspecStore, LocalFolder, MemoryStore, open_store, redact, split_url
from tiercache.store.access import CallOptions, CloudOptions, server_url
from tiercache.store.archive import Boto3Client
from tiercache.store.obstore import BucketFolder, ObstoreClient

SHOWN = [
    ("s3://bucket/a/b", "s3://bucket/a/b"),
    ("s3://key:secret@bucket/a", "s3://bucket/a"),
    ("https://user:secret@host:8080/a?X-Amz-Signature=secret#secret", "https://host:8080/a"),
    ("abfss://container@account.dfs.core.windows.net/a", "abfss://container@account.dfs.core.windows.net/a"),
    ("abfss://user:secret@account.dfs.core.windows.net/a", "abfss://account.dfs.core.windows.net/a"),
    ("/data/what?is@this", "/data/what?is@this"),
    ("relative/path", "relative/path"),
    ("file:///data/x", "file:///data/x"),
    ("https://host?sig=secret", "https://host"),
    ("sftp://user:se/cret@host/a", "sftp://host/a"),
    ("http://[::1]:9000/a@b", "http://[::1]:9000/a@b"),
    ("simplecache::s3://bucket/a", "simplecache::s3://bucket/a"),
    (
        "zip://a.txt::simplecache::https://u:secret@host/b.zip?s=secret",
        "zip://a.txt::simplecache::https://host/b.zip",
    ),
]


def test_redact_removes_only_secrets():
    for url, shown in SHOWN:
        assert redact(url) == redact(shown) == shown


PARTS = [
    ("s3://bucket/a/b.tcs", ("s3://bucket/a", "b.tcs")),
    ("s3://bucket/b.tcs", ("s3://bucket", "b.tcs")),
    ("/data/b.tcs", ("/data", "b.tcs")),
    ("/b.tcs", ("/", "b.tcs")),
    ("file:///data/with%20space/b", ("/data/with space", "b")),
    ("file://localhost/data/b", ("/data", "b")),
    ("memory://name/b", ("memory://name", "b")),
    ("simplecache::s3://bucket/a/b", ("simplecache::s3://bucket/a", "b")),
    ("zip://a/b::file:///data/c.zip", ("zip://a::file:///data/c.zip", "b")),
]


def test_split_url_gives_root_and_key():
    for url, parts in PARTS:
        assert split_url(url) == parts


def test_split_url_of_a_relative_path_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_url("b.tcs") == (str(tmp_path), "b.tcs")


NO_OBJECTS = ["s3://bucket", "s3://bucket/", "/data/", "https://host/a?sig=x", ""]


def test_split_url_refuses_urls_that_name_no_object():
    for url in NO_OBJECTS:
        with pytest.raises(ValueError, match=r"."):
            split_url(url)


BACK_ENDS = [
    ("s3://bucket/a/", CloudStore, "s3://bucket/a"),
    ("gs://bucket/a", CloudStore, "gs://bucket/a"),
    ("az://container/a", CloudStore, "az://container/a"),
    ("https://user:secret@host/a", CloudStore, "https://host/a"),
    ("memory://name/a", MemoryStore, "memory://name/a"),
    ("zip::x", LocalFolder, None),
    ("simplecache::https://user:secret@host/a", FsspecStore, "simplecache::https://host/a"),
    ("zip://*::file:///data/a.zip", FsspecStore, "zip://*::file:///data/a.zip"),
    ("sftp://user:secret@host/a", FsspecStore, "sftp://host/a"),
]


def test_open_store_selects_the_back_end_without_a_request():
    for url, kind, shown in BACK_ENDS:
        store = open_store(url)
        assert type(store) is kind
        assert shown is None or store.url == shown
        assert "secret" not in repr(store)
        assert type(pickle.loads(pickle.dumps(store))) is kind


REFUSED = [
    ("s3://key:secret@bucket/a", {}, "storage_options"),
    ("s3:///a", {}, "BUCKET"),
    ("s3://", {}, "names no bucket"),
    ("https://", {}, "names no host"),
    (Path("s3://bucket/a"), {}, "two slashes .*: s3://bucket/a;"),
    ("gs:bucket/a", {}, "two slashes .*: gs://bucket/a;"),
    ("file:/data", {}, "three slashes .*: file:///data;"),
    ("s3://my bucket/a", {}, "'my bucket' cannot be the name"),
    ("s3://bucket", {"endpoint": "localhost:9000"}, "URL with its scheme.*got 'localhost:9000'"),
    ("gs://bucket", {"base_url": "localhost:9000"}, "base_url"),
    ("az://container", {"endpoint": "host/path"}, "URL with its scheme"),
    ("https://host/a?sig=secret", {}, "query"),
    ("https://host?sig=secret", {}, "query"),
    ("s3://bucket/a?versionId=secret", {}, "query"),
    ("simplechace::s3://bucket/a", {}, "simplecache"),
    ("file://other-machine/a", {}, "three slashes"),
    ("/data", {"region": "x"}, "no storage options, got region"),
    ("s3://bucket/a/../b", {}, "key"),
    ("s3://bucket", {"credentials": "keys.json"}, "must be a function"),
    ("", {}, "not a URL"),
]


def test_open_store_refuses_invalid_urls_and_options():
    for url, options, message in REFUSED:
        with pytest.raises(ValueError, match=message) as caught:
            open_store(url, **options)
        assert "secret" not in str(caught.value)


def test_an_endpoint_of_the_environment_without_a_scheme_is_refused(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    with pytest.raises(ValueError, match=r"got 'localhost:9000' \(storage option endpoint or AWS_ENDPOINT_URL\)"):
        open_store("s3://bucket")


NEAR_NAMES = [
    ("s3", "regoin", "'region'"),
    ("s3", "acess_key_id", "'access_key_id'"),
    ("s3", "endpoint_ulr", "'endpoint_url'"),
    ("gs", "servce_account", "'service_account'"),
    ("az", "acount_name", "'account_name'"),
    ("http", "time_out", "'timeout'"),
    ("gs", "zzzzzz", "known are"),
]


def test_an_unknown_option_is_an_error_that_suggests_similar_names():
    for cloud, name, near in NEAR_NAMES:
        with pytest.raises(ValueError, match=f"unknown storage option '{name}'.*{near}"):
            CloudOptions.parse(cloud, {name: "s3cret-value"})


def test_option_names_of_s3fs_are_accepted():
    given = {
        "key": "k",
        "SECRET": "s",
        "token": "t",
        "endpoint_url": "http://e",
        "region": "r",
        "allow_invalid_certificates": "yes",
        "timeout": 5,
        "connect_timeout": "2s",
        "read_timeout": "7",
        "pool_max_idle_per_host": 3,
    }
    options = CloudOptions.parse("s3", given)
    assert options.config == {
        "access_key_id": "k", "secret_access_key": "s", "session_token": "t", "endpoint": "http://e", "region": "r",
    }  # fmt: skip
    assert options.call.timeout_s == 5
    assert options.client["connect_timeout"] == timedelta(seconds=2)
    assert options.client["read_timeout"] == timedelta(seconds=7), "as the command line gives it"
    assert options.client["pool_max_idle_per_host"] == "3", "obstore takes no numbers"
    assert options.client["allow_invalid_certificates"] is True
    assert options.client["allow_http"] is True


NO_TIMEOUTS = ["soon", "", -1, 0, True, "nan", [1]]


def test_an_invalid_timeout_is_an_error():
    for value in NO_TIMEOUTS:
        with pytest.raises(ValueError, match="'timeout' must be a positive number of seconds"):
            CloudOptions.parse("s3", {"timeout": value})


def test_two_names_of_one_option_must_have_the_same_value():
    assert CloudOptions.parse("s3", {"key": "k", "access_key_id": "k"}).config == {"access_key_id": "k"}
    with pytest.raises(ValueError, match="twice"):
        CloudOptions.parse("s3", {"key": "k", "access_key_id": "other"})


BOOLEANS = ["skip_signature", "request_payer", "allow_http"]


def test_boolean_options_accept_the_usual_words():
    for name in BOOLEANS:
        for given, expected in [("Yes", True), (1, True), ("on", True), (True, True), ("no", False), ("0", False)]:
            options = CloudOptions.parse("s3", {name: given})
            assert {**options.config, **options.client}[name] is expected
        with pytest.raises(ValueError, match=f"{name}.*perhaps"):
            CloudOptions.parse("s3", {name: "perhaps"})


@pytest.mark.parametrize(
    ("environment", "given", "expected"),
    [
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9/x"}, {}, "http://127.0.0.1:9"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, {"endpoint": "http://me:s3cret@host"}, "http://host"),
        ({"AWS_REGION": "eu-west-1"}, {}, "https://s3.eu-west-1.amazonaws.com"),
    ],
)
def test_every_client_has_the_same_name_for_a_server(monkeypatch, environment, given, expected):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    options = CloudOptions.parse("s3", {"anon": True, **given})
    place, counters = BucketFolder("s3", "bucket", "", "s3://bucket"), Counters("requests")
    assert server_url("s3", "bucket", options.config) == expected
    assert ObstoreClient(place, options, counters).wait_target() == expected
    assert Boto3Client(options, place.url, counters).wait_target() == expected


def test_http_is_allowed_unless_an_https_endpoint_is_given():
    assert CloudOptions.parse("s3", {}).client["allow_http"] is True
    assert CloudOptions.parse("s3", {"endpoint": "https://e"}).client["allow_http"] is False
    assert CloudOptions.parse("s3", {"endpoint": "https://e", "allow_http": True}).client["allow_http"] is True


def test_options_are_translated_for_boto3():
    given = {"access_key_id": "k", "secret_access_key": "s", "endpoint": "http://e", "region": "r", "read_timeout": 9}
    given["proxy_url"] = "http://proxy"
    options = CloudOptions.parse("s3", {**given, "virtual_hosted_style_request": "true"})
    assert options.for_boto3() == (
        {"endpoint_url": "http://e", "region_name": "r"},
        {
            "proxies": {"http": "http://proxy", "https": "http://proxy"},
            "retries": {"total_max_attempts": 1},
            "s3": {"addressing_style": "virtual"},
            "read_timeout": 9.0,
            "connect_timeout": 5.0,
        },
    )


def test_options_of_every_remote_store():
    for url in ("s3://bucket", "http://server", "gs://bucket", "az://container", "filecache::http://server"):
        store = open_store(url, concurrency="8", timeout="5m", single_writer="yes")
        assert pickle.loads(pickle.dumps(store)).call_options == CallOptions(300.0, 8, True)
    for options in ({"concurrency": 0}, {"concurrency": "many"}, {"concurrency": True}, {"single_writer": "perhaps"}):
        with pytest.raises(ValueError, match=f"storage option '{next(iter(options))}'"):
            open_store("s3://bucket", **options)


def test_the_values_of_options_are_not_shown():
    assert "s3cret" not in repr(CloudOptions.parse("s3", {"secret": "s3cret", "default_headers": {"x": "s3cret"}}))


def test_an_unknown_scheme_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"no store for sftpp://; did you mean .*sftp"):
        open_store("sftpp://a/b")


def test_a_missing_package_is_an_error_that_names_it():
    with pytest.raises(StoreError, match=r"sftp://host/a.*paramiko") as caught:
        open_store("sftp://host/a").get("a")
    assert not caught.value.retryable


def test_a_tilde_stands_for_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_store("~/a").url == str(tmp_path / "a")


@pytest.mark.parametrize("chain", ["dir", "simplecache"])
def test_a_chained_url_is_read_and_written(chain, tmp_path):
    store = open_store(f"{chain}::file://{tmp_path}/a")
    store.put("b/c", b"data")
    assert (tmp_path / "a/b/c").read_bytes() == b"data"
    assert store.get("b/c") == b"data"
    assert [found.key for found in store.list()] == ["b/c"]
    store.close()
