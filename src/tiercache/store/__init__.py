"""Storage back ends behind one contract: objects under a root URL, read and written by key.

open_store() parses a URL and returns a LocalFolder, a MemoryStore, or a RemoteStore: a CloudStore (cloud.py selects
obstore, or s3fs in forked children) or an FsspecStore. A read goes from RemoteStore.read_into() through the request
planner (range_reads.py), the threads (request_runner.py) and the retry loop (retry.py) to an ObjectClient, and then
into the caller's buffers. archive.py adds storage classes and restores through boto3 (s3.py).
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from tiercache.config import aws_ca_bundle
from tiercache.store.cloud import CloudStore
from tiercache.store.contract import Buffer, Lease, LocalStore, Span, Store, StoreFile, Upload, check_key
from tiercache.store.credentials import default_profile
from tiercache.store.fsspec import FsspecStore, check_scheme
from tiercache.store.local import LocalFolder
from tiercache.store.memory import MemoryStore
from tiercache.store.obstore import BucketFolder
from tiercache.store.options import (
    CloudOptions,
    ParsedUrl,
    parse_limit,
    parse_single_writer,
    redact,
    split_url,
    take_limits,
    with_ca_bundle,
)
from tiercache.store.retry import TIMEOUT_S

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
    "check_key",
    "open_store",
    "redact",
    "split_url",
]


_CLOUDS = {
    "s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "azure": "az", "http": "http", "https": "http",
}  # fmt: skip


def open_store(url: str | os.PathLike[str], **storage_options: Any) -> Store:
    """Return the store of a URL or local path. No request is sent: an unknown bucket shows at the first call.

    Args:
        url: Local path, `file://`, `memory://`, `s3://`, `gs://`, `az://` or `http(s)://` URL, or any fsspec URL,
            chained URLs included.
        **storage_options: Options and credentials of the back end, by name. `timeout` (seconds, or text such as "30s")
            limits the time without progress of every call to a remote store. `max_requests` (a number) and
            `max_bandwidth` (text such as "5Gbit", or bytes per second) limit the reads of all processes of this user
            on this machine together. `single_writer` (a bool) allows commits to a store without conditional puts.

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
    cloud = _CLOUDS.get(parsed.scheme)
    if cloud is None:
        return _by_fsspec(parsed, storage_options)
    return CloudStore(_bucket_folder(cloud, parsed), _options(cloud, storage_options))


def _by_fsspec(parsed: ParsedUrl, given: dict[str, Any]) -> FsspecStore:
    """Return a store through fsspec. `timeout`, `single_writer` and the limits are tiercache's own options."""
    check_scheme(parsed.scheme)
    limits, options = take_limits(given)
    timeout = options.pop("timeout", None)
    single_writer = parse_single_writer(options.pop("single_writer", False))
    timeout_s = TIMEOUT_S if timeout is None else parse_limit("timeout", timeout).total_seconds()
    return FsspecStore(
        parsed.full, parsed.shown, options, timeout_s=timeout_s, limits=limits, is_single_writer=single_writer
    )


def _bucket_folder(cloud: str, parsed: ParsedUrl) -> BucketFolder:
    if cloud == "http":
        if parsed.has_query:
            raise ValueError(f"{parsed.shown}: URLs with a query (such as presigned ones) cannot be opened")
        return BucketFolder(cloud, parsed.full, "", parsed.shown)
    if parsed.has_query:
        raise ValueError(f"{parsed.shown}: a query or fragment has no meaning for {parsed.scheme}://")
    if not parsed.host or parsed.has_userinfo:
        raise ValueError(
            f"{parsed.shown}: {parsed.scheme}://BUCKET/FOLDER is expected; credentials go into storage_options"
        )
    prefix = parsed.path.strip("/")
    return BucketFolder(cloud, parsed.host, check_key(prefix) if prefix else "", parsed.shown)


def _options(cloud: str, given: dict[str, Any]) -> CloudOptions:
    options = CloudOptions.parse(cloud, given)
    if cloud == "s3":
        options = with_ca_bundle(options, aws_ca_bundle())
        options = replace(options, profile=default_profile(options))
    return options
