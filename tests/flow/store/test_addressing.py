"""Where requests go and how they are signed: endpoint, region, style of addresses, anonymous access, proxies."""

from __future__ import annotations

import pytest

from tiercache.errors import StoreError
from tiercache.store import open_store

KEYS = {"access_key_id": "KEY", "secret_access_key": "s"}


@pytest.fixture
def get(http_server):
    """Reads the object `a` of a bucket with some options; the request that the server has seen."""
    http_server.objects = {"bucket/a": b"data", "a": b"data"}
    made = []

    def read(url="s3://bucket", **options):
        made.append(open_store(url, **options))
        assert made[-1].get("a") == b"data"
        return http_server.log[-1]

    yield read
    for store in made:
        store.close()


def test_endpoint_and_region_of_the_options_are_used(http_server, get):
    seen = get(endpoint=http_server.url, region="eu-north-1", **KEYS)
    assert "/eu-north-1/s3/" in seen.headers["authorization"]


def test_endpoint_and_region_of_the_environment_are_used(http_server, get, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", http_server.url)
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    assert "/eu-north-1/s3/" in get(**KEYS).headers["authorization"]


@pytest.mark.parametrize(("virtual", "path"), [(False, "/bucket/a"), (None, "/bucket/a"), (True, "/a")])
def test_the_bucket_is_in_the_path_unless_the_endpoint_names_it(http_server, get, virtual, path):
    options = {} if virtual is None else {"virtual_hosted_style_request": virtual}
    assert get(endpoint=http_server.url, region="us-east-1", **KEYS, **options).path == path


@pytest.mark.parametrize("name", ["anon", "skip_signature"])
def test_anonymous_requests_are_not_signed_whatever_keys_there_are(http_server, get, monkeypatch, name):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    options = {"endpoint": http_server.url, "region": "us-east-1"}
    assert "authorization" in get(**options).headers
    assert "authorization" not in get(**options, **{name: True}).headers


def test_anonymous_requests_to_google_and_azure_are_not_signed(http_server, get):
    assert "authorization" not in get("gs://bucket", base_url=http_server.url, skip_signature=True).headers
    azure = {"endpoint": http_server.url, "account_name": "account", "skip_signature": True}
    assert "authorization" not in get("az://bucket", **azure).headers


CLOUDS = {
    "s3": ("s3://bucket", "endpoint", {"region": "us-east-1", "anon": True}),
    "gs": ("gs://bucket", "base_url", {"skip_signature": True}),
    "az": ("az://bucket", "endpoint", {"account_name": "account", "skip_signature": True}),
}


@pytest.mark.parametrize("cloud", CLOUDS)
def test_requests_go_through_the_proxy_of_the_options(http_server, get, cloud):
    url, name, options = CLOUDS[cloud]
    seen = get(url, **{name: "http://store.invalid"}, proxy_url=http_server.url, **options)
    assert seen.path == "http://store.invalid/bucket/a"


def test_http_requests_go_through_the_proxy_of_the_options(http_server, get):
    assert get("http://store.invalid/bucket", proxy_url=http_server.url).path == "http://store.invalid/bucket/a"


def test_requests_go_through_the_proxy_of_the_environment_unless_no_proxy_names_the_server(
    http_server, get, monkeypatch
):
    for name in ("NO_PROXY", "no_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", http_server.url)
    monkeypatch.setenv("http_proxy", http_server.url)
    assert get(endpoint="http://store.invalid", anon=True, region="us-east-1").path.startswith("http://store.invalid/")
    monkeypatch.setenv("NO_PROXY", "store.invalid")
    monkeypatch.setenv("no_proxy", "store.invalid")
    store = open_store("s3://bucket", endpoint="http://store.invalid", anon=True, region="us-east-1", timeout=0.5)
    with pytest.raises(StoreError, match="cannot connect"):
        store.get("a")
    store.close()
