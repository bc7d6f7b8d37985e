"""Conversion of S3's answers about objects, as boto3 returns them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tiercache.model import ObjectInfo
from tiercache.store.posix import TEMP_PREFIX
from tiercache.store.sums import crc32c_from_text, whole_object_checksums


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
