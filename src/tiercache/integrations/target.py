"""The file system behind `tiercache::`, created in each process, and stores of its buckets or top folders."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial
from hashlib import blake2b
from typing import Any
from weakref import WeakValueDictionary

from tiercache.store import FsspecStore, check_key, redact
from tiercache.store.landing import ProcessLocal

# Options that say on which server an object is; they are never secret. Objects with the same path, size and date on
# different servers are different objects.
_PLACES = (
    "endpoint_url", "endpoint", "host", "hostname", "port", "account_name", "account_host", "base_url", "url",
    "instance", "org", "repo", "sha", "ref", "gist_id", "root_file_id", "share", "namespace", "project_id",
    "path", "fo", "target_protocol",
)  # fmt: skip
_WITH_PLACES = ("client_kwargs", "target_options")
_PLAIN = re.compile(r"[\w.:/@ -]*")
_HTTP = re.compile(r"(https?://[^/]+)/(.+)")


class TargetFileSystem:
    """A file system of fsspec, given by its class and options.

    Safe for threads; a forked child creates its own instance.

    Values of options are never shown.
    """

    def __init__(self, make: Callable[[], Any], given: Any = None) -> None:
        """Open the file system.

        Args:
            make: Function that creates the file system that users see.
            given: Existing instance to use in this process instead.
        """
        first = [given]
        # A given instance serves only the process that gave it, because clients and event loops do not survive a fork.
        self._fs: ProcessLocal[Any] = ProcessLocal(lambda: (first and first.pop()) or make(), id)
        kind, arguments, options = type(self.fs), self.fs.storage_args, dict(self.fs.storage_options)
        self.protocol: str = _first(kind.protocol)
        self._make = partial(private_copy, kind, arguments, options)
        # A hash that stays in memory, because it covers secrets too.
        self._digest = blake2b(repr((kind, arguments, sorted(options.items()))).encode()).digest()
        self._place = "/".join(_places(_named(kind, arguments, options)))

    def __repr__(self) -> str:
        return f"Target({self.protocol!r})"

    @property
    def fs(self) -> Any:
        """File system of this process."""
        return self._fs.get()

    def store(self, root: str) -> FsspecStore:
        """Return the store of a bucket or top folder. Its own file system does not cache listings.

        Equal targets share the store: fsspec creates a file system per thread, and each would have its own connections.
        """
        store = _stores.get((self._digest, root))
        if store is None:
            store = _stores[self._digest, root] = FsspecStore(root, self.url(root), {}, make=self._make)
        return store

    def url(self, path: str) -> str:
        """Return the URL of a path without credentials and query."""
        if path.startswith(("http://", "https://")):
            return redact(path)
        return f"{self.protocol}://{self._place}{'/' if self._place and not path.startswith('/') else ''}{path}"


_stores: WeakValueDictionary[tuple[bytes, str], FsspecStore] = WeakValueDictionary()


def split_path(path: str) -> tuple[str, str] | None:
    """Split the path of a file system into (root, key): its bucket, host or top folder, and the rest.

    Returns:
        None if the object cannot be cached: the path of a version or with a signature ("?", with HTTP also "#"), of an
            S3
        access point, of a file directly below "/", or a path that is not a key (see check_key).
    """
    match = _HTTP.fullmatch(path)
    if match is not None:
        root, key = match[1], match[2]
    else:
        start = 1 if path.startswith("/") else 0
        cut = path.find("/", start)
        root, key = ("", path) if cut < 0 else (path[:cut], path[cut + 1 :])
    if "?" in path or path.startswith("arn:") or (match is not None and "#" in path):
        return None
    try:
        return root, check_key(key)
    except ValueError:
        return None


def _first(protocol: str | tuple[str, ...] | list[str]) -> str:
    return protocol if isinstance(protocol, str) else protocol[0]


def private_copy(kind: Callable[..., Any], arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """Return a new file system with the same options that shares no event loop, connections or listings."""
    # Not asynchronous, so that it runs on fsspec's own loop, whichever thread or loop calls it.
    kept = {name: value for name, value in options.items() if name not in ("asynchronous", "loop")}
    try:
        return kind(*arguments, **{**kept, "use_listings_cache": False}, skip_instance_cache=True)
    except TypeError:  # a class that does not pass on unknown options has no fsspec listings cache
        return kind(*arguments, **kept, skip_instance_cache=True)


def _named(kind: type[Any], arguments: tuple[Any, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options by name, including those that were given by position."""
    names = list(inspect.signature(kind.__init__).parameters)[1:]
    return {**dict(zip(names, arguments, strict=False)), **options}


def _places(options: Mapping[str, Any]) -> list[str]:
    """Return the values of options that name a server or folder, such as "127.0.0.1:9000" or "host:22"."""
    found = []
    for name in _PLACES:
        value = options.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool):
            text = redact(str(value) or "-").rpartition("://")[2]
            found += [text] if _PLAIN.fullmatch(text) else []
    for name in _WITH_PLACES:
        inner = options.get(name)
        if isinstance(inner, Mapping):
            found += _places(inner)
    return found
