"""Arrow IPC streams and files, as Hugging Face `datasets` and Feather write them: rows of a batch are a block."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.errors import SchemaError
from tiercache.layouts.arrow_messages import BATCH, DICTIONARY, SCHEMA, Message, read_messages
from tiercache.layouts.arrow_rows import RowRanges, children_of, count_buffers, cut_children
from tiercache.layouts.contract import (
    TARGET_BLOCK_BYTES,
    FileBytes,
    FileIndex,
    Folder,
    LayoutFile,
    Numbers,
    check_unique,
    merged,
)
from tiercache.layouts.hive import PartitionedLayout
from tiercache.layouts.hugging_face import array_of, check_classes, features_of, hf_features_schema, is_file
from tiercache.model import ByteRange, ObjectInfo
from tiercache.shard.schema import Column, Kind, Schema, with_nulls

_OLD_MAGIC = b"FEA1"


class ArrowLayout(PartitionedLayout):
    name = "Arrow"
    suffixes: ClassVar = (".arrow", ".feather", ".ipc")

    @classmethod
    def find(cls, folder: Folder) -> ArrowLayout | None:
        """Return the Arrow files of a folder; of a data set that `datasets` has saved, those that state.json names.

        A column is nullable if a record batch says that it has nulls. Lists with nulls inside are Arrow lists.
        """
        objects = [info for info in folder.objects if info.key.lower().endswith(cls.suffixes)]
        if not objects:
            return None
        objects = _saved(folder, objects)
        made = folder.index("arrow", objects, _index)
        schemas = [pa.ipc.read_schema(pa.py_buffer(index.parts["schema"])) for index in made]
        locate = f"{folder.url.rstrip('/')}/{{}}".format
        for info, schema in zip(objects, schemas, strict=True):
            _check_same(locate(info.key), schema, locate(objects[0].key), schemas[0])
        has_nulls, null_elements = np.any([index.parts["with_nulls"] for index in made], axis=0)
        found = [name for name, flag in zip(schemas[0].names, has_nulls, strict=True) if flag]
        columns = list(hf_features_schema(features_of(schemas[0]), with_nulls(schemas[0], found)).columns)
        for i in np.flatnonzero(null_elements).tolist():
            if columns[i].kind is Kind.RAGGED and len(columns[i].shape) == 1:
                columns[i] = Column.of(columns[i].name, f"list<{columns[i].dtype}?>{'?' * columns[i].nullable}")
        files = [LayoutFile(info, index) for info, index in zip(objects, made, strict=True)]
        return cls(Schema(columns), files, folder)

    def stored_ranges(self, file: LayoutFile, blocks: Sequence[int], columns: Sequence[str]) -> list[ByteRange]:
        parts = file.index.parts
        if not len(parts["buffers"]):
            batches = dict.fromkeys(parts["batches"][list(blocks)].tolist())
            return merged([ByteRange(*parts["messages"][batch].tolist()) for batch in batches])
        schema = _schema_of(file)
        return merged([one for block in blocks for one in _rows(file, schema, block, columns)[0].ranges])

    def read_stored(self, file: LayoutFile, data: FileBytes, block: int, columns: Sequence[str]) -> Mapping[str, Any]:
        schema = data.once("schema", lambda: _schema_of(file))
        arrays = self._read_rows if len(file.index.parts["buffers"]) else _read_batch
        found = arrays(file, data, schema, block, columns)
        for array in found.values():
            array.validate(full=True)
        location = f"{data.url}, block {block}"
        return {name: array_of(self.schema.columns[self.schema.index(name)], found[name], location) for name in columns}

    def _read_rows(
        self, file: LayoutFile, data: FileBytes, schema: pa.Schema, block: int, columns: Sequence[str]
    ) -> dict[str, pa.Array]:
        rows, builds = _rows(file, schema, block, columns)
        spans = merged(rows.ranges)
        starts = np.array([one.start for one in spans], np.int64)
        pieces = data.read(spans)

        def find(one: ByteRange) -> memoryview:
            number = int(np.searchsorted(starts, one.start, side="right")) - 1
            return pieces[number][one.start - spans[number].start : one.end - spans[number].start]

        return {name: _typed(schema.field(name).type, build(find)) for name, build in builds.items()}


def _typed(arrow_type: pa.DataType, array: pa.Array) -> pa.Array:
    is_extension = isinstance(arrow_type, pa.BaseExtensionType)
    return pa.ExtensionArray.from_storage(arrow_type, array) if is_extension else array


def _schema_of(file: LayoutFile) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(file.index.parts["schema"]))


def _rows(file: LayoutFile, schema: pa.Schema, block: int, columns: Sequence[str]) -> tuple[RowRanges, dict[str, Any]]:
    parts = file.index.parts
    buffers = (ByteRange(start, end) for start, end in parts["buffers"][parts["batches"][block]].tolist())
    rows = RowRanges(buffers, iter(parts["cuts"][block].tolist()))
    builds = {}
    for field in schema:
        if field.name in columns:
            builds[field.name] = rows.rows_of(field.type, int(parts["first"][block]), int(file.index.n_records[block]))
        else:
            rows.skip(field.type)
    return rows, builds


def _read_batch(
    file: LayoutFile, data: FileBytes, schema: pa.Schema, block: int, columns: Sequence[str]
) -> dict[str, pa.Array]:
    """Return columns of a whole record batch, for which Arrow's own reader also needs the dictionaries before it."""
    parts = file.index.parts
    start, end = parts["messages"][parts["batches"][block]].tolist()
    dictionaries = parts["dictionaries"][parts["dictionaries"][:, 0] < start]
    if len(dictionaries):
        pieces = data.read([*(ByteRange(*one) for one in dictionaries.tolist()), ByteRange(start, end)])
        stream = pa.py_buffer(b"".join([bytes(parts["schema"]), *pieces]))
        batch = pa.ipc.open_stream(stream).read_next_batch()
    else:
        batch = pa.ipc.read_record_batch(pa.py_buffer(data.read_one(start, end)), schema)
    return {name: batch.column(name) for name in columns}


def _index(_info: ObjectInfo, data: FileBytes) -> FileIndex:
    """Return the blocks of a file. Raises SchemaError for a file that is not one of Arrow, and CorruptShard."""
    if bytes(data.read_one(0, min(data.n_bytes, 4))) == _OLD_MAGIC:
        raise SchemaError(f"{data.url}: a file of Feather V1; write it again with pyarrow.feather.write_feather()")
    found = list(read_messages(data))
    if not found or found[0].kind != SCHEMA:
        raise SchemaError(f"{data.url}: not an Arrow file: it does not begin with ARROW1 or with a schema")
    head = data.read_one(found[0].start, found[0].end)
    try:
        schema = pa.ipc.read_schema(pa.py_buffer(head))
        names = schema.names  # a forged name may be no UTF-8
    except (pa.ArrowException, OSError, ValueError) as error:
        raise data.damaged(f"its schema cannot be read: {error}") from error
    check_unique(data.url, names)
    others = [message.kind for message in found[1:] if message.kind not in (DICTIONARY, BATCH)]
    if others:
        raise SchemaError(f"{data.url}: it has a message of the kind {others[0]}; tensors are not supported")
    batches = [message for message in found if message.kind == BATCH and message.n_records]
    first_nodes = np.cumsum([0, *(_count_nodes(field.type) for field in schema)])
    for number, batch in enumerate(batches):
        if len(batch.nodes) != first_nodes[-1] or (batch.nodes[first_nodes[:-1], 0] != batch.n_records).any():
            raise data.damaged("its columns are not those of the schema", number)
    n_buffers = [count_buffers(field.type) for field in schema]
    can_cut = 0 not in n_buffers and not any(batch.is_compressed for batch in batches)
    can_cut = can_cut and all(
        len(batch.buffers) == sum(n_buffers) and not (batch.buffers[:, 0] % 8).any() for batch in batches
    )
    cuts = [_cut(data, schema, batch) for batch in batches] if can_cut else []
    rows = [cut[0] for cut in cuts] or [np.array([0, batch.n_records]) for batch in batches]
    n_records = np.concatenate([np.zeros(0, np.int64), *map(np.diff, rows)])
    raw_bytes = [
        _raw_bytes(data, batch) * np.diff(bounds) // batch.n_records
        for batch, bounds in zip(batches, rows, strict=True)
    ]
    parts = {
        "schema": np.frombuffer(head, np.uint8),
        "with_nulls": _with_nulls(schema, batches, first_nodes),
        "messages": np.array([(batch.start, batch.end) for batch in batches], np.int64).reshape(-1, 2),
        "dictionaries": np.array([(one.start, one.end) for one in found if one.kind == DICTIONARY], np.int64).reshape(
            -1, 2
        ),
        "batches": np.repeat(np.arange(len(batches)), [len(bounds) - 1 for bounds in rows]),
        "first": np.concatenate([np.zeros(0, np.int64), *(bounds[:-1] for bounds in rows)]),
        "buffers": np.array([batch.buffers for batch in batches] if can_cut else [], np.int64),
        "cuts": np.concatenate([np.zeros((0, *cuts[0][1].shape[1:]), np.int64), *(cut[1] for cut in cuts)])
        if cuts
        else np.zeros(0),
    }
    return FileIndex(n_records, np.maximum(np.concatenate([np.zeros(0, np.int64), *raw_bytes]), n_records), parts)


def _count_nodes(arrow_type: pa.DataType) -> int:
    return 1 + sum(map(_count_nodes, children_of(arrow_type)))


def _with_nulls(schema: pa.Schema, batches: Sequence[Message], first_nodes: Numbers) -> NDArray[np.bool_]:
    """Return which columns have nulls, and which have nulls in their first child: bool[2, n_columns].

    The nulls of images are those of the first child, their bytes.
    """
    features, found = features_of(schema), np.zeros((2, len(schema)), bool)
    for i, (field, node) in enumerate(zip(schema, first_nodes.tolist(), strict=False)):
        found[0, i] = any(batch.nodes[node, 1] for batch in batches)
        if children_of(field.type):
            found[1, i] = any(batch.nodes[node + 1, 1] for batch in batches)
            found[0, i] |= found[1, i] and is_file(features.get(field.name))
    return found


def _raw_bytes(data: FileBytes, batch: Message) -> int:
    """Return the bytes of a record batch in memory. A compressed buffer begins with its length."""
    if not batch.is_compressed:
        return batch.end - batch.start
    heads = [ByteRange(start, start + 8) for start, end in batch.buffers.tolist() if end - start >= 8]
    lengths = [struct.unpack("<q", head)[0] for head in data.read(heads)]
    return sum(length if length >= 0 else 0 for length in lengths)


def _cut(data: FileBytes, schema: pa.Schema, batch: Message) -> tuple[Numbers, Numbers]:
    """Return the bounds of the blocks of a record batch, and the offsets there, [n_blocks, n_nodes, 2]."""
    n_blocks = max(1, round((batch.end - batch.start) / TARGET_BLOCK_BYTES))
    step = -(-batch.n_records // n_blocks)
    step += -step % 8  # the bits of a block begin at a byte
    rows = np.append(np.arange(0, batch.n_records, step), batch.n_records)

    def offsets_at(buffer: ByteRange, width: int, at: Numbers) -> Numbers:
        first, last = int(at[0]), int(at[-1])
        if buffer.n_bytes < width * (last + 1):
            if not buffer.n_bytes and not last:  # no rows need no offsets
                return np.zeros_like(at)
            raise data.damaged(f"the record batch at byte {batch.start} has too few offsets")
        held = np.frombuffer(
            data.read_one(buffer.start + width * first, buffer.start + width * (last + 1)), f"<i{width}"
        )
        found = held[at - first].astype(np.int64)
        if found[0] < 0 or (np.diff(found) < 0).any():
            raise data.damaged(f"the offsets of the record batch at byte {batch.start} are out of order")
        return found

    buffers = (ByteRange(start, end) for start, end in batch.buffers.tolist())
    found = list(chain.from_iterable(cut_children(field.type, rows, buffers, offsets_at) for field in schema))
    cuts = np.array([np.stack([one[:-1], one[1:]], axis=1) for one in found], np.int64).reshape(-1, len(rows) - 1, 2)
    return rows, cuts.transpose(1, 0, 2)


def _saved(folder: Folder, objects: Sequence[ObjectInfo]) -> list[ObjectInfo]:
    """Return the Arrow files that belong to a data set. Raises SchemaError for a folder of several data sets."""
    named = {info.key: info for info in folder.objects}
    states = [key for key in named if key.rpartition("/")[2] == "state.json"]
    root = folder.url.rstrip("/")
    if states and "state.json" not in named:
        splits = [key.rpartition("/")[0] for key in states]
        raise SchemaError(
            f"{root}: a folder of the data sets {', '.join(splits)}, as DatasetDict.save_to_disk() writes; open one of "
            f"them, for example {root}/{'train' if 'train' in splits else splits[0]}"
        )
    if not states:
        return list(objects)
    info = named["state.json"]
    try:
        stated = json.loads(bytes(folder.open(info).read_one(0, info.n_bytes)))["_data_files"]
        keys = [str(one["filename"]) for one in stated]
    except (ValueError, KeyError, TypeError) as error:
        raise SchemaError(f"{root}/state.json: not the state of a data set that datasets has saved: {error}") from error
    missing = [key for key in keys if key not in named]
    if missing:
        raise SchemaError(f"{root}: {len(missing)} files that state.json names are missing, such as {missing[0]!r}")
    return [named[key] for key in keys]


def _check_same(location: str, schema: pa.Schema, first_location: str, first: pa.Schema) -> None:
    if schema.equals(first, check_metadata=True):
        return
    check_classes(location, features_of(schema), first_location, features_of(first))
    for field, expected in zip(schema, first, strict=False):
        if (field.name, field.type) != (expected.name, expected.type):
            message = f"{location}: expected {expected.name}: {expected.type} as in {first_location}, got {field.type}"
            raise SchemaError(message, column=field.name)
    if len(schema) != len(first):
        raise SchemaError(f"{location}: it has {len(schema)} columns, and {first_location} has {len(first)}")
