"""WebDataset tar shards: members that follow each other with one base name are a sample, their endings its columns."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tiercache.errors import SchemaError
from tiercache.layouts.contract import FileBytes, FileIndex, Folder, Layout, LayoutFile, Numbers, cut_blocks, merged
from tiercache.layouts.spans import Bytes, take_spans, text_array
from tiercache.model import ByteRange, ObjectInfo
from tiercache.shard.schema import INTEGERS, Column, Kind, Schema
from tiercache.shard.shard_file import ColumnData

KEY = "__key__"
_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
# As WebDataset splits names: up to the first dot of the last segment. Other files are no part of a sample.
_NAME = re.compile(r"((?:.*/|)[^./][^./]*)\.([^/]*)")
# By the last part of an ending, as WebDataset's own decoders have it; everything else is bytes.
_TYPES: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(("jpg", "jpeg", "png", "webp"), "image")
    | dict.fromkeys(("cls", "cls2", "index", "inx", "id"), "int64")
    | dict.fromkeys(("txt", "text", "transcript"), "str")
    | dict.fromkeys(("json", "jsn"), "json")
)
_ENDINGS: Mapping[str, str] = MappingProxyType(
    {"image": "jpg", "int64": "cls", "str": "txt", "json": "json", "bytes": "bin", "npy": "npy"}
)
_UNIT = 512  # headers and contents begin at multiples of it
_PLAIN = (b"0", b"\0")  # types of members that are files, without a header of their own before them


def ending_of(column: Column) -> str:
    """Return the ending of the files with a column's values: its name, if the name says what they are, or NAME.ENDING.

    Images, integers, text, JSON and bytes have the endings that _TYPES reads so; arrays are in NumPy's format (npy),
    and all other values are JSON. An image of any encoding may be in a file .jpg: readers look at its first bytes.
    """
    name = column.name.lower()  # as readers see it
    if column.kind in (Kind.TENSOR, Kind.RAGGED):
        return f"{name}.npy"
    is_integer = column.kind is Kind.SCALAR and column.dtype in INTEGERS and column.dtype != "uint64"
    content = "int64" if is_integer else column.kind.value
    content = content if content in _ENDINGS else "json"
    if _TYPES.get(name.rpartition(".")[2], "bytes") == content:
        return name
    return f"{name}.{column.encoding if column.encoding in ('png', 'webp') else _ENDINGS[content]}"


def check_key(key: str) -> None:
    """Raise ValueError if a text cannot be the key of a sample."""
    match, segment = _NAME.fullmatch(f"{key}.x"), key.rpartition("/")[2]
    if match is None or match[1] != key or segment.startswith("__") or "\0" in key:
        raise ValueError(
            f"{key!r} cannot be the key of a sample: its last segment has a dot, begins with __, or is empty"
        )


class _Member(NamedTuple):
    """A file of a tar: its first header and its content, as offsets. is_plain: One header, whose name is complete."""

    name: str
    header: int
    start: int
    end: int
    is_plain: bool


class WebDatasetLayout(Layout):
    name = "WebDataset"

    @classmethod
    def find(cls, folder: Folder) -> WebDatasetLayout | None:
        """Return the samples of the .tar files. A column that some samples lack is nullable."""
        shards = [info for info in folder.objects if info.key.endswith(".tar")]
        if not shards:
            packed = [info.key for info in folder.objects if info.key.endswith(_COMPRESSED)]
            if packed:
                raise SchemaError(
                    f"{folder.url.rstrip('/')}/{packed[0]}: the samples in a compressed tar cannot be found without "
                    "reading all of it: decompress the shards (gunzip), their images and sounds are compressed anyway"
                )
            return None
        indexes = folder.index("webdataset", shards, _index)
        counts: dict[str, int] = {}
        for index in indexes:
            for name, count in zip(index.parts["names"].tolist(), index.parts["counts"].tolist(), strict=True):
                counts[name] = counts.get(name, 0) + count
        n_records = sum(int(index.n_records.sum()) for index in indexes)
        if not n_records:
            raise SchemaError(f"{folder.url}: its .tar files have no samples, whose names are BASE.ENDING")
        types = {KEY: "str"}
        for name, count in counts.items():
            types[name] = _TYPES.get(name.rpartition(".")[2], "bytes") + ("?" if count < n_records else "")
        files = [LayoutFile(info, index) for info, index in zip(shards, indexes, strict=True)]
        return cls(Schema.of(types), files)

    def ranges(self, file: LayoutFile, blocks: Sequence[int], _columns: Sequence[str]) -> list[ByteRange]:
        bounds = file.index.parts["bounds"]
        return merged([ByteRange(int(bounds[block, 0]), int(bounds[block, 1])) for block in blocks])

    def read(self, file: LayoutFile, data: FileBytes, block: int, columns: Sequence[str]) -> Mapping[str, Any]:
        start, end = file.index.parts["bounds"][block].tolist()
        stored = data.read_one(start, end)
        members = _plain_members(stored) if file.index.parts["is_plain"][block] else _members(io.BytesIO(stored))
        n_records = int(file.index.n_records[block])
        keys: list[str] = []
        spans = {name: np.full((n_records, 2), -1, np.int64) for name in columns if name != KEY}
        for key, ending, member in _samples(members):
            if key is not None:
                keys.append(key)
            if ending in spans:
                spans[ending][len(keys) - 1] = member.start, member.end
        if len(keys) != n_records:
            raise data.damaged(f"has {len(keys)} samples, and its index says {n_records}", block)
        memory, found = np.frombuffer(stored, np.uint8), dict[str, Any]()
        for name in columns:
            column = self.schema.columns[self.schema.index(name)]
            found[name] = pa.array(keys, pa.large_string()) if name == KEY else _values(column, memory, spans[name])
        return found


def _values(column: Column, memory: Bytes, spans: Numbers) -> Any:
    """Return the contents of files, [start, end) of each, as the values of a column; -1: a sample has no such file."""
    valid = spans[:, 0] >= 0
    starts, ends = np.where(valid, spans[:, 0], 0), np.where(valid, spans[:, 1], 0)
    missing = None if valid.all() else valid
    if column.kind in (Kind.STR, Kind.SCALAR):
        text = text_array(memory, starts, ends, missing)
        return text if column.kind is Kind.STR else pc.utf8_trim_whitespace(text).cast(pa.int64())
    values, offsets = take_spans(memory, starts, ends)
    return ColumnData(len(starts), values, offsets, valid=missing)


def _samples(members: Iterator[_Member]) -> Iterator[tuple[str | None, str, _Member]]:
    """Yield (key, ending, member) of the files of samples; the key is None for all but the first one of a sample.

    Raises ValueError for a sample with two files of one ending.
    """
    last, endings = None, set[str]()
    for member in members:
        match = _NAME.fullmatch(member.name)
        segment = member.name.rpartition("/")[2]
        if match is None or (segment.startswith("__") and segment.endswith("__")):
            continue
        key, ending = match[1], match[2].lower()
        is_first = key != last
        if is_first:
            last, endings = key, set()
        if ending in endings:
            raise ValueError(f"the sample {key!r} has two files {ending!r}")
        endings.add(ending)
        yield key if is_first else None, ending, member


def _index(_info: ObjectInfo, data: FileBytes) -> FileIndex:
    """Return the samples of a tar in blocks, by its headers. Raises SchemaError and CorruptShard."""
    starts: list[int] = []
    ends: list[int] = []
    plain: list[bool] = []
    counts: dict[str, int] = {}
    try:
        for key, ending, member in _samples(_members(data.open())):
            if key is not None:
                starts.append(member.header)
                ends.append(0)
                plain.append(True)
            if member.end > data.n_bytes:
                raise data.damaged(f"{member.name} ends at byte {member.end}, behind the end of the file")
            ends[-1] = min(-(-member.end // _UNIT) * _UNIT, data.n_bytes)
            plain[-1] &= member.is_plain
            counts[ending] = counts.get(ending, 0) + 1
    except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
        if isinstance(error, SchemaError):
            raise
        raise data.damaged(f"not a readable tar: {error}") from error
    # What lies between two samples, such as a folder's header, is read with the first one.
    is_pure = np.array(plain, bool)
    first = cut_blocks(np.array(ends, np.int64) - np.array(starts, np.int64), len(starts))
    bounds = np.column_stack([np.array(starts, np.int64)[first[:-1]], np.array(ends, np.int64)[first[1:] - 1]])
    all_plain = np.minimum.reduceat(is_pure, first[:-1]) if len(starts) else is_pure
    parts = {
        "bounds": bounds.reshape(-1, 2),
        "is_plain": all_plain,
        "names": np.array(list(counts), np.str_),
        "counts": np.array(list(counts.values()), np.int64),
    }
    return FileIndex(np.diff(first), bounds[:, 1] - bounds[:, 0], parts)


def _members(file: Any) -> Iterator[_Member]:
    """Yield the files of a tar, or of a part of one that begins with a header. Raises tarfile.TarError, SchemaError."""
    with tarfile.open(fileobj=file, mode="r:", errorlevel=2) as tar:
        end = 0
        for member in tar:
            if member.issparse():
                raise SchemaError(f"{member.name}: sparse files of tars are not supported; write the tar again")
            if member.isreg():
                has_one = member.offset_data - member.offset == _UNIT and member.type in (
                    tarfile.REGTYPE,
                    tarfile.AREGTYPE,
                )
                is_plain = has_one and member.offset == end and not tar.pax_headers
                yield _Member(
                    member.name, member.offset, member.offset_data, member.offset_data + member.size, is_plain
                )
                end = member.offset_data + -(-member.size // _UNIT) * _UNIT
            tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
        # tarfile takes a damaged header for the end.
        file.seek(tar.offset)
        if file.read(_UNIT).strip(b"\0"):
            raise ValueError(f"the header at byte {tar.offset} is damaged")


def _plain_members(stored: memoryview) -> Iterator[_Member]:
    """Yield the files of a part of a tar that has only plain members: a twentieth of the time of tarfile."""
    at, n_bytes = 0, len(stored)
    while at + _UNIT <= n_bytes:
        header = bytes(stored[at : at + _UNIT])
        if header[156:157] not in _PLAIN:
            raise ValueError(f"the header at byte {at} of the block is not that of a file")
        name, prefix = header[:100].partition(b"\0")[0], b""
        if header[257:263] == b"ustar\0":
            prefix = header[345:500].partition(b"\0")[0]
        size = int(header[124:136].strip(b" \0") or b"0", 8)
        start = at + _UNIT
        if start + size > n_bytes:
            raise ValueError(f"the file {name!r} extends beyond its block")
        full = prefix + b"/" + name if prefix else name
        yield _Member(full.decode("utf-8", "surrogateescape"), at, start, start + size, True)
        at = start + -(-size // _UNIT) * _UNIT
