"""Plan of a packing: its source with kind, columns and splits, the tasks that divide them, and the checked target.

The tasks follow from the source and the options alone, so any number of processes writes the same shards.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from tiercache import config
from tiercache.data.dataset import Dataset
from tiercache.data.scan import Split
from tiercache.model import parse_bytes
from tiercache.packer import rearrange
from tiercache.packer.files import InputSplit, RecordSource, SkippedFile, find_file
from tiercache.packer.folders import FolderFiles
from tiercache.packer.images import parse_encode, recoded
from tiercache.packer.objects import find_object, is_object, object_of
from tiercache.packer.rearrange import RunPlan, Shuffle, SortBy, SortOrder, check_sortable
from tiercache.packer.sources import SourceOptions, find_source, narrow, with_schema_of, with_types
from tiercache.packer.tokens import tokenized
from tiercache.packer.transform import MapFunction, MappedSource, map_source, select_source
from tiercache.ray_tasks import TaskEngine, check_engine
from tiercache.shard.packings import Packing, find_packing, list_packings
from tiercache.shard.schema import Image, Kind, check_same_schema
from tiercache.shard.versions import (
    Version,
    VersionKind,
    check_mode,
    data_set_exists_error,
    find_latest,
    find_parent,
)
from tiercache.shard.writer import ShardOptions
from tiercache.store import MemoryStore, Store, open_store
from tiercache.store.access import split_glob

logger = logging.getLogger("tiercache")

# A source has this many tasks for the processes to share, unless one would have less than a shard's worth of data; the
# upper limit is what a kill may lose of the work of a process.
_TASKS = 64
_MOST_SHARDS_PER_TASK = 8
_PART_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class PackOptions(SourceOptions):
    """Options of packing. The arguments of `pack` of the same names describe them."""

    report: str | os.PathLike[str] | None = None
    mode: VersionKind = "create"
    shard_size: int | str = "128MiB"
    block_size: int | str = "1MiB"
    compression: str | Mapping[str, str] = "auto"
    workers: int = 1
    engine: TaskEngine = "process"
    map: MapFunction | str | None = None
    resize: int | None = None
    encode: str | None = None
    split: Mapping[str, float] | None = None
    split_by: str | None = None
    shuffle: int | None = None
    sort: str | None = None
    dedup: bool | str = False
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # may hold credentials

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mode(self.mode)
        if self.engine == "ray" and self.workers != 1:
            raise ValueError("workers= is for engine='process': Ray runs as many tasks as its cluster has CPUs")
        check_engine(self.engine)
        if self.resize is not None and (type(self.resize) is not int or self.resize < 1):
            raise ValueError(f"resize must be a number of pixels, got {self.resize!r}")
        if self.encode is not None:
            parse_encode(self.encode)
        if self.split is None and self.split_by is not None:
            raise ValueError("split_by= names the key of split=, which is not given")
        for name in self.parts:
            if self.split is not None and not _PART_NAME.fullmatch(name):
                raise ValueError(f"a part of split= is a folder below the URL, so it cannot be named {name!r}")
        if self.shuffle is not None and self.sort is not None:
            raise ValueError("shuffle= and sort= both state the order of the records: give one of them")
        if self.shuffle is not None and type(self.shuffle) is not int:
            raise TypeError(f"shuffle must be a seed, an int, got {self.shuffle!r}")
        if not isinstance(self.dedup, bool | str):
            raise TypeError(f"dedup must be True, False or the name of a column, got {self.dedup!r}")
        if type(self.workers) is not int or self.workers < 0:
            raise ValueError(f"workers must be a number of processes, or 0 for one per CPU, got {self.workers!r}")
        _ = self.shard_options

    @property
    def n_workers(self) -> int:
        """Number of processes that may be used."""
        return self.workers or config.available_cpus()

    @property
    def parts(self) -> Mapping[str, float]:
        """Share of the records by part; without a split, one part named ""."""
        if self.division is None:
            return {"": 1.0}
        names, weights = self.division.names, self.division.weights
        return {name: weight / sum(weights) for name, weight in zip(names, weights, strict=True)}

    @cached_property
    def division(self) -> Split | None:
        """The split, if there is one. Raises TypeError and ValueError."""
        return None if self.split is None else Split.of(self.split, 0, None, self.split_by)

    @property
    def order(self) -> SortOrder | None:
        """The order of the records; None: that of the source."""
        if self.shuffle is not None:
            return Shuffle(self.shuffle)
        return None if self.sort is None else SortBy((self.sort,))

    @property
    def has_passes(self) -> bool:
        """Whether other passes may come before the one that writes the shards."""
        return self.order is not None or bool(self.dedup)

    @property
    def shard_options(self) -> ShardOptions:
        """Options of the shard writers. Raises ValueError for an invalid size or compression."""
        return ShardOptions(parse_bytes(self.shard_size), parse_bytes(self.block_size), self.compression)


@dataclass(frozen=True)
class PackPlan:
    """Plan of a packing. Nothing has been written.

    key: Hash of the source and of the options that decide what is written; all passes of a packing have the same key.
    is_begun: Whether an earlier run has begun this packing; finished: tasks that it has finished, if the packing has
    one pass. is_committed: Whether an earlier run has committed all parts, so that nothing is left to do. run_plan: How
    this pass orders the records; None: they are written in the order of the source.
    """

    source: RecordSource
    url: str
    options: PackOptions
    tasks: tuple[tuple[InputSplit, ...], ...]  # splits by task; each task writes its own shards
    key: str
    finished: frozenset[int] = frozenset()
    skipped: tuple[SkippedFile, ...] = ()  # although neither include nor exclude says so
    is_begun: bool = False
    is_committed: bool = False
    run_plan: RunPlan | None = None

    @property
    def n_workers(self) -> int:
        """Number of processes to use."""
        return min(self.options.n_workers, max(len(self.tasks) - len(self.finished), 1))

    @property
    def total_bytes(self) -> int:
        """Bytes of the source."""
        return sum(split.n_bytes for task in self.tasks for split in task)


def plan_pack(source: Any, url: str | os.PathLike[str], options: PackOptions, inputs: object = None) -> PackPlan:
    """Inspect a source (see `pack`) and the data set's URL, and return a plan of the packing.

    Raises NotFound, CommitConflict, SchemaError, TypeError, ValueError, as `pack`.
    """
    with open_targets(url, options) as (store, targets):
        parents = {part: check_target(target, options) for part, target in targets.items()}
        first = next(iter(parents.values()))
        find = _find if options.resize is None and options.encode is None else _find_images
        chosen, skipped = find(source, inputs, options, first if options.mode == "append" else None)
        if options.mode == "append":
            for version in filter(None, parents.values()):
                check_same_schema(version.schema, chosen.schema)
        if options.division is not None:
            options.division.check_key(chosen.schema, "split_by")
        if options.sort is not None:
            check_sortable(chosen.schema, options.sort)
        if isinstance(options.dedup, str):
            chosen.schema.index(options.dedup)
        has_content_id = True
        if (found := object_of(chosen)) is not None:
            has_content_id = found.units.has_content_id
            found.units.is_inspected = False
            if options.dedup and found.units.is_read_once:
                raise ValueError("dedup= reads the source twice, and an iterator is read once: pass a function of it")
        tasks = divide_splits(chosen.splits, options.shard_options.shard_bytes)
        key = _key_of(chosen, tasks, options)
        packing = find_packing(store, key)
        committed = _check_committed(targets, parents, packing, options, key if has_content_id else None)
        finished = frozenset() if packing is None or options.has_passes else frozenset(packing.finished())
        if n_others := sum(records.key != key for records in list_packings(store)):
            logger.warning(
                "%s: packings of other sources, or with other options, were not finished, and are left to gc: %d",
                store.url,
                n_others,
            )
    begun = packing is not None
    return PackPlan(chosen, os.fspath(url), options, tuple(tasks), key, finished, tuple(skipped), begun, committed)


def _check_committed(
    targets: Mapping[str, Store],
    parents: Mapping[str, Version | None],
    packing: Packing | None,
    options: PackOptions,
    content_id: str | None,
) -> bool:
    """Return whether this packing has committed all parts. Raises CommitConflict if another one has made a data set.

    packing: Its records; they are gone if it has ended. content_id: Its key, if that tells the content of the source.
    """
    is_committed = True
    for part, parent in parents.items():
        if parent is not None and packing is not None:
            is_own = packing.committed(targets[part], part) is not None
        else:
            is_own = parent is not None and options.mode == "create" and parent.nonce == content_id
        if parent is not None and options.mode == "create" and not is_own:
            raise data_set_exists_error(targets[part], parent)
        is_committed = is_committed and is_own
    return is_committed


def _find(
    source: Any, inputs: object, options: PackOptions, parent: Version | None
) -> tuple[RecordSource, list[SkippedFile]]:
    if options.tokenize is not None:
        plain, skipped = _find(source, inputs, replace(options, tokenize=None), None)
        tokens = tokenized(plain, options.tokenize, options.text_column)
        if parent is not None:
            check_same_schema(parent.schema, tokens.schema)
        return tokens, skipped
    if options.map is not None:
        # schema= and classes= describe the results; classes of a folder of images also number its labels.
        plain, skipped = _find(source, inputs, replace(options, map=None, schema=None, classes={}), None)
        if isinstance(plain, FolderFiles) and options.classes:
            plain, skipped = _find(source, inputs, replace(options, map=None, schema=None), None)
        schema = None if parent is None else parent.schema
        mapped = map_source(plain, options.map, options.schema, options.classes, schema)
        if options.n_workers > 1:
            _check_picklable(mapped)
        return mapped, skipped
    if options.columns or options.filter is not None:
        plain, skipped = _find(source, inputs, replace(options, columns=(), filter=None), None)
        selected = select_source(plain, options.columns, options.filter, narrow)
        if isinstance(plain, FolderFiles) and parent is not None:  # the numbers of classes must be the same, too
            check_same_schema(parent.schema, selected.schema)
            return selected, skipped
        return with_schema_of(parent, selected, options.classes), skipped
    return _find_unchanged(source, inputs, options, parent)


def _find_unchanged(
    source: Any, inputs: object, options: PackOptions, parent: Version | None
) -> tuple[RecordSource, list[SkippedFile]]:
    """Find the files, the object or the data set of a source."""
    own = None
    if inputs is None and not is_object(source):
        own = _find_data_set(source, options)
        if own is None:
            return find_source(source, options, parent)
        source, options = own, replace(options, source_options={})
    what = "a Python object" if own is None else "a data set of tiercache"
    for name in ("kind", "labels", "label_pattern", "check_images", "include", "exclude", "source_options"):
        if getattr(options, name):
            raise ValueError(f"{name}= is for files; the source is {what}")
    schema = None if parent is None else parent.schema
    shard_bytes = options.shard_options.shard_bytes
    found = find_object(source, inputs, options.schema, options.classes, shard_bytes, schema)
    if options.n_workers > 1 and found.units.n_units > 1:  # also if there is little data, which one process packs
        _check_picklable(found)
    return found, []


def _find_data_set(source: str | os.PathLike[str], options: PackOptions) -> Dataset | None:
    """Return the data set of tiercache at a path or URL; None if it is not the URL of one."""
    text = os.fspath(source)
    if options.kind is not None or split_glob(text)[1] or find_file(text, options.source_options) is not None:
        return None
    with closing(open_store(source, **options.source_options)) as store:
        if find_latest(store) is None:
            return None
    return Dataset(source, cache=False, storage_options=options.source_options)


def _find_images(
    source: Any, inputs: object, options: PackOptions, parent: Version | None
) -> tuple[RecordSource, list[SkippedFile]]:
    """Find a source whose images are changed. Before that, they may have other encodings than the data set's."""
    before = parent
    if parent is not None:
        any_image = {c.name: Image(None, c.nullable) for c in parent.schema.columns if c.kind is Kind.IMAGE}
        before = replace(parent, schema_bytes=with_types(parent.schema, any_image).to_bytes())
    plain, skipped = _find(source, inputs, replace(options, resize=None, encode=None), before)
    function, types = recoded(plain.schema, options.resize, options.encode)
    schema = with_types(plain.schema, types)
    if parent is not None:
        mixed = {c.name for c in parent.schema.columns if c.kind is Kind.IMAGE and c.encoding is None}
        schema = with_types(schema, {name: Image(None, one.nullable) for name, one in types.items() if name in mixed})
        check_same_schema(parent.schema, schema)
    return MappedSource(plain, function, schema), skipped


def _check_picklable(source: RecordSource) -> None:
    try:
        pickle.dumps(source)
    except Exception as error:
        raise ValueError(
            f"the source cannot be sent to other processes ({error}): they must be able to import its function, which "
            "is therefore defined in a module, outside of other functions; or use workers=1"
        ) from error


@contextmanager
def open_targets(url: str | os.PathLike[str], options: PackOptions) -> Iterator[tuple[Store, Mapping[str, Store]]]:
    """Yield the store with the records of the packing, and that of each part's data set."""
    with ExitStack() as stack:
        store = stack.enter_context(closing(open_store(url, **options.storage_options)))
        targets = {"": store}
        if options.split is not None:
            roots = {part: part_url(url, part) for part in options.parts}
            opened = {part: open_store(root, **options.storage_options) for part, root in roots.items()}
            targets = {part: stack.enter_context(closing(one)) for part, one in opened.items()}
        yield store, targets


def part_url(url: str | os.PathLike[str], part: str) -> str:
    return f"{os.fspath(url).rstrip('/')}/{part}" if part else os.fspath(url)


def check_target(target: Store, options: PackOptions) -> Version | None:
    """Check a data set's store, and return its newest version, which this packing may have made; None: it has none."""
    parent = find_parent(target, "overwrite" if options.mode == "create" else options.mode)
    if (options.n_workers > 1 or options.engine == "ray") and isinstance(target, MemoryStore):
        raise ValueError(f"{target.url}: a memory store exists in one process only; pack into it with workers=1")
    return parent


def _key_of(source: RecordSource, tasks: Sequence[Sequence[InputSplit]], options: PackOptions) -> str:
    """Return a hash of what decides the shards that are written."""
    how = (options.on_error == "dead-letter", options.mode, options.shard_options, [len(task) for task in tasks])
    order = options.order, options.dedup, rearrange.RUN_BYTES
    facts = (repr(source), source.schema.to_bytes(), source.splits, how, options.division, order)
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(f"{fact!r}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()[:32]


def divide_splits(splits: Sequence[InputSplit], shard_bytes: int) -> list[tuple[InputSplit, ...]]:
    """Return the splits divided into tasks of neighbouring splits with about equal bytes, in order."""
    total = sum(split.n_bytes for split in splits)
    task_bytes = min(max(total // _TASKS, shard_bytes), _MOST_SHARDS_PER_TASK * shard_bytes)
    tasks: list[list[InputSplit]] = [[] for _ in range(max(total // task_bytes, 1))]
    before = 0
    for split in splits:
        middle = before + split.n_bytes / 2
        tasks[min(int(middle * len(tasks) / total), len(tasks) - 1) if total else 0].append(split)
        before += split.n_bytes
    return [tuple(task) for task in tasks if task]
