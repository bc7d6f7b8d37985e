"""Folders in which each file is a record: images, or files of any kind; with their labels and further columns.

The class of an image is the first folder of its path, as in torchvision's ImageFolder, or the part of its path that a
pattern matches. A table of labels names the files; its other columns become columns of the data set.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tiercache.errors import SchemaError
from tiercache.images.decoder import image_checker
from tiercache.packer.files import BadRecord, Files, InputBatch, InputSplit, SkippedFile, SourceFile
from tiercache.packer.images import check_image
from tiercache.shard.schema import Column, Kind, Schema, UserType

_SPLIT_FILES = 64
_SHOWN_NAMES = 5
_LABEL = "label"
# Names of folders that hold the splits of a data set rather than its classes.
_SPLIT_NAMES = frozenset(("train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"))


@dataclass(frozen=True)
class LabelTable:
    """Rows of a table of labels as columns, with their types. location(i) names row i."""

    columns: Mapping[str, Sequence[Any]]
    types: Mapping[str, UserType]
    location: Callable[[int], str]
    url: str


@dataclass(frozen=True)
class _Labels:
    """Further columns of the files of a folder, and why files have none, by the files' numbers."""

    types: Mapping[str, UserType]
    columns: Mapping[str, Sequence[Any]] = field(repr=False)
    missing: Mapping[int, str] = field(repr=False)
    digest: str = ""  # of the columns, whose repr is long

    def with_digest(self) -> _Labels:
        facts = repr((self.columns, sorted(self.missing))).encode(errors="surrogatepass")
        return replace(self, digest=hashlib.sha256(facts).hexdigest())


@dataclass(frozen=True)
class FolderFiles:
    """Files of a folder, a files.RecordSource: each is a record of its bytes, its labels and its path.

    content: Column of the bytes. decodes: Whether each image is decoded, to find those that are damaged inside.
    """

    files: Files
    found: tuple[SourceFile, ...]
    schema: Schema
    content: str
    labels: _Labels
    decodes: bool = False

    @property
    def splits(self) -> tuple[InputSplit, ...]:
        starts = range(0, len(self.found), _SPLIT_FILES)
        runs = [(start, min(start + _SPLIT_FILES, len(self.found))) for start in starts]
        return tuple(InputSplit("", s, e, sum(f.n_bytes for f in self.found[s:e])) for s, e in runs)

    def read(self, split: InputSplit, batch_bytes: int) -> Iterator[InputBatch]:
        decoding_error = image_checker() if self.decodes else None
        column = next((c for c in self.schema.columns if c.name == self.content and c.kind is Kind.IMAGE), None)
        for numbers in self._runs(split, batch_bytes):
            run = self.found[numbers.start : numbers.stop]
            contents, paths = self.files.read_many([f.path for f in run]), [f.path for f in run]
            good, bad = [], []
            for i, (number, content) in enumerate(zip(numbers, contents, strict=True)):
                reason = self.labels.missing.get(number)
                if reason is None and column is not None:
                    reason = check_image(content, column.encoding)
                    if reason is None and decoding_error is not None:
                        reason = decoding_error(content)
                if reason is None:
                    good.append(i)
                else:
                    bad.append(BadRecord(self.files.location(paths[i]), reason, content))
            columns: dict[str, Sequence[Any]] = {self.content: contents, "path": paths} | {
                name: values[numbers.start : numbers.stop] for name, values in self.labels.columns.items()
            }
            chosen = {name: [columns[name][i] for i in good] for name in self.schema.names}
            locations = [self.files.location(paths[i]) for i in good]
            yield InputBatch(chosen, len(good), sum(f.n_bytes for f in run), locations.__getitem__, bad)

    def _runs(self, split: InputSplit, batch_bytes: int) -> Iterator[range]:
        start, run_bytes = split.start, 0
        for number in range(split.start, split.end):
            run_bytes += self.found[number].n_bytes
            if run_bytes >= batch_bytes or number + 1 == split.end:
                yield range(start, number + 1)
                start, run_bytes = number + 1, 0


def find_folder(
    files: Files,
    found: Sequence[SourceFile],
    *,
    content: tuple[str, UserType],
    given: Mapping[str, UserType],
    classes: Sequence[str] | None = None,
    table: LabelTable | None = None,
    pattern: str | None = None,
    labels_by_folder: bool = False,
    decodes: bool = False,
) -> tuple[FolderFiles, list[SkippedFile]]:
    """Return the files of a folder with their labels, and the files that the table names although they do not exist.

    Args:
        files: Location of the files.
        found: Files, in order.
        content: Name and type of the column of the files' bytes.
        given: Types of some columns, instead of those that are found.
        classes: Names of the classes of the column "label", in order; None: the names that occur, sorted.
        table: Labels of the files, by a column that names them.
        pattern: Regular expression whose group "label", or first group, is the class in a file's path.
        labels_by_folder: Whether the first folder of a path is the class, without a table and a pattern.
        decodes: Whether each image is decoded.
    """
    paths = [file.path for file in found]
    absent: list[SkippedFile] = []
    if table is not None:
        labels, absent = _labels_of_table(paths, table)
    elif pattern is not None:
        labels = _labels_of_pattern(paths, pattern)
    elif labels_by_folder and any("/" in path for path in paths):
        labels = _labels_of_folders(files, paths)
    else:
        labels = _Labels({}, {}, {})
    labels, names = _numbered(labels, given, classes)
    name, content_type = content
    types: dict[str, UserType] = {name: content_type, **labels.types, "path": "str"}
    if new := [column for column in given if column not in types]:
        raise SchemaError(f"{files.location('')}: no such column; there are {', '.join(types)}", column=new[0])
    schema = Schema.of(types | dict(given)).with_classes({_LABEL: names} if names else {})
    return FolderFiles(files, tuple(found), schema, name, labels.with_digest(), decodes), absent


def _numbered(
    labels: _Labels, given: Mapping[str, UserType], classes: Sequence[str] | None
) -> tuple[_Labels, tuple[str, ...]]:
    """Return labels with numbers instead of names in the column "label", and the names; without names, if it has none.

    A column that is asked for as text keeps its names.
    """
    values = labels.columns.get(_LABEL)
    is_text = labels.types.get(_LABEL) in ("str", "str?")
    if values is None or not is_text or (_LABEL in given and Column.of(_LABEL, given[_LABEL]).kind is Kind.STR):
        return labels, ()
    found = sorted({value for value in values if value is not None})
    names = tuple(found if classes is None else classes)
    if new := sorted(set(found) - set(names)):
        raise SchemaError(
            f"class {new[0]!r} is not among the {len(names)} classes {_shown(names)}, which classes= or the data set "
            "to append to names"
        )
    numbers = {name: number for number, name in enumerate(names)}
    type_ = "int64?" if labels.types[_LABEL] == "str?" else "int64"
    columns = {**labels.columns, _LABEL: [None if value is None else numbers[value] for value in values]}
    return replace(labels, types={**labels.types, _LABEL: type_}, columns=columns), names


def _labels_of_folders(files: Files, paths: Sequence[str]) -> _Labels:
    flat = next((path for path in paths if "/" not in path), None)
    if flat is not None:
        n_flat = sum("/" not in path for path in paths)
        raise SchemaError(
            f"{files.location(flat)}: {n_flat:,} of {len(paths):,} files lie beside the sub-folders, so they have no "
            "class: an image must lie in a sub-folder that is named after its class; leave them out with exclude=, or "
            "state the classes with labels= or label_pattern="
        )
    deep = [path.split("/")[:-1] for path in paths if path.count("/") > 1]
    if deep and {folders[0].lower() for folders in deep} & _SPLIT_NAMES:
        outer, inner = ({folders[level] for folders in deep} for level in (0, 1))
        raise SchemaError(
            f"{files.location('/'.join(deep[0]))}: a second level of folders: {_shown(inner)} in {_shown(outer)}, "
            "which are splits rather than classes: pack each of them by itself. If they are classes, say it with "
            r"label_pattern='^([^/]+)/'"
        )
    return _Labels({_LABEL: "str"}, {_LABEL: [path.split("/")[0] for path in paths]}, {})


def _labels_of_pattern(paths: Sequence[str], pattern: str) -> _Labels:
    try:
        rule = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"label_pattern is not a regular expression: {error}: {pattern!r}") from None
    if not rule.groups:
        raise ValueError(f"label_pattern needs a group, as in '(?P<label>[a-z]+)_[0-9]+', got {pattern!r}")
    group: str | int = _LABEL if _LABEL in rule.groupindex else 1
    found = [match and match[group] for match in map(rule.search, paths)]
    missing = {i: f"its path does not match {pattern!r}" for i, value in enumerate(found) if not value}
    if len(missing) == len(paths):
        raise SchemaError(f"label_pattern={pattern!r} matches none of {len(paths):,} paths, such as {paths[0]!r}")
    return _Labels({_LABEL: "str"}, {_LABEL: found}, missing)


def _labels_of_table(paths: Sequence[str], table: LabelTable) -> tuple[_Labels, list[SkippedFile]]:
    """Return the columns of a table by file, and the files that it names although they do not exist.

    A column names the files by their paths, names, or names without suffix.
    """
    texts = _texts(table)
    by, numbers, most = "", {}, 0
    for key_of in (str, _name, _stem):
        keys = [key_of(path) for path in paths]
        if len(set(keys)) < len(keys):
            continue
        found = {key: number for number, key in enumerate(keys)}
        for name, values in texts.items():
            n_matches = sum(value in found for value in values)
            if n_matches > most:
                by, numbers, most = name, found, n_matches
    if not most:
        first = {name: values[0] for name, values in table.columns.items() if values}
        raise SchemaError(
            f"{table.url}: no column names the files: its first row is {first}, the first file {paths[0]!r}"
        )
    rows: dict[int, int] = {}
    absent = []
    for row, value in enumerate(texts[by]):
        number = numbers.get(value)
        if number is None:
            absent.append(SkippedFile(str(value), f"{table.location(row)} names it, but it does not exist"))
        elif rows.setdefault(number, row) != row:
            raise SchemaError(f"{table.location(row)}: a second row for {value!r}", column=by)
    others = [name for name in table.columns if name != by]
    if "path" in others:
        raise SchemaError(f"{table.url}: column {by!r} names the files; rename the other column 'path'", column="path")
    missing = {n: f"no row of {table.url} names it" for n in range(len(paths)) if n not in rows}
    columns = {
        name: [table.columns[name][rows[n]] if n in rows else None for n in range(len(paths))] for name in others
    }
    return _Labels({name: table.types[name] for name in others}, columns, missing), absent


def _texts(table: LabelTable) -> dict[str, Sequence[str]]:
    """Return the columns of text; numbers count as text, because they may be names without suffix."""
    return {
        name: values if is_text else [str(value) for value in values]
        for name, values in table.columns.items()
        if (is_text := table.types[name] in ("str", "str?")) or table.types[name] == "int64"
    }


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _stem(path: str) -> str:
    return _name(path).rpartition(".")[0] or _name(path)


def _shown(names: Iterator[str] | set[str] | Sequence[str]) -> str:
    shown = sorted(names)
    more = f" and {len(shown) - _SHOWN_NAMES:,} more" if len(shown) > _SHOWN_NAMES else ""
    return ", ".join(map(repr, shown[:_SHOWN_NAMES])) + more
