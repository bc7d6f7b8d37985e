"""Effects of a bucket's settings on a tier: lifecycle rules, versioning and object lock, as S3 returns them."""

import uuid
from datetime import UTC, datetime

import pytest
from tests.support.http_server import HttpFault, HttpFaultServer

from tiercache.store import open_store
from tiercache.store.archive import BucketSettings, S3StorageClasses
from tiercache.tier.findings import bucket_findings

EXPIRES = {"Expiration": {"Days": 30}}


def rule(action, *, status="Enabled", **where):
    return {"ID": "r", "Status": status, **(where or {"Filter": {"Prefix": ""}}), **action}


def found(*rules, folder="train/", class_of="STANDARD", **settings):
    settings = BucketSettings(lifecycle=rules, **settings)
    return [(one.kind, one.is_danger) for one in bucket_findings("standard", folder, class_of, settings)]


EXPIRATION = [("expiration", True)]


@pytest.mark.parametrize(
    ("where", "folder", "findings"),
    [
        ({"Filter": {"Prefix": ""}}, "train/", EXPIRATION),
        ({"Filter": {}}, "train/", EXPIRATION),
        ({"Filter": {"Prefix": "train/"}}, "train/", EXPIRATION),
        ({"Filter": {"Prefix": "train"}}, "train/", EXPIRATION),
        ({"Filter": {"Prefix": "tr"}}, "train/", EXPIRATION),
        ({"Filter": {"Prefix": "train/checkpoints/"}}, "train/", EXPIRATION),
        ({"Filter": {"Prefix": "train/checkpoints/"}}, "", EXPIRATION),
        ({"Filter": {"And": {"Prefix": "train/", "Tags": [{"Key": "k", "Value": "v"}]}}}, "train/", EXPIRATION),
        ({"Filter": {"Tag": {"Key": "k", "Value": "v"}}}, "train/", EXPIRATION),
        ({"Prefix": "train/"}, "train/", EXPIRATION),
        ({"Prefix": "logs/"}, "train/", []),
        ({"Filter": {"Prefix": "training/"}}, "train/", []),
        ({"Filter": {"And": {"Prefix": "logs/", "Tags": []}}}, "train/", []),
    ],
)
def test_a_lifecycle_rule_affects_a_tier_if_their_prefixes_share_objects(where, folder, findings):
    assert found(rule(EXPIRES, **where), folder=folder) == findings


def test_a_disabled_lifecycle_rule_is_ignored():
    assert found(rule(EXPIRES, status="Disabled")) == []


def test_an_expiration_of_delete_markers_is_ignored():
    assert found(rule({"Expiration": {"ExpiredObjectDeleteMarker": True}})) == []


def test_an_expiration_is_reported_with_its_rule_objects_and_time():
    where = {"Filter": {"And": {"Prefix": "train/", "Tags": [{"Key": "a", "Value": "b"}], "ObjectSizeLessThan": 9}}}
    date = {"Expiration": {"Date": datetime(2027, 5, 1, tzinfo=UTC)}}
    one, other = bucket_findings(
        "cold", "train/", "STANDARD", BucketSettings(lifecycle=(rule(EXPIRES, **where), rule(date)))
    )
    assert (one.tier, one.lifecycle_rule) == ("cold", "r")
    assert all(fact in one.text for fact in ("tiers.cold", "'r'", "'train/'", "a=b", "9 bytes", "30 days"))
    assert "2027-05-01" in other.text


@pytest.mark.parametrize(
    ("target", "class_of", "findings"),
    [
        ("GLACIER", "STANDARD", [("transition", True)]),
        ("STANDARD_IA", "STANDARD", [("transition", False)]),
        ("GLACIER", "GLACIER", []),
    ],
)
def test_a_transition_to_another_storage_class_is_reported(target, class_of, findings):
    action = {"Transitions": [{"Days": 3, "StorageClass": target}]}
    assert found(rule(action), class_of=class_of) == findings


def test_what_happens_to_old_versions_is_reported():
    kept = {"NoncurrentVersionExpiration": {"NoncurrentDays": 14}}
    (one,) = bucket_findings("t", "", "STANDARD", BucketSettings((rule(kept),), versioning="Enabled"))
    assert (one.kind, "14 days" in one.text) == ("versions", True)
    (other,) = bucket_findings("t", "", "STANDARD", BucketSettings(versioning="Enabled"))
    assert "billed" in other.text
    assert found(rule(kept)) == []


def test_object_lock_is_reported_with_its_retention():
    lock = {"ObjectLockEnabled": "Enabled", "Rule": {"DefaultRetention": {"Mode": "COMPLIANCE", "Days": 7}}}
    (one,) = bucket_findings("t", "", "STANDARD", BucketSettings(lock=lock))
    assert (one.kind, "COMPLIANCE, 7 days" in one.text, "delete marker" in one.text) == ("object_lock", True, True)
    assert found(lock={"ObjectLockEnabled": "Enabled"}) == [("object_lock", False)]


# -- asked of servers -------------------------------------------------------------------------------------------------


def archive_of(server, bucket, folder):
    store = server.store()
    made = S3StorageClasses(S3StorageClasses.of(store).calls, bucket, folder)
    store.close()
    return made


@pytest.fixture
def own_bucket(moto_server):
    """A bucket of the test's own, and the client that sets it up."""
    archive = archive_of(moto_server, f"b-{uuid.uuid4().hex[:12]}", "train")
    archive.calls("create_bucket", archive.url, Bucket=archive.bucket)
    yield archive
    archive.close()


@pytest.mark.s3
def test_a_bucket_without_settings_has_no_findings(own_bucket):
    assert own_bucket.settings() == BucketSettings()


@pytest.mark.s3
def test_the_settings_of_a_bucket_are_read_from_the_server(own_bucket):
    lifecycle = {"Rules": [rule(EXPIRES, Filter={"Prefix": "train/"})]}
    lock = {"ObjectLockEnabled": "Enabled", "Rule": {"DefaultRetention": {"Mode": "GOVERNANCE", "Days": 5}}}

    def put(operation, **what):
        own_bucket.calls(operation, own_bucket.url, Bucket=own_bucket.bucket, **what)

    put("put_bucket_lifecycle_configuration", LifecycleConfiguration=lifecycle)
    put("put_bucket_versioning", VersioningConfiguration={"Status": "Enabled"})
    put("put_object_lock_configuration", ObjectLockConfiguration=lock)
    settings = own_bucket.settings()
    kinds = [one.kind for one in bucket_findings("t", "train/", "STANDARD", settings)]
    assert (kinds, settings.unread) == (["expiration", "versions", "object_lock"], {})


@pytest.mark.s3
def test_the_settings_are_requested_from_the_configured_endpoint(s3_server):
    archive = archive_of(s3_server, s3_server.bucket, "train")
    assert archive.settings() == BucketSettings()
    archive.close()


@pytest.mark.parametrize("status", [403, 501])
def test_unreadable_settings_are_reported_and_raise_no_error(status):
    with HttpFaultServer() as server:
        server.when(lambda method, path: HttpFault("status", status))
        options = {"endpoint": server.url, "region": "us-east-1", "access_key_id": "a", "secret_access_key": "b"}
        archive = S3StorageClasses.of(open_store("s3://bucket/train", **options))
        settings = archive.settings()
        archive.close()
    assert set(settings.unread) == {"lifecycle", "versioning", "object lock"}
    findings = bucket_findings("t", "train/", "STANDARD", settings)
    assert {(one.kind, one.is_danger) for one in findings} == {("unread", False)}
