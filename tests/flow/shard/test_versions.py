"""Versions and segments: their text, how the newest version is found, and damage."""

from __future__ import annotations

import itertools
import json
import re
import secrets
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.faults import Fault, FaultKind, FaultStore
from tests.support.http_server import HttpFault, HttpFaultServer
from tests.support.stores import CountingStore

from tiercache.errors import CorruptShard, NotFound, StoreError
from tiercache.model import ShardInfo
from tiercache.shard import versions
from tiercache.shard.schema import Schema, Tensor
from tiercache.shard.source import READS_AGAIN
from tiercache.shard.versions import (
    SegmentRef,
    Version,
    encode_version,
    fingerprint_of,
    new_segment,
    parse_version,
    version_key,
)
from tiercache.store import MemoryStore, open_store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.store import Store

SCHEMA = Schema.of({"tokens": Tensor("uint16", (8,)), "label": "int64"})
DATASET_ID = "d" * 32


def shard(i: int, n_records: int = 10, **changes: object) -> ShardInfo:
    info = ShardInfo(
        f"shards/w-{i:06d}.tcs", f"{i:032x}", n_records, 4096 + i, (i * 2654435761) % 2**32, 3000, 1000 + i
    )
    return replace(info, **changes)


def store_version(store: Store, number: int, parts: Sequence[Sequence[ShardInfo]] = ()) -> Version:
    """Write version `number` with a segment for each part, without the code under test in commit.py."""
    refs = []
    for part in parts:
        ref, data = new_segment(part)
        store.put(ref.key, data)
        refs.append(ref)
    infos = [info for part in parts for info in part]
    n_records = sum(info.n_records for info in infos)
    schema_bytes = SCHEMA.to_bytes()
    version = Version(
        dataset_id=DATASET_ID,
        number=number,
        parent=number - 1 or None,
        kind="append" if number > 1 else "create",
        schema_bytes=schema_bytes,
        writer="w",
        nonce=f"{number:032x}",
        created="2026-01-01T00:00:00+00:00",
        fingerprint=fingerprint_of(DATASET_ID, number, schema_bytes, n_records, [ref.digest for ref in refs]),
        n_records=n_records,
        n_bytes=sum(info.n_bytes for info in infos),
        segments=tuple(refs),
    )
    store.put(version_key(number), encode_version(version))
    return version


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(secrets.token_hex(8))


class TestVersionText:
    @pytest.fixture
    def version(self, store: MemoryStore) -> Version:
        return store_version(store, 3, [[shard(1), shard(2)], [shard(3)]])

    def test_a_version_reads_back_equal(self, version: Version) -> None:
        again = parse_version(encode_version(version), number=3, url="u")
        assert again == version
        assert again.schema == SCHEMA
        assert again.n_shards == 3

    def test_every_flipped_or_appended_byte_and_every_truncation_is_corruption(self, version: Version) -> None:
        text = encode_version(version)
        damaged = [text[:end] for end in range(len(text))] + [text + bytes([b]) for b in range(256)]
        for at, flip in itertools.product(range(len(text)), (0x01, 0x20, 0x80)):
            damaged.append(text[:at] + bytes([text[at] ^ flip]) + text[at + 1 :])
        for wrong in damaged:
            with pytest.raises(CorruptShard, match="version"):
                parse_version(wrong, number=3, url="u")

    @given(
        data=st.binary(max_size=200)
        | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda v: json.dumps(v).encode())
    )
    def test_any_other_text_is_corruption(self, data: bytes) -> None:
        with pytest.raises(CorruptShard):
            parse_version(data, number=1, url="u")

    def test_a_version_under_another_number_is_corruption(self, version: Version) -> None:
        with pytest.raises(CorruptShard, match="says that it is version 3, expected 4"):
            parse_version(encode_version(version), number=4, url="u")

    def test_impossible_values_are_corruption_under_a_right_checksum(self, version: Version) -> None:
        for changes in (
            {"dataset_id": "../../etc"},
            {"parent": 3},
            {"parent": 0},
            {"kind": "Destroy!"},
            {"nonce": ""},
            {"writer": "a\0b"},
            {"n_records": -1},
            {"n_records": 2**63},
            {"n_records": 31},
            {"schema_bytes": b"another"},
            {"segments": ()},
            {"segments": (SegmentRef("../up.arrow", 1, 1, 1, "0" * 64),)},
            {"segments": (SegmentRef("a" * 32 + ".arrow\n", 1, 1, 1, "0" * 64),)},
        ):
            with pytest.raises(CorruptShard):
                parse_version(encode_version(replace(version, **changes)), number=3, url="u")

    def test_a_schema_that_this_release_cannot_read_is_corruption(self, store: MemoryStore, version: Version) -> None:
        schema_bytes = b"not a schema"
        facts = (DATASET_ID, 3, schema_bytes, version.n_records, [ref.digest for ref in version.segments])
        store.put(
            version_key(3),
            encode_version(replace(version, schema_bytes=schema_bytes, fingerprint=fingerprint_of(*facts))),
        )
        with pytest.raises(CorruptShard, match="schema"):
            versions.read_version(store, 3)


class TestShardTable:
    def test_segments_whose_totals_differ_from_the_version_are_corruption(self, store: MemoryStore) -> None:
        version = store_version(store, 1, [[shard(1)]])
        with pytest.raises(CorruptShard, match="10 records, the version says 11"):
            versions.read_shards(store, replace(version, n_records=11))


class TestLatest:
    @pytest.mark.parametrize(
        "hint", [None, b"1\n", b"3\n", b"5\n", b"9\n", b"", b"\xff\x00", b"-1", b"0", b"9" * 40, b"../x", b"4.5"]
    )
    def test_the_newest_version_is_found_from_any_hint(self, store: MemoryStore, hint: bytes | None) -> None:
        for number in range(1, 6):
            store_version(store, number)
        if hint is not None:
            store.put(versions.HINT_KEY, hint)
        assert versions.latest(store).number == 5

    def test_a_correct_hint_costs_three_requests_and_no_listing(self, store: MemoryStore) -> None:
        for number in range(1, 4):
            version = store_version(store, number)
        store.put(versions.HINT_KEY, versions.encode_version(version))
        counting = CountingStore(store)
        versions.latest(counting)
        assert counting.calls == [("get", versions.HINT_KEY), ("get", version_key(3)), ("get", version_key(4))]

    @pytest.mark.parametrize("hint", [None, b"2", b"77"])
    def test_the_newest_version_is_found_in_a_store_that_cannot_list(
        self, store: MemoryStore, hint: bytes | None
    ) -> None:
        for number in range(1, 4):
            store_version(store, number)
        if hint is not None:
            store.put(versions.HINT_KEY, hint)
        blind = FaultStore(store, [Fault("list", times=100, retryable=False, status=405)])
        assert versions.latest(blind).number == 3

    @pytest.mark.parametrize("change", ["outdated", "of a deleted data set", "corrupt", "of a later format"])
    @pytest.mark.parametrize("where", ["memory", "remote"])
    def test_a_hint_that_is_a_wrong_version_is_not_believed(self, store: MemoryStore, change: str, where: str) -> None:
        for number in range(1, 4):
            version = store_version(store, number, [[shard(number)]])
        text = versions.encode_version(version)
        if change == "outdated":
            newer = store_version(store, 4, [[shard(4)]])
        else:
            newer = version
            other = replace(version, writer="another", created="2025-01-01T00:00:00+00:00")
            text = {
                "of a deleted data set": versions.encode_version(other),
                "corrupt": text.replace(b'"number":3', b'"number":7'),
                "of a later format": text.replace(b'"format":1', b'"format":2'),
            }[change]
        store.put(versions.HINT_KEY, text)
        with HttpFaultServer(store) as server:  # segments of a remote store are read before the version is known
            found, table = versions.open_latest(store if where == "memory" else open_store(server.url))
        assert found == newer
        assert table.names.to_pylist() == [shard(newer.number).name]

    def test_a_temporary_error_of_a_listing_is_raised(self, store: MemoryStore) -> None:
        store_version(store, 1)
        with pytest.raises(StoreError):
            versions.latest(FaultStore(store, [Fault("list", retryable=True)]))

    def test_a_damaged_newest_version_is_corruption_and_an_older_one_does_not_matter(self, store: MemoryStore) -> None:
        with pytest.raises(NotFound, match="no data set here"):
            versions.latest(store)
        for number in (1, 2, 3):
            store_version(store, number)
        store.put(version_key(2), b"rotten")
        store.put(versions.HINT_KEY, b"1")
        assert versions.latest(store).number == 3
        store.put(version_key(3), b"rotten")
        with pytest.raises(CorruptShard, match=re.escape(version_key(3))):
            versions.latest(store)


class TestNoDataSet:
    """The error of a URL without a data set says what is there."""

    FOUND = (
        (
            ["train/_tiercache/latest", "val/_tiercache/versions/1.json"],
            "/top/st",
            "folders below it, train, val: open .*/train",
        ),
        (["index.json", "a.tar", "b.tar"], "/top/st", r"other files, such as .*2 \.tar, 1 \.json.*tiercache pack"),
        (["shards/a-000000.tcs"], "/top/st", "no version: the writer"),
        (["../set/_tiercache/latest"], "/top/st", "did you mean .*/top/set"),
        (
            ["../x/_tiercache/latest", "../y/_tiercache/latest"],
            "/top/st",
            "does not exist; .*/top has the data sets x, y",
        ),
        (["../other"], "/top/st", "does not exist, and .*/top has no data set"),
        (["_tiercache/latest", "shards/a-000000.tcs"], "/top/st/shards", "a part of the data set .*/top/st$"),
        (["a.parquet"], "/top/st/a.parquet", "it is a file"),
        (["_tiercache/latest"], "/top/st", "begins with '<html>"),
    )

    @pytest.mark.parametrize("where", ["folder", "memory", "s3"])
    def test_it_names_what_is_there_instead(self, tmp_path, where) -> None:
        for number, (keys, folder, message) in enumerate(self.FOUND):
            top = f"{tmp_path}/{number}" if where == "folder" else f"memory://{secrets.token_hex(8)}"
            with closing(open_store(f"{top}/top")) as store:
                for key in keys:
                    store.put(key.removeprefix("../") if key.startswith("../") else f"st/{key}", b"<html>log in</html>")
                objects = {f"bucket/top/{info.key}": store.get(info.key) for info in store.list()}
            with HttpFaultServer(objects) as server:
                s3 = {"endpoint": server.url, "anon": True} if where == "s3" else {}
                with closing(open_store(f"{'s3://bucket' if s3 else top}{folder}", **s3)) as store:
                    with pytest.raises(NotFound, match=message) as caught:
                        versions.latest(store)
                    assert str(caught.value).startswith(f"{store.url}: no data set here: ")
                    assert versions.find_latest(store) is None

    def test_a_missing_bucket_is_named(self) -> None:
        body = b"<Error><Code>NoSuchBucket</Code></Error>"
        with HttpFaultServer() as server:
            server.when(lambda method, path: HttpFault("status", 404, body=body))
            with closing(open_store("s3://bucket/set", endpoint=server.url, anon=True)) as store:
                for read in (versions.latest, versions.open_latest, lambda store: versions.read_version(store, 3)):
                    with pytest.raises(NotFound, match="no data set here: the bucket does not exist; check its name"):
                        read(store)

    def test_a_store_that_cannot_be_listed_says_so(self) -> None:
        refused = pytest.raises(NotFound, match="it has no _tiercache/latest, and cannot be listed")
        with HttpFaultServer() as server, closing(open_store(f"{server.url}/set")) as store, refused:
            versions.latest(store)

    def test_a_missing_version_names_the_newest(self, store: MemoryStore) -> None:
        store_version(store, 1)
        with pytest.raises(NotFound, match="no version 7; the newest is 1"):
            versions.read_version(store, 7)


class TestTransferErrors:
    """A version or a segment that is damaged on the way is fetched once more, and no more than once."""

    @pytest.mark.parametrize("read", [versions.latest, lambda store: versions.read_version(store, 2)])
    def test_a_version_that_is_damaged_in_transit_is_fetched_again(self, store: MemoryStore, read) -> None:
        for n in (1, 2):
            version = store_version(store, n, [[shard(n)]])
        for number in (1, 2):
            flips = Fault("get", kind=FaultKind.BIT_FLIP, keys=version_key(number))
            assert read(FaultStore(store, [flips])) == version
        faulty = FaultStore(store, [Fault("get", kind=FaultKind.BIT_FLIP, times=99, keys=version_key(2))])
        with pytest.raises(CorruptShard, match="version"):
            read(faulty)
        assert len(faulty.faulted_calls) == 2

    @pytest.mark.parametrize(("times", "is_read"), [(1, True), (99, False)])
    def test_a_segment_is_fetched_again_a_few_times(self, store: MemoryStore, times, is_read) -> None:
        version = store_version(store, 1, [[shard(1), shard(2)]])
        faulty = FaultStore(store, [Fault("read_into", kind=FaultKind.BIT_FLIP, times=times)])
        if is_read:
            assert len(versions.read_shards(faulty, version)) == 2
        else:
            with pytest.raises(CorruptShard, match="CRC-32C"):
                versions.read_shards(faulty, version)
        assert len(faulty.faulted_calls) == min(times, 1 + READS_AGAIN)
