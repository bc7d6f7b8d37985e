"""The file system behind `tiercache::`, made anew in each process, and stores of its buckets or top folders."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial
from hashlib import blake2b
from typing import Any
from weakref import WeakValueDictionary

from tiercache.store import FsspecStore, check_key, redact
from tiercache.store.landing import PerProcess

# Options that say which place is meant; never a secret. What lies elsewhere is another object, though its path, size
# and date are the same.
_PLACES = (
    "endpoint_url", "endpoint", "host", "hostname", "port", "account_name", "account_host", "base_url", "url",
    "instance", "org", "repo", "sha", "ref", "gist_id", "root_file_id", "share", "namespace", "project_id",
    "path", "fo", "target_protocol",
)  # fmt: skip
_WITH_PLACES = ("client_kwargs", "target_options")
_PLAIN = re.compile(r"[\w.:/@ -]*")
_HTTP = re.compile(r"(https?://[^/]+)/(.+)")


class Target:
    """A file system of fsspec, by its class and options. Safe from any thread; a forked child makes its own.

    Values of options never show.
    """

    def __init__(self, make: Callable[[], Any], given: Any = None) -> None:
        """make: gives the file system that people see; given: this one here, in this process."""
        first = [given]
        # What was given is for the process that gave it: clients and event loops do not live through a fork.
        self._fs: PerProcess[Any] = PerProcess(lambda: (first and first.pop()) or make(), id)
        kind, arguments, options = type(self.fs), self.fs.storage_args, dict(self.fs.storage_options)
        self.protocol: str = _first(kind.protocol)
        self._make = partial(unshared, kind, arguments, options)
        # In memory only, and a hash: it is made of secrets too.
        self._digest = blake2b(repr((kind, arguments, sorted(options.items()))).encode()).digest()
        self._place = "/".join(_places(_named(kind, arguments, options)))

    def __repr__(self) -> str:
        return f"Target({self.protocol!r})"

    @property
    def fs(self) -> Any:
        """The file system of this process."""
        return self._fs.get()

    def store(self, root: str) -> FsspecStore:
        """The store of a bucket or top folder, with a file system of its own that remembers no listings.

        Equal targets share it: fsspec makes a file system for each thread, and each would have its own connections.
        """
        store = _stores.get((self._digest, root))
        if store is None:
            store = _stores[self._digest, root] = FsspecStore(root, self.url(root), {}, make=self._make)
        return store

    def url(self, path: str) -> str:
        """What may be shown of a path: no credentials, no query."""
        if path.startswith(("http://", "https://")):
            return redact(path)
        return f"{self.protocol}://{self._place}{'/' if self._place and not path.startswith('/') else ''}{path}"


_stores: WeakValueDictionary[tuple[bytes, str], FsspecStore] = WeakValueDictionary()


def place_of(path: str) -> tuple[str, str] | None:
    """(root, key) of a path of a file system: its bucket, host or top folder, and the rest.

    None: nothing that can be cached: the path of a version or with a signature ("?", of HTTP "#" too), of an S3 access
    point, of a file directly below "/", or one that is no key (see check_key).
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


def unshared(kind: Callable[..., Any], arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """A file system like another, but of no other's event loop, connections or listings."""
    # Not asynchronous: then it runs on fsspec's own loop, from whatever thread or loop it is asked.
    kept = {name: value for name, value in options.items() if name not in ("asynchronous", "loop")}
    try:
        return kind(*arguments, **{**kept, "use_listings_cache": False}, skip_instance_cache=True)
    except TypeError:  # a class that does not hand unknown options on keeps no listings of fsspec's kind
        return kind(*arguments, **kept, skip_instance_cache=True)


def _named(kind: type[Any], arguments: tuple[Any, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name, those that were given by position too."""
    names = list(inspect.signature(kind.__init__).parameters)[1:]
    return {**dict(zip(names, arguments, strict=False)), **options}


def _places(options: Mapping[str, Any]) -> list[str]:
    """What options say about where: "127.0.0.1:9000", "host:22"."""
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
