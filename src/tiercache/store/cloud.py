"""Cloud storage by the fastest available client: obstore, or s3fs in a forked child of a process that used obstore."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from threading import Event

from tiercache.errors import StoreError
from tiercache.model import ObjectInfo
from tiercache.stats import Counters
from tiercache.store.bucket import ObstoreStore, ReadSettings
from tiercache.store.contract import Buffer, Span, Store, Upload
from tiercache.store.fsspec import FsspecStore
from tiercache.store.landing import ProcessLocal
from tiercache.store.obstore import BucketFolder, is_usable_here
from tiercache.store.options import CloudOptions


class CloudStore(Store):
    """A bucket, a container or an HTTP server. Each process that holds the store selects the client for itself."""

    def __init__(self, place: BucketFolder, options: CloudOptions, tuning: ReadSettings | None = None) -> None:
        self._place, self._options, self._tuning = place, options, tuning or ReadSettings()
        self.url = place.url
        self.counters = Counters("requests", "bytes_read", "bytes_written")
        self._here: ProcessLocal[Store] = ProcessLocal(self._open, lambda store: store.close())

    def __repr__(self) -> str:
        return f"CloudStore({self.url!r})"

    def __reduce__(self) -> tuple[type[CloudStore], tuple[BucketFolder, CloudOptions, ReadSettings]]:
        return CloudStore, (self._place, self._options, self._tuning)

    def _open(self) -> Store:
        if is_usable_here():
            return ObstoreStore(self._place, self._options, self._tuning, counters=self.counters)
        _warn_of_fork()
        store = _fallback_store(self._place, self._options, self._tuning)
        store.counters = self.counters
        return store

    @property
    def place(self) -> BucketFolder:
        """Bucket and folder of the store."""
        return self._place

    @property
    def options(self) -> CloudOptions:
        """Storage options, including credentials; never shown."""
        return self._options

    @property
    def cloud(self) -> str:
        """Kind of cloud: "s3", "gs", "az" or "http"."""
        return self._place.cloud

    @property
    def identity(self) -> tuple[str, ...]:
        """Cloud, endpoint, bucket and prefix: equal for stores of the same folder."""
        config = self._options.config
        endpoint = str(config.get("endpoint", config.get("account_name", ""))).rstrip("/")
        return self._place.cloud, endpoint, self._place.bucket, self._place.prefix

    @property
    def back_end(self) -> Store:
        """Store that does the work in this process."""
        return self._here.get()

    def head(self, key: str) -> ObjectInfo:
        """See Store.head."""
        return self.back_end.head(key)

    def get(self, key: str) -> bytes:
        """See Store.get."""
        return self.back_end.get(key)

    def read_tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        """See Store.read_tail."""
        return self.back_end.read_tail(key, n_bytes)

    def read_into(
        self,
        key: str,
        spans: Sequence[Span],
        *,
        if_match: str | None = None,
        deadline_s: float | None = None,
        cancel: Event | None = None,
    ) -> None:
        """See Store.read_into."""
        self.back_end.read_into(key, spans, if_match=if_match, deadline_s=deadline_s, cancel=cancel)

    def put(self, key: str, data: Buffer) -> ObjectInfo:
        """See Store.put."""
        return self.back_end.put(key, data)

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        """See Store.put_if_absent."""
        return self.back_end.put_if_absent(key, data)

    def create(self, key: str, *, if_absent: bool = False) -> Upload:
        """See Store.create."""
        return self.back_end.create(key, if_absent=if_absent)

    def delete(self, keys: Iterable[str]) -> None:
        """See Store.delete."""
        self.back_end.delete(keys)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See Store.list."""
        return self.back_end.list(prefix)

    def copy(self, src: str, dst: str) -> ObjectInfo:
        """See Store.copy."""
        return self.back_end.copy(src, dst)

    def close(self) -> None:
        """Close this process's back end."""
        self._here.drop()


def _fallback_store(place: BucketFolder, options: CloudOptions, tuning: ReadSettings) -> Store:
    if place.cloud == "http":
        given = options.for_fsspec_http()
        return FsspecStore(place.bucket, place.url, given, policy=tuning.policy, timeout_s=options.timeout_s)
    if place.cloud != "s3":
        message = "obstore cannot be used in this forked process; start workers with forkserver or spawn"
        raise StoreError(message, url=place.url)
    if options.unknown_to_s3fs:
        names = ", ".join(options.unknown_to_s3fs)
        message = (
            f"this forked process reads S3 by s3fs, which does not support {names}; start it with forkserver or spawn"
        )
        raise StoreError(message, url=place.url)
    full_url = f"s3://{place.bucket}/{place.prefix}".rstrip("/")
    return FsspecStore(full_url, place.url, {}, policy=tuning.policy, timeout_s=options.timeout_s, s3=options)


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
