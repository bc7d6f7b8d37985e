"""URLs: parsing, redaction for messages, and the split into a root and a key."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tiercache.config import aws_endpoint_options
from tiercache.store.contract import check_key

# In abfss://container@account/... the "@" separates container and account, not credentials.
_AT_IS_A_PLACE = ("abfs", "abfss", "wasb", "wasbs")
_SCHEME = re.compile(r"[A-Za-z0-9+.-]+")
_CHAIN = "::"


@dataclass(frozen=True, slots=True, repr=False)
class ParsedUrl:
    """A parsed URL or local path.

    Attributes:
        scheme: Scheme in lower case; "" for a local path.
        host: Host with userinfo and port.
        path: Path; the path of a URL has no leading "/".
        chain: Rest after the first "::" of a chained fsspec URL, such as "simplecache::s3://bucket/folder".
    """

    scheme: str
    host: str
    path: str
    chain: str = ""

    @classmethod
    def parse(cls, url: str | os.PathLike[str]) -> ParsedUrl:
        """Parse a URL or local path. `file://` becomes a local path, and "~/" the user's home.

        Raises:
            ValueError: The text is empty, or a file URL of another machine.
        """
        text = os.fspath(url)
        if not text:
            raise ValueError(f"not a URL or path: {text!r}")
        first, linked, chain = text.partition(_CHAIN)
        if linked and _is_chain(first, chain):
            scheme, _, rest = first.partition("://")
            host, _, path = rest.partition("/")
            return cls(scheme.lower(), host, path, chain)
        scheme, found, rest = text.partition("://")
        if not found or not _SCHEME.fullmatch(scheme):
            return cls("", "", str(Path(text).expanduser()) if text == "~" or text.startswith("~/") else text)
        host, _, path = rest.partition("/")
        if scheme.lower() != "file":
            return cls(scheme.lower(), host, path)
        if host not in ("", "localhost"):
            raise ValueError(
                f"{redact(text)}: a file URL must have three slashes (file:///folder), or name this machine"
            )
        return cls("", "", unquote("/" + path))

    def __repr__(self) -> str:
        return f"Location({self.shown!r})"

    @property
    def shown(self) -> str:
        """URL without userinfo, query and fragment, in every link of a chain."""
        if not self.scheme:
            return self.path
        host, path = self.host, self.path
        if ":" in host and not host.rpartition(":")[2].rstrip("]").isdigit() and "@" in path:
            host, _, path = path.rpartition("@")[2].partition("/")  # a password that contains "/"
        host = re.split(r"[?#]", host, maxsplit=1)[0] if not self.chain else host
        if self.scheme not in _AT_IS_A_PLACE or ":" in host.rpartition("@")[0]:
            host = host.rpartition("@")[2]
        path = path.partition("?")[0].partition("#")[0]
        return self._joined(host, path, redact(self.chain) if "://" in self.chain else self.chain)

    @property
    def has_userinfo(self) -> bool:
        """Whether the host contains credentials: text before an "@" that is not a container name."""
        return "@" in self.host and self.scheme not in _AT_IS_A_PLACE

    @property
    def has_query(self) -> bool:
        """Whether the URL has a query or fragment."""
        return bool(self.scheme) and any(mark in part for mark in "?#" for part in (self.host, self.path))

    @property
    def full(self) -> str:
        """URL as given, including secrets; never shown."""
        return self._joined(self.host, self.path, self.chain) if self.scheme else self.path

    def _joined(self, host: str, path: str, chain: str) -> str:
        if not chain:
            return f"{self.scheme}://{host}/{path}".rstrip("/") if path else f"{self.scheme}://{host}"
        first = f"{self.scheme}://{host}" if host or path else self.scheme
        return f"{first}{'/' if path else ''}{path}{_CHAIN}{chain}"


def _is_chain(first: str, rest: str) -> bool:
    """Return whether both sides of a "::" form a chained URL: links are schemes or URLs, and the last link is a URL."""
    links = [first, *rest.split(_CHAIN)]
    return "://" in links[-1] and all(_SCHEME.fullmatch(link.partition("://")[0]) for link in links)


def redact(url: str | os.PathLike[str]) -> str:
    """Return the URL without userinfo, query and fragment, safe for messages, logs, file names and catalogs."""
    text = os.fspath(url)
    if text.lower().startswith("file://"):
        return text
    return ParsedUrl.parse(text).shown


def split_url(url: str | os.PathLike[str]) -> tuple[str, str]:
    """Split the URL of an object into the root URL of its folder and its key: ("s3://bucket/folder", "object").

    Raises:
        ValueError: The URL names no object, or has a query.
    """
    place = ParsedUrl.parse(url)
    if place.chain and not place.host and not place.path:  # the rest of the chain names the object
        root, key = split_url(place.chain)
        return f"{place.scheme}{_CHAIN}{root}", key
    if place.has_query and not place.chain:
        raise ValueError(f"{place.shown}: URLs with a query (such as presigned ones) cannot be opened")
    path = place.path
    if not place.scheme and not path.endswith("/"):
        path = os.path.abspath(path)  # noqa: PTH100 - resolve() would follow links
    folder, _, name = path.rpartition("/")
    if not name:
        raise ValueError(f"{place.shown}: the URL names a folder; the URL of an object is expected")
    if not place.scheme:
        return folder or "/", check_key(name)
    return ParsedUrl(place.scheme, place.host, folder, place.chain).full, check_key(name)


def server_url(cloud: str, place: str, config: Mapping[str, Any]) -> str:
    """Return the server of a store, as far as it is known before the first request; for messages.

    Args:
        cloud: "s3", "gs", "az" or "http".
        place: Bucket or container; for "http" the URL.
        config: Options of the store.
    """
    said = {**aws_endpoint_options(), **config} if cloud == "s3" else config
    given = {
        "s3": said.get("aws_endpoint_url_s3") or said.get("endpoint"),
        "gs": said.get("base_url"),
        "az": said.get("endpoint"),
        "http": place,
    }[cloud]
    if given:
        parts = urlsplit(str(given))
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    if cloud == "s3":
        return f"https://s3.{said.get('region') or said.get('default_region') or 'us-east-1'}.amazonaws.com"
    if cloud == "gs":
        return "https://storage.googleapis.com"
    return f"https://{said.get('account_name', place)}.blob.core.windows.net"
