"""Keys of S3: from files, processes, tokens and functions, read again when they expire or are refused."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta

import pytest
from tests.support.http_server import HttpFault
from tests.support.store_suite import read_ranges

from tiercache.errors import StoreError
from tiercache.model import ByteRange
from tiercache.store import open_store
from tiercache.store.access import CloudOptions, Credentials, Keys, s3_access
from tiercache.store.archive import S3StorageClasses

EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
REFUSED = HttpFault("status", 400, body=EXPIRED)


@pytest.fixture(autouse=True)
def aws(monkeypatch, tmp_path):
    """The user's AWS files, which are not there yet; nothing in the environment."""
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "PROFILE", "ROLE_ARN", "ENDPOINT_URL"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    return tmp_path


@pytest.fixture
def opened(http_server):
    """Opens stores of the fault server's bucket, with an object `a` in it."""
    http_server.objects = {"bucket/a": b"data"}
    made = []

    def build(**options):
        made.append(open_store("s3://bucket", endpoint=http_server.url, region="us-east-1", **options))
        return made[-1]

    yield build
    for store in made:
        store.close()


def keys_of(server, *, start=0):
    """Names of the keys that requests were signed with."""
    signed = [seen.headers.get("authorization", "") for seen in server.log[start:]]
    return [text.partition("Credential=")[2].partition("/")[0] for text in signed]


def profile_text(key, section="work"):
    return f"[{section}]\naws_access_key_id = {key}\naws_secret_access_key = s3cret\n"


# Renewal


def renew_file(tmp_path, monkeypatch, key):
    (tmp_path / "credentials").write_text(profile_text(key))


def renew_environment(tmp_path, monkeypatch, key):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")


def test_keys_renewed_by_another_program_are_read_when_s3_refuses_the_old_ones(
    http_server, opened, monkeypatch, tmp_path
):
    listing = HttpFault("status", 200, body=b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>")
    calls = {
        "get": lambda store: store.get("a"),
        "head": lambda store: store.head("a"),
        "read_tail": lambda store: store.read_tail("a", 2),
        "read_into": lambda store: read_ranges(store, "a", [ByteRange(0, 4)]),
        "put": lambda store: store.put("b", b"x"),
        "list": lambda store: list(store.list()),
    }
    for name, call in calls.items():
        start = len(http_server.log)
        renew_file(tmp_path, monkeypatch, "OLD")
        store = opened(profile="work")
        assert store.get("a") == b"data"
        renew_file(tmp_path, monkeypatch, "NEW")
        n_refusals = 2 if name == "head" else 1  # that of a HEAD has no body
        http_server.next(*[REFUSED] * n_refusals, *([listing] if name == "list" else []))
        call(store)
        assert keys_of(http_server, start=start) == ["OLD"] * (1 + n_refusals) + ["NEW"], name


def test_an_archive_reads_renewed_keys_too(http_server, opened, monkeypatch, tmp_path):
    pytest.importorskip("boto3")
    renew_file(tmp_path, monkeypatch, "OLD")
    archive = S3StorageClasses(opened(profile="work"))
    archive.head("a")
    renew_file(tmp_path, monkeypatch, "NEW")
    http_server.next(REFUSED, REFUSED, REFUSED)  # botocore asks the bucket for its region in between
    archive.head("a")
    archive.close()
    assert keys_of(http_server) == ["OLD"] * 4 + ["NEW"]


def test_an_expired_token_without_a_newer_one_is_named_in_the_error(http_server, opened, monkeypatch, tmp_path):
    renew_file(tmp_path, monkeypatch, "OLD")
    store = opened(profile="work")
    http_server.when(lambda method, path: REFUSED)
    for call in (store.get, store.head):
        with pytest.raises(StoreError, match=r"ExpiredToken.*'work' has no newer credentials") as caught:
            call("a")
        assert (caught.value.code, caught.value.retryable) == ("ExpiredToken", False)
    assert len(http_server.log) == 3, "the HEAD is followed by a GET that says why"


def test_a_credentials_file_that_is_being_rewritten_is_read_until_it_is_complete(
    http_server, opened, monkeypatch, tmp_path
):
    for half_written in ("", "[work]\naws_access_key_id = NEW\n", "aws_access_key_id\n"):
        renew_file(tmp_path, monkeypatch, "OLD")
        store = opened(profile="work")
        assert store.get("a") == b"data"
        (tmp_path / "credentials").write_text(half_written)
        refused = []

        def answer(_method, _path, refused=refused):
            refused.append(1)
            if len(refused) == 2:
                renew_file(tmp_path, monkeypatch, "NEW")
            return REFUSED if len(refused) < 3 else None

        http_server.when(answer)
        assert store.get("a") == b"data"
        assert keys_of(http_server)[-1] == "NEW", half_written


def test_a_request_refused_with_newer_keys_too_fails(http_server, opened):
    asked = []

    def keys():
        asked.append(1)
        return {"AccessKeyId": f"K{len(asked)}", "SecretAccessKey": "s"}

    store = opened(credentials=keys)
    http_server.when(lambda method, path: HttpFault("status", 403, body=DENIED))
    with pytest.raises(StoreError, match="AccessDenied"):
        store.get("a")
    assert keys_of(http_server) == ["K1", "K2"]


def test_keys_are_read_before_they_expire_and_stay_in_use_while_the_source_fails():
    now = datetime(2026, 1, 1, tzinfo=UTC)
    given = []

    def read():
        answer = given.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    source = Credentials("the test", read, "s3://bucket", now=lambda: now)
    first = Keys("A", "s", None, now + timedelta(hours=1))
    given.append(first)
    assert source.get() is first
    now += timedelta(minutes=54)
    assert source.get() is first, "not asked yet"
    now += timedelta(minutes=2)
    given.append(StoreError("no", url="s3://bucket"))
    assert source.get() is first
    assert not given
    assert source.get() is first, "not asked at once again"
    now += timedelta(minutes=1)
    second = Keys("B", "s", None, now + timedelta(hours=1))
    given.append(second)
    assert source.get() is second
    now += timedelta(hours=2)
    given.append(StoreError("no", url="s3://bucket"))
    with pytest.raises(StoreError):
        source.get()
    given.append(first)
    with pytest.raises(StoreError, match="of the test have expired, at 2026-01-01 01:00:00"):
        source.get()


# Functions


def test_a_credentials_function_may_use_the_names_of_obstore_or_of_aws(http_server, opened):
    later = datetime.now(UTC) + timedelta(hours=1)
    for names in (
        ("access_key_id", "secret_access_key", "token", "expires_at"),
        ("AccessKeyId", "SecretAccessKey", "SessionToken", "Expiration"),
    ):
        given = dict(zip(names, ("FROM-A-FUNCTION", "s", "the-token", later), strict=True))
        store = opened(credentials=lambda given=given: given)
        assert store.get("a") == store.get("a") == b"data"
        assert keys_of(http_server)[-2:] == ["FROM-A-FUNCTION"] * 2
        assert http_server.log[-1].headers["x-amz-security-token"] == "the-token"


def test_an_invalid_result_of_a_credentials_function_is_described(opened):
    keys = {"AccessKeyId": "A", "SecretAccessKey": "s"}
    for given, fact in (
        (None, "NoneType"),
        ({"AccessKeyId": "A"}, "secret_access_key"),
        (keys | {"Expiration": "soon"}, "datetime, got str"),
        (keys | {"Expiration": datetime(2020, 1, 1)}, "expired"),
    ):
        with pytest.raises(StoreError, match=fact):
            opened(credentials=lambda given=given: given).get("a")


# Profiles


def test_a_profile_of_the_config_file_only_is_used(http_server, opened, tmp_path, monkeypatch):
    (tmp_path / "config").write_text(profile_text("FROM-CONFIG", "profile work"))
    opened(profile="work").get("a")
    monkeypatch.setenv("AWS_PROFILE", "work")
    opened().get("a")
    assert keys_of(http_server) == ["FROM-CONFIG"] * 2


def test_one_key_without_the_other_is_an_error(opened):
    with pytest.raises(ValueError, match="belong together"):
        opened(access_key_id="a").get("a")


def test_the_environment_overrides_region_and_endpoint_of_a_profile(monkeypatch, tmp_path):
    text = "[profile work]\nregion = eu-north-1\nservices = here\n[services here]\ns3 =\n  endpoint_url = http://e\n"
    (tmp_path / "config").write_text(text)
    (tmp_path / "credentials").write_text(profile_text("K"))
    options = CloudOptions.parse("s3", {"profile": "work"})
    config, credentials = s3_access(options, "s3://bucket")
    assert config == {"region": "eu-north-1", "endpoint": "http://e"}
    assert credentials.get() == Keys("K", "s3cret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://nearer")
    assert s3_access(options, "s3://bucket")[0]["endpoint"] == "http://nearer"


def test_an_unknown_profile_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"'no-such-profile' cannot be read: .*could not be found"):
        open_store("s3://bucket", profile="no-such-profile").get("a")


def test_an_error_of_an_aws_file_names_the_file_but_not_its_contents(tmp_path):
    (tmp_path / "credentials").write_text("aws_secret_access_key = s3cret\n")
    with pytest.raises(ValueError, match=r"'work' cannot be read: .*credentials") as caught:
        open_store("s3://bucket", profile="work").get("a")
    assert "s3cret" not in str(caught.value)


# Roles by a token's file


def sts_answer(key, action="AssumeRoleWithWebIdentity", expiration="2099-01-01T00:00:00Z"):
    return (
        f'<{action}Response xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><{action}Result><AssumedRoleUser>'
        f"<Arn>arn</Arn><AssumedRoleId>id:x</AssumedRoleId></AssumedRoleUser><Credentials><AccessKeyId>{key}"
        f"</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken><Expiration>{expiration}"
        f"</Expiration></Credentials></{action}Result></{action}Response>"
    ).encode()


@pytest.fixture
def role(http_server, tmp_path, monkeypatch):
    (tmp_path / "token").write_text("the-web-token")
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/r")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"{http_server.url}/sts")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


@pytest.mark.usefixtures("role")
def test_a_refusal_of_sts_is_reported_with_its_reason_and_a_failure_is_retried(http_server, opened):
    body = (
        b"<ErrorResponse><Error><Type>Sender</Type><Code>ExpiredTokenException</Code><Message>Token expired: now must "
        b"be before</Message></Error></ErrorResponse>"
    )
    http_server.next(HttpFault("status", 400, body=body))
    with pytest.raises(StoreError, match=r"the AWS configuration gave no keys: .*Token expired") as caught:
        opened().get("a")
    assert (caught.value.code, caught.value.retryable) == ("ExpiredTokenException", False)
    assert "the-web-token" not in str(caught.value)
    for status in (500, 503):
        http_server.next(HttpFault("status", status), HttpFault("status", 200, body=sts_answer("ROLE")))
        assert opened().put_if_absent(f"b{status}", b"x"), "the write without keys was not sent"


# Without botocore


def test_what_needs_botocore_is_an_error_that_names_the_extra(http_server, opened, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "botocore.session", None)
    assert s3_access(CloudOptions.parse("s3", {}), "s3://bucket") == ({}, None), "obstore asks the metadata service"
    (tmp_path / "credentials").write_text(profile_text("KEY"))
    monkeypatch.setenv("AWS_PROFILE", "work")
    for options in ({}, {"profile": "work"}):
        with pytest.raises(ValueError, match=r"'work' is read by botocore: .*tiercache-data\[archive\].*access_key_id"):
            opened(**options).get("a")
    renew_environment(tmp_path, monkeypatch, "ENVIRONMENT")
    for options in ({}, {"key": "GIVEN", "secret": "s"}):
        assert opened(**options).get("a") == b"data"
    assert keys_of(http_server) == ["ENVIRONMENT", "GIVEN"]


def test_no_credentials_at_all_are_reported_at_once(opened):
    with pytest.raises(ValueError, match=r"no credentials in storage_options.*anon=true"):
        opened().get("a")


def test_unsigned_requests_need_no_keys(opened, tmp_path, monkeypatch):
    (tmp_path / "credentials").write_text(profile_text("KEY"))
    monkeypatch.setenv("AWS_PROFILE", "work")
    for given, is_signed in [("false", True), (False, True), ("yes", False), ("1", False)]:
        store = opened(skip_signature=given)
        assert (s3_access(store.options, store.url)[1] is not None) == is_signed


def test_a_failed_or_silent_credential_process_is_named(http_server, opened, tmp_path):
    def write(program):
        (tmp_path / "process.py").write_text(program)
        command = f"{sys.executable} -S {tmp_path / 'process.py'}"
        (tmp_path / "config").write_text(f"[profile work]\ncredential_process = {command}\n")

    write("import sys; sys.exit('log in first')")
    with pytest.raises(StoreError, match=r"the AWS profile 'work' gave no keys: .*log in first") as caught:
        opened(profile="work").get("a")
    assert not caught.value.retryable
    write(f"import pathlib, time\nwhile not pathlib.Path({str(tmp_path / 'go')!r}).exists(): time.sleep(0.01)\n")
    with pytest.raises(StoreError, match=r"nothing came from the AWS profile 'work' for 2\.5 s"):
        opened(profile="work", timeout=2.5).head("a")
    (tmp_path / "go").touch()
    assert http_server.log == []


def test_keys_that_are_renewed_late_are_asked_for_again_until_the_deadline(http_server, opened):
    keys, refused = {"valid": "OLD", "given": "OLD"}, []

    def admit(_path, headers):
        if f"Credential={keys['valid']}/" in headers.get("authorization", ""):
            return None
        refused.append(1)
        if len(refused) == 4:
            keys["given"] = "NEW"  # another program renews them
        return REFUSED

    http_server.admit(admit)
    store = opened(credentials=lambda: {"access_key_id": keys["given"], "secret_access_key": "s"})
    assert store.get("a") == b"data"
    keys["valid"] = "NEW"
    assert store.get("a") == b"data"
    assert len(refused) >= 4
