"""S3 through boto3, for requests that obstore does not offer: client, answers, checksums, verified uploads."""

from __future__ import annotations

import base64
import binascii
import importlib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import replace
from threading import Lock
from typing import Any

from tiercache.distribution import install_command
from tiercache.errors import NotFound, ObjectChanged, StoreError
from tiercache.model import ObjectInfo
from tiercache.stats import Counters
from tiercache.store.credentials import Keys, refused_error, s3_access, wait_target
from tiercache.store.options import CloudOptions, server_url
from tiercache.store.posix import TEMP_PREFIX
from tiercache.store.range_reads import ProcessLocal
from tiercache.store.remote import RETRYABLE_STATUSES

# Type of a checksum over part checksums. It cannot compare copies that have other part sizes.
_OF_PARTS = "COMPOSITE"
_NAME = "Checksum"


def crc32c_to_text(crc: int) -> str:
    """Return the CRC-32C in S3's text form."""
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


def crc32c_from_text(text: str | None) -> int | None:
    """Return the CRC-32C of S3's text form, or None if the text is invalid."""
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
    """Return an ETag without quotes, which some servers omit in some answers."""
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
    """Convert the answer to a HEAD to an ObjectInfo."""
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
_TRY_AGAIN_CODES = ("OperationAborted", "ConditionalRequestConflict", "RequestTimeout", "SlowDown")
_ARCHIVED_CODES = ("InvalidObjectState", "ObjectNotInActiveTierError")
_UNABLE = (405, 501)
# Options that s3fs does not support and S3Calls does.
_ENCRYPTION = ("server_side_encryption", "sse_kms_key_id", "sse_bucket_key_enabled")


# Sessions by process. A session takes 100 ms to read botocore's tables and then creates a client in 3 ms. A session is
# not thread-safe, hence the lock; a forked child has its own session.
_sessions: dict[int, tuple[Any, Lock]] = {}


def has_boto3() -> bool:
    """Return whether boto3 is installed."""
    return importlib.util.find_spec("boto3") is not None


class Boto3Client:
    """boto3's client of one endpoint. A call is one request, not retried, and raises StoreError.

    Safe for threads; each process creates its client at first use. The client counts "requests" in counters.
    """

    def __init__(self, options: CloudOptions, url: str, counters: Counters) -> None:
        """Open nothing yet. Raises ValueError if boto3 is missing, or does not support the options."""
        if not has_boto3():
            raise ValueError(
                f"{url}: storage classes, restores and batch deletes need boto3: {install_command('archive')}"
            )
        if unknown := [name for name in options.unknown_to_s3fs if name not in _ENCRYPTION]:
            raise ValueError(f"{url}: storage classes need boto3, for which {', '.join(unknown)} cannot be set")
        self.url, self.counters = url, counters
        self._options = options
        self._clients = ProcessLocal(lambda: _Clients(options, url), lambda clients: clients.close())

    def __reduce__(self) -> tuple[type[Boto3Client], tuple[CloudOptions, str, Counters]]:
        return Boto3Client, (self._options, self.url, self.counters)

    @property
    def write_arguments(self) -> dict[str, Any]:
        """Request arguments that set the encryption of a written object."""
        config = self._options.config
        kind = config.get("server_side_encryption")
        if kind is None:
            return {}
        more = {"SSEKMSKeyId": config["sse_kms_key_id"]} if "sse_kms_key_id" in config else {}
        return {"ServerSideEncryption": kind, **more}

    @property
    def endpoint_and_identity(self) -> tuple[object, ...]:
        """Endpoint and identity: equal for clients between whose buckets the server can copy."""
        config = self._options.config
        names = ("endpoint", "region", "access_key_id", "session_token", "skip_signature", "role_arn")
        return self._options.profile, self._options.credentials, *(config.get(name) for name in names)

    def __call__(self, operation: str, where: str, **request: Any) -> Mapping[str, Any]:
        """Send one request and return its answer. Arguments that are None are omitted. where: URL, for messages.

        The error has .status and .retryable; .archived is True if the object must be restored first, and .unable is
        True if the server does not support the request.
        """
        exceptions = importlib.import_module("botocore.exceptions")
        given = {name: value for name, value in request.items() if value is not None}
        if "RequestPayer" not in given and self._options.config.get("request_payer"):
            given["RequestPayer"] = "requester"
        clients = self._clients.get()
        client, number = clients.get(operation)
        endpoint = clients.endpoint
        self.counters.add("requests")
        try:
            answer: Mapping[str, Any] = getattr(client, operation)(**given)
        except exceptions.ClientError as error:
            response = error.response
            if operation == "head_object":
                response = _reason(client, given, response, exceptions.ClientError)
            raise refused_error(_refused(response, operation, where), clients.credentials, number) from None
        except (exceptions.EndpointConnectionError, exceptions.ConnectTimeoutError):
            message = f"{operation}: cannot connect to {endpoint}"
            raise StoreError(message, url=where, retryable=True, sent=False) from None
        except exceptions.BotoCoreError as error:
            # From None: botocore's text may contain a signed URL.
            lost = isinstance(error, (exceptions.HTTPClientError, exceptions.ConnectionError))
            text = f"{operation}: {type(error).__name__}{f' ({endpoint})' if lost else ''}"
            raise StoreError(text, url=where, retryable=lost) from None
        return answer

    def wait_target(self) -> str:
        """Return what a request waits for now, for messages."""
        clients = self._clients.get()
        return wait_target(clients.endpoint, clients.credentials)

    @property
    def timeout_s(self) -> float:
        """Seconds without an answer after which a call fails, retries included."""
        return self._options.timeout_s

    def supports(self, operation: str, *names: str) -> bool:
        """Return whether the installed boto3 supports these arguments of an operation (such as "CopyObject")."""
        shape = self._clients.get().get("head_object")[0].meta.service_model.operation_model(operation).input_shape
        return set(names) <= set(shape.members)

    def close(self) -> None:
        """Close this process's connections."""
        self._clients.drop()


def takes_long(operation: str) -> bool:
    """Return whether the server may be silent for minutes while it executes the operation."""
    return operation in _COPYING


class _Clients:
    """This process's clients of one endpoint, created again when the keys change. Safe for threads."""

    def __init__(self, options: CloudOptions, url: str) -> None:
        config, self.credentials = s3_access(options, url)
        self._options, self.endpoint = replace(options, config=config), server_url("s3", "", config)
        self._lock = Lock()
        self._made: dict[bool, tuple[Keys | None, Any]] = {}
        self._old: list[Any] = []  # other threads may still use them

    def get(self, operation: str) -> tuple[Any, int]:
        """Return the client for an operation, and the number of its keys."""
        keys = None if self.credentials is None else self.credentials.get()
        number = 0 if self.credentials is None else self.credentials.number
        is_long = takes_long(operation)
        with self._lock:
            made = self._made.get(is_long)
            if made is None or made[0] != keys:
                if made is not None:
                    self._old.append(made[1])
                made = self._made[is_long] = keys, _client(self._options, keys, is_long=is_long)
            return made[1], number

    def close(self) -> None:
        """Close the connections."""
        with self._lock:
            for client in (*self._old, *(client for _, client in self._made.values())):
                client.close()
            self._made.clear()
            self._old.clear()


def _client(options: CloudOptions, keys: Keys | None, *, is_long: bool) -> Any:
    boto3 = importlib.import_module("boto3")
    config_of, unsigned = importlib.import_module("botocore.config").Config, importlib.import_module("botocore")
    named = options.for_s3fs()
    settings = named["config_kwargs"]
    if is_long:
        settings["read_timeout"] = max(settings["read_timeout"], _COPYING_S)
    settings.setdefault("s3", {"addressing_style": "path" if "endpoint_url" in named else "auto"})
    if named["anon"]:
        settings["signature_version"] = unsigned.UNSIGNED
    # tiercache sends its own checksums. Many servers do not support the checksums that botocore adds by default.
    config = config_of(
        max_pool_connections=_CONNECTIONS,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        **settings,
    )
    pid = os.getpid()
    if pid not in _sessions:
        _sessions.setdefault(pid, (boto3.Session(), Lock()))
    session, lock = _sessions[pid]
    with lock:
        return session.client(
            "s3",
            endpoint_url=named.get("endpoint_url"),
            aws_access_key_id=named.get("key") if keys is None else keys.access_key_id,
            aws_secret_access_key=named.get("secret") if keys is None else keys.secret_access_key,
            aws_session_token=named.get("token") if keys is None else keys.token,
            config=config,
            **named["client_kwargs"],
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
    """Convert an error answer to a StoreError."""
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
