"""Servers with certificates of a private authority, and buckets whose requester pays."""

from __future__ import annotations

import ssl

import pytest
from tests.support.http_server import HttpFaultServer

from tiercache.errors import StoreError
from tiercache.store import open_store
from tiercache.store.archive import S3StorageClasses


@pytest.fixture
def server(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate[1])
    with HttpFaultServer({"bucket/a": b"data"}, tls=context) as server:
        yield server


def options(server, **more):
    return {"endpoint": server.url, "region": "us-east-1", "anon": True, "timeout": 5, **more}


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_a_certificate_bundle_is_trusted_by_every_back_end(server, certificate, monkeypatch):
    path = certificate[0]
    for bundle, given in (
        ("", {"root_certificate": path}), ("", {"root_certificate": str(path)}),
        ("", {"allow_invalid_certificates": True}), (str(path), {}),
    ):  # fmt: skip
        monkeypatch.setenv("AWS_CA_BUNDLE", bundle)
        store = open_store("s3://bucket", **options(server, **given))
        archive = S3StorageClasses(store)
        assert (store.get("a"), archive.head("a").n_bytes) == (b"data", 4), (bundle, given)
        archive.close()
        store.close()


def test_without_the_bundle_the_server_is_not_trusted(server):
    store = open_store("s3://bucket", **options(server))
    with pytest.raises(StoreError, match=r"UnknownIssuer.*root_certificate") as caught:
        store.get("a")
    assert not caught.value.retryable
    store.close()


@pytest.mark.parametrize("name", ["root_certificate", "AWS_CA_BUNDLE"])
def test_a_file_without_a_certificate_is_an_error_that_names_option_and_file(monkeypatch, tmp_path, name):
    for path in (tmp_path / "gone.pem", tmp_path / "empty.pem", tmp_path):
        (tmp_path / "empty.pem").write_text("nothing")
        given = {} if name == "AWS_CA_BUNDLE" else {name: str(path)}
        monkeypatch.setenv("AWS_CA_BUNDLE", str(path) if not given else "")
        with pytest.raises(ValueError, match=f"{name}.*{path.name}"):
            open_store("s3://bucket", **given)


def test_requester_pays_is_sent_by_every_back_end_if_an_option_says_so(http_server):
    http_server.objects = {"bucket/a": b"data"}
    keys = {"access_key_id": "k", "secret_access_key": "s"}  # S3 lets nobody pay whom it does not know
    for name, value in {"requester_pays": True, "request_payer": "requester", "": None}.items():
        given = keys | ({name: value} if name else {})
        store = open_store("s3://bucket", endpoint=http_server.url, region="us-east-1", **given)
        archive = S3StorageClasses(store)
        store.get("a")
        archive.head("a")
        for one in (store, archive):
            one.close()
        sent = [seen.headers.get("x-amz-request-payer") for seen in http_server.log[-2:]]
        assert sent == ["requester" if name else None] * 2, name
