"""The servers that tests with real requests share: each is started once in a run."""

from __future__ import annotations

import pytest
from tests.s3_fixtures import s3_server
from tests.support.certificates import certificate

from tiercache.demo.s3_server import S3Server

__all__ = ["certificate", "s3_server"]


@pytest.fixture(scope="session")
def moto_server():
    with S3Server(kind="moto") as server:
        yield server
