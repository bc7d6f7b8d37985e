"""Megatron-LM, NeMo and GPT-NeoX: tokens in NAME.bin, and the borders of sequences and documents in NAME.idx.

NAME.idx has a head of 34 bytes; then for each sequence its number of tokens (int32) and its first byte in NAME.bin
(int64), for each document its first sequence (int64, with one more for the end), and in multimodal data sets a mode for
each sequence (int8).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tiercache.errors import SchemaError
from tiercache.layouts.contract import FileBytes, FileIndex, Folder, Layout, LayoutFile, Numbers, cut_blocks
from tiercache.model import ByteRange, ObjectInfo
from tiercache.shard.schema import STORED, Ragged, Schema
from tiercache.shard.shard_file import ColumnData

_MAGIC, _OLD_MAGIC = b"MMIDIDX\0\0", b"TNTIDX\0\0"
_HEAD = struct.Struct("<9sQBQQ")
# 6 and 7 are float64 and float32 for Megatron-LM, and the other way round in older data sets.
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
# Documents of which the index is made at once: memory for a few of these times 8 bytes.
_PIECE = 1 << 20
_LENGTH, _POINTER = np.dtype("<i4"), np.dtype("<i8")
# Bytes in memory of a record besides its tokens, so that a block of short documents is not too long.
_RECORD_BYTES = 12


@dataclass(frozen=True)
class _Index:
    """The head of an index file. is_multimodal: each sequence is a record, and has a mode."""

    data: FileBytes
    dtype: str
    n_sequences: int
    n_documents: int
    is_multimodal: bool

    @property
    def n_records(self) -> int:
        return self.n_sequences if self.is_multimodal else self.n_documents

    def read(self, sequences: tuple[int, int]) -> tuple[Numbers, Numbers]:
        """Return the tokens and the first bytes of the sequences [start, end)."""
        start, end = sequences
        pointers = _HEAD.size + 4 * self.n_sequences
        ranges = [
            ByteRange(_HEAD.size + 4 * start, _HEAD.size + 4 * end),
            ByteRange(pointers + 8 * start, pointers + 8 * end),
        ]
        lengths, firsts = self.data.read(ranges)
        return np.frombuffer(lengths, _LENGTH).astype(np.int64), np.frombuffer(firsts, _POINTER)

    def read_records(self, records: tuple[int, int]) -> Numbers:
        """Return the first sequences of the records [start, end), and the end of the last one."""
        start, end = records
        if self.is_multimodal:
            return np.arange(start, end + 1)
        at = _HEAD.size + 12 * self.n_sequences
        return np.frombuffer(self.data.read_one(at + 8 * start, at + 8 * (end + 1)), _POINTER)

    def read_modes(self, sequences: tuple[int, int]) -> memoryview:
        at = self.data.n_bytes - self.n_sequences
        return self.data.read_one(at + sequences[0], at + sequences[1])


class MegatronLayout(Layout):
    name = "Megatron"
    suffixes: ClassVar = (".idx",)

    def __init__(self, schema: Schema, files: Sequence[LayoutFile], indexes: Mapping[str, ObjectInfo]) -> None:
        super().__init__(schema, files)
        self._indexes = dict(indexes)  # by the keys of the .bin files

    @classmethod
    def keys_of(cls, name: str) -> Sequence[str]:
        """Return both files of a pair, which Megatron's users name without an ending."""
        stem = name.removesuffix(".bin").removesuffix(".idx")
        return f"{stem}.bin", f"{stem}.idx"

    @classmethod
    def find(cls, folder: Folder) -> MegatronLayout | None:
        """Return the pairs of .bin and .idx files. A record is a document, or a sequence of a multimodal data set."""
        named = {info.key: info for info in folder.objects}
        bins = {f"{info.key[:-4]}.bin": info for info in folder.objects if info.key.endswith(".idx")}
        pairs = {key: info for key, info in bins.items() if key in named}
        if not pairs or not _has_magic(folder.open(next(iter(pairs.values())))):
            return None
        infos = [named[key] for key in pairs]
        made = folder.index("megatron", list(pairs.values()), lambda _, data: _make(data))
        first, dtype = infos[0].key, str(made[0].parts["dtype"][0])
        is_multimodal = bool(made[0].parts["is_multimodal"][0])
        for info, index in zip(infos, made, strict=True):
            url, n_bytes = folder.open(info).url, int(index.parts["starts"][-1])
            if info.n_bytes != n_bytes:
                message = f"has {info.n_bytes} bytes, but the .idx file beside it names tokens in {n_bytes} bytes"
                raise folder.open(info).damaged(message)
            if str(index.parts["dtype"][0]) != dtype or bool(index.parts["is_multimodal"][0]) != is_multimodal:
                raise SchemaError(
                    f"{url}: its tokens are {index.parts['dtype'][0]}, with{'out' * is_multimodal} modes, unlike those "
                    f"of {first!r}; open the files of one kind"
                )
        types: dict[str, Any] = {"tokens": Ragged(dtype, (None,))} | ({"mode": "int8"} if is_multimodal else {})
        files = [LayoutFile(info, index) for info, index in zip(infos, made, strict=True)]
        files += [LayoutFile(info, FileIndex(np.zeros(0, np.int64), np.zeros(0, np.int64))) for info in pairs.values()]
        return cls(Schema.of(types), files, pairs)

    def ranges(self, file: LayoutFile, blocks: Sequence[int], columns: Sequence[str]) -> list[ByteRange]:
        if not len(file.index.n_records):  # an index, which is read beside the tokens
            return [ByteRange(0, file.info.n_bytes)]
        starts = file.index.parts["starts"]
        return [ByteRange(int(starts[b]), int(starts[b + 1])) for b in blocks] if "tokens" in columns else []

    def read(self, file: LayoutFile, data: FileBytes, block: int, columns: Sequence[str]) -> Mapping[str, Any]:
        index: _Index = data.once("index", lambda: _open(data.beside(self._indexes[file.info.key])))
        parts, found = file.index.parts, dict[str, Any]()
        sequences = int(parts["sequences"][block]), int(parts["sequences"][block + 1])
        if "mode" in columns:
            found["mode"] = np.frombuffer(index.read_modes(sequences), np.int8)
        if "tokens" in columns:
            lengths, _ = index.read(sequences)
            first = int(parts["records"][block])
            bounds = index.read_records((first, first + int(file.index.n_records[block])))
            offsets = _ends(index, lengths)[_checked(index, bounds, sequences) - sequences[0]]
            start, end = int(parts["starts"][block]), int(parts["starts"][block + 1])
            values = np.frombuffer(data.read_one(start, end), STORED[index.dtype])
            if offsets[-1] != len(values):
                raise index.data.damaged(f"names {offsets[-1]} tokens in bytes {start} to {end} of {data.url}")
            shapes = np.diff(offsets).astype("<i4").reshape(-1, 1)
            found["tokens"] = ColumnData(len(shapes), values, offsets, shapes)
        return found


def _has_magic(data: FileBytes) -> bool:
    return bytes(data.read_one(0, min(data.n_bytes, len(_OLD_MAGIC)))) in (_MAGIC[: len(_OLD_MAGIC)], _OLD_MAGIC)


def _open(data: FileBytes) -> _Index:
    """Return the head of an index file. Raises SchemaError for another version, and CorruptShard."""
    head = bytes(data.read_one(0, min(data.n_bytes, _HEAD.size)))
    if head.startswith(_OLD_MAGIC):
        raise SchemaError(
            f"{data.url}: an index of fairseq's older format (TNTIDX); tokenize again with --dataset-impl mmap"
        )
    if len(head) < _HEAD.size or not head.startswith(_MAGIC):
        raise data.damaged("expected an index of Megatron (MMIDIDX), as the other .idx files here are")
    _, version, code, n_sequences, n_bounds = _HEAD.unpack(head)
    if version != 1:
        raise SchemaError(f"{data.url}: version {version} of Megatron's index; version 1 is supported")
    if code not in _DTYPES:
        supported = ", ".join(_DTYPES.values())
        raise SchemaError(f"{data.url}: tokens of the unsupported type {code}; the supported types are {supported}")
    whole = _HEAD.size + 12 * n_sequences + 8 * n_bounds
    if data.n_bytes not in (whole, whole + n_sequences):
        raise data.damaged(
            f"has {data.n_bytes} bytes; {n_sequences} sequences and {n_bounds} document borders take {whole}"
        )
    if n_bounds == 0:
        raise data.damaged("names no document, not even the border at 0")
    return _Index(data, _DTYPES[code], n_sequences, n_bounds - 1, is_multimodal=data.n_bytes > whole)


def _make(data: FileBytes) -> FileIndex:
    """Return the blocks of a .bin file, from its index file, which is read in pieces: it may be larger than memory."""
    index = _open(data)
    width = STORED[index.dtype].itemsize
    n_records, sizes, sequences, starts = [], list[Numbers](), [np.zeros(1, np.int64)], [np.zeros(1, np.int64)]
    sequence = byte = 0
    for first in range(0, index.n_records, _PIECE):
        last = min(first + _PIECE, index.n_records)
        bounds = index.read_records((first, last))
        bounds = _checked(index, bounds, (sequence, int(bounds[-1])))
        lengths, pointers = index.read((sequence, int(bounds[-1])))
        ends = _ends(index, lengths) * width
        if not np.array_equal(pointers, byte + ends[:-1]):
            wrong = sequence + int(np.argmax(pointers != byte + ends[:-1]))
            raise data.damaged(f"sequence {wrong} does not begin where the one before it ends")
        record_ends = ends[bounds - sequence]
        cuts = cut_blocks(np.diff(record_ends) + _RECORD_BYTES, last - first)
        n_records.append(np.diff(cuts))
        sizes.append(np.diff(record_ends[cuts]) + _RECORD_BYTES * np.diff(cuts))
        sequences.append(bounds[cuts[1:]])
        starts.append(byte + record_ends[cuts[1:]])
        sequence, byte = int(bounds[-1]), byte + int(ends[-1])
    if sequence != index.n_sequences:
        raise data.damaged(f"its documents end at sequence {sequence} of {index.n_sequences}")
    empty = np.zeros(0, np.int64)
    counts = np.concatenate([empty, *n_records])
    parts = {
        "dtype": np.array([index.dtype]),
        "is_multimodal": np.array([index.is_multimodal]),
        "records": np.append(0, np.cumsum(counts))[:-1],
        "sequences": np.concatenate(sequences),
        "starts": np.concatenate(starts),
    }
    return FileIndex(counts, np.concatenate([empty, *sizes]), parts)


def _ends(index: _Index, lengths: Numbers) -> Numbers:
    """Return the first tokens of sequences, and the end of the last one. Raises CorruptShard."""
    if len(lengths) and int(lengths.min()) < 0:
        raise index.data.damaged(f"a sequence has {int(lengths.min())} tokens")
    return np.append(0, np.cumsum(lengths))


def _checked(index: _Index, bounds: Numbers, sequences: tuple[int, int]) -> Numbers:
    """Return the borders of documents, which divide these sequences. Raises CorruptShard."""
    is_ordered = bool((np.diff(bounds) >= 0).all())
    if not is_ordered or bounds[0] != sequences[0] or bounds[-1] != sequences[1] or sequences[1] > index.n_sequences:
        got = f"{int(bounds.min())} to {int(bounds.max())} of {index.n_sequences} sequences"
        raise index.data.damaged(f"the borders of documents are out of order or beyond the sequences: {got}")
    return bounds
