"""Options that several verbs share, and the parsers of option values."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from tiercache.model import parse_bytes, parse_duration


def option(flags: str, metavar: str | None, text: str, **more: Any) -> Any:
    """Return typer's description of an option with a value. flags: Its names, separated by spaces."""
    return typer.Option(*flags.split(), metavar=metavar, help=text, **more)


def flag(flags: str, text: str) -> Any:
    """Return typer's description of an option without a value."""
    return option(flags, None, text)


def argument(metavar: str, text: str) -> Any:
    """Return typer's description of an argument."""
    return typer.Argument(metavar=metavar, help=text)


Url: TypeAlias = Annotated[str, argument("URL", "Data set: a local path, or a URL such as s3://bucket/name.")]
DryRun: TypeAlias = Annotated[bool, flag("--dry-run", "Print what would be done, and change nothing.")]
Yes: TypeAlias = Annotated[bool, flag("--yes -y", "Do not ask for confirmation.")]
Jobs: TypeAlias = Annotated[
    int, typer.Option("--jobs", "-j", min=0, help="Number of shards to process at a time; 0: one per CPU.")
]
Include: TypeAlias = Annotated[
    list[str] | None,
    option("--include", "GLOB", "Only names that match, e.g. '*.jpg' or 'train/**'. May be repeated."),
]
Exclude: TypeAlias = Annotated[list[str] | None, option("--exclude", "GLOB", "Skip names that match. May be repeated.")]
VersionNumber: TypeAlias = Annotated[
    int | None,
    option("--at", "VERSION", "Number of the data set version to use; default: the newest."),
]
Columns: TypeAlias = Annotated[
    str | None,
    option("--columns", "A,B", "Names of the columns to use, in this order; default: all."),
]
StorageOptions: TypeAlias = Annotated[
    list[str] | None,
    option("--storage-option", "KEY=VALUE", "Option of the URL's store, e.g. region=eu-central-1. May be repeated."),
]
CacheDir: TypeAlias = Annotated[
    str | None, option("--cache", "DIR", "Folder of the cache; default: the configured folder.")
]
CacheSize: TypeAlias = Annotated[
    str | None,
    option("--cache-size", "SIZE", "Size limit of the cache, e.g. 200GB, or 80% (of its disk)."),
]
FilesFrom: TypeAlias = Annotated[
    str | None,
    option("--files-from -f", "FILE", "Only shards named in FILE, one name per line; -: standard input."),
]
Seed: TypeAlias = Annotated[
    int | None,
    option("--seed", "N", "Seed of the training's shuffle, as in LoaderOptions(seed=N)."),
]
Placement: TypeAlias = Annotated[
    str | None,
    option(
        "--placement",
        "HOW",
        "The training's assignment of shards to ranks, as in LoaderOptions: sticky (default) or global.",
    ),
]
Streams: TypeAlias = Annotated[
    int | None,
    option("--streams", "N", "Number of the training's shuffle streams, as in LoaderOptions; default: one per rank."),
]
ShuffleGroup: TypeAlias = Annotated[
    str | None,
    option(
        "--shuffle-group",
        "SIZE",
        "Size of the training's shuffle groups, as in LoaderOptions, or 'all'; default: 4GiB.",
    ),
]
Rules: TypeAlias = Annotated[
    Path | None,
    option("--rules", "FILE", "Rule file; default: the nearest tiercache.toml, from this folder upwards."),
]
BatchSize: TypeAlias = Annotated[
    int | None,
    option(
        "--batch-size",
        "N",
        "The training's batch size per rank; needed only if --streams does not divide the global batch size.",
        min=1,
    ),
]


def parse_storage_options(pairs: Sequence[str] | None) -> dict[str, Any]:
    """Return the options that KEY=VALUE texts give. true, false and {JSON objects} are parsed; other values stay text.

    Numbers stay text, because a key or an account name may look like a number; back ends parse numbers from text.

    Raises:
        ValueError: A text has no "=" or no key, or a value in braces is not JSON.
    """
    options: dict[str, Any] = {}
    for pair in pairs or ():
        key, found, text = pair.partition("=")
        if not found or not key:
            raise ValueError("--storage-option takes KEY=VALUE, e.g. region=eu-central-1")
        with errors_name(f"--storage-option {key}: not a JSON object"):
            options[key] = json.loads(text) if text in ("true", "false") or text.startswith("{") else text
    return options


def parse_columns(text: str | None) -> list[str] | None:
    """Return the column names in "a,b", or None for None. Raises ValueError for an empty name."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ValueError(f"--columns takes names separated by commas, got {text!r}")
    return names


def parse_fraction(text: str) -> float:
    """Return the fraction, 0 to 1, that "25%" or "0.25" names. Raises ValueError."""
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ValueError(f"a fraction is from 0% to 100%, got {text!r}")
    return share


@contextmanager
def errors_name(option: str) -> Iterator[None]:
    """Let a ValueError in the block name the option."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def check_size(option: str, text: str | None) -> str | None:
    """Return text unchanged if it is a valid size, or None for None. Raises ValueError, which names the option."""
    with errors_name(option):
        if text is not None:
            parse_bytes(text, whole_bytes=1)
        return text


def parse_rate(option: str, text: str) -> int:
    """Return the bytes per second that "200MB/s" or "200MB" names. Raises ValueError, which names the option."""
    try:
        rate = parse_bytes(text.strip().removesuffix("/s"))
    except ValueError as error:
        raise ValueError(f"{option}: {error}, optionally followed by /s") from error
    if rate < 1:
        raise ValueError(f"{option} must be at least 1 byte per second, got {text!r}")
    return rate


def parse_size(option: str, text: str, *, whole_bytes: int | None = None) -> int:
    """Return the bytes of a size: "200GB", or "25%" of whole_bytes. Raises ValueError, which names the option."""
    with errors_name(option):
        return parse_bytes(text, whole_bytes=whole_bytes)


def parse_age(option: str, text: str) -> float:
    """Return the seconds of a duration such as "7d". Raises ValueError, which names the option."""
    with errors_name(option):
        return parse_duration(text)
