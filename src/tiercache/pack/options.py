"""Options and progress of packing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import pyarrow as pa

from tiercache.model import parse_bytes
from tiercache.shard.schema import Schema, UserType

Kind: TypeAlias = Literal["images", "parquet", "jsonl"]
KINDS: tuple[Kind, ...] = ("images", "parquet", "jsonl")


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """Options of packing.

    Attributes:
        kind: Kind of the source: "images", "parquet" or "jsonl"; None: decided by the files' names.
        schema: Mapping from column names to types, which overrides the types of these columns; or an Arrow schema (or a
            Schema) with all columns to pack. Not for images.
        mode: "create" for a new data set, "append" or "overwrite".
        shard_size: Target size of a shard in bytes, or a text such as "128MiB".
        block_size: Target size of a block in bytes, or a text such as "1MiB".
        compression: "auto", "none", "zstd" or "zstd:LEVEL", or a mapping from columns to these.
        jobs: Number of processes; 0: one per CPU.
        include: Globs over the paths below the source; only files that match one of them are packed. Empty: all files.
        exclude: Globs of files that are not packed.
        storage_options: Options of the data set's store.
        source_options: Options of the source's store.
    """

    kind: Kind | None = None
    schema: Mapping[str, UserType] | pa.Schema | Schema | None = None
    mode: Literal["create", "append", "overwrite"] = "create"
    shard_size: int | str = "128MiB"
    block_size: int | str = "1MiB"
    compression: str | Mapping[str, str] = "auto"
    jobs: int = 1
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # may hold credentials
    source_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.mode not in ("create", "append", "overwrite"):
            raise ValueError(f"mode must be 'create', 'append' or 'overwrite', got {self.mode!r}")
        if type(self.jobs) is not int or self.jobs < 0:
            raise ValueError(f"jobs must be a number of processes, or 0 for one per CPU, got {self.jobs!r}")
        for name in ("include", "exclude"):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a sequence of globs, got the str {getattr(self, name)!r}")
        if min(parse_bytes(self.shard_size), parse_bytes(self.block_size)) == 0:
            raise ValueError("shard_size and block_size cannot be 0")


@dataclass(frozen=True, slots=True)
class PackProgress:
    """Progress of packing.

    Attributes:
        n_records: Number of records packed.
        n_bytes: Bytes of the source that are packed.
        total_bytes: Bytes of the whole source.
    """

    n_records: int
    n_bytes: int
    total_bytes: int
