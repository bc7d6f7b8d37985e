"""What only the stores' tests need."""

from __future__ import annotations

import uuid

import pytest
from botocore.config import Config
from botocore.session import Session
from tests.support.http_server import HttpFaultServer


@pytest.fixture
def http_server():
    with HttpFaultServer() as server:
        yield server


class BackDoor:
    """S3 by botocore: the way in that no class under test uses. A folder of its own in the server's bucket."""

    def __init__(self, server, client):
        self.server, self.client = server, client
        self.prefix = f"test-{uuid.uuid4().hex[:8]}"

    def put(self, key, data):
        self.client.put_object(Bucket=self.server.bucket, Key=f"{self.prefix}/{key}", Body=data)

    def get(self, key):
        with self.client.get_object(Bucket=self.server.bucket, Key=f"{self.prefix}/{key}")["Body"] as body:
            return body.read()

    def uploads(self):
        found = self.client.list_multipart_uploads(Bucket=self.server.bucket).get("Uploads", [])
        return [upload["Key"] for upload in found if upload["Key"].startswith(self.prefix)]


def _client(server):
    return Session().create_client(
        "s3",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=server.access_key_id,
        aws_secret_access_key=server.secret_access_key,
        config=Config(proxies={}, s3={"addressing_style": "path"}),
    )


@pytest.fixture(scope="session")
def s3_client(s3_server):
    client = _client(s3_server)
    yield client
    client.close()


@pytest.fixture(scope="session")
def moto_client(moto_server):
    client = _client(moto_server)
    yield client
    client.close()


@pytest.fixture
def s3(s3_server, s3_client):
    return BackDoor(s3_server, s3_client)


@pytest.fixture
def moto(moto_server, moto_client):
    return BackDoor(moto_server, moto_client)
