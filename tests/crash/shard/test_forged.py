"""Forged data sets: impossible or false values under matching checksums and a matching fingerprint."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from tests.support.later_release import sealed

import tiercache as tc
from tiercache._native.checksum import crc32c
from tiercache.errors import CorruptShard, TierCacheError
from tiercache.shard import codec
from tiercache.shard.footer import TAIL_BYTES, Footer, Tail
from tiercache.shard.verify import verify_dataset
from tiercache.shard.versions import (
    SegmentRef,
    digest_rows,
    encode_version,
    fingerprint_of,
    latest,
    read_shards,
    version_key,
)
from tiercache.store import LocalFolder

N = 300
SCHEMA = {
    "id": "int64",
    "small": "uint8?",
    "score": "float32?",
    "text": "str?",
    "note": "json",
    "blob": "bytes?",
    "point": tc.Tensor("float32", (3,)),
    "boxes": tc.Ragged("int16", (None, 2)),
    "when": pa.field("when", pa.list_(pa.string()), nullable=True),
}


def records() -> dict[str, Any]:
    ids = range(N)
    return {
        "id": np.arange(N),
        "small": [None if i % 7 == 0 else i % 200 for i in ids],
        "score": [None if i % 5 == 0 else i / 2 for i in ids],
        "text": [None if i % 11 == 0 else f"{i}: ä text" for i in ids],
        "note": [{"i": i} for i in ids],
        "blob": [None if i % 3 == 0 else bytes([i % 256]) * (i % 5) for i in ids],
        "point": np.arange(3 * N, dtype=np.float32).reshape(N, 3),
        "boxes": [np.full((i % 4, 2), i, np.int16) for i in ids],
        "when": pa.array([None if i % 4 == 0 else [str(i)] * (i % 3) for i in ids], pa.list_(pa.string())),
    }


class Forgery:
    """A data set in a folder, of which anything can be changed; save() makes all sums fit what is there then."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, LocalFolder(folder)
        self.version = latest(self.store)
        self.table = read_shards(self.store, self.version).arrow
        self.rows: list[dict[str, Any]] = self.table.to_pylist()

    def footer(self, shard: int) -> tuple[bytes, Footer, bytearray]:
        """What lies before the footer, the footer, and its content."""
        row = self.rows[shard]
        data = (self.folder / row["name"]).read_bytes()
        tail = Tail.parse(data[-TAIL_BYTES:], len(data), "")
        stored = data[tail.footer_offset : -TAIL_BYTES]
        raw = bytearray(codec.decompress(stored, tail.footer_raw_bytes))
        return data[: tail.footer_offset], Footer.parse(stored, tail, ""), raw

    def put(self, shard: int, chunks: bytes, footer: Footer, raw: bytes | None = None) -> None:
        """Another shard in the place of one, and its row."""
        row = self.rows[shard]
        fields, data = sealed(chunks, footer, row["name"], raw)
        self.put_data(shard, data, fields["footer_bytes"])

    def put_data(self, shard: int, data: bytes, footer_bytes: int) -> None:
        row = self.rows[shard]
        (self.folder / row["name"]).write_bytes(data)
        offset = len(data) - footer_bytes - TAIL_BYTES
        row |= {"bytes": len(data), "crc32c": crc32c(data), "footer_offset": offset, "footer_bytes": footer_bytes}

    def save(self, *, segment: bytes | None = None, **changes: Any) -> str:
        """Write segment and version anew, and give the segment's name. changes: of the segment's line."""
        table = pa.Table.from_pylist(self.rows, self.table.schema)
        if segment is None:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
            segment = sink.getvalue().to_pybytes()
        ref = SegmentRef(self.version.segments[0].name, len(segment), crc32c(segment), len(table), digest_rows(table))
        ref = dataclasses.replace(ref, **changes)
        (self.folder / ref.key).write_bytes(segment)
        n_records = sum(row["records"] for row in self.rows)
        facts = self.version.dataset_id, self.version.number, self.version.schema_bytes, n_records
        forged = dataclasses.replace(
            self.version,
            segments=(ref,),
            n_records=n_records,
            n_bytes=sum(row["bytes"] for row in self.rows),
            fingerprint=fingerprint_of(*facts, [ref.digest]),
        )
        (self.folder / version_key(forged.number)).write_bytes(encode_version(forged))
        return ref.name


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forged") / "original"
    with tc.Writer(folder, schema=SCHEMA, shard_size="16KiB", block_size="4KiB", compression={"note": "zstd"}) as w:
        w.write_batch(records())
    assert len(tc.Dataset(folder)._source.shard_records) > 1
    return folder


@pytest.fixture
def forgery(original, tmp_path):
    shutil.copytree(original, tmp_path / "data")
    return Forgery(tmp_path / "data")


def filtered(folder: Path) -> int:
    return len(tc.Dataset(folder, cache=False).filter((pc.field("id") > 250) | (pc.field("score") > 1e9)))


def use(folder: Path) -> list[str]:
    """Do all that reads a data set; names of what failed with an error of ours. Any other error passes through."""

    def epoch() -> None:
        dataset = tc.Dataset(folder, cache=False)
        for first in range(0, len(dataset), 64):
            dataset[list(range(first, min(first + 64, len(dataset))))]

    def verify() -> None:
        for finding in verify_dataset(LocalFolder(folder), jobs=1):
            raise CorruptShard(finding.message, url=finding.url)

    failed = []
    for name, work in {
        "epoch": epoch,
        "filter": lambda: filtered(folder),
        "to_arrow": lambda: [b.validate(full=True) for b in tc.Dataset(folder, cache=False).to_arrow()],
        "verify": verify,
    }.items():
        try:
            work()
        except TierCacheError:
            failed.append(name)
    return failed


def forge_chunk(forgery: Forgery, column: str, change) -> None:
    """Change a raw chunk of a column of the first shard, and the sums of it. change: (bytes, buffers, nodes)."""
    chunks, footer, _ = forgery.footer(0)
    number = footer.schema.index(column)
    rows, nodes, pages = footer.chunks.copy(), footer.nodes.copy(), footer.pages.copy()
    row = rows[0, number]
    assert row["codec"] == codec.RAW
    start, end = int(row["offset"]), int(row["offset"]) + int(row["stored"])
    body, chunk = bytearray(chunks), bytearray(chunks[start:end])
    change(chunk, footer.buffers[int(row["first_buffer"]) :], nodes[int(row["first_node"]) :])
    body[start:end] = chunk
    row["crc"] = pages[int(row["first_page"])] = crc32c(bytes(chunk))
    forgery.put(0, bytes(body), dataclasses.replace(footer, chunks=rows, nodes=nodes, pages=pages))
    forgery.save()


@pytest.mark.parametrize("column", ["utf8", "text", "small", "blob", "when"])
def test_to_arrow_refuses_invalid_utf8_and_wrong_null_counts(forgery, column):
    def no_utf8(chunk, buffers, _nodes):
        chunk[int(buffers[2, 0]) + 3] = 0xFF

    def other_nulls(_chunk, _buffers, nodes):
        nodes[0, 1] += 1

    column, change = ("text", no_utf8) if column == "utf8" else (column, other_nulls)
    forge_chunk(forgery, column, change)
    with pytest.raises(CorruptShard, match=f"{forgery.rows[0]['name']}.*block 0.*{column!r}"):
        list(tc.Dataset(forgery.folder, cache=False).to_arrow())
    findings = list(verify_dataset(forgery.store))
    assert ("chunk", column) in [(finding.part, finding.column) for finding in findings]


NUMBERS = [0, 1, -1, 63, 64, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1]


@pytest.mark.parametrize("column", ["records", "bytes", "crc32c", "footer_offset", "footer_bytes"])
def test_a_forged_number_in_a_segment_is_a_tiercache_error_and_found_by_verify(forgery, column):
    right, forged = forgery.rows[1][column], []
    for number in NUMBERS:
        forgery.rows[1][column] = number
        with suppress(struct.error, OverflowError, pa.ArrowInvalid):  # not a number of that column
            forgery.save()
            forged.append((number, use(forgery.folder)))
        forgery.rows[1][column] = right
    assert len(forged) > 5
    assert [number for number, failed in forged if "verify" not in failed] == []
    forgery.save()
    assert use(forgery.folder) == []
    assert filtered(forgery.folder) == N - 251


@pytest.mark.parametrize("seed", range(3))
def test_a_forged_number_in_a_footer_is_a_tiercache_error_or_found_by_verify(forgery, seed):
    """Numbers of 4 or 8 bytes anywhere in the footer, sealed; what still reads without an error reads as before."""
    random_, original = random.Random(seed), forgery.footer(0)
    chunks, footer, raw = original
    n_found = 0
    for _ in range(12):
        forged = bytearray(raw)
        for _ in range(random_.choice([1, 1, 2])):
            size = random_.choice([4, 8])
            at = random_.randrange(0, (len(raw) - size) // size) * size
            number = random_.choice([*NUMBERS, random_.getrandbits(8 * size), raw[at] ^ 1]) % 2 ** (8 * size)
            forged[at : at + size] = number.to_bytes(size, "little")
        forgery.put(0, chunks, footer, bytes(forged))
        forgery.save()
        failed = use(forgery.folder)
        n_found += "verify" in failed
        assert not failed or "verify" in failed
    assert n_found > 0


def test_forged_bytes_of_a_segment_are_a_tiercache_error(forgery):
    forgery.save()
    path = forgery.folder / forgery.version.segments[0].key
    data, random_ = path.read_bytes(), random.Random(0)
    for _ in range(15):
        number = random_.choice([0, 1, 2**31 - 1, 2**32 - 1, random_.getrandbits(32)])
        at = random_.randrange(0, len(data) // 4) * 4
        forgery.save(segment=data[:at] + number.to_bytes(4, "little") + data[at + 4 :])
        use(forgery.folder)


CHILD = """
import json, resource, sys
import pyarrow.compute as pc
import tiercache as tc
from tiercache.shard.verify import verify_dataset
from tiercache.store import LocalFolder
folder, cache = sys.argv[1:3]
dataset = tc.Dataset(sys.argv[3], cache=False)
dataset[0], dataset.filter(pc.field("id") > 3), list(dataset.to_arrow()), list(verify_dataset(LocalFolder(sys.argv[3])))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), resource.RLIM_INFINITY))
said = []
for work in (
    lambda: tc.Dataset(folder, cache=False)[0],
    lambda: tc.Dataset(folder, cache=tc.Cache(cache, size="8GiB"))[0],
    lambda: tc.Dataset(folder, cache=False).filter(pc.field("id") > 3),
    lambda: [str(finding) for finding in verify_dataset(LocalFolder(folder))],
):
    try:
        said.append(str(work()))
    except tc.CorruptShard as error:
        said.append(str(error))
print(json.dumps(said))
"""
HUGE = 3_200_000_000


def forge_segment_size(forgery):
    forgery.save(n_bytes=HUGE)
    return forgery.version.segments[0].name


def forge_footer_size(forgery):
    row = forgery.rows[0]
    row |= {"bytes": row["footer_offset"] + (HUGE >> 2) + TAIL_BYTES, "footer_bytes": HUGE >> 2}
    forgery.save()
    return row["name"]


def forge_decoded_footer(forgery):
    chunks, _, raw = forgery.footer(0)
    frame = bytearray(codec.compress(bytes(raw), 3))
    promised = 1 << 30
    assert frame[4] & 0xC0 in (0x40, 0x80)  # the frame's header says its content's size in 2 or 4 bytes
    single = bytes(frame[:4]) + bytes([0xA0]) + promised.to_bytes(4, "little") + bytes(frame[7:])
    tail = Tail(len(chunks), len(single), promised, crc32c(single))
    forgery.put_data(0, chunks + single + tail.pack(), len(single))
    forgery.save()
    return forgery.rows[0]["name"]


def forge_decoded_chunk(forgery):
    chunks, footer, _ = forgery.footer(0)
    rows, buffers = footer.chunks.copy(), footer.buffers.copy()
    number = footer.schema.index("note")
    row = rows[0, number]
    row["raw"] = 1 << 30
    last = int(row["first_buffer"]) + 2
    buffers[last, 1] = (1 << 30) - int(buffers[last, 0])
    forgery.put(0, chunks, dataclasses.replace(footer, chunks=rows, buffers=buffers))
    forgery.save()
    return forgery.rows[0]["name"]


@pytest.mark.parametrize(
    "forge",
    [
        forge_decoded_chunk,
        *(
            pytest.param(forge, marks=pytest.mark.stress)
            for forge in (forge_segment_size, forge_decoded_footer, forge_footer_size)
        ),
    ],
    ids=lambda forge: forge.__name__,
)
def test_no_memory_is_allocated_for_a_size_that_is_only_claimed(forgery, original, tmp_path, forge):
    name = forge(forgery)
    command = [sys.executable, "-c", CHILD, str(forgery.folder), str(tmp_path / "cache"), str(original)]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in said for said in json.loads(done.stdout)), done.stdout


def test_a_compressed_segment_is_refused_before_arrow_decodes_it(forgery):
    table = pa.Table.from_pylist(forgery.rows, forgery.table.schema)
    for compression in ("zstd", "lz4"):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
            writer.write_table(table)
        name = forgery.save(segment=sink.getvalue().to_pybytes())
        with pytest.raises(CorruptShard, match=f"{name}.*compressed"):
            tc.Dataset(forgery.folder, cache=False)
