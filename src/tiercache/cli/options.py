"""The flags that verbs share, and how their texts are read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, TypeAlias

import typer

from tiercache.model import parse_bytes, parse_duration
from tiercache.shard.types import Image, Ragged, Tensor, UserType

Url: TypeAlias = Annotated[str, typer.Argument(metavar="URL", help="The data set: a local path or any store's URL.")]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")]
Quiet: TypeAlias = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")]
Verbose: TypeAlias = Annotated[bool, typer.Option("--verbose", "-v", help="A failure's traceback too.")]
DryRun: TypeAlias = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
Yes: TypeAlias = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Jobs: TypeAlias = Annotated[int, typer.Option("--jobs", "-j", min=0, help="How many at a time; 0: one a CPU.")]
Include: TypeAlias = Annotated[
    list[str] | None, typer.Option("--include", metavar="GLOB", help="Only what matches; may be given again.")
]
Exclude: TypeAlias = Annotated[
    list[str] | None, typer.Option("--exclude", metavar="GLOB", help="Not what matches; may be given again.")
]
Version: TypeAlias = Annotated[int | None, typer.Option("--at", metavar="VERSION", help="A version by number.")]
Columns: TypeAlias = Annotated[
    str | None, typer.Option("--columns", metavar="A,B", help="Only these columns, in this order.")
]
StorageOptions: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--storage-option", metavar="KEY=VALUE", help="For the URL's store; may be given again."),
]
CacheDir: TypeAlias = Annotated[
    str | None, typer.Option("--cache", metavar="DIR", help="The cache's folder, instead of the configured one.")
]
CacheSize: TypeAlias = Annotated[
    str | None, typer.Option("--cache-size", metavar="SIZE", help="Its budget: 200GB, or 80% of the disk.")
]
FilesFrom: TypeAlias = Annotated[
    str | None,
    typer.Option("--files-from", "-f", metavar="FILE", help="Only those named in FILE, one a line; -: standard input."),
]
Seed: TypeAlias = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Of the training's shuffled order, as LoaderOptions has it.")
]
Placement: TypeAlias = Annotated[
    str | None, typer.Option("--placement", metavar="HOW", help="Of the training: sticky (the default) or global.")
]
Streams: TypeAlias = Annotated[
    int | None, typer.Option("--streams", metavar="N", help="Of the training; by default one for each rank.")
]
ShuffleGroup: TypeAlias = Annotated[
    str | None, typer.Option("--shuffle-group", metavar="SIZE", help="Of the training, or all; by default 4GiB.")
]
BatchSize: TypeAlias = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, metavar="N", help="Of one rank, where it is no multiple of the streams."),
]

_TYPE = re.compile(r"(?P<name>\w+)(?:\[(?P<shape>[^\]]*)\]|<(?P<encoding>[^>]*)>)?(?P<nullable>\??)")


def parse_storage_options(pairs: Sequence[str] | None) -> dict[str, Any]:
    """KEY=VALUE texts as a mapping. true, false and {JSON objects} are read as such, all else stays text.

    Numbers stay text because a key or an account may look like one; back ends read numbers from texts.

    Raises:
        ValueError: no "=", or no JSON between braces.
    """
    options: dict[str, Any] = {}
    for pair in pairs or ():
        key, found, text = pair.partition("=")
        if not found or not key:
            raise ValueError("--storage-option takes KEY=VALUE, as in region=eu-central-1")
        options[key] = text
        if text in ("true", "false") or text.startswith("{"):
            try:
                options[key] = json.loads(text)
            except ValueError as error:
                raise ValueError(f"--storage-option {key}: not a JSON object: {error}") from error
    return options


def parse_columns(text: str | None) -> list[str] | None:
    """Names from "a,b"; None for None. Raises ValueError for an empty name."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ValueError(f"--columns takes names with commas between them, got {text!r}")
    return names


def parse_types(pairs: Sequence[str] | None) -> dict[str, UserType]:
    """Column types from NAME=TYPE texts; see parse_type(). Raises ValueError or SchemaError."""
    types: dict[str, UserType] = {}
    for pair in pairs or ():
        name, found, text = pair.rpartition("=")
        if not found or not name:
            raise ValueError(f"--column takes NAME=TYPE, as in label=int64 or caption=str?, got {pair!r}")
        types[name] = parse_type(text)
    return types


def parse_type(text: str) -> UserType:
    """A column's type as `info` prints it: "int64", "str?", "image<jpeg>", "float32[3, 64, 64]", "float32[*, 4]?".

    Raises:
        ValueError: not of these forms.
        SchemaError: no such type.
    """
    match = _TYPE.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"not a column type: {text!r}; there are int64, str?, image<jpeg>, float32[3, 64], float32[*, 4]?"
        )
    nullable = bool(match["nullable"])
    if match["encoding"] is not None and match["name"] == "image":
        return Image(match["encoding"], nullable=nullable)
    if match["shape"] is None:
        return text.strip()
    try:
        shape = tuple(None if d.strip() == "*" else int(d) for d in match["shape"].split(","))
    except ValueError as error:
        raise ValueError(f"a shape has numbers, and * where the size varies, got {text!r}") from error
    fixed = tuple(d for d in shape if d is not None)
    if len(fixed) == len(shape):
        return Tensor(match["name"], fixed, nullable=nullable)
    return Ragged(match["name"], shape, nullable=nullable)


def parse_share(text: str) -> float:
    """A share of a whole, 0 to 1, from "25%" or "0.25". Raises ValueError."""
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ValueError(f"a share is from 0% to 100%, got {text!r}")
    return share


def check_size(option: str, text: str | None) -> str | None:
    """The size as it was given, once it is known to be one. Raises ValueError naming the option."""
    if text is not None:
        try:
            parse_bytes(text, whole_bytes=1)
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from error
    return text


def parse_rate(option: str, text: str) -> int:
    """Bytes a second of "200MB/s" or "200MB". Raises ValueError naming the option."""
    try:
        rate = parse_bytes(text.strip().removesuffix("/s"))
    except ValueError as error:
        raise ValueError(f"{option}: {error}, and /s after it if you like") from error
    if rate < 1:
        raise ValueError(f"{option} must be 1 byte a second or more, got {text!r}")
    return rate


def parse_size(option: str, text: str, *, whole_bytes: int | None = None) -> int:
    """Bytes of a size. Raises ValueError naming the option."""
    try:
        return parse_bytes(text, whole_bytes=whole_bytes)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def parse_age(option: str, text: str) -> float:
    """Seconds of "7d". Raises ValueError naming the option."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error
