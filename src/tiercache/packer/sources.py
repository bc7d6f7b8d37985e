"""Sources of packing: which kind of source the files are, and its records, with the schema of the data set."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeAlias, cast, get_args

import pyarrow as pa
import pyarrow.compute as pc

from tiercache.errors import NotFound, SchemaError
from tiercache.layouts.hive import find_partitions
from tiercache.layouts.splits import choose_split, keys_of_split, text_of_card
from tiercache.packer import folders, images, tables
from tiercache.packer.arrays import ARRAY_SUFFIXES, ArrayFiles, find_arrays
from tiercache.packer.bad_records import ON_ERROR, OnError
from tiercache.packer.files import (
    Files,
    RecordSource,
    SkippedFile,
    SourceFile,
    find_files,
    find_index,
    plain_name,
    refuse_foreign_files,
    selected,
    with_fingerprint,
)
from tiercache.packer.layouts import LAYOUT_SUFFIXES, LayoutSource, find_layout_source, named_as
from tiercache.packer.litdata import LitDataChunks, LitDataTables, find_litdata
from tiercache.packer.objects import narrow_object
from tiercache.packer.tfrecords import TFRECORD_SUFFIXES, TFRecords, find_tfrecords
from tiercache.packer.tokens import TEXT_SUFFIXES, TextFiles
from tiercache.packer.transform import SelectedSource
from tiercache.shard.schema import Column, Image, Schema, UserType, check_same_schema
from tiercache.shard.versions import Version
from tiercache.store import folders_above, pin_revision
from tiercache.store.access import split_glob

SourceKind: TypeAlias = Literal[
    "images",
    "files",
    "parquet",
    "csv",
    "feather",
    "orc",
    "jsonl",
    "text",
    "numpy",
    "tfrecord",
    "mds",
    "litdata",
    "arrow",
    "megatron",
    "webdataset",
]
SOURCE_KINDS: tuple[SourceKind, ...] = get_args(SourceKind)
# Kinds that file names can indicate: the kind "files" is packed only on request.
_SUFFIXES: dict[SourceKind, tuple[str, ...]] = {
    "images": tuple(images.SUFFIXES),
    **cast("dict[SourceKind, tuple[str, ...]]", tables.TABLE_SUFFIXES),
    "jsonl": tables.JSON_SUFFIXES,
    "text": TEXT_SUFFIXES,
    "numpy": ARRAY_SUFFIXES,
    "tfrecord": TFRECORD_SUFFIXES,
    **cast("dict[SourceKind, tuple[str, ...]]", LAYOUT_SUFFIXES),
}
_FOLDER_KINDS = ("images", "files")
# Kinds whose files may say by their names, or in a README.md, to which split they belong.
_SPLIT_KINDS = ("parquet", "csv", "feather", "orc", "jsonl", "arrow", "webdataset")


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Options of the source of a packing. The arguments of `pack` of the same names describe them."""

    kind: SourceKind | None = None
    schema: Mapping[str, UserType] | pa.Schema | Schema | None = None
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    labels: str | os.PathLike[str] | None = None
    label_pattern: str | None = None
    check_images: bool = False
    on_error: OnError = "stop"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    columns: Sequence[str] = ()
    filter: pc.Expression | None = None
    tokenize: str | None = None
    text_column: str = "text"
    source_options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # may hold credentials

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in SOURCE_KINDS:
            raise ValueError(f"kind must be one of {', '.join(SOURCE_KINDS)}, got {self.kind!r}")
        if self.labels is not None and self.label_pattern is not None:
            raise ValueError("labels= and label_pattern= both state the labels of the files: give one of them")
        if self.on_error not in ON_ERROR:
            raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}, got {self.on_error!r}")
        for name, of in (("include", "globs"), ("exclude", "globs"), ("columns", "names")):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a sequence of {of}, got the str {getattr(self, name)!r}")
        if len(set(self.columns)) < len(self.columns):
            raise ValueError(f"columns= names a column twice: {', '.join(self.columns)}")
        if self.filter is not None and not isinstance(self.filter, pc.Expression):
            expected = "an expression of pyarrow, such as pyarrow.compute.field('label') == 3"
            raise TypeError(f"filter must be {expected}, got {self.filter!r}")


def kind_of(paths: Sequence[str]) -> SourceKind:
    """Return the kind that the files' names indicate; files that match no kind are ignored. Raises ValueError."""
    names = [plain_name(path) for path in paths]
    if all(name.endswith(TEXT_SUFFIXES) for name in names):
        return "text"
    # A README.md often lies beside other files, so files of text count only where nothing else lies. MDS is recognised
    # by the content of its index.
    ends = {kind: suffixes for kind, suffixes in _SUFFIXES.items() if kind not in ("text", "mds")}
    counts = {kind: sum(name.endswith(suffixes) for name in names) for kind, suffixes in ends.items()}
    if len(paths) > 1:  # other libraries, too, have files that end in .idx
        there = set(paths)
        counts["megatron"] = sum(path.endswith(".idx") and f"{path[:-4]}.bin" in there for path in paths)
    if counts["arrow"] or counts["megatron"]:  # state.json and vocab.json are no records
        counts["jsonl"] -= sum(path.lower().endswith(".json") for path in paths)
    found = [kind for kind, n in counts.items() if n]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f"{counts[kind]:,} of {kind}" for kind in found)
    what = f"files of several kinds ({listed})" if found else "no file name indicates the kind of the source"
    raise ValueError(f"{what}; say it with kind=, which is one of {', '.join(SOURCE_KINDS)}")


def find_source(
    source: str | os.PathLike[str], options: SourceOptions, parent: Version | None = None
) -> tuple[RecordSource, list[SkippedFile]]:
    """Inspect a source and return it with its kind, schema and splits, and the skipped files.

    parent is the version that is appended to. Raises NotFound, ValueError, SchemaError.
    """
    files, found, skipped, split = _find_files(source, options.source_options)
    if options.labels is not None:
        labels_path = os.path.abspath(options.labels)  # noqa: PTH100 -- the labels may lie beside the images
        found = [f for f in found if files.location(f.path) not in (labels_path, os.fspath(options.labels))]
    chosen = [f for f in found if selected(f.path, options.include, options.exclude)]
    if not chosen:
        raise NotFound(f"include= and exclude= leave none of the {len(found)} files", url=files.location(""))

    index = cast("SourceKind | None", find_index(files, chosen, options.kind))
    kind = options.kind or index
    if kind is None:
        refuse_foreign_files(files, chosen)
        kind = kind_of([f.path for f in chosen])
    chooses = not (options.include or options.exclude or split_glob(os.fspath(source))[1])
    chosen = _of_split(files, chosen, kind, split) if chooses else chosen
    files = with_fingerprint(files, chosen)
    given_for = {name: getattr(options, name) for name in ("labels", "label_pattern", "check_images")}
    if kind not in _FOLDER_KINDS and (useless := [name for name, value in given_for.items() if value]):
        raise ValueError(f"{useless[0]}= applies to folders of images or files, not to the kind {kind!r}")
    if kind in LAYOUT_SUFFIXES:
        layout = find_layout_source(files, chosen, kind)
        read = {file.info.key for file in layout.layout.files}
        skipped += [
            SkippedFile(f.path, f"it is not among the files of {layout.layout.name}")
            for f in chosen
            if f.path not in read and not f.path.lower().endswith(".json")  # what describes the data set
        ]
        stored = named_as(layout.layout, options.schema)
        names = {name: given for given, name in stored.items()}
        plain = Schema([Column.of(names.get(one.name, one.name), one.arrow) for one in layout.schema.columns])
        schema = with_types(plain, options.schema).with_classes(options.classes)
        typed = replace(layout, schema=schema, stored=stored)
        skipped = [f for f in skipped if selected(f.path, options.include, options.exclude)]
        return with_schema_of(parent, typed, options.classes), skipped
    if kind not in ("files", "text", "litdata"):
        # A folder also holds other files (README.md); a file that is named explicitly always counts. Spark and pyarrow
        # skip names that begin with "_".
        named = [f for f in chosen if _is_named_as(kind, f.path)]
        others = set(chosen) - set(named) if named else ()
        markers = {f for f in others if kind != "images" and f.path.rpartition("/")[2].startswith("_")}
        reason = f"its name is not that of {'an image' if kind == 'images' else f'a {kind} file'}"
        skipped += [SkippedFile(f.path, reason) for f in chosen if f in others and f not in markers]
        chosen = named or chosen
    if kind in _FOLDER_KINDS:
        folder, absent = _find_folder(kind, files, chosen, options, parent)
        skipped += absent
    skipped = [f for f in skipped if selected(f.path, options.include, options.exclude)]
    if kind in _FOLDER_KINDS:
        return with_schema_of(parent, folder), skipped
    if kind == "text":
        if options.schema is not None or options.classes:
            raise SchemaError("files of text have the fixed columns text and path: omit schema= and classes=")
        return with_schema_of(parent, TextFiles(files, tuple(chosen))), skipped
    table = _find_table(kind, files, chosen, options)
    if kind == "litdata":
        read = {split.path for split in table.splits}
        others = {f for f in chosen if f.path not in read and not f.path.lower().endswith(".json")}
        skipped += [SkippedFile(f.path, "the index does not list it") for f in chosen if f in others]
    table = replace(table, schema=table.schema.with_classes(options.classes))
    return with_schema_of(parent, table, options.classes), skipped


def _find_files(
    source: str | os.PathLike[str], storage_options: Mapping[str, Any]
) -> tuple[Files, list[SourceFile], list[SkippedFile], list[str]]:
    """Return what find_files() finds; on the Hub, of a folder above, and the names of a split of its files."""
    source = pin_revision(os.fspath(source), storage_options)
    try:
        return *find_files(source, storage_options), []
    except NotFound:
        with suppress(NotFound):  # a pair of files of Megatron, NAME.idx and NAME.bin, is called NAME
            return *find_files(f"{source}.idx", storage_options), []
        for root, names in folders_above(source):
            with suppress(NotFound):
                files, found, skipped = find_files(root, storage_options)
                keys = [file.path for file in found]
                readme = partial(text_of_card, keys, partial(_read_card, files))
                if len(names) < 2 or choose_split(root, keys, names, readme):
                    return files, found, skipped, names
        raise


def _of_split(files: Files, found: Sequence[SourceFile], kind: SourceKind, names: Sequence[str]) -> list[SourceFile]:
    """Return the files without those of other splits. Raises SchemaError if several splits would be mixed."""
    if kind not in _SPLIT_KINDS:
        return list(found)
    keys = [file.path for file in found if _is_named_as(kind, file.path)]
    there = [file.path for file in found]
    others = set(keys) - set(keys_of_split(files.location(""), there, keys, names, partial(_read_card, files)))
    if keys and files.root.startswith("hf://"):  # each repository has it
        others.add("README.md")
    return [file for file in found if file.path not in others]


def _read_card(files: Files) -> bytes:
    return files.read_many(["README.md"])[0]


def with_types(schema: Schema, given: Mapping[str, UserType] | pa.Schema | Schema | None) -> Schema:
    """Return a schema with the types that are given: of some columns, or of all that are packed."""
    if given is None:
        return schema
    if not isinstance(given, Mapping):
        schema.select(Schema.of(given).names)  # raises SchemaError for a column that there is not
        return Schema.of(given)
    schema.select(list(given))
    typed = Schema.of({column.name: given.get(column.name, column.arrow) for column in schema.columns})
    kept = {column.name: column.classes for column in schema.columns if column.classes and column.name not in given}
    return typed.with_classes(kept)


def _is_named_as(kind: SourceKind, path: str) -> bool:
    """Return whether a file's name is that of a kind. A file without a suffix is an image if its bytes say so."""
    name = plain_name(path)
    return name.endswith(_SUFFIXES[kind]) or (kind == "images" and "." not in name)


def _find_folder(
    kind: SourceKind, files: Files, found: Sequence[SourceFile], options: SourceOptions, parent: Version | None
) -> tuple[folders.FolderFiles, list[SkippedFile]]:
    given = options.schema
    if given is not None and not isinstance(given, Mapping):
        raise SchemaError(
            f"schema= of a folder of {kind} is a mapping from column names to types: its columns are fixed"
        )
    if unknown := [name for name in options.classes if name != "label"]:
        raise SchemaError("classes= names the classes of the column 'label' of a folder of files", column=unknown[0])
    classes = options.classes.get("label")
    if parent is not None:  # the new records have the columns and the class names of the data set
        columns = {column.name: column for column in parent.schema.columns}
        classes = columns["label"].classes or classes if "label" in columns else classes
        given = {name: str(columns[name]) for name in ("label", "image") if name in columns} | dict(given or {})
    return folders.find_folder(
        files,
        found,
        content=("image", Image()) if kind == "images" else ("bytes", "bytes"),
        given=given or {},
        classes=classes,
        table=None if options.labels is None else _read_labels(options.labels),
        pattern=options.label_pattern,
        labels_by_folder=kind == "images",
        decodes=options.check_images,
    )


def _read_labels(labels: str | os.PathLike[str]) -> folders.LabelTable:
    """Return a table of labels, which is read as the source of a packing is."""
    source, _ = find_source(labels, SourceOptions())
    columns: dict[str, list[Any]] = {name: [] for name in source.schema.names}
    locations: list[tuple[int, Any]] = []
    for split in source.splits:
        for batch in source.read(split, 1 << 20):
            for one in batch.bad:
                raise SchemaError(f"{one.location}: {one.reason}", column=one.column)
            locations.append((len(next(iter(columns.values()), [])), batch.location))
            for name, values in columns.items():
                found = cast("Mapping[str, Any]", batch.columns)[name]  # of files, a batch has columns
                values.extend(found.to_pylist() if isinstance(found, pa.Array) else found)

    def location(row: int) -> str:
        first, of_batch = next((first, of) for first, of in reversed(locations) if first <= row)
        return cast("str", of_batch(row - first))

    types = {column.name: str(column) for column in source.schema.columns}
    return folders.LabelTable(columns, types, location, os.fspath(labels))


_Table: TypeAlias = "tables.TableFiles | tables.JsonLines | ArrayFiles | TFRecords | LitDataChunks | LitDataTables"


def _find_table(kind: SourceKind, files: Files, found: Sequence[SourceFile], options: SourceOptions) -> _Table:
    given = options.schema
    types = given if isinstance(given, Mapping) else {}
    if kind == "jsonl":
        if given is None or isinstance(given, Mapping):
            return tables.find_jsonl(files, found, types)
        partitions = find_partitions([file.path for file in found], files.location)
        return tables.JsonLines(files, Schema.of(given), tables.split_files(found), partitions)
    table: _Table
    if kind == "numpy":
        table = find_arrays(files, found, types)
    elif kind == "litdata":
        table = find_litdata(files, found, types)
    elif kind == "tfrecord":
        table = find_tfrecords(files, found, types)
    else:
        table = tables.find_tables(kind, files, found, types, accepts_damage=options.on_error != "stop")
    if given is None or isinstance(given, Mapping):
        return table
    table.schema.select(Schema.of(given).names)  # raises SchemaError for a column that the files lack
    return replace(table, schema=Schema.of(given))


_SameColumns: TypeAlias = (
    tables.TableFiles | folders.FolderFiles | LayoutSource | ArrayFiles | TFRecords | LitDataChunks | LitDataTables
)


def narrow(source: RecordSource, schema: Schema) -> RecordSource:
    """Return a source that reads only some of its columns, those of a schema; the source itself if it cannot."""
    return replace(source, schema=schema) if isinstance(source, _SameColumns) else narrow_object(source, schema)


def with_schema_of(
    parent: Version | None, source: RecordSource, classes: Mapping[str, Sequence[str]] | None = None
) -> RecordSource:
    """Return the source with the schema of the data set that it is appended to, if any.

    If a source has the data set's columns, its inferred types are ignored: each value is checked when it is written.
    Raises SchemaError if the columns differ.
    """
    if parent is None:
        return source
    names, expected = set(source.schema.names), set(parent.schema.names)
    schema = parent.schema.with_classes(classes or {})  # the writer refuses other classes than those of the data set
    if isinstance(source, tables.JsonLines) and names <= expected:
        return replace(source, schema=schema)
    if isinstance(source, _SameColumns | SelectedSource) and names == expected:
        return replace(source, schema=schema)
    check_same_schema(parent.schema, source.schema)
    return source
