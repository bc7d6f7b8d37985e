"""A StorageReader of torch.distributed.checkpoint: each rank reads the ranges that it needs, and checks them."""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from tiercache._native.checksum import crc32c
from tiercache.checkpoint.checkpoints import Checkpoints
from tiercache.checkpoint.dcp_writer import BLOCK_BYTES, Shape, block_checksums, items_of, memory_of
from tiercache.checkpoint.inventory import CheckpointCopy, resolve
from tiercache.checkpoint.layout import STATE_NAME, Manifest, StoredFile, TensorEntry, key_of
from tiercache.checkpoint.state_tree import DTYPES, decode_state, flat_bytes, parse_state
from tiercache.checkpoint.stored import archived_error
from tiercache.checkpoint.writer import in_parallel
from tiercache.errors import CorruptCheckpoint, NotFound, StoreError
from tiercache.model import ByteRange
from tiercache.store import Store
from tiercache.store.placement import is_archived

if TYPE_CHECKING:
    import os

# Bytes that a thread reads before it copies them to their tensors.
_READ_BYTES = 128 << 20
_READS_AGAIN = 2


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint contains, in the terms of torch."""

    metadata: Metadata
    parts: Mapping[MetadataIndex, str]  # name in the manifest of each part of a tensor
    values: Mapping[str, Any]  # node of each other value in the state, by key


@dataclass(eq=False, slots=True)
class _Read:
    """A range of a part that is read into a tensor."""

    item: ReadItem
    target: torch.Tensor  # receives the values, on any device and with any strides
    entry: TensorEntry
    blocks: Sequence[int] | None  # checksums of the part's blocks; None: the file is checked whole
    wanted: ByteRange  # of the part, with the values
    block_range: ByteRange  # the same, extended to whole blocks
    buffer: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))

    @property
    def is_direct(self) -> bool:
        """Whether the values are those of the target, byte by byte, so that they are read into its memory."""
        is_same = str(self.target.dtype).removeprefix("torch.") == DTYPES[self.entry.dtype]
        is_whole = self.block_range == self.wanted == ByteRange(0, self.entry.n_bytes)
        return is_whole and is_same and self.target.device.type == "cpu" and self.target.is_contiguous()

    def span(self) -> tuple[ByteRange, memoryview]:
        """Take memory, and return what is to be read into it: a byte range of the file."""
        target = flat_bytes(self.target) if self.is_direct else None
        self.buffer = torch.empty(self.block_range.n_bytes, dtype=torch.uint8) if target is None else target
        start = self.entry.offset
        return ByteRange(start + self.block_range.start, start + self.block_range.end), memory_of(self.buffer)

    def problem(self) -> str:
        """Return which block of the buffer does not have its checksum; "" if all have it."""
        first, found = self.block_range.start // BLOCK_BYTES, block_checksums(memory_of(self.buffer))
        stated = list(self.blocks or ())[first : first + len(found)]
        if list(found) == stated:
            return ""
        number = next((n for n, pair in enumerate(zip(found, stated, strict=False)) if pair[0] != pair[1]), len(stated))
        return f"block {first + number} of {self.item.storage_index.fqn} does not match its CRC-32C"

    def take(self, data: torch.Tensor) -> None:
        """Copy the values into the target.

        data: uint8, from the first byte of `wanted` on.
        """
        if self.is_direct and data.data_ptr() == self.target.data_ptr():
            return
        dtype = getattr(torch, DTYPES[self.entry.dtype])
        values = data[: self.wanted.n_bytes].view(dtype)
        self.target.copy_(values.as_strided(tuple(self.item.lengths), _strides(self.entry.shape)))

    def finish(self) -> None:
        """Copy what was read into the target, and release the memory."""
        self.take(self.buffer[self.wanted.start - self.block_range.start :])
        self.buffer = self.buffer[:0]


class DistributedReader(StorageReader):
    """Reader of one checkpoint, for `dcp.load`. Every rank makes its own, with the same arguments.

    A rank reads the byte ranges that its parts need, and checks each block that it reads. It reads the local copy where
    there is one, else the store; a corrupt local file is skipped with a warning. The ranks may be more or fewer than
    those that saved, and may read what Checkpoints.save() wrote.

    Args:
        checkpoints: Checkpoints.
        which: "latest", "best:METRIC", a step or a name, as for Checkpoints.load().
    """

    def __init__(self, checkpoints: Checkpoints, which: str | int = "latest") -> None:
        super().__init__()
        self._checkpoints, self._which = checkpoints, which
        self.name = ""
        self._manifest = Manifest("", 0, 0.0, ())
        self._contents = Contents(Metadata({}), {}, {})
        self._blocks: Mapping[str, Sequence[int]] = {}
        self._copies: Sequence[CheckpointCopy] = ()
        self._stores: Sequence[Store] = ()  # of the own tiers, and of those to which the checkpoint was moved

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003 - torch's interface
        """Return False: torch must not make this reader from a checkpoint_id."""
        return False

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Prepare for another load: of the same checkpoints, or of the one that checkpoint_id names."""
        self.name = ""
        if checkpoint_id is not None:
            self._which = str(checkpoint_id)

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """Return the description of the checkpoint.

        Raises:
            NotFound: There is no such complete checkpoint.
            ArchivedShards: It is archived; the error names the command that restores it.
            CorruptCheckpoint: No copy of its state can be read.
        """
        scan = self._checkpoints.scan_to_load(self._which)
        self.name = resolve(scan, self._which)
        manifest = scan.manifest(self.name)
        if manifest is None:
            raise archived_error(next(copy for copy in scan.copies[self.name] if copy.is_archived))
        self._manifest = manifest
        self._copies = scan.copies[self.name]
        own = [*self._checkpoints.stores.tiers.values()]
        self._stores = [*own, *(copy.store for copy in self._copies if copy.store not in own)]
        file = self._file(STATE_NAME)
        data = bytearray(file.n_bytes)
        spans = [(ByteRange(0, file.n_bytes), memoryview(data))]
        self._fill(file, spans, lambda: _whole_problem(file, memoryview(data)))
        try:
            body, tree = json.loads(bytes(data)), parse_state(bytes(data))
            self._blocks = body.get("blocks", {}).get("crc32c", {})
            self._contents = contents_of(tree, self._manifest, is_flat=body.get("is_flat", False))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            url = f"{self._checkpoints.remote_store.url}/{self.name}"
            raise CorruptCheckpoint(f"its state cannot be read: {error!r}", url=url, part=STATE_NAME) from error
        self._contents.metadata.storage_meta = StorageMeta(checkpoint_id=self.name)
        return self._contents.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_args: Any, **_kwargs: Any) -> None:
        """Begin a load."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan with the name of the checkpoint that this rank found."""
        return replace(plan, storage_data=self.name)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans. Raises StoreError if a checkpoint was committed while the ranks looked for the newest."""
        names = sorted({str(plan.storage_data) for plan in plans})
        if len(names) > 1:
            raise StoreError(
                f"the ranks found different checkpoints ({', '.join(names)}), because one was committed meanwhile: "
                "load again, or name the checkpoint",
                url=self._checkpoints.remote_store.url,
                retryable=True,
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the values that this rank needs.

        Raises:
            CorruptCheckpoint: No copy of a file is right; the message names the tensor.
            StoreError: A store failed.
        """
        reads: dict[str, list[_Read]] = {}
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                self._load_value(item, planner)
            else:
                read = self._plan_read(item, planner)
                reads.setdefault(read.entry.file, []).append(read)
        calls = [partial(self._read, path, batch) for path, found in reads.items() for batch in _batches(found)]
        # A file that is checked whole is held whole, so that only two of them are read at a time.
        is_whole = any(read.blocks is None for found in reads.values() for read in found)
        for batch in in_parallel(calls, 2 if is_whole else self._checkpoints.n_streams):
            for read in batch:
                planner.commit_tensor(read.item, read.target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _plan_read(self, item: ReadItem, planner: LoadPlanner) -> _Read:
        name = self._contents.parts[item.storage_index]
        entry, target = self._manifest.tensors[name], planner.resolve_tensor(item).detach()
        if target.shape != item.lengths:
            raise ValueError(
                f"{item.dest_index.fqn}: the planner wants values of shape {tuple(item.lengths)}, and gave a tensor of "
                f"shape {tuple(target.shape)} for them"
            )
        wanted = _byte_range(entry, tuple(item.storage_offsets), tuple(item.lengths))
        start = wanted.start // BLOCK_BYTES * BLOCK_BYTES
        end = min(-(-wanted.end // BLOCK_BYTES) * BLOCK_BYTES, entry.n_bytes) if wanted.n_bytes else start
        return _Read(item, target, entry, self._blocks.get(name), wanted, ByteRange(start, end))

    def _read(self, path: str, reads: Sequence[_Read]) -> Sequence[_Read]:
        """Read some ranges of a file. A file whose tensors have no checksums of their own is read and checked whole."""
        file = self._file(path)
        if any(read.blocks is None for read in reads):
            data = torch.empty(file.n_bytes, dtype=torch.uint8)
            whole = memory_of(data)
            self._fill(file, [(ByteRange(0, file.n_bytes), whole)], lambda: _whole_problem(file, whole))
            for read in reads:
                read.take(data[read.entry.offset + read.wanted.start :])
            return reads
        spans = [read.span() for read in reads if read.wanted.n_bytes]
        self._fill(file, spans, lambda: next(filter(None, (read.problem() for read in reads)), ""))
        for read in reads:
            read.finish()
        return reads

    def _fill(self, file: StoredFile, spans: Sequence[tuple[ByteRange, memoryview]], check: Callable[[], str]) -> None:
        """Fill buffers from the nearest copy of a file whose bytes are right.

        check: Function that returns what is wrong with the bytes in the buffers; "" if nothing is.
        """
        key = key_of(self.name, file.path)
        for number, store in enumerate(self._stores, start=1):
            url = f"{store.url}/{key}"
            try:
                for _ in range(_READS_AGAIN):  # the bytes may have been damaged in transit
                    store.read_into(key, spans)
                    if not (problem := check()):
                        return
                error: StoreError | CorruptCheckpoint = CorruptCheckpoint(problem, url=url, part=file.path)
            except StoreError as failed:
                error = failed
            if number == len(self._stores):
                if isinstance(error, StoreError) and is_archived(error):
                    raise archived_error(self._copies[-1]) from error
                raise error
            if not isinstance(error, NotFound):  # the local folder of this machine has the files of its own ranks only
                warnings.warn(f"{error}; the next copy is read", RuntimeWarning, stacklevel=2)

    def _load_value(self, item: ReadItem, planner: LoadPlanner) -> None:
        """Give the planner a value that is not a tensor, in the form in which torch would have stored it."""
        value, text = decode_state(self._contents.values[item.storage_index.fqn], self._find), io.BytesIO()
        torch.save(value, text)
        text.seek(0)
        planner.load_bytes(item, text)

    def _find(self, name: str, library: str) -> Any:
        """Return a tensor, or an array of NumPy, to which a value refers."""
        entry = self._manifest.tensors[name]
        values = torch.empty(entry.shape, dtype=getattr(torch, DTYPES[entry.dtype]))
        item = ReadItem(
            LoadItemType.TENSOR, MetadataIndex(name), torch.Size(), MetadataIndex(name), torch.Size(), values.shape
        )
        whole = ByteRange(0, entry.n_bytes)
        self._read(entry.file, [_Read(item, values, entry, self._blocks.get(name), whole, whole)])
        return values.numpy() if library == "numpy" else values

    def _file(self, path: str) -> StoredFile:
        found = next((file for file in self._manifest.files if file.path == path), None)
        if found is None:
            url = f"{self._checkpoints.remote_store.url}/{self.name}"
            raise CorruptCheckpoint("the manifest does not list this file", url=url, part=path)
        return found


def _whole_problem(file: StoredFile, data: memoryview) -> str:
    return "" if crc32c(data) == file.crc32c else "the file does not match its CRC-32C"


def _batches(reads: Sequence[_Read]) -> Iterator[list[_Read]]:
    """Yield ranges of one file that are read together; those of a file that is checked whole are one batch."""
    if any(read.blocks is None for read in reads):
        yield [*reads]
        return
    batch: list[_Read] = []
    n_bytes = 0
    for read in sorted(reads, key=lambda one: (one.entry.offset, one.wanted.start)):
        if batch and n_bytes + read.block_range.n_bytes > _READ_BYTES:
            yield batch
            batch, n_bytes = [], 0
        batch.append(read)
        n_bytes += read.block_range.n_bytes
    if batch:
        yield batch


def _strides(shape: Shape) -> Shape:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _byte_range(entry: TensorEntry, offsets: Shape, lengths: Shape) -> ByteRange:
    """Return the bytes of a part from the first to the last value of a box of it."""
    if not math.prod(lengths):
        return ByteRange(0, 0)
    item_bytes = getattr(torch, DTYPES[entry.dtype]).itemsize
    strides = _strides(entry.shape)
    first = sum(start * stride for start, stride in zip(offsets, strides, strict=True))
    last = sum((start + n - 1) * stride for start, n, stride in zip(offsets, lengths, strides, strict=True))
    return ByteRange(first * item_bytes, (last + 1) * item_bytes)


# -- contents -------------------------------------------------------------------------------------------------------


def contents_of(tree: Any, manifest: Manifest, *, is_flat: bool) -> Contents:
    """Return the contents of a checkpoint from its state, whether torch's planners or Checkpoints.save() wrote it.

    is_flat: Whether the planner that wrote it kept nested dicts as one value each.
    """
    leaves = (((key,), node) for key, node in items_of(tree) or ()) if is_flat else _leaves(tree, ())
    found: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    parts, values = dict[MetadataIndex, str](), dict[str, Any]()
    paths = {}
    for path, node in leaves:
        fqn = ".".join(map(str, path))
        paths[fqn] = path
        facts = _sharded_facts(node, manifest)
        if facts is None:
            found[fqn], values[fqn] = BytesStorageMetadata(), node
            continue
        properties = TensorProperties(getattr(torch, DTYPES[facts["dtype"]]))
        found[fqn] = tensor = TensorStorageMetadata(properties, torch.Size(facts["size"]), [])
        for offsets, sizes, part in facts["parts"]:
            tensor.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            parts[MetadataIndex(fqn, offsets)] = part["$tensor"]
    metadata = Metadata(found, planner_data=None if is_flat else paths, storage_data=parts)
    return Contents(metadata, parts, values)


def _sharded_facts(node: Any, manifest: Manifest) -> Any:
    """Return type, size and parts of a node that is a tensor; None for another node."""
    if not isinstance(node, dict):
        return None
    if "$tensor" in node and "as" not in node:
        name = node["$tensor"]
        entry = manifest.tensors[name]
        shape = list(entry.shape)
        return {"dtype": entry.dtype, "size": shape, "parts": [[[0] * len(shape), shape, node]]}
    return node.get("$sharded")


def _leaves(node: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Yield the nodes of a state that torch's planners regard as one value each, with their paths."""
    if (items := items_of(node)) is not None:
        for key, value in items:
            yield from _leaves(value, (*path, str(key)))
    elif isinstance(node, list) and not _is_value(node):
        for number, value in enumerate(node):
            yield from _leaves(value, (*path, number))
    else:
        yield path, node


def _is_value(node: list[Any]) -> bool:
    """Return whether torch's planners keep a list as one value: it contains neither tensors nor dicts."""
    for one in node:
        if items_of(one) is not None or (isinstance(one, dict) and ("$tensor" in one or "$sharded" in one)):
            return False
        if isinstance(one, list) and not _is_value(one):
            return False
    return True
