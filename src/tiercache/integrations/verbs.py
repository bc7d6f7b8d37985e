"""Methods that the file system delegates to its target, and the handling of paths that start with `tiercache::`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Verb: TypeAlias = Callable[..., Any]

_CHAIN = re.compile(r"tiercache(?:://|::)")
_MAGIC = re.compile(r"[*?\[]")


def without_protocol(path: Any) -> Any:
    """Return paths (a path, a list, or the keys of a mapping) without "tiercache::", as the target accepts them."""
    if isinstance(path, Mapping):
        return {without_protocol(name): value for name, value in path.items()}
    if isinstance(path, list | tuple | set | frozenset):
        return [without_protocol(name) for name in path]
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    match = _CHAIN.match(text) if isinstance(text, str) else None
    return text if match is None else text[match.end() :]


def literal_prefix(path: str) -> str:
    """Return the part of a path before its first wildcard: the folder that contains all matches."""
    return _MAGIC.split(path)[0].rpartition("/")[0] if _MAGIC.search(path) else path


def delegate(verb: str, *names: str) -> Verb:
    """Return a method that calls the target's method.

    Args:
        verb: Name of the method.
        names: Names of the arguments that are paths, in order.
    """

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        paths, rest = _taken(names, arguments, options)
        return getattr(self.fs, verb)(*[without_protocol(path) for path in paths], *rest, **options)

    return _called(call, verb, f"Call the target's {verb}().")


def delegate_write(verb: str, *names: str, drops: str) -> Verb:
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
            return getattr(self.fs, verb)(*[without_protocol(path) for path in paths], *rest, **options)
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


class DelegatedMethods:
    """All methods of a file system except those that read contents.

    The subclass provides fs (the target) and drop().
    """

    ls = delegate("ls", "path")
    info = delegate("info", "path")
    exists = delegate("exists", "path")
    lexists = delegate("lexists", "path")
    isdir = delegate("isdir", "path")
    isfile = delegate("isfile", "path")
    find = delegate("find", "path")
    walk = delegate("walk", "path")
    glob = delegate("glob", "path")
    du = delegate("du", "path")
    size = delegate("size", "path")
    sizes = delegate("sizes", "paths")
    expand_path = delegate("expand_path", "path")
    created = delegate("created", "path")
    modified = delegate("modified", "path")
    checksum = delegate("checksum", "path")
    ukey = delegate("ukey", "path")
    sign = delegate("sign", "path")
    mkdir = delegate("mkdir", "path")
    makedirs = delegate("makedirs", "path")
    rmdir = delegate("rmdir", "path")
    invalidate_cache = delegate("invalidate_cache", "path")
    start_transaction = delegate("start_transaction")
    end_transaction = delegate("end_transaction")

    pipe = delegate_write("pipe", "path", drops="path")
    pipe_file = delegate_write("pipe_file", "path", drops="path")
    put = delegate_write("put", "lpath", "rpath", drops="rpath")
    put_file = delegate_write("put_file", "lpath", "rpath", drops="rpath")
    copy = delegate_write("copy", "path1", "path2", drops="path2")
    cp_file = delegate_write("cp_file", "path1", "path2", drops="path2")
    mv = delegate_write("mv", "path1", "path2", drops="path1 path2")
    rm = delegate_write("rm", "path", drops="path")
    rm_file = delegate_write("rm_file", "path", drops="path")
    touch = delegate_write("touch", "path", drops="path")
