"""Uploads to real S3, larger than one request."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest
from tests.support.http_server import HttpFault
from tests.support.store_suite import pattern

from tiercache.errors import StoreError
from tiercache.store import open_store

pytestmark = pytest.mark.s3
MIB = 1 << 20
PARTS = [pattern(6 * MIB, seed) for seed in range(3)] + [b"end"]


@pytest.fixture
def store(s3):
    store = s3.server.store(s3.prefix)
    yield store
    store.close()


def _send(upload, order=(0, 1, 2, 3)):
    for number in order:
        upload.put_part(number, PARTS[number])


def test_a_large_upload_is_invisible_until_it_is_complete(s3, store):
    with store.create("big") as upload:
        _send(upload)
        assert list(store.list()) == []
        info = upload.complete()
    assert info.n_bytes == sum(map(len, PARTS))
    assert s3.get("big") == b"".join(PARTS)


@pytest.mark.parametrize("door", ["s3", "moto"])
def test_an_upload_whose_store_was_closed_or_whose_writer_failed_leaves_nothing(request, door):
    door = request.getfixturevalue(door)
    store = door.server.store(door.prefix)
    with store.create("closed") as upload:
        _send(upload, (0, 1, 2))
        store.close()

    def fail():
        with store.create("failed") as upload:
            _send(upload, (0, 1, 2))
            raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        fail()
    assert list(store.list()) == []
    assert door.uploads() == []
    store.close()


def test_a_failed_part_ends_the_upload_and_leaves_nothing(s3, store, monkeypatch):
    def fail(key, writer, data):
        raise StoreError("broken", url="u", retryable=False)

    with store.create("broken") as upload:
        upload.put_part(0, bytes(17 * MIB))
        monkeypatch.setattr(store, "write_part", fail)
        with pytest.raises(StoreError, match="broken"):
            upload.put_part(1, b"x")
        for call in (lambda: upload.put_part(2, b"x"), upload.complete):
            with pytest.raises(ValueError, match="failed"):
                call()
    assert list(store.list()) == []
    assert s3.uploads() == []


CREATED = b"<InitiateMultipartUploadResult><UploadId>the-upload</UploadId></InitiateMultipartUploadResult>"


@pytest.fixture
def scripted(http_server):
    """A store of the fault server, which answers a multipart upload as scripted: complete() as given."""

    def build(complete):
        def rule(method, path):
            if method == "POST" and "uploadId=" not in path:
                return HttpFault("status", 200, body=CREATED)
            return complete if method == "POST" else None

        http_server.when(rule)
        made.append(
            open_store("s3://bucket", endpoint=http_server.url, region="us-east-1", access_key_id="k",
                       secret_access_key="s", timeout=1)
        )  # fmt: skip
        return made[-1]

    made = []
    yield build
    for store in made:
        store.close()


def test_an_upload_whose_completion_fails_is_aborted(http_server, scripted):
    with scripted(HttpFault("status", 403)).create("big") as upload:
        upload.put_part(0, bytes(17 * MIB))
        with pytest.raises(StoreError, match="403"):
            upload.complete()
    assert [seen.path for seen in http_server.log if seen.method == "DELETE"] == ["/bucket/big?uploadId=the-upload"]


def crc64nvme(data):
    """The CRC-64/NVME of data, bit by bit."""
    crc = (1 << 64) - 1
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x9A6C9329AC4BC9B5 if crc & 1 else 0)
    return crc ^ ((1 << 64) - 1)


def test_uploads_to_amazon_carry_a_crc64(http_server):
    assert crc64nvme(b"123456789") == 0xAE8B14860A799888
    options = {"endpoint": "http://s3.us-east-1.amazonaws.com", "region": "us-east-1", "proxy_url": http_server.url}
    store = open_store("s3://bucket", **options, access_key_id="k", secret_access_key="s")
    store.put("a", b"some data")
    store.put_if_absent("b", b"other data")
    store.close()
    sent = [seen.headers["x-amz-checksum-crc64nvme"] for seen in http_server.log if seen.method == "PUT"]
    expected = [crc64nvme(data).to_bytes(8, "big") for data in (b"some data", b"other data")]
    assert [base64.b64decode(text) for text in sent] == expected


@pytest.mark.parametrize("door", ["s3", "moto"])
def test_uploads_with_a_crc64_are_accepted_by_other_servers(request, door):
    door = request.getfixturevalue(door)
    store = door.server.store(door.prefix, checksum_algorithm="CRC64NVME")
    store.put("small", b"data")
    with store.create("big") as upload:
        _send(upload)
        upload.complete()
    assert door.get("small") == b"data"
    assert door.get("big") == b"".join(PARTS)
    store.close()


@pytest.mark.stress
def test_an_upload_of_any_size_needs_bounded_memory(store):
    def peak_bytes():
        text = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", text)[1]) << 10

    part = pattern(8 * MIB)
    with store.create("first") as upload:  # what the client itself needs
        for number in range(8):
            upload.put_part(number, part)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = peak_bytes()
    with store.create("big") as upload:
        for number in range(128):
            upload.put_part(number, part)
        assert upload.complete().n_bytes == 1 << 30
    assert peak_bytes() - before < 192 * MIB
