"""What S3 has beyond a store: storage classes, restores, copies between buckets and deletes that say what failed."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal, Protocol, TypeAlias
from urllib.parse import quote_plus

from tiercache.config import aws_reach
from tiercache.errors import NotFound, ObjectChanged, StoreError
from tiercache.model import ObjectInfo
from tiercache.store import CloudStore, open_store
from tiercache.store.aws import S3Calls, has_boto3, takes_long
from tiercache.store.contract import Upload, check_key
from tiercache.store.landing import worker_pool
from tiercache.store.retry import CallLimit, CallWatch, RetryPolicy, with_retries
from tiercache.store.s3_answers import bare, described, encryption, is_object, listed
from tiercache.store.s3_upload import S3Upload
from tiercache.store.sums import whole_sums
from tiercache.waiting import SYSTEM_CLOCK, Clock

__all__ = [
    "SPEEDS",
    "ArchiveStore",
    "BucketSettings",
    "CopySizes",
    "Restoring",
    "S3Archive",
    "Speed",
    "has_boto3",
    "open_archive",
]

Speed: TypeAlias = Literal["expedited", "standard", "bulk"]
SPEEDS: tuple[Speed, ...] = ("expedited", "standard", "bulk")
Restoring: TypeAlias = Literal["started", "running", "done"]
Failed: TypeAlias = list[tuple[str, str]]  # keys and reasons

_TIERS = {"expedited": "Expedited", "standard": "Standard", "bulk": "Bulk"}
_DELETE_KEYS = 1000
_SETTINGS = {
    "lifecycle": "get_bucket_lifecycle_configuration",
    "versioning": "get_bucket_versioning",
    "object lock": "get_object_lock_configuration",
}
# Of a bucket that has no such setting.
_NOT_SET = ("NoSuchLifecycleConfiguration", "ObjectLockConfigurationNotFoundError")
_PARTS = 10_000
# What S3 keeps of an object beside its bytes, and what a copy in parts must be told again.
_Part: TypeAlias = dict[str, Any]
_Parts: TypeAlias = list[_Part]
_KEPT = ("CacheControl", "ContentDisposition", "ContentEncoding", "ContentLanguage", "ContentType", "Metadata")


class ArchiveStore(Protocol):
    """Objects with storage classes. Keys are those of the Store with the same URL. Safe from any thread."""

    url: str

    def head(self, key: str) -> ObjectInfo:
        """With class, `restore` (S3's x-amz-restore) and the CRC-32C of the whole. Raises NotFound."""

    def sums(self, key: str) -> Mapping[str, str]:
        """Checksums over the whole object that the store knows, and its ETag, each by its name. Raises NotFound."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """As Store.list(), with class and restore state."""

    def create(self, key: str, *, storage_class: str | None = None, if_match: str | None = None) -> Upload:
        """An upload whose parts may come in parallel; the object has the class (None: the store's own).

        if_match: the ETag of what it takes the place of: of another, or none, complete() raises ObjectChanged, as far
        as the server looks at it.

        Where it has an attribute `is_confirmed` that is true after complete(), the server has named sums of all that it
        was given, and they were ours: then nothing need be read back, and of a class that is archived nothing can be.
        """

    def set_class(self, key: str, storage_class: str, *, if_match: str | None = None) -> ObjectInfo:
        """Give an object another class in place; bytes, metadata and tags stay.

        Raises:
            NotFound, ObjectChanged: not there, or not what if_match names.
            StoreError: with .archived True where it must be restored first.
        """

    def can_copy_from(self, src: ArchiveStore) -> bool:
        """Whether the server can copy from there."""

    def copy_from(
        self,
        src: ArchiveStore,
        src_key: str,
        key: str,
        *,
        storage_class: str | None = None,
        if_match: str | None = None,
        crc32c: int | None = None,
        if_absent: bool = False,
        over: str | None = None,
    ) -> ObjectInfo:
        """Copy by the server; only where can_copy_from(src). Raises as set_class().

        crc32c: what its bytes sum to, where somebody knows: the server is then asked for such a sum of the copy too,
        which stands in the answer where it can, and is the caller's to compare. if_absent: raise ObjectChanged where
        something lies, which is replaced otherwise; over: and where that has not this ETag.
        """

    def restore(self, key: str, *, days: int | None, speed: Speed) -> Restoring:
        """Ask for a readable copy for so many days.

        "started": asked for; "running": somebody had asked; "done": it can be read, for as long as was asked now.

        Raises:
            NotFound: not there.
            StoreError: with .unable True where the store cannot restore; its classes are then names only.
        """

    def delete_many(self, keys: Sequence[str], *, if_match: Sequence[str | None] | None = None) -> Failed:
        """Delete, by a thousand a request; what could not be deleted, each with the reason.

        if_match: the ETag that each must have, as far as the server looks at it; None: whatever it has.
        """


@dataclass(frozen=True, slots=True)
class BucketSettings:
    """What a bucket does by itself, in S3's words.

    Attributes:
        lifecycle: its lifecycle rules, those that are off too.
        versioning: "Enabled", "Suspended", or "": it never kept versions.
        lock: its configuration of object lock; None: it has none.
        unread: settings that could not be read, and why.
    """

    lifecycle: tuple[Mapping[str, Any], ...] = ()
    versioning: str = ""
    lock: Mapping[str, Any] | None = None
    unread: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CopySizes:
    """Copies by the server: objects up to whole_bytes by one request, larger ones in parts, n_parts at once.

    S3 itself copies up to 5 GB by one request; a GiB in parts of 256 MiB is faster, and no request lasts long.
    """

    whole_bytes: int = 1 << 30
    part_bytes: int = 256 << 20
    n_parts: int = 8


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Of a copy by the server: its class, the source's ETag, and whether its CRC-32C is to be compared with one.

    where: "itself": in the place of the source, while that is there; "absent": where nothing is; "over": in the place
    of what has the ETag `over`; else "any".
    """

    storage_class: str | None
    if_match: str | None
    where: Literal["itself", "absent", "over", "any"]
    needs_crc32c: bool = False
    over: str | None = None

    def expected(self, source_etag: str) -> str | None:
        """The ETag of what it takes the place of; None: there is nothing."""
        return source_etag if self.where == "itself" else self.over

    def condition(self, source_etag: str) -> dict[str, str]:
        """What must be so in the place that it goes to, in a request's words."""
        if self.where == "any":
            return {}
        expected = self.expected(source_etag)
        return {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}


class S3Archive:
    """A folder of a bucket through boto3. Clients and threads are made by each process when it first needs them."""

    def __init__(
        self,
        calls: S3Calls,
        bucket: str,
        prefix: str,
        *,
        sizes: CopySizes | None = None,
        policy: RetryPolicy | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._calls, self.bucket, self.prefix = calls, bucket, prefix
        self.url = calls.url
        self.counters = calls.counters
        self._timeout_s, self._awaited = calls.timeout_s, calls.awaited
        self._sizes, self._policy, self._clock = sizes or CopySizes(), policy or RetryPolicy(), clock
        self._pool = worker_pool(self._sizes.n_parts)
        self._under_way = CallWatch()

    @classmethod
    def of(cls, store: CloudStore, *, sizes: CopySizes | None = None) -> S3Archive:
        """The archive of an S3 store: the same bucket, folder, options and counters.

        Raises:
            ValueError: the store is not S3, boto3 is missing, or it cannot do what the options ask for.
        """
        if store.cloud != "s3":
            raise ValueError(f"{store.url}: only s3:// has storage classes that can be changed and restored")
        options = replace(store.options, config={**aws_reach(), **store.options.config})
        calls = S3Calls(options, store.url, store.counters)
        return cls(calls, store.place.bucket, store.place.prefix, sizes=sizes)

    def __repr__(self) -> str:
        return f"S3Archive({self.url!r})"

    def close(self) -> None:
        """End the threads of this process and drop its connections."""
        self._under_way.close()
        self._pool.drop()
        self._calls.close()

    def at(self, key: str) -> str:
        """The URL of a key, for people."""
        return f"{self.url}/{key}" if key else self.url

    def full(self, key: str) -> str:
        """The key in the bucket."""
        return f"{self.prefix}/{check_key(key)}" if self.prefix else check_key(key)

    def call(self, operation: str, key: str, **request: Any) -> Mapping[str, Any]:
        """One request about an object, repeated while that can help."""
        return self._ask(operation, self.at(key), Key=self.full(key), **request)

    def _ask(self, operation: str, where: str, **request: Any) -> Mapping[str, Any]:
        copies = takes_long(operation)
        # A copy by the server is silent for long while all is well: its own client limits it.
        limit = CallLimit(
            where,
            operation,
            clock=self._clock,
            timeout_s=None if copies else self._timeout_s,
            endpoint=self._awaited,
        )

        def attempt() -> Mapping[str, Any]:
            return self._calls(operation, where, Bucket=self.bucket, **request)

        if copies:
            return with_retries(attempt, self._policy, limit)
        return self._under_way.retrying(attempt, self._policy, limit)

    def head(self, key: str) -> ObjectInfo:
        """One HEAD."""
        return described(key, self.call("head_object", key, ChecksumMode="ENABLED"))

    def sums(self, key: str) -> Mapping[str, str]:
        """One HEAD."""
        said = self.call("head_object", key, ChecksumMode="ENABLED")
        return {**whole_sums(said), "ETag": str(said.get("ETag", ""))}

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """By pages of a thousand."""
        folder = check_key(prefix.removesuffix("/")) if prefix else ""
        root = f"{self.prefix}/" if self.prefix else ""
        token = None
        while True:
            page = self._ask(
                "list_objects_v2",
                self.at(folder),
                Prefix=root + (f"{folder}/" if folder else ""),
                ContinuationToken=token,
                OptionalObjectAttributes=["RestoreStatus"],
            )
            for entry in page.get("Contents", ()):
                key = entry["Key"].removeprefix(root)
                if is_object(key):
                    yield listed(key, entry)
            token = page.get("NextContinuationToken")
            if not page.get("IsTruncated") or token is None:
                return

    def create(self, key: str, *, storage_class: str | None = None, if_match: str | None = None) -> S3Upload:
        """One request for an object of one part, else S3's multipart upload."""
        writing = {**self._calls.writing, **({"StorageClass": storage_class} if storage_class else {})}
        takes = all(self._calls.takes(one, "IfMatch") for one in ("PutObject", "CompleteMultipartUpload"))
        return S3Upload(self, check_key(key), writing, if_match=if_match if takes else None)

    def set_class(self, key: str, storage_class: str, *, if_match: str | None = None) -> ObjectInfo:
        """A copy to itself: one request, or in parts where it is large."""
        return self._copied(self, key, key, _Wanted(storage_class, if_match, "itself"))

    def can_copy_from(self, src: ArchiveStore) -> bool:
        """Whether both are of one endpoint, reached with one set of credentials."""
        return isinstance(src, S3Archive) and src.calls.reach == self._calls.reach

    @property
    def calls(self) -> S3Calls:
        """The single requests."""
        return self._calls

    def copy_from(
        self,
        src: ArchiveStore,
        src_key: str,
        key: str,
        *,
        storage_class: str | None = None,
        if_match: str | None = None,
        crc32c: int | None = None,
        if_absent: bool = False,
        over: str | None = None,
    ) -> ObjectInfo:
        """One request, or in parts where it is large."""
        if not isinstance(src, S3Archive) or not self.can_copy_from(src):
            raise ValueError(f"{self.url}: the server cannot copy from {src.url}")
        where: Literal["absent", "over", "any"] = "absent" if if_absent else "any" if over is None else "over"
        wanted = _Wanted(storage_class, if_match, where, crc32c is not None, None if if_absent else over)
        return self._copied(src, src_key, key, wanted)

    def _copied(self, src: S3Archive, src_key: str, key: str, wanted: _Wanted) -> ObjectInfo:
        head = src.call("head_object", src_key, ChecksumMode="ENABLED")
        expected = wanted.if_match or str(head["ETag"])
        request = {
            "CopySource": {"Bucket": src.bucket, "Key": src.full(src_key)},
            "CopySourceIfMatch": expected,
        }
        # The copy gets sums of the kinds that the source has; where it has none, or ours is known, one of our kind.
        sums = whole_sums(head)
        kind = "CRC32C" if wanted.needs_crc32c or not sums or "ChecksumCRC32C" in sums else None
        writing = {
            **encryption(head, self._calls.writing),
            "StorageClass": wanted.storage_class,
            "ChecksumAlgorithm": kind,
        }
        condition = wanted.condition(expected)
        if int(head["ContentLength"]) <= self._sizes.whole_bytes:
            if condition and not self._calls.takes("CopyObject", *condition):  # a boto3 of before 2025-10
                self._check(key, wanted, expected)
                condition = {}
            etag = self._copy_whole(key, head, request, writing | condition)
        else:
            writing |= {name: head.get(name) for name in _KEPT} | {"Tagging": src.tags(src_key, head)}
            writing["ChecksumType"] = "FULL_OBJECT" if kind else None
            etag = self._copy_parts(key, int(head["ContentLength"]), request, writing, condition)
        made = self.head(key)
        if None not in (etag, made.etag) and bare(etag) != bare(made.etag):
            message = "somebody else has written it since it was copied"
            raise ObjectChanged(message, url=self.at(key), expected=etag, found=made.etag)
        return made

    def _check(self, key: str, wanted: _Wanted, source_etag: str) -> None:
        """Look at the place of a copy, where the request itself cannot. Raises ObjectChanged."""
        try:
            found = self.head(key).etag
        except NotFound:
            found = None
        expected = wanted.expected(source_etag)
        if found != expected:
            raise ObjectChanged("it is not as it was", url=self.at(key), expected=expected, found=found)

    def _copy_whole(
        self, key: str, head: Mapping[str, Any], request: dict[str, Any], writing: dict[str, Any]
    ) -> str | None:
        """Copy by one request; the ETag of what was made."""
        try:
            said = self.call("copy_object", key, **request, **writing, MetadataDirective="COPY")
        except StoreError as error:
            if error.facts.get("code") != "InvalidRequest":
                raise
            # SeaweedFS takes no copy to itself that changes the class alone; with its metadata given anew, it does.
            kept = {name: head.get(name) for name in _KEPT}
            said = self.call("copy_object", key, **request, **writing, **kept, MetadataDirective="REPLACE")
        etag: str | None = said.get("CopyObjectResult", {}).get("ETag")
        return etag

    def _copy_parts(
        self, key: str, n_bytes: int, request: dict[str, Any], writing: dict[str, Any], condition: dict[str, str]
    ) -> str | None:
        """Copy in parts; the ETag of what was made."""
        begun = self.call("create_multipart_upload", key, **writing)
        upload_id = str(begun["UploadId"])

        def copy_part(number: int, start: int, end: int) -> _Part:
            said = self.call(
                "upload_part_copy",
                key,
                UploadId=upload_id,
                PartNumber=number,
                CopySourceRange=f"bytes={start}-{end - 1}",
                **request,
            )["CopyPartResult"]
            named = {"ChecksumCRC32C": said["ChecksumCRC32C"]} if "ChecksumCRC32C" in said else {}
            return {"PartNumber": number, "ETag": said["ETag"], **named}

        step = max(self._sizes.part_bytes, -(-n_bytes // _PARTS))
        starts = range(0, n_bytes, step)
        jobs = [(number, start, min(start + step, n_bytes)) for number, start in enumerate(starts, start=1)]
        try:
            parts = self._side_by_side(copy_part, jobs)
            joined = {"UploadId": upload_id, "MultipartUpload": {"Parts": parts}}
            etag: str | None = self.call("complete_multipart_upload", key, **joined, **condition).get("ETag")
        except BaseException:
            self._abort(key, upload_id)
            raise
        return etag

    def _abort(self, key: str, upload_id: str) -> None:
        """Drop an upload; what cannot be dropped stays until the bucket's own rule removes it."""
        try:
            self.call("abort_multipart_upload", key, UploadId=upload_id)
        except StoreError:
            return

    def _side_by_side(self, work: Callable[[int, int, int], _Part], jobs: Iterable[tuple[int, int, int]]) -> _Parts:
        """Results of all jobs, in order; after the first error no further one is begun, and none is running."""
        pool, waiting = self._pool.get(), iter(jobs)
        results: _Parts = []
        running: deque[Future[_Part]] = deque()
        try:
            while running or not results:
                running += [pool.submit(work, *job) for job in islice(waiting, self._sizes.n_parts - len(running))]
                if not running:
                    break
                results.append(running.popleft().result())
        finally:
            for future in running:
                future.cancel()
            for future in running:
                if not future.cancelled():
                    future.exception()
        return results

    def tags(self, key: str, head: Mapping[str, Any]) -> str | None:
        """An object's tags as a request writes them; None where it has none."""
        if not head.get("TagCount"):
            return None
        found = self.call("get_object_tagging", key)["TagSet"]
        return "&".join(f"{quote_plus(tag['Key'])}={quote_plus(tag['Value'])}" for tag in found)

    def restore(self, key: str, *, days: int | None, speed: Speed) -> Restoring:
        """One POST."""
        wanted: dict[str, Any] = {"GlacierJobParameters": {"Tier": _TIERS[speed]}}
        if days is not None:
            wanted["Days"] = days
        try:
            said = self.call("restore_object", key, RestoreRequest=wanted)
        except StoreError as error:
            if error.facts.get("code") == "RestoreAlreadyInProgress":
                return "running"
            if error.facts.get("unable"):
                message = (
                    f"restore: this store cannot (HTTP {error.status}); its storage classes are names only, "
                    "and what it holds may be read as it is"
                )
                raise StoreError(message, url=self.at(key), status=error.status, unable=True) from None
            if error.facts.get("archived"):  # S3's word for a class that needs no restore
                return "done"
            raise
        return "done" if said.get("ResponseMetadata", {}).get("HTTPStatusCode") == 200 else "started"

    def settings(self) -> BucketSettings:
        """The bucket's, in three requests. What cannot be read is named, and is no error."""
        answers: dict[str, Mapping[str, Any]] = {}
        unread: dict[str, str] = {}
        for name, operation in _SETTINGS.items():
            try:
                answers[name] = self._ask(operation, self.url)
            except StoreError as error:
                if error.facts.get("code") not in _NOT_SET:
                    unread[name] = error.message
        return BucketSettings(
            tuple(answers.get("lifecycle", {}).get("Rules", ())),
            str(answers.get("versioning", {}).get("Status", "")),
            answers.get("object lock", {}).get("ObjectLockConfiguration"),
            unread,
        )

    def delete_many(self, keys: Sequence[str], *, if_match: Sequence[str | None] | None = None) -> Failed:
        """DeleteObjects."""
        failed: Failed = []
        names = {self.full(key): key for key in keys}
        etags = dict(zip(names, if_match or [None] * len(keys), strict=True))
        full = [*names]
        for start in range(0, len(full), _DELETE_KEYS):
            some = full[start : start + _DELETE_KEYS]
            objects = [{"Key": name, **({"ETag": etags[name]} if etags[name] else {})} for name in some]
            wanted = {"Objects": objects, "Quiet": True}
            said = self._ask("delete_objects", self.at(names[some[0]]), Delete=wanted)
            failed += [
                (names[error["Key"]], f"{error.get('Code', '')}: {error.get('Message', '')}")
                for error in said.get("Errors", ())
                if error.get("Code") != "NoSuchKey"
            ]
        return failed


def open_archive(url: str | os.PathLike[str], **storage_options: Any) -> S3Archive:
    """The archive of an `s3://` URL. Nothing is asked of the server yet.

    Raises:
        ValueError: another URL, an option that is not known, or boto3 is missing; the message names the extra.
    """
    store = open_store(url, **storage_options)
    if not isinstance(store, CloudStore):
        raise ValueError(f"{store.url}: only s3:// has storage classes that can be changed and restored")
    return S3Archive.of(store)
