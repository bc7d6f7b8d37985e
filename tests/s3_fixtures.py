"""A real S3 server for any test that imports these fixtures; mark such tests `s3`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tiercache.demo.s3_server import S3Server

# Each conftest that imports the fixture has one of its own; they share the server of the first that was asked.
_running: list[S3Server] = []


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """One server for the whole run; every test uses a folder of its own: server.store(prefix)."""
    if _running:
        yield _running[0]
        return
    with S3Server() as server:
        _running.append(server)
        yield server
        _running.clear()


def s3fs_options(server):
    """Return the options of s3fs for the server's bucket."""
    return {
        "key": server.access_key_id,
        "secret": server.secret_access_key,
        "endpoint_url": server.endpoint,
        "client_kwargs": {"region_name": "us-east-1"},
        "config_kwargs": {"s3": {"addressing_style": "path"}},
    }
