"""Decides what a source is and how its parts are shared out. Pure but for looking at the source's files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tiercache.errors import NotFound, SchemaError
from tiercache.pack import images, jsonl, parquet
from tiercache.pack.files import Files, LeftOut, SourceFile, find_files, selected
from tiercache.pack.foreign import refuse_foreign_files, refuse_foreign_index
from tiercache.pack.options import KINDS, Kind, PackOptions
from tiercache.pack.partitions import Partitions
from tiercache.pack.source import Part, Source
from tiercache.shard.difference import check_same_schema
from tiercache.shard.types import Schema

_SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "images": tuple(images.SUFFIXES),
    "parquet": parquet.SUFFIXES,
    "jsonl": jsonl.SUFFIXES,
}
# More shares than processes even out their speeds; each ends with a shard that is not full, so none is below four.
_SHARES_A_JOB = 4
_SHARDS_A_SHARE = 4


def kind_of(paths: Sequence[str]) -> Kind:
    """The one kind that the names of files say; what no kind knows is not counted.

    Raises:
        ValueError: none or several.
    """
    found = {kind for kind in KINDS for path in paths if path.lower().endswith(_SUFFIXES[kind])}
    if len(found) == 1:
        return found.pop()
    what = (
        f"files of several kinds ({', '.join(sorted(found))})"
        if found
        else "no file of a kind that is known by its name"
    )
    raise ValueError(f"{what}; say kind: {', '.join(KINDS)}")


def find_source(
    source: str | os.PathLike[str], options: PackOptions, *, classes: Sequence[str] | None = None
) -> tuple[Source, list[LeftOut]]:
    """Look at a source: which files, their kind, the schema, the parts; and which files are left out.

    classes: of the data set that is appended to, for images.

    Raises:
        NotFound: no file.
        ValueError: the kind cannot be told.
        SchemaError: files that cannot be packed together, or files of another library's format.
    """
    files, found, left_out = find_files(source, options.source_options)
    chosen = [f for f in found if selected(f.path, options.include, options.exclude)]
    left_out = [f for f in left_out if selected(f.path, options.include, options.exclude)]
    if not chosen:
        raise NotFound(f"none of {len(found)} files passes include and exclude", url=files.place(""))
    refuse_foreign_index(files, chosen)
    if options.kind is None:
        refuse_foreign_files(files, chosen)
    kind = options.kind or kind_of([f.path for f in chosen])
    if kind == "images":
        if options.schema is not None:
            raise SchemaError("a folder of images has a schema of its own: image, label, path")
        return images.find_images(files, chosen, classes=classes), left_out
    # A folder of tables has other files too (README.md, Spark's _SUCCESS); a file that was named itself counts always.
    known = [f for f in chosen if f.path.lower().endswith(_SUFFIXES[kind])]
    if known:
        taken = set(known)
        left_out += [LeftOut(f.path, f"not {kind} by its name") for f in chosen if f not in taken and not _is_marker(f)]
    return _find_table(kind, files, known or chosen, options), left_out


def _is_marker(file: SourceFile) -> bool:
    """Whether a file holds no records by convention: Spark and pyarrow pass over names that begin with "_"."""
    return file.path.rsplit("/", 1)[-1].startswith("_")


def _find_table(kind: Kind, files: Files, found: Sequence[SourceFile], options: PackOptions) -> Source:
    given = options.schema
    if given is None or isinstance(given, Mapping):
        find = parquet.find_parquet if kind == "parquet" else jsonl.find_jsonl
        return find(files, found, given or {})
    if kind == "parquet":
        whole = parquet.find_parquet(files, found, {})
        whole.schema.select(Schema.of(given).names)  # each must be there
        return replace(whole, schema=Schema.of(given))
    partitions = Partitions.find(files, found)
    return jsonl.JsonLines(files, Schema.of(given), jsonl.split_files(found), partitions)


def fitted(source: Source, there: Schema) -> Source:
    """The source with the schema of the data set that it is appended to.

    Where a table has its columns, each value decides whether it fits, and not what was guessed of the types.

    Raises:
        SchemaError: other columns, or images of other classes or encodings.
    """
    names = set(source.schema.names)
    if isinstance(source, jsonl.JsonLines) and names <= set(there.names):
        return replace(source, schema=there)
    if isinstance(source, parquet.ParquetFiles) and names == set(there.names):
        return replace(source, schema=there)
    check_same_schema(there, source.schema)
    return source


def share_out(parts: Sequence[Part], jobs: int, shard_bytes: int) -> list[tuple[Part, ...]]:
    """Runs of neighbouring parts, in order, of about equal bytes: one for one job, else one to four for each job."""
    total = sum(part.n_bytes for part in parts)
    n_shares = 1
    if jobs > 1:
        n_shares = max(jobs, min(_SHARES_A_JOB * jobs, total // (_SHARDS_A_SHARE * shard_bytes)))
    shares: list[list[Part]] = [[] for _ in range(min(n_shares, max(len(parts), 1)))]
    before = 0
    for part in parts:
        middle = before + part.n_bytes / 2
        shares[min(int(middle * len(shares) / total), len(shares) - 1) if total else 0].append(part)
        before += part.n_bytes
    return [tuple(share) for share in shares if share]
