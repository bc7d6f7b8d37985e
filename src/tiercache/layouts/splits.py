"""Which files of a folder are one split: by the rules of Hugging Face's Hub for names, or by the YAML of README.md."""

from __future__ import annotations

import importlib
import os
import posixpath
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from tiercache.distribution import install_command
from tiercache.errors import SchemaError
from tiercache.store.access import matches_glob

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_WORDS = {split: re.compile(rf"(.*[-._ 0-9])?({'|'.join(words)})([-._ 0-9].*)?") for split, words in _KEYWORDS.items()}
_NUMBERED_SPLIT = re.compile(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_OTHERS = "files of no split"
# The splits of each configuration, and the keys of each split.
Splits = Mapping[str, Sequence[str]]


def keys_of_split(
    url: str, there: Collection[str], keys: Sequence[str], names: Sequence[str], read_card: Callable[[], bytes]
) -> Sequence[str]:
    """Return the keys of the files of one split, see choose_split(); all of them if a state.json lists the files.

    there: Keys of all files of the folder; keys: of its files of records. read_card: Returns the README.md, which is
    called only if there is one.
    """
    if not keys or any(key.rpartition("/")[2] == "state.json" for key in there):
        return keys
    return choose_split(url.rstrip("/"), keys, names, lambda: text_of_card(there, read_card))


def text_of_card(there: Collection[str], read_card: Callable[[], bytes]) -> str:
    """Return the text of the README.md of a folder, "" if there is none. See keys_of_split() for the parameters."""
    return read_card().decode(errors="replace") if "README.md" in there else ""


def choose_split(url: str, keys: Sequence[str], names: Sequence[str], readme: Callable[[], str]) -> Sequence[str]:
    """Return the keys of the files of one split. All of them, if neither their names nor README.md say splits.

    None of them, if two names are given and the first one is not that of a configuration: it may be a folder.

    Args:
        url: Folder of the files, for messages.
        keys: Keys of files of records, in their order.
        names: Name of a split or of a configuration, or both; without them, the folder must have one split.
        readme: Returns the text of the README.md of the folder, "" if there is none.

    Raises:
        SchemaError: There are several splits or configurations, or none of the name; the message lists them.
    """
    configs, config = _configs(url, keys, readme())
    left = list(names)
    if left and left[0] in configs:
        config = left.pop(0)
    elif len(left) > 1:
        return ()
    if config is None:
        raise SchemaError(
            f"{url}: several configurations would be mixed: {', '.join(configs)}; append one of them to the URL: "
            f"{_ways(url, {name: list(chain(*splits.values())) for name, splits in configs.items()}, keys)}"
        )
    splits = configs[config]
    if len(left) == 1 and left[0] in splits:
        return splits[left[0]]
    if left:
        also = f", and configurations {', '.join(configs)}" if len(configs) > 1 else ""
        there = f"there are {', '.join(splits)}{also}" if splits else "the names of its files say no splits"
        raise SchemaError(f"{url}: no split {'/'.join(left)!r}; {there}")
    if len(splits) > 1:
        listed = ", ".join(f"{name} ({len(found):,} file{'s' * (len(found) != 1)})" for name, found in splits.items())
        raise SchemaError(
            f"{url}: several splits would be mixed: {listed}; append one of them to the URL: {_ways(url, splits, keys)}"
        )
    return next(iter(splits.values()), keys)


def _ways(url: str, splits: Splits, keys: Sequence[str]) -> str:
    ways = [way for name, found in splits.items() if name != _OTHERS and (way := _way(url, name, found, keys))]
    return f"{', '.join(ways)}; or a wildcard, as /**/*{posixpath.splitext(keys[0])[1]} for all files"


def _way(url: str, name: str, found: Sequence[str], keys: Sequence[str]) -> str:
    """Return what names only these files after the URL: the split, their folder, or a wildcard; "" if nothing does."""
    if url.startswith("hf://datasets/"):
        return f"/{name}"
    folder = posixpath.commonpath([posixpath.dirname(key) for key in found])
    if folder and sum(key.startswith(f"{folder}/") for key in keys) == len(found):
        return f"/{folder}"
    if len(found) == 1:
        return f"/{found[0]}"
    start = os.path.commonprefix(list(found)).rstrip("0123456789")  # noqa: RUF071 - character by character
    glob = f"{start}*{posixpath.splitext(found[0])[1]}"
    fits = [key for key in keys if matches_glob(key.split("/"), glob.split("/"))]
    return f"/{glob}" if fits == list(found) else ""


def _configs(url: str, keys: Sequence[str], readme: str) -> tuple[Mapping[str, Splits], str | None]:
    """Return the splits by configuration, and the configuration that is meant if none is named."""
    found: dict[str, Splits] = {}
    default: str | None = None
    for name, folder, is_default, patterns in _yaml_of(url, readme):
        if patterns:
            splits: Splits = {
                split: [key for key in keys if any(_fits(key, posixpath.join(folder, path)) for path in paths)]
                for split, paths in patterns.items()
            }
        else:
            inside = [key for key in keys if key.startswith(f"{folder}/")] if folder else keys
            splits = named_splits(inside, folder) or {"train": inside}
        splits = {split: files for split, files in splits.items() if files}
        if splits:
            found[name] = splits
            default = name if is_default else default
    if not found:
        return {"default": named_splits(keys)}, "default"
    return found, default if default is not None or len(found) > 1 else next(iter(found))


def _fits(key: str, pattern: str) -> bool:
    return matches_glob(key.split("/"), posixpath.normpath(pattern).split("/"))


def _yaml_of(url: str, readme: str) -> Sequence[tuple[str, str, bool, Splits]]:
    """Return the configurations in the YAML block of a README.md. Raises SchemaError."""
    if not readme.startswith("---") or "configs:" not in readme:
        return ()
    try:
        repocard, yaml = map(importlib.import_module, ("huggingface_hub.repocard", "yaml"))
    except ImportError as error:
        raise SchemaError(
            f"{url}/README.md: it states which files are a data set, and huggingface_hub reads it: "
            f"{install_command('hub')}; or name the files by a wildcard"
        ) from error
    try:
        configs = repocard.RepoCard(readme, ignore_metadata_errors=True).data.to_dict().get("configs") or []
        return [_checked(config) for config in configs]
    except (yaml.YAMLError, ValueError, TypeError, KeyError) as error:
        raise SchemaError(f"{url}/README.md: its configurations cannot be read: {error}") from error


def _checked(config: dict[str, Any]) -> tuple[str, str, bool, Splits]:
    """Return the name, folder, whether it is the default, and the patterns by split of a configuration, if any."""
    patterns: dict[str, list[str]] = {}
    given = dict(config).get("data_files")
    for one in given if isinstance(given, list) else [] if given is None else [given]:
        split, path = (one["split"], one["path"]) if isinstance(one, dict) else ("train", one)
        patterns.setdefault(str(split), []).extend(map(str, path if isinstance(path, list) else [path]))
    name, folder = str(config.get("config_name", "default")), str(config.get("data_dir") or "")
    return name, folder, name == "default" or config.get("default") is True, patterns


def named_splits(keys: Sequence[str], folder: str = "") -> Splits:
    """Return the splits that names of files and folders state: "data/train-00000-of-00002.parquet", "test/", "dev.csv".

    Files beside them, of which no name says a split, are listed under a name of their own. folder: Where the keys lie;
    its own name says nothing.
    """
    inside = {key: key.removeprefix(f"{folder}/") for key in keys}
    for rule in (_numbered, _of_folders, _of_name):
        found: dict[str, list[str]] = {}
        for key in keys:
            for split in rule(inside[key]):
                found.setdefault(split, []).append(key)
        if found:
            known = {key for some in found.values() for key in some}
            others = [key for key in keys if key not in known]
            ordered = sorted(found, key=lambda split: ([*_WORDS, split].index(split), split))
            return {split: found[split] for split in ordered} | ({_OTHERS: others} if others else {})
    return {}


def _numbered(key: str) -> Iterator[str]:
    if match := _NUMBERED_SPLIT.fullmatch(key):
        yield match[1]


def _of_folders(key: str) -> Iterator[str]:
    folders = [folder for folder in key.split("/")[:-1] if "=" not in folder]  # partitions are columns
    return (split for split, words in _WORDS.items() if any(map(words.fullmatch, folders)))


def _of_name(key: str) -> Iterator[str]:
    return (split for split, words in _WORDS.items() if words.fullmatch(key.rpartition("/")[2]))
