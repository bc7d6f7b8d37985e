"""Segments: rows, checks of their values, damage, and local copies."""

from __future__ import annotations

import os
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.stores import CountingStore

from tiercache.errors import CorruptShard
from tiercache.model import ShardIdentity, ShardInfo
from tiercache.shard import versions as segments
from tiercache.shard.versions import ShardTable, new_segment, parse_segment, read_segments
from tiercache.store import LocalFolder, MemoryStore, check_key

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tiercache.model import ByteRange
    from tiercache.store import Store

DATASET_ID = "d" * 32


def shard(i: int, n_records: int = 10, **changes: object) -> ShardInfo:
    info = ShardInfo(
        f"shards/w-{i:06d}.tcs", f"{i:032x}", n_records, 4096 + i, (i * 2654435761) % 2**32, 3000, 1000 + i
    )
    return replace(info, **changes)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(secrets.token_hex(8))


class TestSegment:
    def test_every_flipped_byte_and_truncation_is_corruption_and_appended_bytes_are_harmless(
        self, store: MemoryStore, tmp_path: Path
    ) -> None:
        ref, data = new_segment([shard(1)])
        damaged = [data[:at] + bytes([data[at] ^ (1 << (at % 8))]) + data[at + 1 :] for at in range(len(data))]
        for wrong in (*damaged, *(data[:end] for end in range(len(data)))):
            store.put(ref.key, wrong)
            with pytest.raises(CorruptShard, match="segment"):
                read_segments(store, DATASET_ID, [ref])
        for other in (store, LocalFolder(tmp_path), CountingStore(LocalFolder(tmp_path))):
            other.put(ref.key, data[:-100])
            with pytest.raises(CorruptShard, match="segment"):
                read_segments(other, DATASET_ID, [ref])
            other.put(ref.key, data + b"x")
            assert list(ShardTable(read_segments(other, DATASET_ID, [ref])).infos()) == [shard(1)]

    @given(name=st.text(st.sampled_from("a./\\:\0\n-"), max_size=8) | st.text(max_size=20))
    def test_shard_names_are_refused_exactly_as_store_keys_are(self, name: str) -> None:
        try:
            check_key(name)
        except ValueError:
            with pytest.raises(ValueError, match="relative path inside"):
                new_segment([shard(1, name=name)])
        else:
            ref, data = new_segment([shard(1, name=name)])
            assert ShardTable([parse_segment(pa.py_buffer(data), ref, url="u")]).info(0).name == name

    def test_a_stored_name_outside_the_data_set_is_corruption(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(segments, "_BAD_NAME", "^\x01$")  # a writer without the rule
            ref, data = new_segment([shard(1, name="../outside.tcs")])
        with pytest.raises(CorruptShard, match="relative path inside the data set"):
            parse_segment(pa.py_buffer(data), ref, url="u")

    def test_impossible_numbers_of_a_segment_are_errors(self) -> None:
        for changes in (
            *({name: -1} for name in ("n_records", "n_bytes", "footer_offset", "footer_bytes")),
            {"footer_offset": 2**61},
            {"n_records": 2**62},
        ):
            with pytest.raises(ValueError, match=r"has a value below 0|beyond the end"):
                new_segment([shard(1, **changes)])
        with pytest.raises(ValueError, match="records has a value below 0"):
            new_segment([shard(i, n_records=2**61) for i in range(16)])

    def test_rows_that_differ_from_the_fingerprint_are_corruption(self) -> None:
        ref, data = new_segment([shard(1)])
        with pytest.raises(CorruptShard, match="fingerprint"):
            parse_segment(pa.py_buffer(data), replace(ref, digest="0" * 64), url="u")
        with pytest.raises(CorruptShard, match="1 rows, the version states 2"):
            parse_segment(pa.py_buffer(data), replace(ref, n_shards=2), url="u")


class CopyLease:
    """A lease on a local file that may be rotten, short, or never come."""

    def __init__(self, path: Path, comes: bool) -> None:
        self.fd = os.open(path, os.O_RDONLY)
        self.n_bytes = path.stat().st_size
        self.comes = comes
        self.log: list[str] = []

    def present(self, ranges: Sequence[ByteRange]) -> bool:
        return False

    def prefetch(self, ranges: Sequence[ByteRange]) -> None:
        self.log.append("prefetch")

    def wait(self, ranges: Sequence[ByteRange], *, deadline_s: float | None = None) -> bool:
        self.log.append("wait")
        return self.comes

    def close(self) -> None:
        self.log.append("close")
        os.close(self.fd)


class CopyStore(CountingStore):
    """As a cache: every object has one local copy, the file at path."""

    def __init__(self, inner: Store, path: Path, *, comes: bool = True) -> None:
        super().__init__(inner)
        self.path, self.comes = path, comes
        self.leases: list[CopyLease] = []
        self.asked: list[ShardIdentity | None] = []

    def open_local(self, key: str, identity: ShardIdentity | None = None) -> CopyLease:
        self.asked.append(identity)
        self.leases.append(CopyLease(self.path, self.comes))
        return self.leases[-1]

    def remove_if_corrupt(self, key: str, identity: ShardIdentity | None = None) -> bool:
        return False


class TestLocalCopies:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "copy"

    def test_an_intact_local_copy_of_a_segment_is_read_and_nothing_else(
        self, store: MemoryStore, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ref, data = new_segment([shard(1)])
        path.write_bytes(data)
        for map_bytes in (1, 1 << 20):  # mapped, or copied
            monkeypatch.setattr(segments, "_MAP_BYTES", map_bytes)
            copies = CopyStore(store, path)
            assert list(ShardTable(read_segments(copies, DATASET_ID, [ref])).infos()) == [shard(1)]
            assert copies.calls == []
            assert copies.asked == [ShardIdentity(DATASET_ID, ref.name[:32], len(data), ref.crc32c)]
            assert copies.leases[0].log == ["prefetch", "wait", "close"]

    @pytest.mark.parametrize("copy", ["rotten", "short", "never comes"])
    def test_a_bad_local_copy_of_a_segment_is_replaced_by_the_source(
        self, store: MemoryStore, path: Path, copy: str
    ) -> None:
        ref, data = new_segment([shard(1)])
        store.put(ref.key, data)
        path.write_bytes({"rotten": bytes([data[0] ^ 1]) + data[1:], "short": data[:-1]}.get(copy, data))
        copies = CopyStore(store, path, comes=copy != "never comes")
        assert list(ShardTable(read_segments(copies, DATASET_ID, [ref])).infos()) == [shard(1)]
        assert copies.calls == [("read_into", ref.key)]
        assert copies.leases[0].log[-1] == "close"
