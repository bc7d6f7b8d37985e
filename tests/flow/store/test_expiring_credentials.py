"""Credentials that expire in the middle of an epoch, at a server that refuses every key but its newest."""

from __future__ import annotations

import json
import sys
import threading
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import pytest
from tests.support.http_server import HttpFault, HttpFaultServer

import tiercache as tc

N_RECORDS = 400
REQUESTS_A_KEY = 8
EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
LATER = "2099-01-01T00:00:00Z"


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """A data set whose epoch takes about forty requests."""
    folder = tmp_path_factory.mktemp("expiring")
    with tc.Writer(
        folder / "data", schema={"id": "int64", "x": tc.Tensor("uint8", (64,))}, shard_size="1KiB"
    ) as writer:
        for first in range(0, N_RECORDS, 20):
            writer.write_batch(
                {"id": [*range(first, first + 20)], "x": [[i % 251] * 64 for i in range(first, first + 20)]}
            )
    return {f"bucket/{path.relative_to(folder)}": path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Issuer:
    """A server of objects that gives each key for some requests, and the places where clients look for the newest."""

    def __init__(self, server, tmp_path, monkeypatch):
        self.server, self.tmp_path, self.monkeypatch = server, tmp_path, monkeypatch
        self.number, self.n_used, self.n_refused = 0, 0, 0
        self._lock = threading.Lock()
        self._waiting = set()  # paths whose last request was refused
        self.writes = []  # functions that write the newest key somewhere
        self.answers = {}  # path -> function that returns an answer with the newest key
        server.admit(self.admit)

    @property
    def key(self):
        return f"KEY{self.number}"

    def admit(self, path, headers):
        plain = urlsplit(path).path
        if plain in self.answers:
            return HttpFault("status", 200, body=self.answers[plain]().encode())
        with self._lock:
            given = headers.get("authorization", "")
            if not (f"Credential={self.key}/" in given or given == f"Bearer {self.key}"):
                self.n_refused += 1
                self._waiting.add(plain)
                return HttpFault("status", 400 if "Credential=" in given else 401, body=EXPIRED)
            self._waiting.discard(plain)
            self.n_used += 1
            # A request is refused once: its second attempt must be faster than the end of the next key.
            if self.n_used >= REQUESTS_A_KEY and not self._waiting:
                self.n_used = 0
                self.issue()
        return None

    def issue(self):
        self.number += 1
        for write in self.writes:
            write()

    def json(self, **fields):
        return lambda: json.dumps({name: value() if callable(value) else value for name, value in fields.items()})


@pytest.fixture
def issuer(objects, tmp_path, monkeypatch):
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "PROFILE", "ROLE_ARN", "ENDPOINT_URL"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    with HttpFaultServer(dict(objects)) as server:
        yield Issuer(server, tmp_path, monkeypatch)


def by_profile(issuer):
    def write():
        text = f"[work]\naws_access_key_id = {issuer.key}\naws_secret_access_key = s\n"
        (issuer.tmp_path / "credentials").write_text(text)

    issuer.writes.append(write)
    return {"profile": "work"}


def by_environment(issuer):
    issuer.monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    issuer.writes.append(lambda: issuer.monkeypatch.setenv("AWS_ACCESS_KEY_ID", issuer.key))
    return {}


def by_web_identity(issuer):
    (issuer.tmp_path / "token").write_text("web token")
    issuer.answers["/sts"] = lambda: (
        "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>"
        f"<AccessKeyId>{issuer.key}</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken>"
        f"<Expiration>{LATER}</Expiration></Credentials></AssumeRoleWithWebIdentityResult>"
        "</AssumeRoleWithWebIdentityResponse>"
    )
    issuer.monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/r")
    issuer.monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(issuer.tmp_path / "token"))
    issuer.monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"{issuer.server.url}/sts")
    return {}


def by_instance_metadata(issuer):
    issuer.answers["/latest/api/token"] = lambda: "a session"
    issuer.answers["/latest/meta-data/iam/security-credentials/"] = lambda: "the-role"
    issuer.answers["/latest/meta-data/iam/security-credentials/the-role"] = aws_json(issuer)
    issuer.monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", issuer.server.url)
    issuer.monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "false")
    return {}


def by_container(issuer):
    (issuer.tmp_path / "token").write_text("container token")
    issuer.answers["/container"] = aws_json(issuer)
    issuer.monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{issuer.server.url}/container")
    issuer.monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(issuer.tmp_path / "token"))
    return {}


def aws_json(issuer):
    return issuer.json(
        AccessKeyId=lambda: issuer.key, SecretAccessKey="s", Token="t", Expiration=LATER, Code="Success", Type="x"
    )


def by_process(issuer):
    issuer.writes.append(lambda: (issuer.tmp_path / "key").write_text(issuer.key))
    script = issuer.tmp_path / "process.py"
    script.write_text(
        "import json, pathlib, sys\n"
        "keys = {'Version': 1, 'AccessKeyId': pathlib.Path(sys.argv[1]).read_text(), 'SecretAccessKey': 's'}\n"
        f"print(json.dumps(keys | {{'Expiration': {LATER!r}}}))\n"
    )
    command = f"{sys.executable} -S {script} {issuer.tmp_path / 'key'}"
    (issuer.tmp_path / "config").write_text(f"[profile work]\ncredential_process = {command}\n")
    return {"profile": "work"}


def by_function(issuer):
    return {"credentials": lambda: {"access_key_id": issuer.key, "secret_access_key": "s", "token": None}}


def token_function(issuer):
    later = datetime.now(UTC) + timedelta(hours=1)
    return {"credentials": lambda: {"token": issuer.key, "expires_at": later}}


def oauth_json(issuer):
    return issuer.json(access_token=lambda: issuer.key, expires_in=3600, expires_on="4070908800", token_type="Bearer")


def by_google_metadata(issuer):
    issuer.answers["/computeMetadata/v1/instance/service-accounts/default/token"] = oauth_json(issuer)
    issuer.monkeypatch.setenv("GCE_METADATA_HOST", urlsplit(issuer.server.url).netloc)
    return {}


def by_azure_identity(issuer):
    issuer.answers["/msi"] = oauth_json(issuer)
    issuer.monkeypatch.setenv("AZURE_MSI_ENDPOINT", f"{issuer.server.url}/msi")
    return {}


def by_azure_secret(issuer):
    issuer.answers["/tenant/oauth2/v2.0/token"] = oauth_json(issuer)
    issuer.monkeypatch.setenv("AZURE_AUTHORITY_HOST", issuer.server.url)
    return {"client_id": "c", "client_secret": "s", "tenant_id": "tenant"}


def by_azure_federation(issuer):
    (issuer.tmp_path / "token").write_text("federated token")
    issuer.answers["/tenant/oauth2/v2.0/token"] = oauth_json(issuer)
    issuer.monkeypatch.setenv("AZURE_AUTHORITY_HOST", issuer.server.url)
    issuer.monkeypatch.setenv("AZURE_FEDERATED_TOKEN_FILE", str(issuer.tmp_path / "token"))
    return {"client_id": "c", "tenant_id": "tenant"}


S3 = [by_profile, by_environment, by_web_identity, by_instance_metadata, by_container, by_process, by_function]
GOOGLE = [token_function, by_google_metadata]
AZURE = [token_function, by_azure_identity, by_azure_secret, by_azure_federation]


@pytest.mark.parametrize(
    ("cloud", "source"),
    [*(("s3", source) for source in S3), *(("gs", source) for source in GOOGLE), *(("az", source) for source in AZURE)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_credentials_may_expire_in_the_middle_of_an_epoch(issuer, tmp_path, cloud, source):
    cached = source in (by_profile, token_function)
    url = issuer.server.url
    places = {
        "s3": {"endpoint": url, "region": "us-east-1"}, "gs": {"base_url": url},
        "az": {"endpoint": url, "account_name": "account"},
    }  # fmt: skip
    options = {**places[cloud], **source(issuer), "timeout": 20}
    issuer.issue()
    cache = tc.Cache(tmp_path / "cache", size="64MiB") if cached else False
    dataset = tc.Dataset(f"{cloud}://bucket/data", cache=cache, storage_options=options)
    loader = tc.DataLoader(dataset, batch_size=10, shuffle=True)
    ids = [i for batch in loader for i in batch["id"].tolist()]
    dataset.close()
    if cached:
        cache.close()
    assert sorted(ids) == [*range(N_RECORDS)]
    assert issuer.number > 2, "several keys have expired"
    assert issuer.n_refused >= 2
