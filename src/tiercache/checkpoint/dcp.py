"""Writer and reader for torch.distributed.checkpoint: `Checkpoints` of states of many ranks.

Each rank writes its parts of the tensors as safetensors files to the store (and to `local`), verifies them there, and
tells the coordinator their sizes and checksums. The coordinator writes `state.json`, which says where each part of a
tensor is and holds all other values, and puts the manifest. So a save in which a rank fails leaves no manifest: nobody
sees it, and collection removes its files. torch's planners decide which rank writes which part.

Nothing is stored as pickle: values that are not tensors become JSON, and those that are neither JSON values, tensors
nor arrays are refused. The reader hands them to torch as text of torch.save(), in memory.

A rank that loads reads the ranges that it needs, and checks them.
"""

from __future__ import annotations

import io
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from tiercache._native.checksum import crc32c
from tiercache.checkpoint.format import (
    METRICS_NAME,
    STATE_NAME,
    FileLayout,
    Manifest,
    StoredFile,
    TensorEntry,
    TensorSpec,
    checkpoint_name,
    checkpoint_objects,
    distribute,
    encode_metrics,
    json_copy,
    lay_out_file,
    metric_numbers,
)
from tiercache.checkpoint.housekeeping import Housekeeper
from tiercache.checkpoint.run_stores import CheckpointCopy, RunStores, archived_error, missing_file, resolve
from tiercache.checkpoint.state_tree import (
    BY_NAME,
    DTYPES,
    children,
    decode_state,
    encode_state,
    flat_bytes,
    memory_of,
    parse_state,
    state_text,
)
from tiercache.checkpoint.writer import CheckpointWriter, SourceFile, equal_parts, in_parallel, part_bytes
from tiercache.crash_points import crash_point
from tiercache.errors import CorruptCheckpoint, NotFound, StoreError, TierCacheError
from tiercache.model import ByteRange
from tiercache.store import LocalFolder, Store
from tiercache.store.placement import is_archived
from tiercache.store.shared_files import boot_id

# Each part of a tensor has a checksum for every so many bytes: a rank that reads a range checks what it reads.
BLOCK_BYTES = 1 << 20

# Methods of DefaultSavePlanner by which a planner could change what is stored.
_CHANGES = ("resolve_data", "transform_object")
Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Part:
    name: str  # in the manifest
    entry: TensorEntry
    blocks: tuple[int, ...]  # CRC-32C of each BLOCK_BYTES of its values
    file: StoredFile


@dataclass(frozen=True, slots=True)
class _Stored:
    """An item of a plan as a rank has stored it: its node in the state, and the tensors to which the node refers."""

    node: Any
    parts: tuple[_Part, ...]


@dataclass(frozen=True, slots=True)
class _Task:
    """What the coordinator tells each rank with its plan."""

    name: str
    rank: int
    retains: bool  # whether it applies retention to its local folder, which the coordinator and lower ranks lack


@dataclass(frozen=True, slots=True)
class _Source:
    """A tensor that this rank writes. find: Function that returns it, on any device and with any strides."""

    spec: TensorSpec
    find: Callable[[], torch.Tensor]


class DistributedWriter(StorageWriter):
    """Writer of one checkpoint, for `dcp.save` and `dcp.async_save`. Every rank makes its own, with the same arguments.

    When `dcp.save` returns, the checkpoint is verified and committed at the store. If a rank fails, all ranks raise the
    error, and the checkpoints that were there before are unchanged. If only the copy in the local folder fails, the
    coordinator warns. Retention runs in a thread of the coordinator after the commit; to the local folders of other
    machines, their first rank applies it during the next save.

    Args:
        house: Housekeeper of the run to which the checkpoint is added.
        n_streams: Number of files that are written in parallel.
        step: Step of the training run.
        metrics: Metrics by name; those of the coordinator count.
        note: JSON value of the user; that of the coordinator counts.

    Attributes:
        name: Name of the checkpoint, once the save has begun; "" before.
        step: Step of the training run.
    """

    def __init__(self, house: Housekeeper, n_streams: int, step: int, metrics: Mapping[str, float], note: Any) -> None:
        super().__init__()
        checkpoint_name(step, 0.0, "000000")  # checks the step
        self._house, self._n_streams, self.step = house, n_streams, step
        self._metrics, self._note = metric_numbers(metrics), json_copy(note)
        self._created_s, self.name = 0.0, ""
        self._is_committed = self._is_coordinator = False
        self._unfinished = house.begin_rank_save()

    def __getstate__(self) -> Any:
        raise TypeError(
            "a writer of tc.Checkpoints stays in its process: use dcp.async_save with AsyncCheckpointerType.THREAD"
        )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003 - torch's interface
        return False

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a save. Raises ValueError if checkpoint_id is given: tiercache names its checkpoints."""
        if checkpoint_id is not None:
            raise ValueError(
                f"checkpoint_id={str(checkpoint_id)!r} cannot be combined with a writer of tc.Checkpoints, which names "
                "its checkpoints itself: leave checkpoint_id= out"
            )

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=self._house.stores.remote.url)

    def set_up_storage_writer(self, is_coordinator: bool, *_args: Any, **kwargs: Any) -> None:
        """Begin a save. Raises ValueError without collectives, by which the ranks agree on the checkpoint's name."""
        self._is_coordinator = is_coordinator
        if not kwargs.get("use_collectives", True):
            raise ValueError(
                "tc.Checkpoints commits one checkpoint of all ranks: use_collectives=False is not supported"
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return replace(plan, storage_data=_folder_id(self._house.local))

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Return the plans of all ranks with the checkpoint's name, each part in one of them only."""
        if self._is_committed:
            raise ValueError(
                f"this writer has saved {self.name}: make one for each checkpoint, with dcp_writer(step), on every rank"
            )
        if not all(plan.usable for plan in plans):
            raise ValueError(
                "the planner caches plans (enable_plan_caching=True), with which the ranks would not learn the name of "
                "the new checkpoint: use a planner without caching"
            )
        self._house.stores.remote.require_conditional_put()
        self.name, self._created_s = self._house.new_name(self.step)
        planned: set[MetadataIndex] = set()
        tasks = []
        folders = {_folder_id(self._house.local)}
        for rank, plan in enumerate(plans):
            items = [item for item in plan.items if item.index not in planned]
            planned.update(item.index for item in items)
            folder = plan.storage_data
            retains = bool(folder) and folder not in folders
            folders.add(folder)
            tasks.append(replace(plan, items=items, storage_data=_Task(self.name, rank, retains)))
        return tasks

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the parts of this rank, and check them at the store."""
        kind: Any = type(planner)
        if not isinstance(planner, DefaultSavePlanner) or any(
            getattr(kind, name) is not getattr(DefaultSavePlanner, name) for name in _CHANGES
        ):
            raise TypeError(
                f"{kind.__name__} changes what is stored: use a DefaultSavePlanner that replaces none of"
                f" {', '.join(_CHANGES)}, and change the state before dcp.save"
            )
        task: _Task = plan.storage_data
        self.name = task.name
        if task.retains:  # the checkpoint before this one is committed by now
            self._house.retain_local()
        sources: list[_Source] = []
        nodes: dict[MetadataIndex, tuple[Any, list[str]]] = {}  # of each item, and the names of its tensors
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                value = encode_state({item.index.fqn: planner.lookup_object(item.index)})
                (node,) = (children(value.tree) or {}).values()
                found = [
                    _Source(TensorSpec(name, one.dtype, one.shape, one.n_bytes), partial(torch.as_tensor, one.value))
                    for name, one in value.tensors.items()
                ]
            else:
                found = [_source_of(item, planner)]
                node = {"$tensor": found[0].spec.name}
            nodes[item.index] = node, [source.spec.name for source in found]
            sources += found
        _check_names(source.spec.name for source in sources)
        self._unfinished.name = task.name  # retention after another save leaves the local files alone
        try:
            stored = self._write_files(task, {source.spec.name: source for source in sources})
        except BaseException:
            self._unfinished.name = ""
            raise
        self._unfinished.name = task.name if self._is_coordinator else ""
        results = []
        for index, (node, names) in nodes.items():
            parts = tuple(stored[name] for name in names)
            results.append(WriteResult(index, sum(part.entry.n_bytes for part in parts), _Stored(node, parts)))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write_files(self, task: _Task, sources: Mapping[str, _Source]) -> dict[str, _Part]:
        """Write the tensors to the local folder and upload them from there, or to the store at once."""
        first, *others = self._house.writers
        files = distribute([source.spec for source in sources.values()], self._n_streams)

        def write(number: int, specs: Sequence[TensorSpec]) -> list[_Part]:
            path = f"tensors-rank{task.rank:05d}-{number:05d}-of-{len(files):05d}.safetensors"
            layout = lay_out_file(specs)
            blocks: dict[str, tuple[int, ...]] = {}

            def pieces() -> Iterator[memoryview]:
                return equal_parts(_pieces(layout, sources, blocks), part_bytes(layout.n_bytes))

            file = first.write(task.name, SourceFile(path, layout.n_bytes, pieces))
            crash_point("dcp.written")
            entries = [TensorEntry(path, layout.offsets[one.name], one.n_bytes, one.dtype, one.shape) for one in specs]
            return [_Part(one.name, entry, blocks[one.name], file) for one, entry in zip(specs, entries, strict=True)]

        try:
            parts = in_parallel([partial(write, *one) for one in enumerate(files, start=1)], self._n_streams)
            stored = {part.name: part for some in parts for part in some}
            written = tuple({part.file.path: part.file for part in stored.values()}.values())
            for writer in others:
                writer.upload(Manifest(task.name, self.step, 0.0, written), first.store)
        except BaseException:
            if others:
                first.discard(task.name)  # a full disk must not stay full; the other ranks' parts are of no use
            raise
        return stored

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Describe the parts of all ranks, and commit the checkpoint."""
        try:
            self._finish(metadata, results)
        finally:
            self._unfinished.name = ""
        self._house.follow_commit("remote")

    def _finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        stored: dict[MetadataIndex, _Stored] = {one.index: one.storage_data for rank in results for one in rank}
        parts = [part for found in stored.values() for part in found.parts]
        _check_names(part.name for part in parts)
        texts = {STATE_NAME: _state_of(metadata, stored)}
        if self._metrics:
            texts[METRICS_NAME] = encode_metrics(self._metrics)
        files = {part.file.path: part.file for part in parts}
        manifest = Manifest(
            name=self.name,
            step=self.step,
            created_s=self._created_s,
            files=tuple(files[path] for path in sorted(files)),
            tensors={part.name: part.entry for part in parts},
            metrics=self._metrics,
            note=self._note,
        )
        # The store first: it alone has the files of all ranks. A local folder has those of the ranks of its machine.
        *local, remote = self._house.writers
        url = f"{remote.store.url}/{self.name}"
        if missing := _missing_file(remote.store, manifest):
            raise StoreError(missing, url=url)
        _commit(remote, manifest, texts)
        self._is_committed = True
        for writer in local:
            try:
                if not _missing_file(writer.store, manifest):
                    _commit(writer, manifest, texts)
            except TierCacheError as error:
                message = f"the checkpoint is committed at {url}, but has no complete local copy: {error}"
                warnings.warn(message, RuntimeWarning, stacklevel=3)

    def done(self) -> bool:
        """Return whether the checkpoint is committed at the store; the coordinator knows."""
        return self._is_committed


def _check_names(names: Iterable[str]) -> None:
    name, n_times = Counter(names).most_common(1)[0] if (names := [*names]) else ("", 0)
    if n_times > 1:
        raise ValueError(f"two tensors of the state would be stored as {name!r}: rename one of their keys")


def _source_of(item: WriteItem, planner: DefaultSavePlanner) -> _Source:
    """Return the part of a tensor that an item of a plan names. The part is not loaded yet."""
    data = item.tensor_data
    if data is None:
        raise ValueError(f"{item.index.fqn}: the planner describes no tensor")
    dtype, shape, name = dtype_name(item.index.fqn, data.properties.dtype), tuple(data.chunk.sizes), item.index.fqn
    if shape != tuple(data.size):  # a part is called by its ranges
        ranges = [f"{start}:{start + n}" for start, n in zip(data.chunk.offsets, shape, strict=True)]
        name += f"[{','.join(ranges)}]"
    n_bytes = math.prod(shape) * data.properties.dtype.itemsize
    return _Source(TensorSpec(name, dtype, shape, n_bytes), partial(planner.lookup_object, item.index))


def _bytes_of(source: _Source) -> memoryview:
    """Return the values of a tensor in host memory, row by row. The memory lives as long as the view."""
    spec, tensor = source.spec, source.find().detach()
    if (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) != (spec.shape, DTYPES[spec.dtype]):
        found = f"shape {tuple(tensor.shape)} and type {tensor.dtype}"
        raise ValueError(f"{spec.name}: the planner announced shape {spec.shape} and type {spec.dtype}, found {found}")
    return memory_of(tensor.cpu().contiguous())


def _pieces(
    layout: FileLayout, sources: Mapping[str, _Source], blocks: dict[str, tuple[int, ...]]
) -> Iterator[memoryview]:
    """Yield the bytes of a file, one tensor after another, and note the checksums of the tensors by name."""
    yield memoryview(layout.header)
    for name in layout.offsets:
        data = _bytes_of(sources[name])
        blocks[name] = block_checksums(data)
        yield data


def _folder_id(store: LocalFolder | None) -> str:
    """Return what tells apart the local folders of ranks, also of several machines; "" if there is none yet."""
    try:
        found = None if store is None else store.root.stat()
    except OSError:
        return ""
    return "" if found is None else f"{boot_id()}-{found.st_dev}-{found.st_ino}"


def _commit(writer: CheckpointWriter, manifest: Manifest, texts: Mapping[str, bytes]) -> None:
    small = writer.write_texts(manifest.name, texts)
    crash_point("dcp.described")
    writer.commit(replace(manifest, files=(*manifest.files, *small)))
    crash_point("dcp.committed")


def _missing_file(store: Store, manifest: Manifest) -> str:
    return missing_file(manifest, checkpoint_objects(store.list(f"{manifest.name}/")).get(manifest.name, {}))


# -- state.json -----------------------------------------------------------------------------------------------------


def block_checksums(data: memoryview) -> tuple[int, ...]:
    return tuple(crc32c(data[start : start + BLOCK_BYTES]) for start in range(0, data.nbytes, BLOCK_BYTES))


def dtype_name(fqn: str, dtype: torch.dtype) -> str:
    """Return the name of a dtype in a safetensors file. Raises TypeError, with the key, if the format lacks it."""
    name = BY_NAME.get(str(dtype).removeprefix("torch."))
    if name is None:
        raise TypeError(f"{fqn} is a tensor of type {dtype}, which the safetensors format does not have")
    return name


def _state_of(metadata: Metadata, stored: Mapping[MetadataIndex, _Stored]) -> bytes:
    """Return the text of state.json: the tree of the state, as of Checkpoints.save(), and checksums of the parts."""
    nodes: dict[str, Any] = {}
    for fqn, found in metadata.state_dict_metadata.items():
        if isinstance(found, TensorStorageMetadata):
            nodes[fqn] = _tensor_node(fqn, found, stored)
        else:
            nodes[fqn] = stored[MetadataIndex(fqn)].node
    paths = metadata.planner_data
    if not (isinstance(paths, Mapping) and paths.keys() >= nodes.keys()):
        raise ValueError("the planner does not know the paths of the keys: leave flatten_state_dict=False out")
    tree = _tree_of({tuple(paths[fqn]): node for fqn, node in nodes.items()})
    checksums = {part.name: list(part.blocks) for one in stored.values() for part in one.parts}
    return state_text(tree, blocks={"bytes": BLOCK_BYTES, "crc32c": checksums})


def _tree_of(nodes: Mapping[tuple[str | int, ...], Any]) -> Any:
    """Return the tree that has each node at its path, in which a number is an index of a list."""
    if () in nodes:
        return nodes[()]
    below: dict[str | int, dict[tuple[str | int, ...], Any]] = {}
    for (key, *rest), node in nodes.items():
        below.setdefault(key, {})[tuple(rest)] = node
    found = {key: _tree_of(part) for key, part in below.items()}
    if found and all(isinstance(key, int) for key in found):
        return [found[number] for number in range(len(found))]
    has_tags = any(isinstance(key, str) and key.startswith("$") for key in found)
    return {"$dict": [list(item) for item in found.items()]} if has_tags else found


def _tensor_node(fqn: str, found: TensorStorageMetadata, stored: Mapping[MetadataIndex, _Stored]) -> Any:
    parts: list[Any] = []
    for chunk in found.chunks:
        part = stored.get(MetadataIndex(fqn, chunk.offsets))
        if part is None:
            raise ValueError(f"no rank has stored {fqn} at {tuple(chunk.offsets)}")
        parts.append([list(chunk.offsets), list(chunk.sizes), part.node])
    if len(parts) == 1 and parts[0][1] == list(found.size):
        return parts[0][2]
    return {"$sharded": {"dtype": dtype_name(fqn, found.properties.dtype), "size": list(found.size), "parts": parts}}


# -- reader ----------------------------------------------------------------------------------------------------------

# Bytes that a thread reads before it copies them to their tensors.
_READ_BYTES = 128 << 20
_READS_AGAIN = 2


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
        first, stated = self.block_range.start // BLOCK_BYTES, list(self.blocks or ())
        for number, crc in enumerate(block_checksums(memory_of(self.buffer)), first):
            if stated[number : number + 1] != [crc]:
                return f"block {number} of {self.item.storage_index.fqn} does not match its CRC-32C"
        return ""

    def take(self, data: torch.Tensor) -> None:
        """Copy the values into the target.

        data: uint8, from the first byte of `wanted` on.
        """
        if self.is_direct and data.data_ptr() == self.target.data_ptr():
            return
        dtype = getattr(torch, DTYPES[self.entry.dtype])
        values = data[: self.wanted.n_bytes].view(dtype)
        self.target.copy_(values.as_strided(tuple(self.item.lengths), _strides(self.entry.shape)))


class DistributedReader(StorageReader):
    """Reader of one checkpoint, for `dcp.load`. Every rank makes its own, with the same arguments.

    A rank reads the byte ranges that its parts need, and checks each block that it reads. It reads the local copy where
    there is one, else the store; a corrupt local file is skipped with a warning. The ranks may be more or fewer than
    those that saved, and may read what Checkpoints.save() wrote.

    Args:
        stores: Stores of the run.
        n_streams: Number of files that are read in parallel.
        which: "latest", "best:METRIC", a step or a name, as for Checkpoints.load().
    """

    def __init__(self, stores: RunStores, n_streams: int, which: str | int) -> None:
        super().__init__()
        self._run, self._n_streams, self._which = stores, n_streams, which
        self.name = ""
        self._manifest = Manifest("", 0, 0.0, ())
        self._parts: dict[MetadataIndex, str] = {}  # name in the manifest of each part of a tensor
        self._values: dict[str, Any] = {}  # node of each other value in the state, by key
        self._blocks: Mapping[str, Sequence[int]] = {}
        self._copies: Sequence[CheckpointCopy] = ()
        self._stores: Sequence[Store] = ()  # of the own tiers, and of those to which the checkpoint was moved

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003 - torch's interface
        return False

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.name = ""
        if checkpoint_id is not None:
            self._which = str(checkpoint_id)

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """Return the description of the checkpoint."""
        scan = self._run.scan_to_load(self._which)
        self.name = resolve(scan, self._which)
        manifest = scan.manifest(self.name)
        if manifest is None:
            raise archived_error(next(copy for copy in scan.copies[self.name] if copy.is_archived))
        self._manifest = manifest
        self._copies = scan.copies[self.name]
        own = [*self._run.tiers.values()]
        self._stores = [*own, *(copy.store for copy in self._copies if copy.store not in own)]
        file = manifest.file(STATE_NAME)
        data = bytearray(file.n_bytes)
        spans = [(ByteRange(0, file.n_bytes), memoryview(data))]
        self._fill(file, spans, lambda: _whole_problem(file, memoryview(data)))
        try:
            body, tree = json.loads(bytes(data)), parse_state(bytes(data))
            self._blocks = body.get("blocks", {}).get("crc32c", {})
            metadata = self._describe(tree)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            url = f"{self._run.remote.url}/{self.name}"
            raise CorruptCheckpoint(f"its state cannot be read: {error!r}", url=url, part=STATE_NAME) from error
        metadata.storage_meta = StorageMeta(checkpoint_id=self.name)
        return metadata

    def _describe(self, tree: Any) -> Metadata:
        """Return the contents of a state in the terms of torch, whether torch's planners or save() wrote it."""
        found: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        paths: dict[str, tuple[str | int, ...]] = {}
        self._parts, self._values = {}, {}
        for path, node in _leaves(tree, ()):
            fqn = ".".join(map(str, path))
            paths[fqn] = path
            facts = _sharded_facts(node, self._manifest)
            if facts is None:
                found[fqn], self._values[fqn] = BytesStorageMetadata(), node
                continue
            properties = TensorProperties(getattr(torch, DTYPES[facts["dtype"]]))
            found[fqn] = tensor = TensorStorageMetadata(properties, torch.Size(facts["size"]), [])
            for offsets, sizes, part in facts["parts"]:
                tensor.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                self._parts[MetadataIndex(fqn, offsets)] = part["$tensor"]
        return Metadata(found, planner_data=paths, storage_data=self._parts)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_args: Any, **_kwargs: Any) -> None:
        """Begin a load."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return replace(plan, storage_data=self.name)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans. Raises StoreError if a checkpoint was committed while the ranks looked for the newest."""
        names = sorted({str(plan.storage_data) for plan in plans})
        if len(names) > 1:
            raise StoreError(
                f"the ranks found different checkpoints ({', '.join(names)}), because one was committed meanwhile: "
                "load again, or name the checkpoint",
                url=self._run.remote.url,
                retryable=True,
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the values that this rank needs."""
        reads: dict[str, list[_Read]] = {}
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                self._give_value(item, planner)
            else:
                read = self._plan_read(item, planner)
                reads.setdefault(read.entry.file, []).append(read)
        calls = [partial(self._read, path, batch) for path, found in reads.items() for batch in _batches(found)]
        # A file that is checked whole is held whole, so that only two of them are read at a time.
        is_whole = any(read.blocks is None for found in reads.values() for read in found)
        for batch in in_parallel(calls, 2 if is_whole else self._n_streams):
            for read in batch:
                planner.commit_tensor(read.item, read.target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _plan_read(self, item: ReadItem, planner: LoadPlanner) -> _Read:
        name = self._parts[item.storage_index]
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
        file = self._manifest.file(path)
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
            read.take(read.buffer[read.wanted.start - read.block_range.start :])
            read.buffer = read.buffer[:0]
        return reads

    def _fill(self, file: StoredFile, spans: Sequence[tuple[ByteRange, memoryview]], check: Callable[[], str]) -> None:
        """Fill buffers from the nearest copy of a file whose bytes are right.

        check: Function that returns what is wrong with the bytes in the buffers; "" if nothing is.
        """
        key = f"{self.name}/{file.path}"
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

    def _give_value(self, item: ReadItem, planner: LoadPlanner) -> None:
        """Give the planner a value that is not a tensor, in the form in which torch would have stored it."""
        value, text = decode_state(self._values[item.storage_index.fqn], self._find), io.BytesIO()
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
    if (items := children(node)) is not None:
        for key, value in items.items():
            yield from _leaves(value, (*path, str(key)))
    elif isinstance(node, list) and not _is_value(node):
        for number, value in enumerate(node):
            yield from _leaves(value, (*path, number))
    else:
        yield path, node


def _is_value(node: list[Any]) -> bool:
    """Return whether torch's planners keep a list as one value: it contains neither tensors nor dicts."""
    for one in node:
        if children(one) is not None or (isinstance(one, dict) and ("$tensor" in one or "$sharded" in one)):
            return False
        if isinstance(one, list) and not _is_value(one):
            return False
    return True
