"""What can be said about packing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import pyarrow as pa

from tiercache.model import parse_bytes
from tiercache.shard.types import Schema, UserType

Kind: TypeAlias = Literal["images", "parquet", "jsonl"]
KINDS: tuple[Kind, ...] = ("images", "parquet", "jsonl")


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """How to pack.

    Attributes:
        kind: "images", "parquet" or "jsonl"; None: as the files' names say.
        schema: a mapping gives types of some columns, the others are as the source has them; an Arrow schema (or a
            Schema) gives all columns, and no others are packed. Not for images.
        mode: "create", "append" or "overwrite".
        shard_size, block_size: bytes, or texts such as "128MiB".
        compression: "auto", "none", "zstd" or "zstd:LEVEL", or a mapping by column.
        jobs: processes; 0: as many as there are CPUs.
        include, exclude: globs over the paths below the source: a file is packed that matches one of include (if there
            are any) and none of exclude.
        storage_options: for the data set's URL. source_options: for the source's URL.
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
            raise ValueError(f"kind is one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.mode not in ("create", "append", "overwrite"):
            raise ValueError(f"mode is 'create', 'append' or 'overwrite', got {self.mode!r}")
        if type(self.jobs) is not int or self.jobs < 0:
            raise ValueError(f"jobs is a number of processes, 0 for one a CPU, got {self.jobs!r}")
        for name in ("include", "exclude"):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"{name} is a sequence of globs, got the str {getattr(self, name)!r}")
        if min(parse_bytes(self.shard_size), parse_bytes(self.block_size)) == 0:
            raise ValueError("shard_size and block_size cannot be 0")


@dataclass(frozen=True, slots=True)
class PackProgress:
    """How far packing is. n_bytes, total_bytes: of the source."""

    n_records: int
    n_bytes: int
    total_bytes: int
