"""S3 through boto3: storage classes, restores, verified uploads, and copies between buckets.

Boto3Client sends single requests; S3StorageClasses makes the operations of them, with retries.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import importlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, Literal, TypeAlias
from urllib.parse import quote_plus

from tiercache._native.checksum import combine, crc32c
from tiercache.config import aws_endpoint_options
from tiercache.distribution import install_command
from tiercache.errors import NotFound, ObjectChanged, StoreError
from tiercache.model import ObjectInfo
from tiercache.prices import Speed
from tiercache.stats import Counters
from tiercache.store.access import CloudOptions, Keys, refused_error, s3_access, server_url, wait_target
from tiercache.store.contract import Buffer, ProcessLocal, Upload, check_key
from tiercache.store.local import TEMP_PREFIX
from tiercache.store.obstore import CloudStore
from tiercache.store.remote import RETRYABLE_STATUSES, CallLimit, RetryPolicy, with_retries
from tiercache.waiting import SYSTEM_CLOCK

# Type of a checksum over part checksums. It cannot compare copies that have other part sizes.
_OF_PARTS = "COMPOSITE"
_NAME = "Checksum"


def crc32c_to_text(crc: int) -> str:
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


def crc32c_from_text(text: str | None) -> int | None:
    try:
        data = base64.b64decode(text or "", validate=True)
    except binascii.Error:
        return None
    return int.from_bytes(data, "big") if len(data) == 4 else None


def whole_object_checksums(answer: Mapping[str, Any]) -> dict[str, str]:
    """Return the checksums over the whole object in a HEAD's answer, by S3's names such as "ChecksumCRC64NVME"."""
    if answer.get("ChecksumType") == _OF_PARTS:
        return {}
    return {
        name: str(text)
        for name, text in answer.items()
        if name.startswith(_NAME) and name not in ("ChecksumType", "ChecksumAlgorithm") and "-" not in str(text)
    }


def unquoted_etag(etag: str | None) -> str:
    return (etag or "").strip('"')


def is_object(key: str) -> bool:
    """Return whether the key names an object, not a folder marker of a browser and not an unfinished write."""
    segments = key.split("/")
    return all(segments) and not any(segment.startswith(TEMP_PREFIX) for segment in segments)


def encryption(head: Mapping[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the encryption arguments of a copy: those of the options, or else the key of the source object."""
    if given or not str(head.get("ServerSideEncryption", "")).startswith("aws:kms"):
        return given
    return {"ServerSideEncryption": head["ServerSideEncryption"], "SSEKMSKeyId": head.get("SSEKMSKeyId")}


def head_to_object_info(key: str, head: Mapping[str, Any]) -> ObjectInfo:
    when = head.get("LastModified")
    restore = head.get("Restore")
    if restore is None and head.get("ArchiveStatus") is not None:
        restore = f'archive-status="{head["ArchiveStatus"]}"'  # class INTELLIGENT_TIERING
    return ObjectInfo(
        key,
        int(head["ContentLength"]),
        etag=head.get("ETag"),
        version=head.get("VersionId"),
        crc32c=crc32c_from_text(whole_object_checksums(head).get("ChecksumCRC32C")),
        modified_s=when.timestamp() if when is not None else None,
        storage_class=head.get("StorageClass") or "STANDARD",
        restore=restore,
    )


def entry_to_object_info(key: str, entry: Mapping[str, Any]) -> ObjectInfo:
    """Convert an entry of a listing to an ObjectInfo, with the restore state in the form of x-amz-restore."""
    status = entry.get("RestoreStatus")
    restore = None
    if status is not None and status.get("IsRestoreInProgress"):
        restore = 'ongoing-request="true"'
    elif status is not None and status.get("RestoreExpiryDate") is not None:
        until = status["RestoreExpiryDate"]
        restore = f'ongoing-request="false", expiry-date="{until.strftime("%a, %d %b %Y %H:%M:%S GMT")}"'
    return ObjectInfo(
        key,
        int(entry["Size"]),
        etag=entry.get("ETag"),
        modified_s=entry["LastModified"].timestamp(),
        storage_class=entry.get("StorageClass") or "STANDARD",
        restore=restore,
    )


# The server may copy a GiB, or join its parts, for longer than 20 s without sending a byte.
_COPYING = ("copy_object", "upload_part_copy", "complete_multipart_upload")
_COPYING_S = 120.0
_CONNECTIONS = 32
_COPIED_PARTS = 8  # at once
_TRY_AGAIN_CODES = ("OperationAborted", "ConditionalRequestConflict", "RequestTimeout", "SlowDown")
_ARCHIVED_CODES = ("InvalidObjectState", "ObjectNotInActiveTierError")
_UNABLE = (405, 501)


def has_boto3() -> bool:
    return importlib.util.find_spec("boto3") is not None


class Boto3Client:
    """boto3's clients of one endpoint, made again when the keys change; requests are not retried. Safe for threads."""

    def __init__(self, options: CloudOptions, url: str, counters: Counters) -> None:
        config, self.credentials = s3_access(options, url)
        self._options, self.endpoint = replace(options, config=config), server_url("s3", "", config)
        self._counters = counters
        self._session = importlib.import_module("boto3").Session()
        self._lock = Lock()  # of the session, which is not safe for threads, and of the clients
        self._made: dict[bool, tuple[Keys | None, Any]] = {}  # by whether the server may be silent for minutes
        self._old: list[Any] = []  # other threads may still use them

    def _client(self, *, is_long: bool) -> tuple[Any, int]:
        keys = None if self.credentials is None else self.credentials.get()
        number = 0 if self.credentials is None else self.credentials.number
        with self._lock:
            made = self._made.get(is_long)
            if made is None or made[0] != keys:
                if made is not None:
                    self._old.append(made[1])
                made = self._made[is_long] = keys, _client(self._session, self._options, keys, is_long=is_long)
            return made[1], number

    def __call__(self, operation: str, where: str, **request: Any) -> Mapping[str, Any]:
        """Send one request, without arguments that are None, and return its answer. where: URL, for messages.

        Details of the error: "archived": the object must be restored first; "unable": the server lacks the request.
        """
        exceptions = importlib.import_module("botocore.exceptions")
        given = {name: value for name, value in request.items() if value is not None}
        if "RequestPayer" not in given and self._options.config.get("request_payer"):
            given["RequestPayer"] = "requester"
        client, number = self._client(is_long=operation in _COPYING)
        self._counters.add("requests")
        try:
            answer: Mapping[str, Any] = getattr(client, operation)(**given)
        except exceptions.ClientError as error:
            response = error.response
            if operation == "head_object":
                response = _reason(client, given, response, exceptions.ClientError)
            raise refused_error(_refused(response, operation, where), self.credentials, number) from None
        except (exceptions.EndpointConnectionError, exceptions.ConnectTimeoutError):
            message = f"{operation}: cannot connect to {self.endpoint}"
            raise StoreError(message, url=where, retryable=True, sent=False) from None
        except exceptions.BotoCoreError as error:
            # From None: botocore's text may contain a signed URL.
            lost = isinstance(error, (exceptions.HTTPClientError, exceptions.ConnectionError))
            text = f"{operation}: {type(error).__name__}{f' ({self.endpoint})' if lost else ''}"
            raise StoreError(text, url=where, retryable=lost) from None
        return answer

    def wait_target(self) -> str:
        return wait_target(self.endpoint, self.credentials)

    def close(self) -> None:
        with self._lock:
            for client in (*self._old, *(client for _, client in self._made.values())):
                client.close()
            self._made.clear()
            self._old.clear()


def _client(session: Any, options: CloudOptions, keys: Keys | None, *, is_long: bool) -> Any:
    config_of, unsigned = importlib.import_module("botocore.config").Config, importlib.import_module("botocore")
    arguments, settings = options.for_boto3()
    if is_long:
        settings["read_timeout"] = max(settings["read_timeout"], _COPYING_S)
    if options.config.get("skip_signature"):
        settings["signature_version"] = unsigned.UNSIGNED
    # tiercache sends its own checksums. Many servers do not support the checksums that botocore adds by default.
    config = config_of(
        max_pool_connections=_CONNECTIONS,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        **settings,
    )
    return session.client(
        "s3",
        aws_access_key_id=None if keys is None else keys.access_key_id,
        aws_secret_access_key=None if keys is None else keys.secret_access_key,
        aws_session_token=None if keys is None else keys.token,
        config=config,
        **arguments,
    )


def _reason(
    client: Any, given: Mapping[str, Any], response: Mapping[str, Any], failure: type[Exception]
) -> Mapping[str, Any]:
    """Return the reason why a HEAD was refused: its answer has no body, so a GET of one byte is sent."""
    if response.get("ResponseMetadata", {}).get("HTTPStatusCode") not in (400, 401, 403):
        return response
    names = ("Bucket", "Key", "VersionId", "RequestPayer")
    try:
        said = client.get_object(**{name: given[name] for name in names if name in given}, Range="bytes=0-0")
    except failure as error:
        found: Mapping[str, Any] = getattr(error, "response", response)
        return found
    said["Body"].close()
    return response


def _refused(response: Mapping[str, Any], operation: str, where: str) -> StoreError:
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or None
    code, text = str(response["Error"].get("Code", "")), str(response["Error"].get("Message", ""))
    if status == 404:
        missing = {"NoSuchBucket": "bucket", "NoSuchUpload": "upload"}.get(code, "object")
        return NotFound(f"no such {missing} ({operation})", url=where, status=status, code=code)
    if status == 412:
        message = f"the object does not have the requested ETag ({operation})"
        return ObjectChanged(message, url=where, status=status, code=code)
    if code in _ARCHIVED_CODES:
        message = f"{operation}: the object is archived and must be restored before it can be read: tiercache tier get"
        return StoreError(message, url=where, status=status, code=code, archived=True)
    retryable = status in RETRYABLE_STATUSES or code in _TRY_AGAIN_CODES
    unable = status in _UNABLE or code in ("NotImplemented", "MethodNotAllowed")
    said = f"{operation}: HTTP {status} {code}{': ' if text else ''}{text}"
    return StoreError(said, url=where, status=status, code=code, retryable=retryable and not unable, unable=unable)


RestoreState: TypeAlias = Literal["started", "running", "done"]
DeleteFailures: TypeAlias = list[tuple[str, str]]  # (key, reason)

_DELETE_KEYS = 1000
MOST_PARTS = 10_000  # of one object
# Metadata that a copy in parts must pass again.
_KEPT = ("CacheControl", "ContentDisposition", "ContentEncoding", "ContentLanguage", "ContentType", "Metadata")


@dataclass(frozen=True, slots=True)
class UnfinishedUpload:
    """An upload in parts that runs, or that a killed process has left. started_s: By the clock of the store."""

    key: str
    upload_id: str
    started_s: float


class S3StorageClasses:
    """Objects with storage classes: the bucket and folder of an S3 store through boto3, with its options and counters.

    Safe for threads. Each process creates its clients and threads at first use. whole_bytes: Most bytes that the server
    copies by one request. S3 copies up to 5 GB by one, but a GiB in parts of part_bytes is faster, and no request lasts
    long.
    """

    whole_bytes = 1 << 30
    part_bytes = 256 << 20

    def __init__(self, store: CloudStore) -> None:
        """Open nothing yet. Raises ValueError if the store is not S3, or boto3 is missing."""
        url = store.url
        if store.cloud != "s3":
            raise ValueError(f"{url}: only s3:// has storage classes that can be changed and restored")
        if not has_boto3():
            raise ValueError(
                f"{url}: storage classes, restores and batch deletes need boto3: {install_command('archive')}"
            )
        options = replace(store.options, config={**aws_endpoint_options(), **store.options.config})
        self.url, self.url_of, self.counters = url, store.url_of, store.counters
        self.bucket, self.prefix = store.folder.bucket, store.folder.prefix
        self._options = options
        self._client = ProcessLocal(lambda: Boto3Client(options, url, store.counters), Boto3Client.close)
        self._pool = ProcessLocal(
            lambda: ThreadPoolExecutor(_COPIED_PARTS, "tiercache-store"),
            lambda pool: pool.shutdown(wait=False, cancel_futures=True),
        )

    def __repr__(self) -> str:
        return f"S3StorageClasses({self.url!r})"

    def close(self) -> None:
        self._pool.drop()
        self._client.drop()

    @property
    def _encryption(self) -> dict[str, Any]:
        config = self._options.config
        if "server_side_encryption" not in config:
            return {}
        return {"ServerSideEncryption": config["server_side_encryption"], "SSEKMSKeyId": config.get("sse_kms_key_id")}

    @property
    def _endpoint_and_identity(self) -> tuple[object, ...]:
        """Endpoint and identity: equal for stores between whose buckets the server can copy."""
        config = self._options.config
        names = ("endpoint", "region", "access_key_id", "session_token", "skip_signature")
        return self._options.profile, self._options.credentials, *(config.get(name) for name in names)

    def full_key(self, key: str) -> str:
        return f"{self.prefix}/{check_key(key)}" if self.prefix else check_key(key)

    def call(self, operation: str, key: str, **request: Any) -> Mapping[str, Any]:
        return self._ask(operation, self.url_of(key), Key=self.full_key(key), **request)

    def _ask(self, operation: str, where: str, **request: Any) -> Mapping[str, Any]:
        client = self._client.get()
        # A server-side copy may be silent for long without a failure: the timeout of its own client limits it.
        timeout_s = None if operation in _COPYING else self._options.call.timeout_s
        limit = CallLimit(
            where,
            operation,
            clock=SYSTEM_CLOCK,
            timeout_s=timeout_s,
            endpoint=client.wait_target,
            counters=self.counters,
        )
        return with_retries(lambda: client(operation, where, Bucket=self.bucket, **request), RetryPolicy(), limit)

    def head(self, key: str) -> ObjectInfo:
        """Return the object with class, `restore` (x-amz-restore) and the CRC-32C of the whole. Raises NotFound."""
        return head_to_object_info(key, self.call("head_object", key, ChecksumMode="ENABLED"))

    def checksums(self, key: str) -> Mapping[str, str]:
        """Return the store's checksums over the whole object, and its ETag, by name. Raises NotFound."""
        answer = self.call("head_object", key, ChecksumMode="ENABLED")
        return {**whole_object_checksums(answer), "ETag": str(answer.get("ETag", ""))}

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        folder = check_key(prefix.removesuffix("/")) if prefix else ""
        root = f"{self.prefix}/" if self.prefix else ""
        token = None
        while True:
            page = self._ask(
                "list_objects_v2",
                self.url_of(folder),
                Prefix=root + (f"{folder}/" if folder else ""),
                ContinuationToken=token,
                OptionalObjectAttributes=["RestoreStatus"],
            )
            for entry in page.get("Contents", ()):
                key = entry["Key"].removeprefix(root)
                if is_object(key):
                    yield entry_to_object_info(key, entry)
            token = page.get("NextContinuationToken")
            if not page.get("IsTruncated") or token is None:
                return

    def create(self, key: str, *, storage_class: str | None = None, if_match: str | None = None) -> S3Upload:
        """Start an upload whose parts may come in parallel. storage_class: None for the store's default.

        if_match: Unless the key has an object with this ETag, complete() raises ObjectChanged, on servers that check
        this.
        """
        writing = {**self._encryption, **({"StorageClass": storage_class} if storage_class else {})}
        return S3Upload(self, check_key(key), writing, if_match=if_match)

    def set_class(self, key: str, storage_class: str, *, if_match: str | None = None) -> ObjectInfo:
        """Change the storage class of an object by a copy to itself; bytes, metadata and tags stay.

        Raises NotFound, ObjectChanged (it does not match if_match), or StoreError, with "archived" if it must be
        restored.
        """
        etag = if_match or str(self.head(key).etag)
        return self.copy_from(self, key, key, storage_class=storage_class, if_match=etag, replaces=etag)

    def can_copy_from(self, src: S3StorageClasses) -> bool:
        """Return whether the server can copy from src: both have the same endpoint and the same credentials."""
        return src._endpoint_and_identity == self._endpoint_and_identity

    def copy_from(
        self,
        src: S3StorageClasses,
        src_key: str,
        key: str,
        *,
        storage_class: str | None = None,
        if_match: str | None = None,
        crc32c: int | None = None,
        replaces: bool | str = True,
    ) -> ObjectInfo:
        """Copy on the server, in parts if the object is large. Requires can_copy_from(src). Raises as set_class().

        if_match: ETag of the source. crc32c: Known CRC-32C of the bytes; the server is then asked for one of the copy,
        which the caller compares. replaces: False: raise ObjectChanged if the key exists. An ETag: unless the key has
        this ETag.
        """
        if not self.can_copy_from(src):
            raise ValueError(f"{self.url}: the server cannot copy from {src.url}")
        condition = {} if replaces is True else {"IfMatch": replaces} if replaces else {"IfNoneMatch": "*"}
        head = src.call("head_object", src_key, ChecksumMode="ENABLED")
        etag = if_match or str(head["ETag"])
        source = {"CopySource": {"Bucket": src.bucket, "Key": src.full_key(src_key)}, "CopySourceIfMatch": etag}
        # The server gives the copy the source's kinds of checksums. If the source has none, or the caller knows the
        # CRC-32C, request a CRC-32C.
        sums = whole_object_checksums(head)
        kind = "CRC32C" if crc32c is not None or not sums or "ChecksumCRC32C" in sums else None
        writing = {**encryption(head, self._encryption), "StorageClass": storage_class, "ChecksumAlgorithm": kind}
        if int(head["ContentLength"]) <= self.whole_bytes:
            made_etag = self._copy_whole(key, head, source, writing | condition)
        else:
            writing |= {name: head.get(name) for name in _KEPT} | {"Tagging": src.tags(src_key, head)}
            writing["ChecksumType"] = "FULL_OBJECT" if kind else None
            made_etag = self._copy_parts(key, int(head["ContentLength"]), source, writing, condition)
        made = self.head(key)
        if None not in (made_etag, made.etag) and unquoted_etag(made_etag) != unquoted_etag(made.etag):
            message = "another writer replaced the destination after the copy"
            raise ObjectChanged(message, url=self.url_of(key), expected=made_etag, found=made.etag)
        return made

    def _copy_whole(
        self, key: str, head: Mapping[str, Any], source: dict[str, Any], writing: dict[str, Any]
    ) -> str | None:
        try:
            answer = self.call("copy_object", key, **source, **writing, MetadataDirective="COPY")
        except StoreError as error:
            if error.code != "InvalidRequest":
                raise
            # SeaweedFS refuses a copy to itself that changes only the class, unless the metadata is given again.
            kept = {name: head.get(name) for name in _KEPT}
            answer = self.call("copy_object", key, **source, **writing, **kept, MetadataDirective="REPLACE")
        etag: str | None = answer.get("CopyObjectResult", {}).get("ETag")
        return etag

    def _copy_parts(
        self, key: str, n_bytes: int, source: dict[str, Any], writing: dict[str, Any], condition: dict[str, Any]
    ) -> str | None:
        upload_id = str(self.call("create_multipart_upload", key, **writing)["UploadId"])
        step = max(self.part_bytes, -(-n_bytes // MOST_PARTS))

        def copy_part(start: int) -> dict[str, Any]:
            answer = self.call(
                "upload_part_copy",
                key,
                UploadId=upload_id,
                PartNumber=1 + start // step,
                CopySourceRange=f"bytes={start}-{min(start + step, n_bytes) - 1}",
                **source,
            )["CopyPartResult"]
            sums = {name: answer[name] for name in ("ETag", "ChecksumCRC32C") if name in answer}
            return {"PartNumber": 1 + start // step, **sums}

        futures = [self._pool.get().submit(copy_part, start) for start in range(0, n_bytes, step)]
        try:
            parts = {"Parts": [future.result() for future in futures]}
            join = {"UploadId": upload_id, "MultipartUpload": parts}
            etag: str | None = self.call("complete_multipart_upload", key, **join, **condition).get("ETag")
        except BaseException:
            for future in futures:  # no part may be sent after the upload was aborted
                if not future.cancel():
                    future.exception()
            self.abort(key, upload_id)
            raise
        return etag

    def abort(self, key: str, upload_id: str) -> None:
        """Discard an upload. If this fails, the parts stay until gc or a lifecycle rule of the bucket removes them."""
        with suppress(StoreError):
            self.call("abort_multipart_upload", key, UploadId=upload_id)

    def unfinished_uploads(self) -> Iterator[UnfinishedUpload]:
        """Yield the uploads in parts below the folder that were neither completed nor aborted; running ones too."""
        root = f"{self.prefix}/" if self.prefix else ""
        markers: dict[str, Any] = {}
        while True:
            page = self._ask("list_multipart_uploads", self.url, Prefix=root, **markers)
            for entry in page.get("Uploads", ()):
                key = entry["Key"].removeprefix(root)
                if is_object(key):
                    yield UnfinishedUpload(key, str(entry["UploadId"]), entry["Initiated"].timestamp())
            if not page.get("IsTruncated"):
                return
            markers = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def tags(self, key: str, head: Mapping[str, Any]) -> str | None:
        if not head.get("TagCount"):
            return None
        found = self.call("get_object_tagging", key)["TagSet"]
        return "&".join(f"{quote_plus(tag['Key'])}={quote_plus(tag['Value'])}" for tag in found)

    def restore(self, key: str, *, days: int | None, speed: Speed) -> RestoreState:
        """Request a temporary readable copy of an archived object. days: None for a class that needs no such number.

        Return "started", "running" if a request was active, or "done" if the object can be read. Raises NotFound, or
        StoreError, with "unable" if the store has no restores, so its classes are only labels.
        """
        wanted: dict[str, Any] = {"GlacierJobParameters": {"Tier": speed.capitalize()}}
        if days is not None:
            wanted["Days"] = days
        try:
            answer = self.call("restore_object", key, RestoreRequest=wanted)
        except StoreError as error:
            if error.code == "RestoreAlreadyInProgress":
                return "running"
            if error.details.get("unable"):
                message = (
                    f"restore: this store has no restores (HTTP {error.status}); its storage classes are only labels, "
                    "and its objects can be read without one"
                )
                raise StoreError(message, url=self.url_of(key), status=error.status, unable=True) from None
            if error.details.get("archived"):  # S3's error code for a class that needs no restore
                return "done"
            raise
        return "done" if answer.get("ResponseMetadata", {}).get("HTTPStatusCode") == 200 else "started"

    def delete_many(self, keys: Sequence[str], *, if_match: Sequence[str | None] | None = None) -> DeleteFailures:
        """Delete objects, 1,000 per request. Return those that could not be deleted, each with the reason.

        if_match: ETag that each must have, on servers that check this; None for any.
        """
        failed: DeleteFailures = []
        names = {self.full_key(key): key for key in keys}
        etags = dict(zip(names, if_match or [None] * len(keys), strict=True))
        full = [*names]
        for start in range(0, len(full), _DELETE_KEYS):
            some = full[start : start + _DELETE_KEYS]
            objects = [{"Key": name, **({"ETag": etags[name]} if etags[name] else {})} for name in some]
            wanted = {"Objects": objects, "Quiet": True}
            answer = self._ask("delete_objects", self.url_of(names[some[0]]), Delete=wanted)
            failed += [
                (names[error["Key"]], f"{error.get('Code', '')}: {error.get('Message', '')}")
                for error in answer.get("Errors", ())
                if error.get("Code") != "NoSuchKey"
            ]
        return failed


class S3Upload(Upload):
    """An S3 upload that holds its first part until a second one comes, so that an object of one part takes one request.

    The lock guards the held part, the id and the table of parts; parts are sent outside it, in any order, and none may
    be in flight at complete() or abort(). Afterwards, `crc32c` is that of the whole object. is_confirmed: The server
    returned a matching checksum of each part, so the object need not be read back.
    """

    def __init__(
        self, archive: S3StorageClasses, key: str, writing: dict[str, Any], *, if_match: str | None = None
    ) -> None:
        """Send nothing yet. writing: Arguments of the request that creates the object: storage class, encryption."""
        self._archive, self._key, self._writing, self._if_match = archive, key, writing, if_match
        self._lock = Lock()
        self._held: tuple[int, bytes | bytearray] | None = None
        self._upload_id: str | None = None
        self._is_open = True
        self._parts: dict[int, tuple[dict[str, Any], int, int]] = {}  # number -> its request, CRC-32C and size
        self.crc32c = 0
        self.is_confirmed = True

    def put_part(self, number: int, data: Buffer) -> None:
        """Send the part, or hold a copy of the first one."""
        with self._lock:
            if number < 0 or not self._is_open:
                raise ValueError(
                    f"{self._key}: part {number}: numbers start at 0; add parts before complete() or abort()"
                )
            if self._held is None and self._upload_id is None:
                self._held = number, bytes(data)
                return
            if self._upload_id is None:
                request = {**self._writing, "ChecksumAlgorithm": "CRC32C", "ChecksumType": "FULL_OBJECT"}
                self._upload_id = str(self._archive.call("create_multipart_upload", self._key, **request)["UploadId"])
            held, self._held = self._held, None
        if held is not None:
            self._send(self._upload_id, *held)
        self._send(self._upload_id, number, data)

    def _send(self, upload_id: str, number: int, data: Buffer) -> None:
        crc = crc32c(data)
        body = data if isinstance(data, bytes | bytearray) else bytes(data)
        answer = self._archive.call(
            "upload_part",
            self._key,
            UploadId=upload_id,
            PartNumber=number + 1,
            Body=body,
            ChecksumCRC32C=crc32c_to_text(crc),
        )
        part = {"PartNumber": number + 1, "ETag": str(answer["ETag"]), "ChecksumCRC32C": crc32c_to_text(crc)}
        is_confirmed = _confirms(answer, crc, body)
        with self._lock:
            self._parts[number] = part, crc, len(body)
            self.is_confirmed &= is_confirmed

    def complete(self, *, if_absent: bool = False) -> ObjectInfo | None:
        if not self._stop():
            raise ValueError(f"{self._key}: the upload is already completed or aborted")
        condition = {"IfNoneMatch": "*"} if if_absent else {"IfMatch": self._if_match} if self._if_match else {}
        try:
            return self._put(condition) if self._upload_id is None else self._join(self._upload_id, condition)
        except ObjectChanged:
            self._drop()
            if not if_absent:
                raise
            return None
        except NotFound as error:
            if "IfMatch" not in condition:
                raise
            self._drop()
            message = "the object to be replaced does not exist any more"
            raise ObjectChanged(message, url=self._archive.url_of(self._key), expected=self._if_match) from error

    def _put(self, condition: dict[str, str]) -> ObjectInfo:
        number, data = self._held or (0, b"")
        if number:
            raise ValueError(f"{self._key}: part 0 is missing; parts are numbered 0, 1, 2, ... without gaps")
        self.crc32c = crc32c(data)
        request = {**self._writing, **condition, "Body": data, "ChecksumCRC32C": crc32c_to_text(self.crc32c)}
        answer = self._archive.call("put_object", self._key, **request)
        self.is_confirmed = _confirms(answer, self.crc32c, data)
        return ObjectInfo(self._key, len(data), etag=answer.get("ETag"), version=answer.get("VersionId"))

    def _join(self, upload_id: str, condition: dict[str, str]) -> ObjectInfo:
        missing = [number for number in range(len(self._parts)) if number not in self._parts]
        if missing:
            self._drop()
            raise ValueError(f"{self._key}: part {missing[0]} is missing; parts are numbered 0, 1, 2, ... without gaps")
        parts, total = [], 0
        for number in range(len(self._parts)):
            part, crc, n_bytes = self._parts[number]
            parts.append(part)
            self.crc32c = combine(self.crc32c, crc, n_bytes)
            total += n_bytes
        request = {
            "UploadId": upload_id,
            "MultipartUpload": {"Parts": parts},
            "ChecksumCRC32C": crc32c_to_text(self.crc32c),
            "ChecksumType": "FULL_OBJECT",
            "MpuObjectSize": total,
        }
        try:
            answer = self._archive.call("complete_multipart_upload", self._key, **request, **condition)
        except NotFound:
            # A retry after a lost answer: S3 does not know the upload any more, and the object may exist.
            info = self._archive.head(self._key)
            if "IfNoneMatch" in condition or info.n_bytes != total or info.crc32c != self.crc32c:
                raise
            return info
        return ObjectInfo(self._key, total, etag=answer.get("ETag"), version=answer.get("VersionId"))

    def abort(self) -> None:
        if self._stop():
            self._drop()

    def _stop(self) -> bool:
        with self._lock:
            was_open, self._is_open = self._is_open, False
            return was_open

    def _drop(self) -> None:
        self._held = None
        if self._upload_id is not None:
            self._archive.abort(self._key, self._upload_id)


def _confirms(answer: Mapping[str, Any], crc: int, data: bytes | bytearray) -> bool:
    """Return whether the server's answer contains a matching checksum of the bytes: CRC-32C, or MD5 as an ETag."""
    if (named := answer.get("ChecksumCRC32C")) is not None:
        return crc32c_from_text(str(named)) == crc
    # S3's ETag of an object written by one request without KMS keys.
    return unquoted_etag(answer.get("ETag")) == hashlib.md5(data, usedforsecurity=False).hexdigest()
