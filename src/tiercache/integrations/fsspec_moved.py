"""Paths whose files have moved to another tier: the `tiercache` file system lists them as if they had stayed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fsspec import AbstractFileSystem

from tiercache.model import ObjectInfo
from tiercache.store.placement.locations import FileLocator


class MovedPaths(AbstractFileSystem):  # type: ignore[misc]  # fsspec ships no types
    """A file system of a few names, of which only names and sizes are known. fsspec derives its other methods."""

    cachable = False
    protocol = "tiercache-moved"

    def __init__(self, files: Mapping[str, ObjectInfo]) -> None:
        """Store the files. files: Full path -> description where the file lies now."""
        super().__init__()
        self._files = dict(files)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.rstrip("/")

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """Return the names directly below a folder, or a file's own."""
        path = self._strip_protocol(path)
        if path in self._files:
            found = {path: self._about(path)}
        else:
            names = {name[len(path) + 1 :].split("/")[0] for name in self._files if name.startswith(f"{path}/")}
            if not names:
                raise FileNotFoundError(path)
            found = {f"{path}/{name}": self._about(f"{path}/{name}") for name in sorted(names)}
        return [*found.values()] if detail else [*found]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Return the description of a file or folder."""
        path = self._strip_protocol(path)
        if path not in self._files and not any(name.startswith(f"{path}/") for name in self._files):
            raise FileNotFoundError(path)
        return self._about(path)

    def _about(self, path: str) -> dict[str, Any]:
        info = self._files.get(path)
        if info is None:
            return {"name": path, "size": 0, "type": "directory"}
        about: dict[str, Any] = {"name": path, "size": info.n_bytes, "type": "file"}
        about |= {} if info.modified_s is None else {"mtime": info.modified_s}
        return about | ({} if info.etag is None else {"ETag": info.etag})


def moved_paths(locator: FileLocator, path: str, url: str) -> MovedPaths | None:
    """Return the file, or everything below the folder, that once lay at a path; None: it is nowhere.

    path: Path of the file system. url: The same as a URL or local path. Raises StoreError.
    """
    file = locator.find_file(url)
    if file is not None:
        return MovedPaths({path: file.info})
    folder = locator.find_folder(url)
    return None if folder is None else MovedPaths({f"{path}/{name}": one.info for name, one in folder.files.items()})


# Methods that look paths up. Their answer for a path that the target does not have may be an error, False or nothing.
FOLLOWED = frozenset(
    ("info", "ls", "exists", "lexists", "isdir", "isfile", "find", "walk", "glob", "du", "size", "expand_path")
)


def follow(method: str, delegated: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that calls the target's; a path that the target lacks is looked up where it has moved."""

    def call(self: Any, path: Any, *arguments: Any, **options: Any) -> Any:
        error: FileNotFoundError | None = None
        answer: Any = None
        if method != "walk" or self.fs.exists(self._strip_protocol(path)):  # walk() answers only when it is used
            try:
                answer = delegated(self, path, *arguments, **options)
            except FileNotFoundError as missing:
                error = missing
        if answer or not isinstance(path, str):
            if error is not None:
                raise error
            return answer
        moved = self.moved(path)
        if moved is not None:
            return getattr(moved, method)(self._strip_protocol(path), *arguments, **options)
        if error is not None:
            raise error
        return delegated(self, path, *arguments, **options) if method == "walk" else answer

    call.__name__, call.__qualname__, call.__doc__ = method, f"TierCacheFileSystem.{method}", delegated.__doc__
    return call
