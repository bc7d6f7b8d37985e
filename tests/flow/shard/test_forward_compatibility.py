"""Additions of later releases to format version 1: ignored, or an error that names the needed release."""

import json
import re
import secrets
import struct
from dataclasses import replace

import pyarrow as pa
import pytest
from tests.support import later_release as later

import tiercache as tc
from tiercache import __version__
from tiercache.errors import CorruptShard, UnsupportedFormat
from tiercache.shard import codec
from tiercache.shard import versions as segments
from tiercache.shard.footer import pack_head, parse_head
from tiercache.shard.reader import ShardReader
from tiercache.shard.schema import Schema
from tiercache.shard.verify import verify_shard
from tiercache.shard.versions import (
    commit,
    parse_version,
    read_version,
    version_key,
)
from tiercache.shard.writer import ShardOptions, ShardWriter
from tiercache.store.local import LocalFolder
from tiercache.store.memory import MemoryStore

SCHEMA = Schema.of({"id": "int64", "text": "str"})


@pytest.fixture
def shard() -> tuple[dict, bytes]:
    store = MemoryStore("needs-shard")
    with ShardWriter(store, SCHEMA, ShardOptions(block_bytes=60, compression={"id": "none", "text": "zstd"})) as writer:
        for i in range(5):
            writer.write({"id": i, "text": "x" * i})
    (info,) = writer.finish()
    return {name: getattr(info, name) for name in info.__slots__}, store.get(info.name)


def opened(data: bytes) -> ShardReader:
    store = MemoryStore("needs-open")
    store.put("shard", data)
    return ShardReader(store, "shard")


def with_tail(data: bytes, at: int, value: bytes) -> bytes:
    tail = bytearray(data[-64:])
    tail[at : at + len(value)] = value
    return data[:-64] + later.resum_tail(tail)


def test_a_shard_states_its_first_reading_release_and_its_software(shard):
    _, data = shard
    features, major, minor = struct.unpack_from("<IHH", data, len(data) - 24)
    assert (features, (major, minor)) == (0, (0, 1))
    footer_offset, stored, raw = struct.unpack_from("<QQQ", data, len(data) - 64)
    content = bytes(codec.decompress(data[footer_offset : footer_offset + stored], raw))
    offset, length = struct.unpack_from("<QQ", content, 40)
    assert json.loads(content[offset : offset + length])["software"] == f"tiercache {__version__}"


def test_unknown_features_of_a_shard_are_an_error_that_names_the_needed_release(shard):
    _, data = shard
    changed = with_tail(data, 40, struct.pack("<IHH", 0b1010, 1, 7))
    with pytest.raises(UnsupportedFormat, match=r"bit 1, feature bit 3, which tiercache 1\.7 and later") as error:
        opened(changed)
    assert error.value.details["needs"] == ("feature bit 1", "feature bit 3")
    assert error.value.details["release"] == "1.7"
    store = MemoryStore("needs-verify")
    store.put("shard", changed)
    with pytest.raises(UnsupportedFormat):  # it is not damage
        list(verify_shard(store, "shard"))


def test_a_later_format_is_an_error_that_names_the_needed_release(shard):
    _, data = shard
    changed = with_tail(with_tail(data, 28, b"\2"), 44, struct.pack("<HH", 2, 0))
    with pytest.raises(UnsupportedFormat, match=r"format 2, which tiercache 2\.0 and later know; this is") as error:
        opened(changed)
    assert (error.value.found, error.value.supported) == (2, 1)


def test_padding_bytes_of_head_and_tail_are_ignored(shard):
    _, data = shard
    for at in range(48, 52):
        assert opened(with_tail(data, at, b"\xff")).n_records == 5
    for at in (*range(12, 16), *range(32, 60)):
        head = bytearray(pack_head(bytes(range(16))))
        head[at] = 0xFF
        assert parse_head(later.resum_head(head), "u") == bytes(range(16)), at


def test_missing_sections_of_a_footer_are_corruption(shard, monkeypatch):
    info, data = shard
    footer = opened(data).footer
    raw = bytearray(later.content_with(footer, {}, ()))
    raw[36] = 6
    _, changed = later.sealed(data[: info["footer_offset"]], footer, "shard", bytes(raw))
    with pytest.raises(CorruptShard, match="6 sections"):
        opened(changed)


def test_a_codec_of_a_later_release_is_unsupported_and_not_corruption(shard):
    info, data = shard
    footer = opened(data).footer
    for number in (2, 1 << 16, 2**32 - 1):
        chunks = footer.chunks.copy()
        chunks["codec"][1, 1] = number
        _, changed = later.sealed(data[: info["footer_offset"]], replace(footer, chunks=chunks), "shard")
        with pytest.raises(UnsupportedFormat, match=f"needs codec {number}, which a later tiercache knows"):
            opened(changed)


def schema_with_kind(kind: str) -> bytes:
    said = {b"tiercache.type": json.dumps({"kind": kind, "rate": 44100}).encode()}
    return bytes(pa.schema([pa.field("sound", pa.large_binary(), nullable=False, metadata=said)]).serialize())


def test_a_kind_of_column_of_a_later_release_is_unsupported_and_not_corruption(shard):
    class Later(Schema):
        def to_bytes(self) -> bytes:
            return schema_with_kind("audio")

    _, data = shard
    footer = replace(opened(data).footer, schema=Later(SCHEMA.columns))
    _, changed = later.sealed(data[:64], footer, "shard")
    with pytest.raises(UnsupportedFormat, match="needs kind 'audio' of column 'sound'"):
        opened(changed)


def test_unknown_keys_of_a_column_type_are_ignored():
    assert str(Schema.from_bytes(schema_with_kind("bytes")).columns[0]) == "bytes"


def test_bytes_between_chunks_are_found_by_verify_unless_a_later_section_may_describe_them(shard):
    info, data = shard
    footer = opened(data).footer
    row = footer.chunks[0, 1]
    at = int(row["offset"] + row["stored"])
    assert at % 64
    for place in (at, codec.align(at) - 1):
        changed = bytearray(data)
        changed[place] = 7
        store = MemoryStore("needs-gap")
        store.put("shard", bytes(changed))
        assert ShardReader(store, "shard").n_records == 5
        (finding,) = verify_shard(store, "shard")
        assert (finding.part, finding.block, finding.message) == ("chunk", 0, "the bytes between chunks are not zeros")
    raw = later.content_with(footer, {}, (b"",))
    _, whole = later.sealed(bytes(changed[: info["footer_offset"]]), footer, "shard", raw)
    store.put("later", whole)
    assert list(verify_shard(store, "later")) == []


@pytest.fixture
def store(shard) -> MemoryStore:
    info, data = shard
    store = MemoryStore(f"needs-{secrets.token_hex(8)}")  # another one each time: an id may come again
    store.put(info["name"], data)
    commit(store, [tc.model.ShardInfo(**info)], schema=SCHEMA, mode="create")
    return store


def changed_version(store: MemoryStore, **changes: object) -> bytes:
    body = json.loads(store.get(version_key(1)))
    return later.version_text({key: value for key, value in (body | changes).items() if value is not ...})


def test_the_text_of_a_version_follows_the_specification(store):
    assert changed_version(store) == store.get(version_key(1))


def test_a_version_that_needs_a_later_release_is_an_error_that_names_it(store):
    for changes, text in (
        ({"needs_to_read": ["row-deletes", "encryption"], "release": "1.9"}, "encryption, row-deletes, which"),
        ({"format": 2, "release": "3.0", "segments": ..., "needs_to_read": ...}, "format 2, which tiercache 3.0"),
        ({"format": 2, "release": 7}, "format 2, which a later tiercache knows"),
    ):
        with pytest.raises(UnsupportedFormat, match=re.escape(text)):
            parse_version(changed_version(store, **changes), number=1, url="u")


def test_a_version_with_unreadable_requirements_is_corruption(store):
    for changes in (
        *({"needs_to_read": wrong} for wrong in ("all", [1], ["Not A Name"], ...)),
        {"needs_to_write": ...},
        {"release": "soon"},
        {"format": "1"},
        {"format": True},
        {"kind": "Append!"},
        {"software": ""},
    ):
        with pytest.raises(CorruptShard):
            parse_version(changed_version(store, **changes), number=1, url="u")


def test_a_data_set_that_only_a_later_release_may_write_is_readable(tmp_path, shard):
    with tc.Writer(str(tmp_path), schema=SCHEMA) as writer:
        writer.write({"id": 1, "text": "a"})
    path = tmp_path / version_key(1)
    body = json.loads(path.read_text()) | {"needs_to_write": ["row-ids"], "release": "1.4"}
    path.unlink()
    path.write_bytes(later.version_text(body))
    assert len(tc.Dataset(tmp_path)) == 1
    for mode in ("append", "overwrite"):
        with pytest.raises(UnsupportedFormat, match="writing to this data set needs row-ids"):
            tc.Writer(str(tmp_path), schema=SCHEMA, mode=mode)
        with pytest.raises(UnsupportedFormat, match=r"writing to this data set needs row-ids, which tiercache 1\.4"):
            commit(LocalFolder(tmp_path), [tc.model.ShardInfo(**shard[0])], schema=SCHEMA, mode=mode)


def test_missing_and_other_columns_of_a_segment_are_corruption(store):
    (ref,) = read_version(store, 1).segments
    whole = pa.ipc.open_file(pa.py_buffer(store.get(ref.key))).read_all()
    for other in (whole.select(range(7)), whole.select([1, 0, *range(2, 8)]), whole.rename_columns(["n"] * 8)):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, other.schema) as writer:
            writer.write_table(other)
        with pytest.raises(CorruptShard, match="another Arrow schema"):
            segments.parse_segment(sink.getvalue(), ref, url="u")
