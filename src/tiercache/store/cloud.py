"""The choice of the client library for S3, Google Cloud Storage, Azure and HTTP.

- obstore is the fast client, and the only one for Google Cloud Storage and Azure.
- fsspec (s3fs for S3) is the portable one: it serves forked children of a process that used obstore, where obstore
  hangs.
- boto3 (archive.py, s3.py) serves only what obstore does not offer: storage classes, restores, batch deletes and copies
  between buckets.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from urllib.parse import urlsplit

from tiercache.errors import StoreError
from tiercache.stats import Counters
from tiercache.store.credentials import s3_access
from tiercache.store.fsspec import FsspecClient, S3fsClient, open_file_system
from tiercache.store.obstore import BucketFolder, ObstoreClient, is_usable_here
from tiercache.store.options import CloudOptions, server_url
from tiercache.store.remote import ObjectClient, ReadSettings, RemoteStore

_CONDITIONAL_HOSTS = (".amazonaws.com", ".amazonaws.com.cn", ".googleapis.com", ".core.windows.net")
_PROVIDERS = {".amazonaws.com": "aws", "storage.googleapis.com": "gcs", ".blob.core.windows.net": "azure"}


class CloudStore(RemoteStore):
    """A bucket, a container or an HTTP server. Each process that holds the store selects the client for itself.

    Attributes:
        folder: Bucket and folder of the store.
        options: Storage options, including credentials; never shown.
    """

    def __init__(self, folder: BucketFolder, options: CloudOptions, settings: ReadSettings | None = None) -> None:
        super().__init__(
            folder.url,
            options.timeout_s,
            settings or ReadSettings(),
            options.limits,
            is_single_writer=options.single_writer,
        )
        self.folder, self.options = folder, options
        host = urlsplit(server_url(folder.cloud, folder.bucket, options.config)).hostname or ""
        self.provider = next((name for domain, name in _PROVIDERS.items() if host.endswith(domain)), None)

    def __reduce__(self) -> tuple[type[CloudStore], tuple[BucketFolder, CloudOptions, ReadSettings]]:
        return CloudStore, (self.folder, self.options, self._settings)

    def _open_client(self) -> ObjectClient:
        if is_usable_here():
            return ObstoreClient(self.folder, self.options, self.counters)
        _warn_of_fork()
        return fallback_client(self.folder, self.options, self.counters)

    @property
    def knows_conditional_put(self) -> bool:
        """Whether the server is Amazon's, Google's or Microsoft's own."""
        host = urlsplit(server_url(self.folder.cloud, self.folder.bucket, self.options.config)).hostname or ""
        return host.endswith(_CONDITIONAL_HOSTS)

    @property
    def cloud(self) -> str:
        """Kind of cloud: "s3", "gs", "az" or "http"."""
        return self.folder.cloud

    @property
    def machine_name(self) -> str:
        """Cloud, server and bucket: a store throttles all prefixes of a bucket together. HTTP: the server."""
        server = server_url(self.folder.cloud, self.folder.bucket, self.options.config)
        return server if self.cloud == "http" else f"{self.folder.cloud} {server} {self.folder.bucket}"

    @property
    def identity(self) -> tuple[str, ...]:
        """Cloud, endpoint, bucket and prefix: equal for stores of the same folder."""
        config = self.options.config
        endpoint = str(config.get("endpoint", config.get("account_name", ""))).rstrip("/")
        return self.folder.cloud, endpoint, self.folder.bucket, self.folder.prefix


def fallback_client(folder: BucketFolder, options: CloudOptions, counters: Counters) -> ObjectClient:
    """Return the client of a process in which obstore hangs. Raises StoreError."""
    if folder.cloud == "http":
        open_fs = partial(open_file_system, folder.bucket, options.for_fsspec_http())
        return FsspecClient(open_fs, folder.url, counters, server_url("http", folder.bucket, {}))
    if folder.cloud != "s3":
        message = "obstore cannot be used in this forked process; start workers with forkserver or spawn"
        raise StoreError(message, url=folder.url)
    if options.unknown_to_s3fs:
        names = ", ".join(options.unknown_to_s3fs)
        message = (
            f"this forked process reads S3 by s3fs, which does not support {names}; start it with forkserver or spawn"
        )
        raise StoreError(message, url=folder.url)
    config, credentials = s3_access(options, folder.url)
    given = replace(options, config=config).for_s3fs()
    open_fs = partial(open_file_system, f"s3://{folder.bucket}/{folder.prefix}".rstrip("/"), given)
    return S3fsClient(open_fs, folder.url, counters, server_url("s3", folder.url, config), credentials)


_warned = False


def _warn_of_fork() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "this process was forked from a process that had used obstore, which does not survive a fork: S3 is read "
            "by s3fs, which is slower; start workers with forkserver or spawn",
            RuntimeWarning,
            stacklevel=4,
        )
