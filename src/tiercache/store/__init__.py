"""Storage back ends behind one contract: objects under a root URL, read and written by key.

open_store() parses a URL and returns a LocalFolder, a MemoryStore, or a RemoteStore: a CloudStore (obstore) or an
FsspecStore. A read goes from RemoteStore.read_into() through the request planner (contract.py), and the threads and
retries of remote.py, to an ObjectClient, and then into the caller's buffers. archive.py adds storage classes and
restores through boto3.
"""

from __future__ import annotations

import os
import re
from typing import Any

from tiercache.store.access import CLOUDS, CallOptions, CloudOptions, ParsedUrl, redact, split_url
from tiercache.store.contract import Buffer, Lease, LocalStore, Span, Store, StoreFile, Upload, UploadFile, check_key
from tiercache.store.fsspec import FsspecStore, check_scheme
from tiercache.store.hub import folders_above, pin_revision, store_type, without_commit
from tiercache.store.local import LocalFolder
from tiercache.store.memory import MemoryStore
from tiercache.store.obstore import BucketFolder, CloudStore

__all__ = [
    "Buffer",
    "CloudStore",
    "FsspecStore",
    "Lease",
    "LocalFolder",
    "LocalStore",
    "MemoryStore",
    "Span",
    "Store",
    "StoreFile",
    "Upload",
    "UploadFile",
    "check_key",
    "folders_above",
    "open_store",
    "pin_revision",
    "redact",
    "split_url",
    "without_commit",
]


# Of every cloud, with the colons of access points.
_BUCKET = re.compile(r"[A-Za-z0-9_.:-]+")


def open_store(url: str | os.PathLike[str], **storage_options: Any) -> Store:
    """Return the store of a URL or local path. No request is sent: an unknown bucket shows at the first call.

    Args:
        url: Local path, `file://`, `memory://`, `s3://`, `gs://`, `az://` or `http(s)://` URL, or any fsspec URL,
            chained URLs included.
        **storage_options: Options and credentials of the back end, by name. `timeout` (seconds, or text such as "30s")
            limits the time without progress of every call to a remote store. `concurrency` is the number of read
            requests that run at once. `single_writer` (a bool) allows commits to a store without conditional puts.

    Raises:
        ValueError: The URL is invalid, or the back end does not know an option.
    """
    parsed = ParsedUrl.parse(url)
    if parsed.chain:
        if parsed.scheme == "tiercache":  # integrations/fsspec.py; it would be a cache of a cache
            raise ValueError(
                f"{parsed.shown}: tiercache reads data sets through its cache already; remove tiercache:: from the URL"
            )
        return _by_fsspec(parsed, storage_options)
    if parsed.scheme in ("", "memory") and storage_options:
        raise ValueError(f"{parsed.shown} takes no storage options, got {', '.join(sorted(storage_options))}")
    if not parsed.scheme:
        return LocalFolder(parsed.path)
    if parsed.scheme == "memory":
        return MemoryStore(parsed.host, parsed.path)
    cloud = CLOUDS.get(parsed.scheme)
    if cloud is None:
        return _by_fsspec(parsed, storage_options)
    return CloudStore(_bucket_folder(cloud, parsed), CloudOptions.parse(cloud, storage_options))


def _by_fsspec(parsed: ParsedUrl, given: dict[str, Any]) -> FsspecStore:
    check_scheme(parsed.scheme)
    call, options = CallOptions.take(given)
    return store_type(parsed.shown)(parsed.full, parsed.shown, options, call)


def _bucket_folder(cloud: str, parsed: ParsedUrl) -> BucketFolder:
    if cloud == "http":
        if parsed.has_query:
            raise ValueError(f"{parsed.shown}: URLs with a query (such as presigned ones) cannot be opened")
        return BucketFolder(cloud, parsed.full, "", parsed.shown)
    if parsed.has_query:
        raise ValueError(f"{parsed.shown}: a query or fragment has no meaning for {parsed.scheme}://")
    if parsed.has_userinfo:
        raise ValueError(
            f"{parsed.shown}: {parsed.scheme}://BUCKET/FOLDER is expected; credentials go into storage_options"
        )
    if not _BUCKET.fullmatch(parsed.host):
        raise ValueError(f"{parsed.shown}: {parsed.host!r} cannot be the name of a bucket")
    prefix = parsed.path.strip("/")
    return BucketFolder(cloud, parsed.host, check_key(prefix) if prefix else "", parsed.shown)
