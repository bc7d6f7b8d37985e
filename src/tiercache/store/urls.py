"""URLs: what may be shown of them, and how they fall into a root and a key."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import unquote

from tiercache.store.contract import check_key

# In abfss://container@account/... the "@" belongs to the name of the place.
_AT_IS_A_PLACE = ("abfs", "abfss", "wasb", "wasbs")


@dataclass(frozen=True, slots=True, repr=False)
class Location:
    """A URL in parts.

    scheme: lower case, "" for a local path; host: with userinfo and port; path: of a URL without its leading "/".
    """

    scheme: str
    host: str
    path: str

    @classmethod
    def parse(cls, url: str | os.PathLike[str]) -> Location:
        """Parts of a URL or local path; `file://` becomes a local path.

        Raises:
            ValueError: empty, or a file URL of another machine.
        """
        text = os.fspath(url)
        if not text:
            raise ValueError(f"not a URL or path: {text!r}")
        scheme, found, rest = text.partition("://")
        if not found or not scheme.replace("+", "").replace("-", "").replace(".", "").isalnum():
            return cls("", "", text)
        host, _, path = rest.partition("/")
        if scheme.lower() != "file":
            return cls(scheme.lower(), host, path)
        if host not in ("", "localhost"):
            raise ValueError(f"{redact(text)}: a file URL has three slashes (file:///folder), or names this machine")
        return cls("", "", unquote("/" + path))

    def __repr__(self) -> str:
        return f"Location({self.shown!r})"

    @property
    def shown(self) -> str:
        """The URL without userinfo, query and fragment."""
        if not self.scheme:
            return self.path
        host = self.host
        if self.scheme not in _AT_IS_A_PLACE or ":" in host.rpartition("@")[0]:
            host = host.rpartition("@")[2]
        path = self.path.partition("?")[0].partition("#")[0]
        return f"{self.scheme}://{host}/{path}".rstrip("/") if path else f"{self.scheme}://{host}"

    @property
    def has_userinfo(self) -> bool:
        """Whether something stands before an "@" that is not the name of a place."""
        return "@" in self.host and self.scheme not in _AT_IS_A_PLACE

    @property
    def has_query(self) -> bool:
        """Whether the path has a query or fragment."""
        return bool(self.scheme) and ("?" in self.path or "#" in self.path)

    @property
    def full(self) -> str:
        """The URL as given, secrets included: never shown."""
        if not self.scheme:
            return self.path
        return f"{self.scheme}://{self.host}/{self.path}".rstrip("/") if self.path else f"{self.scheme}://{self.host}"


def redact(url: str | os.PathLike[str]) -> str:
    """The URL without userinfo, query and fragment: what may stand in messages, logs, file names and catalogs."""
    text = os.fspath(url)
    if text.lower().startswith("file://"):
        return text
    return Location.parse(text).shown


def split_url(url: str | os.PathLike[str]) -> tuple[str, str]:
    """Root URL of the folder that an object lies in, and the object's key there: ("s3://bucket/folder", "object").

    Raises:
        ValueError: the URL names no object, or has a query.
    """
    place = Location.parse(url)
    if place.has_query:
        raise ValueError(f"{place.shown}: URLs with a query (such as presigned ones) cannot be opened")
    path = place.path
    if not place.scheme and not path.endswith("/"):
        path = os.path.abspath(path)  # noqa: PTH100 - resolve() would follow links
    folder, _, name = path.rpartition("/")
    if not name:
        raise ValueError(f"{place.shown}: names a folder, not an object")
    if not place.scheme:
        return folder or "/", check_key(name)
    return Location(place.scheme, place.host, folder).full, check_key(name)
