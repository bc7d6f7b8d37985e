"""What a layout of another library is: the files of a data set, the blocks of each file, and how to read a block.

A new layout is one module with a subclass of `Layout`, and an entry in `layouts/find.py`. The suite in
tests/flow/layouts/test_conformance.py then checks it.
"""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.errors import CorruptShard, SchemaError
from tiercache.model import ByteRange, ObjectInfo
from tiercache.shard.schema import Schema
from tiercache.shard.source import merge_ranges

Numbers: TypeAlias = NDArray[np.int64]


class FileBytes(ABC):
    """The bytes of one file: from a local copy, or by ranged reads of a store. Safe from any thread.

    url names the file in messages.
    """

    def __init__(self, url: str, n_bytes: int) -> None:
        self.url, self.n_bytes = url, n_bytes
        self._kept: dict[str, Any] = {}

    @abstractmethod
    def read(self, ranges: Sequence[ByteRange]) -> list[memoryview]:
        """Return the bytes of each range, in memory of its own. The ranges of one call are read at once.

        Raises CorruptShard for a range that the file does not have, and StoreError.
        """

    def read_one(self, start: int, end: int) -> memoryview:
        """Return the bytes [start, end). Raises as read()."""
        return self.read([ByteRange(start, end)])[0]

    @abstractmethod
    def beside(self, info: ObjectInfo) -> FileBytes:
        """Return the bytes of another file of the data set, the same object at each call."""

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what make() returned for this name at its first call: a head or a table that all blocks need.

        Two threads may both call make(); one result is kept.
        """
        if name not in self._kept:
            self._kept.setdefault(name, make())
        return self._kept[name]

    def open(self, ranges: Sequence[ByteRange] = ()) -> io.BufferedIOBase:
        """Return a seekable file for a library that wants one. These ranges are read now, at once; others on demand."""
        return io.BufferedReader(_OpenFile(self, ranges), 1 << 16)

    def open_for_arrow(self, ranges: Sequence[ByteRange] = ()) -> pa.PythonFile:
        """Return the same for Arrow, which uses the bytes of these ranges without a copy."""
        return pa.PythonFile(_OpenFile(self, ranges), mode="r")

    def damaged(self, message: str, block: int | None = None) -> CorruptShard:
        """Return the error of a file whose bytes are not what its layout promises."""
        return CorruptShard(message, url=self.url, block=block, part="" if block is not None else "file")


class _OpenFile(io.RawIOBase):
    def __init__(self, file: FileBytes, ranges: Sequence[ByteRange]) -> None:
        super().__init__()
        self._file, self._position = file, 0
        self._ready = list(zip(ranges, file.read(ranges), strict=True)) if ranges else []

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.n_bytes}[whence]
        return self._position

    def read(self, size: int = -1) -> Any:
        """Return the next bytes, without a copy if one of the ranges has them all. Arrow calls this."""
        start = self._position
        end = self._file.n_bytes if size < 0 else min(start + size, self._file.n_bytes)
        if start >= end:
            return b""
        self._position = end
        for ready, data in self._ready:
            if ready.start <= start and end <= ready.end:
                return data[start - ready.start : end - ready.start]
        return self._file.read_one(start, end)

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(view.nbytes)
        view[: len(data)] = data
        return len(data)


@dataclass(frozen=True, eq=False)
class FileIndex:
    """The blocks of a file: runs of records that are read together.

    A block should have about 1 MiB (TARGET_BLOCK_BYTES), unless the layout has larger units that can only be read
    whole. Blocks are the units of shuffling, of threads and of memory.

    Attributes:
        n_records: int64[n_blocks], records of each block, 1 or more.
        raw_bytes: int64[n_blocks], about the bytes of each block in memory; the limits of memory rely on them.
        parts: Arrays by name that the layout itself needs to find the blocks. They are pickled with the data set, and
            kept in the folder of indexes, so they should be small: per block, not per record.
    """

    n_records: Numbers
    raw_bytes: Numbers
    parts: Mapping[str, NDArray[Any]] = field(default_factory=dict)


TARGET_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class LayoutFile:
    """A file of records with its blocks. info.key is relative to the data set's URL."""

    info: ObjectInfo
    index: FileIndex

    @cached_property
    def total_records(self) -> int:
        return int(self.index.n_records.sum())


class Folder(Protocol):
    """The files below a URL, as a layout finds them. For one thread."""

    @property
    def url(self) -> str: ...

    @property
    def objects(self) -> Sequence[ObjectInfo]:
        """All files, in the order of the segments of their keys, without hidden ones."""

    def open(self, info: ObjectInfo) -> FileBytes:
        """Return the bytes of a file, which are read through the cache."""

    def index(
        self, layout: str, objects: Sequence[ObjectInfo], make: Callable[[ObjectInfo, FileBytes], FileIndex]
    ) -> list[FileIndex]:
        """Return make(info, file) for each of these files, called in threads.

        The results are kept beside the cache under the name of the layout, and found there as long as the files do not
        change.
        """


class Layout(ABC):
    """A data set in the layout of another library. Immutable and picklable; safe from any thread.

    Attributes:
        name: Name of the layout for people.
        schema: Columns of the records.
        files: Files with records, in the order in which the library reads them. Files that are only read beside others
            are there too, without blocks: warm() fetches them.
    """

    name: ClassVar[str]

    def __init__(self, schema: Schema, files: Sequence[LayoutFile]) -> None:
        self.schema, self.files = schema, tuple(files)

    @classmethod
    def keys_of(cls, name: str) -> Sequence[str]:  # noqa: ARG003 - for layouts of several files with one name
        """Return the keys of the files that the last segment of a URL may mean, besides the file of this name."""
        return ()

    @classmethod
    @abstractmethod
    def find(cls, folder: Folder) -> Layout | None:
        """Return the data set that these files are; None if they are none of this layout, by a signature.

        A signature is the content or the name of an index file, or the first bytes of files, never a guess.
        Raises SchemaError for a data set of this layout that cannot be read, with the reason and what to do.
        """

    @abstractmethod
    def ranges(self, file: LayoutFile, blocks: Sequence[int], columns: Sequence[str]) -> list[ByteRange]:
        """Return the ranges of a file that read() reads for these blocks and columns, in order, not overlapping."""

    @abstractmethod
    def read(self, file: LayoutFile, data: FileBytes, block: int, columns: Sequence[str]) -> Mapping[str, Any]:
        """Return the records of a block by column, each as `tiercache.Writer.write_batch` takes it.

        Arrow arrays and NumPy arrays in the types of the schema are used without a copy, so their memory must not
        change later. Ragged columns may be given as an Arrow list array, or as `tiercache.shard.shard_file.ColumnData`.
        Raises CorruptShard (data.damaged()) for bytes that are not of this layout.
        """

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the schema, and of the names, sizes and blocks of all files: 32 hex digits."""
        found = hashlib.sha256(self.schema.to_bytes())
        for file in self.files:
            found.update(f"{file.info.key} {file.info.n_bytes} ".encode())
            found.update(np.ascontiguousarray(file.index.n_records, "<i8").tobytes())
        return found.hexdigest()[:32]


def cut_blocks(record_bytes: Numbers | int, n_records: int, target_bytes: int = TARGET_BLOCK_BYTES) -> Numbers:
    """Return the bounds of blocks of about target_bytes: int64[n_blocks + 1], from 0 to n_records.

    record_bytes: Bytes of each record, int64[n_records], or one number for all. A larger record is a block of its own.
    """
    ends = np.cumsum(np.broadcast_to(np.asarray(record_bytes, np.int64), n_records))
    bounds = [0]
    while bounds[-1] < n_records:
        before = int(ends[bounds[-1] - 1]) if bounds[-1] else 0
        end = int(np.searchsorted(ends, before + target_bytes, side="right"))
        bounds.append(min(max(end, bounds[-1] + 1), n_records))
    return np.array(bounds, np.int64)


def check_unique(location: str, names: Sequence[str]) -> None:
    """Raise SchemaError for a file of tables with two columns of one name."""
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SchemaError(f"{location}: the file has two columns with this name", column=twice)


# Ranges with a smaller gap are read as one: the bytes between cost less than another request.
_GAP_BYTES = 16 << 10


def merged(ranges: Sequence[ByteRange]) -> list[ByteRange]:
    """Return ranges in order, those merged that overlap or have a small gap between them."""
    starts = np.array([one.start for one in ranges], np.int64)
    ends = np.array([one.end for one in ranges], np.int64)
    return merge_ranges(starts, ends, _GAP_BYTES)
