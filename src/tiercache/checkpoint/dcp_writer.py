"""A StorageWriter of torch.distributed.checkpoint: `Checkpoints` of states of many ranks.

Each rank writes its parts of the tensors as safetensors files to the store (and to `local`), verifies them there, and
tells the coordinator their sizes and checksums. The coordinator writes `state.json`, which says where each part of a
tensor is and holds all other values, and puts the manifest. So a save in which a rank fails leaves no manifest: nobody
sees it, and collection removes its files. torch's planners decide which rank writes which part.

Nothing is stored as pickle. torch hands over values that are not tensors as text of torch.save(): the writer turns them
into JSON, and refuses those that are neither JSON values, tensors nor arrays; the reader does the reverse in memory.
"""

from __future__ import annotations

import json
import math
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from tiercache._native.checksum import crc32c
from tiercache.cache.locks import boot_id
from tiercache.checkpoint.checkpoints import Checkpoints, json_copy, numbers
from tiercache.checkpoint.layout import (
    METRICS_NAME,
    STATE_NAME,
    FileLayout,
    Manifest,
    StoredFile,
    TensorEntry,
    TensorSpec,
    checkpoint_name,
    distribute,
    encode_metrics,
    key_of,
    lay_out_file,
)
from tiercache.checkpoint.state_tree import DTYPES, EncodedState, encode_state, flat_bytes, state_text
from tiercache.checkpoint.writer import CheckpointWriter, SourceFile, equal_parts, in_parallel, part_bytes
from tiercache.crash_points import crash_point
from tiercache.errors import StoreError, TierCacheError

if TYPE_CHECKING:
    import os

    from tiercache.store import LocalFolder, Store


# Each part of a tensor has a checksum for every so many bytes: a rank that reads a range checks what it reads.
BLOCK_BYTES = 1 << 20

_DTYPE_NAMES = {name: key for key, name in DTYPES.items()}
Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A tensor, or a part of one, that a rank has stored."""

    name: str  # in the manifest
    entry: TensorEntry
    blocks: tuple[int, ...]  # CRC-32C of each BLOCK_BYTES of its values
    file: StoredFile


@dataclass(frozen=True, slots=True)
class StoredValue:
    """A value that is not a tensor: its node in the state, and the tensors to which the node refers."""

    node: Any
    parts: tuple[StoredPart, ...]


@dataclass(frozen=True, slots=True)
class _Task:
    """What the coordinator tells each rank with its plan."""

    name: str
    rank: int
    retains: bool  # whether it applies retention to its local folder, which the coordinator and lower ranks lack


@dataclass(frozen=True, slots=True)
class _Source:
    """A tensor that this rank writes. load: Function that returns it, on any device and with any strides."""

    spec: TensorSpec
    load: Callable[[], torch.Tensor]


class DistributedWriter(StorageWriter):
    """Writer of one checkpoint, for `dcp.save` and `dcp.async_save`. Every rank makes its own, with the same arguments.

    When `dcp.save` returns, the checkpoint is verified and committed at the store. If a rank fails, all ranks raise the
    error, and the checkpoints that were there before are unchanged. If only the copy in the local folder fails, the
    coordinator warns. Retention runs in a thread of the coordinator after the commit; to the local folders of other
    machines, their first rank applies it during the next save.

    Args:
        checkpoints: Checkpoints to which this one is added.
        step: Step of the training run.
        metrics: Metrics by name; those of the coordinator count.
        note: JSON value of the user; that of the coordinator counts.

    Attributes:
        name: Name of the checkpoint, once the save has begun; "" before.
        step: Step of the training run.
        is_writing: Whether the save has begun and not ended, as far as this rank knows.
        error: None; see StoredCheckpoints.unfinished_saves().
    """

    error: BaseException | None = None

    def __init__(
        self, checkpoints: Checkpoints, step: int, *, metrics: Mapping[str, float] | None = None, note: Any = None
    ) -> None:
        super().__init__()
        checkpoint_name(step, 0.0, "000000")  # checks the step
        self._checkpoints, self.step = checkpoints, step
        self._metrics, self._note = numbers(metrics or {}), json_copy(note)
        self._created_s, self.name = 0.0, ""
        self._is_committed = self._is_coordinator = self.is_writing = False

    def __getstate__(self) -> Any:
        raise TypeError(
            "a writer of tc.Checkpoints stays in its process: use dcp.async_save with AsyncCheckpointerType.THREAD"
        )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003 - torch's interface
        """Return False: torch must not make this writer from a checkpoint_id."""
        return False

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a save. Raises ValueError if checkpoint_id is given: tiercache names its checkpoints."""
        if checkpoint_id is not None:
            raise ValueError(
                f"checkpoint_id={str(checkpoint_id)!r} cannot be combined with a writer of tc.Checkpoints, which names "
                "its checkpoints itself: leave checkpoint_id= out"
            )

    def storage_meta(self) -> StorageMeta:
        """Return where the checkpoints are."""
        return StorageMeta(checkpoint_id=self._checkpoints.remote_store.url)

    def set_up_storage_writer(self, is_coordinator: bool, *_args: Any, **kwargs: Any) -> None:
        """Begin a save. Raises ValueError without collectives, by which the ranks agree on the checkpoint's name."""
        self._is_coordinator = is_coordinator
        if not kwargs.get("use_collectives", True):
            raise ValueError(
                "tc.Checkpoints commits one checkpoint of all ranks: use_collectives=False is not supported"
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan with what tells the local folder of this rank from those of others."""
        return replace(plan, storage_data=_folder_id(self._checkpoints.local_store))

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Return the plans of all ranks with the checkpoint's name, each part in one of them only.

        Raises:
            ValueError: A planner caches its plans, or the writer has already saved its checkpoint.
        """
        if self._is_committed:
            raise ValueError(
                f"this writer has saved {self.name}: make one for each checkpoint, with dcp_writer(step), on every rank"
            )
        if not all(plan.usable for plan in plans):
            raise ValueError(
                "the planner caches plans (enable_plan_caching=True), with which the ranks would not learn the name of "
                "the new checkpoint: use a planner without caching"
            )
        self._checkpoints.remote_store.require_conditional_put()
        self.name, self._created_s = self._checkpoints.new_name(self.step)
        planned: set[MetadataIndex] = set()
        tasks = []
        folders = {_folder_id(self._checkpoints.local_store)}
        for rank, plan in enumerate(plans):
            items = [item for item in plan.items if item.index not in planned]
            planned.update(item.index for item in items)
            folder = plan.storage_data
            retains = bool(folder) and folder not in folders
            folders.add(folder)
            tasks.append(replace(plan, items=items, storage_data=_Task(self.name, rank, retains)))
        return tasks

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the parts of this rank, and check them at the store.

        Raises:
            TypeError, ValueError: A value cannot be stored; the message names its key.
            StoreError: A store failed, or did not store what it was given.
        """
        task: _Task = plan.storage_data
        self.name = task.name
        if task.retains:  # the checkpoint before this one is committed by now
            self._checkpoints.retain_local()
        sources: dict[str, _Source] = {}
        values: dict[MetadataIndex, EncodedState] = {}
        parts: dict[MetadataIndex, str] = {}
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                values[item.index] = _encode_value(item, planner)
                for name, tensor in values[item.index].tensors.items():
                    spec = TensorSpec(name, tensor.dtype, tensor.shape, tensor.n_bytes)
                    _add(sources, _Source(spec, partial(torch.as_tensor, tensor.value)))
            else:
                source = _source_of(item, planner)
                parts[item.index] = source.spec.name
                _add(sources, source)
        self.is_writing = True  # retention after another save leaves the local files alone
        try:
            stored = self._write_files(task, sources)
        except BaseException:
            self.is_writing = False
            raise
        self.is_writing = self._is_coordinator
        results = [WriteResult(index, stored[name].entry.n_bytes, stored[name]) for index, name in parts.items()]
        for index, value in values.items():
            ((_, node),) = items_of(value.tree) or ()
            found = StoredValue(node, tuple(stored[name] for name in value.tensors))
            results.append(WriteResult(index, sum(part.entry.n_bytes for part in found.parts), found))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write_files(self, task: _Task, sources: Mapping[str, _Source]) -> dict[str, StoredPart]:
        """Write the tensors to the local folder and upload them from there, or to the store at once."""
        first, *others = self._checkpoints.file_writers
        n_streams = self._checkpoints.n_streams
        files = distribute([source.spec for source in sources.values()], n_streams)

        def write(number: int) -> list[StoredPart]:
            path = f"tensors-rank{task.rank:05d}-{number + 1:05d}-of-{len(files):05d}.safetensors"
            layout = lay_out_file(files[number])
            blocks: dict[str, tuple[int, ...]] = {}

            def pieces() -> Iterator[memoryview]:
                return equal_parts(_pieces(layout, sources, blocks), part_bytes(layout.n_bytes))

            file = first.write(task.name, SourceFile(path, layout.n_bytes, pieces))
            crash_point("dcp.written")
            return [StoredPart(one.name, _entry(path, layout, one), blocks[one.name], file) for one in files[number]]

        try:
            parts = in_parallel([partial(write, number) for number in range(len(files))], n_streams)
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
        """Describe the parts of all ranks, and commit the checkpoint.

        Raises:
            StoreError: A store failed; if .maybe_done is true, the checkpoint may be committed.
            CommitConflict: The name of the checkpoint is taken.
        """
        try:
            self._finish(metadata, results)
        finally:
            self.is_writing = False
        self._checkpoints.announce("remote")

    def _finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        stored = {result.index: result.storage_data for rank in results for result in rank}
        parts = [part for found in stored.values() for part in _parts_of(found)]
        tensors = {part.name: part.entry for part in parts}
        if len(tensors) != len(parts):
            names = [part.name for part in parts]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two tensors of the state would be stored as {twice!r}: rename one of their keys")
        text = encode_metadata(metadata, stored, {part.name: part.blocks for part in parts})
        files = {part.file.path: part.file for part in parts}
        texts = {STATE_NAME: text}
        if self._metrics:
            texts[METRICS_NAME] = encode_metrics(self._metrics)
        manifest = Manifest(
            name=self.name,
            step=self.step,
            created_s=self._created_s,
            files=tuple(files[path] for path in sorted(files)),
            tensors=tensors,
            metrics=self._metrics,
            note=self._note,
        )
        # The store first: it alone has the files of all ranks. A local folder has those of the ranks of its machine.
        *local, remote = self._checkpoints.file_writers
        if missing := _missing_file(remote.store, manifest):
            raise StoreError(f"{missing} is missing, or has another size", url=f"{remote.store.url}/{self.name}")
        _commit(remote, manifest, texts)
        self._is_committed = True
        for writer in local:
            try:
                if not _missing_file(writer.store, manifest):
                    _commit(writer, manifest, texts)
            except TierCacheError as error:
                where = f"{remote.store.url}/{self.name}"
                message = f"the checkpoint is committed at {where}, but has no complete local copy: {error}"
                warnings.warn(message, RuntimeWarning, stacklevel=3)

    def done(self) -> bool:
        """Return whether the checkpoint is committed at the store; the coordinator knows."""
        return self._is_committed

    wait = done


def _add(sources: dict[str, _Source], source: _Source) -> None:
    name = source.spec.name
    if name in sources:
        raise ValueError(f"two tensors of the state would be stored as {name!r}: rename one of their keys")
    sources[name] = source


def _source_of(item: WriteItem, planner: SavePlanner) -> _Source:
    """Return the part of a tensor that an item of a plan names. The part is not loaded yet."""
    data = item.tensor_data
    if data is None:
        raise ValueError(f"{item.index.fqn}: the planner describes no tensor")
    dtype, shape = dtype_name(item.index.fqn, data.properties.dtype), tuple(data.chunk.sizes)
    name = _part_name(item.index.fqn, tuple(data.chunk.offsets), shape, tuple(data.size))
    n_bytes = math.prod(shape) * data.properties.dtype.itemsize

    def load() -> torch.Tensor:
        found = planner.resolve_data(item)
        if not isinstance(found, torch.Tensor):
            raise TypeError(f"{item.index.fqn}: the planner announced a tensor, and gave a {type(found).__name__}")
        return found

    return _Source(TensorSpec(name, dtype, shape, n_bytes), load)


def _part_name(fqn: str, offsets: Shape, shape: Shape, size: Shape) -> str:
    """Return the name of a part: that of the tensor if the part is all of it, else with its ranges."""
    if shape == size:
        return fqn
    return f"{fqn}[{','.join(f'{start}:{start + n}' for start, n in zip(offsets, shape, strict=True))}]"


def _encode_value(item: WriteItem, planner: SavePlanner) -> EncodedState:
    """Return a value that is not a tensor as JSON. Raises TypeError, with its key, if it cannot be stored."""
    fqn = item.index.fqn
    if isinstance(planner, DefaultSavePlanner) and not _changes_values(type(planner)):
        return encode_state({fqn: planner.lookup_object(item.index)})
    text = planner.resolve_data(item)
    if isinstance(text, torch.Tensor):
        raise TypeError(f"{fqn}: the planner announced a value that is no tensor, and gave a tensor")
    text.seek(0)
    try:
        return encode_state({fqn: torch.load(text, weights_only=True)})
    except pickle.UnpicklingError as error:
        message = f"{fqn!r} is a value that only pickle could store, which tiercache does not use: store JSON values"
        raise TypeError(f"{message}, tensors or arrays") from error


def _changes_values(planner: type[DefaultSavePlanner]) -> bool:
    plain = DefaultSavePlanner
    return planner.resolve_data is not plain.resolve_data or planner.transform_object is not plain.transform_object


def _bytes_of(source: _Source) -> memoryview:
    """Return the values of a tensor in host memory, row by row. The memory lives as long as the view."""
    spec, tensor = source.spec, source.load().detach()
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


def _entry(path: str, layout: FileLayout, spec: TensorSpec) -> TensorEntry:
    return TensorEntry(path, layout.offsets[spec.name], spec.n_bytes, spec.dtype, spec.shape)


def _parts_of(found: StoredPart | StoredValue) -> tuple[StoredPart, ...]:
    return found.parts if isinstance(found, StoredValue) else (found,)


def _folder_id(store: LocalFolder | None) -> str:
    """Return what tells apart the local folders of ranks, also of several machines; "" if there is none yet."""
    try:
        found = None if store is None else store.root.stat()
    except OSError:
        return ""
    return "" if found is None else f"{boot_id()}-{found.st_dev}-{found.st_ino}"


def _commit(writer: CheckpointWriter, manifest: Manifest, texts: Mapping[str, bytes]) -> None:
    """Write the files of the coordinator, given as texts by path, and commit a checkpoint."""
    small = [
        writer.write(manifest.name, SourceFile(path, len(data), partial(iter, [memoryview(data)])))
        for path, data in texts.items()
    ]
    crash_point("dcp.described")
    writer.commit(replace(manifest, files=(*manifest.files, *small)))
    crash_point("dcp.committed")


def _missing_file(store: Store, manifest: Manifest) -> str:
    """Return which file of a checkpoint a store lacks, or has with another size; "" if none. The store is listed."""
    sizes = {info.key: info.n_bytes for info in store.list(f"{manifest.name}/")}
    return next((one.path for one in manifest.files if sizes.get(key_of(manifest.name, one.path)) != one.n_bytes), "")


# -- state.json -----------------------------------------------------------------------------------------------------


def memory_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU, which can be written."""
    if not tensor.numel():
        return memoryview(b"")
    values: Any = flat_bytes(tensor).numpy()
    return memoryview(values)


def block_checksums(data: memoryview) -> tuple[int, ...]:
    """Return the CRC-32C of each BLOCK_BYTES of the values of a part."""
    return tuple(crc32c(data[start : start + BLOCK_BYTES]) for start in range(0, data.nbytes, BLOCK_BYTES))


def dtype_name(fqn: str, dtype: torch.dtype) -> str:
    """Return the name of a dtype in a safetensors file. Raises TypeError, with the key, if the format lacks it."""
    name = _DTYPE_NAMES.get(str(dtype).removeprefix("torch."))
    if name is None:
        raise TypeError(f"{fqn} is a tensor of type {dtype}, which the safetensors format does not have")
    return name


def items_of(node: Any) -> Iterable[Sequence[Any]] | None:
    """Return keys and nodes of a dict in the state; None for another node."""
    if not isinstance(node, dict):
        return None
    if "$state_dict" in node:
        return items_of(node["$state_dict"])
    if "$dict" in node:
        return node["$dict"]  # type: ignore[no-any-return]
    return None if any(key.startswith("$") for key in node) else node.items()


def encode_metadata(
    metadata: Metadata, stored: Mapping[MetadataIndex, Any], blocks: Mapping[str, Sequence[int]]
) -> bytes:
    """Return the text of state.json: the tree of the state, as of Checkpoints.save(), and checksums of the parts.

    Raises:
        ValueError: A part is missing, or the planner's own data cannot be stored.
    """
    nodes: dict[str, Any] = {}
    for fqn, found in metadata.state_dict_metadata.items():
        if isinstance(found, TensorStorageMetadata):
            nodes[fqn] = _tensor_node(fqn, found, stored)
        else:
            nodes[fqn] = stored[MetadataIndex(fqn)].node
    paths = metadata.planner_data
    if paths is not None and not (isinstance(paths, Mapping) and paths.keys() >= nodes.keys()):
        raise ValueError(
            f"the planner has data of its own ({type(paths).__name__}), which a checkpoint cannot hold; it holds the "
            "paths of keys, as DefaultSavePlanner has them"
        )
    tree = _dict_node(nodes) if paths is None else _tree_of({tuple(paths[fqn]): node for fqn, node in nodes.items()})
    checksums = {"bytes": BLOCK_BYTES, "crc32c": {name: list(crcs) for name, crcs in blocks.items()}}
    body = json.loads(state_text(tree)) | {"blocks": checksums, "is_flat": paths is None}
    return json.dumps(body, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii") + b"\n"


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
    return _dict_node(found)


def _dict_node(nodes: Mapping[Any, Any]) -> Any:
    return {"$dict": [list(item) for item in nodes.items()]} if any(k.startswith("$") for k in nodes) else dict(nodes)


def _tensor_node(fqn: str, found: TensorStorageMetadata, stored: Mapping[MetadataIndex, Any]) -> Any:
    parts: list[Any] = []
    for chunk in found.chunks:
        part = stored.get(MetadataIndex(fqn, chunk.offsets))
        if not isinstance(part, StoredPart):
            raise ValueError(f"no rank has stored {fqn} at {tuple(chunk.offsets)}")
        parts.append([list(chunk.offsets), list(chunk.sizes), {"$tensor": part.name}])
    if len(parts) == 1 and parts[0][1] == list(found.size):
        return parts[0][2]
    return {"$sharded": {"dtype": dtype_name(fqn, found.properties.dtype), "size": list(found.size), "parts": parts}}
