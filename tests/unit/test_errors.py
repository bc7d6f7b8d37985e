"""Exceptions carry typed facts, between processes too."""

import pickle

import pytest

from tiercache.errors import (
    ArchivedShards,
    CommitConflict,
    CorruptCheckpoint,
    CorruptShard,
    NotFound,
    ObjectChanged,
    SchemaError,
    StoreError,
    TierCacheError,
    UnsupportedFormat,
)

ERRORS = [
    TierCacheError("it failed", path="p"),
    StoreError("it failed", url="s3://b/k", retryable=True, status=503, code="SlowDown", maybe_done=True, sent=True),
    NotFound("no such object", url="s3://b/k", status=404),
    ObjectChanged(url="s3://b/k", expected="a", found="b"),
    CorruptShard("bad checksum", url="s3://b/k", part="block", block=3, column="x", location=(1, 3, 7)),
    CorruptCheckpoint("bad checksum", url="s3://b/k", part="manifest"),
    SchemaError("not an integer", column="x", record=4, expected="int64", got="str"),
    CommitConflict("another writer was first", url="s3://b", number=3),
    ArchivedShards("restore first", names=["a", "b"], command="tiercache tier get a"),
    UnsupportedFormat("a newer release wrote it", url="s3://b", found=9, supported=1),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_keeps_its_class_message_and_facts_between_processes(error):
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def test_other_facts_of_an_error_are_in_details():
    assert ERRORS[1].details == {"sent": True}
    with pytest.raises(AttributeError):
        _ = ERRORS[1].sent
