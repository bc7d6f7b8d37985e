"""Methods that the file system delegates to its target, and the handling of paths that start with `tiercache::`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Verb: TypeAlias = Callable[..., Any]

_CHAIN = re.compile(r"tiercache(?:://|::)")
_MAGIC = re.compile(r"[*?\[]")


def bare(path: Any) -> Any:
    """Return paths (a path, a list, or the keys of a mapping) without "tiercache::", as the target accepts them."""
    if isinstance(path, Mapping):
        return {bare(name): value for name, value in path.items()}
    if isinstance(path, list | tuple | set | frozenset):
        return [bare(name) for name in path]
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    match = _CHAIN.match(text) if isinstance(text, str) else None
    return text if match is None else text[match.end() :]


def literal(path: str) -> str:
    """Return the part of a path before its first wildcard: the folder that contains all matches."""
    return _MAGIC.split(path)[0].rpartition("/")[0] if _MAGIC.search(path) else path


def passed_on(verb: str, *names: str) -> Verb:
    """Return a method that calls the target's method.

    Args:
        verb: Name of the method.
        names: Names of the arguments that are paths, in order.
    """

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        paths, rest = _taken(names, arguments, options)
        return getattr(self.fs, verb)(*[bare(path) for path in paths], *rest, **options)

    return _called(call, verb, f"Call the target's {verb}().")


def written(verb: str, *names: str, drops: str) -> Verb:
    """Return a method that calls the target's writing method and drops cached copies.

    Args:
        verb: Name of the method.
        names: Names of the arguments that are paths, in order.
        drops: Names of the arguments whose cached copies are dropped, such as "path1 path2".
    """
    dropped = [names.index(name) for name in drops.split()]

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        paths, rest = _taken(names, arguments, options)
        try:
            return getattr(self.fs, verb)(*[bare(path) for path in paths], *rest, **options)
        finally:
            self.drop(*(paths[number] for number in dropped if number < len(paths)))

    return _called(call, verb, f"Call the target's {verb}() and drop the cached copies of the written paths.")


def _taken(
    names: tuple[str, ...], arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[list[Any], tuple[Any, ...]]:
    """Return (paths, other arguments), and remove paths given by name from options."""
    paths = list(arguments[: len(names)])
    paths += [options.pop(name) for name in names[len(paths) :] if name in options]
    return paths, arguments[len(names) :]


def _called(method: Verb, name: str, doc: str) -> Verb:
    method.__name__, method.__qualname__, method.__doc__ = name, f"TargetVerbs.{name}", doc
    return method


class TargetVerbs:
    """All methods of a file system except those that read contents.

    The subclass provides fs (the target) and drop().
    """

    ls = passed_on("ls", "path")
    info = passed_on("info", "path")
    exists = passed_on("exists", "path")
    lexists = passed_on("lexists", "path")
    isdir = passed_on("isdir", "path")
    isfile = passed_on("isfile", "path")
    find = passed_on("find", "path")
    walk = passed_on("walk", "path")
    glob = passed_on("glob", "path")
    du = passed_on("du", "path")
    size = passed_on("size", "path")
    sizes = passed_on("sizes", "paths")
    expand_path = passed_on("expand_path", "path")
    created = passed_on("created", "path")
    modified = passed_on("modified", "path")
    checksum = passed_on("checksum", "path")
    ukey = passed_on("ukey", "path")
    sign = passed_on("sign", "path")
    mkdir = passed_on("mkdir", "path")
    makedirs = passed_on("makedirs", "path")
    rmdir = passed_on("rmdir", "path")
    invalidate_cache = passed_on("invalidate_cache", "path")
    start_transaction = passed_on("start_transaction")
    end_transaction = passed_on("end_transaction")

    pipe = written("pipe", "path", drops="path")
    pipe_file = written("pipe_file", "path", drops="path")
    put = written("put", "lpath", "rpath", drops="rpath")
    put_file = written("put_file", "lpath", "rpath", drops="rpath")
    copy = written("copy", "path1", "path2", drops="path2")
    cp_file = written("cp_file", "path1", "path2", drops="path2")
    mv = written("mv", "path1", "path2", drops="path1 path2")
    rm = written("rm", "path", drops="path")
    rm_file = written("rm_file", "path", drops="path")
    touch = written("touch", "path", drops="path")
