"""An S3 upload in parts from any thread, each with a CRC-32C that the server verifies."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from threading import Condition
from typing import Any, Protocol

from tiercache._native.checksum import combine, crc32c
from tiercache.errors import NotFound, ObjectChanged, StoreError
from tiercache.model import ObjectInfo
from tiercache.store.contract import Buffer, Upload
from tiercache.store.parts import parts_in_order
from tiercache.store.sums import crc32c_from_text, crc32c_to_text


class S3Requests(Protocol):
    """S3 requests of an upload, retried and with tiercache's errors."""

    def call(self, operation: str, key: str, **request: Any) -> Any:
        """Send one request about an object."""

    def url_of(self, key: str) -> str:
        """Return the URL of the object, for messages."""

    def head(self, key: str) -> ObjectInfo:
        """Return the description of the object."""


@dataclass(frozen=True, slots=True)
class _Part:
    etag: str
    crc32c: int
    n_bytes: int
    is_confirmed: bool


class S3Upload(Upload):
    """An S3 upload that holds its first part until a second one comes, so that an object of one part takes one request.

    The lock guards the table of parts and the start of the multipart upload; parts are sent outside it. After
    complete(), `crc32c` is the checksum of the whole object, and `is_confirmed` says whether the server returned a
    matching checksum of each part. If it did, the object need not be read back.
    """

    def __init__(self, target: S3Requests, key: str, writing: dict[str, Any], *, if_match: str | None = None) -> None:
        """Send nothing yet.

        Args:
            target: Bucket folder to which the object is written.
            key: Key of the object.
            writing: Arguments of the request that creates the object: storage class, encryption.
            if_match: ETag of the object that the upload replaces; None for any object, or none.
        """
        self._target, self._key, self._writing, self._if_match = target, key, writing, if_match
        self._changed = Condition()
        self._held: tuple[int, bytes | bytearray] | None = None
        self._upload_id: str | None = None
        self._is_beginning = False
        self._is_open = True
        self._n_sending = 0
        self._parts: dict[int, _Part] = {}
        self.crc32c = 0
        self.is_confirmed = False

    def put_part(self, number: int, data: Buffer) -> None:
        """Send the part, or hold a copy of the first one."""
        with self._changed:
            if number < 0 or not self._is_open:
                raise ValueError(
                    f"{self._key}: part {number}: numbers start at 0, and parts must come before complete() or abort()"
                )
            if self._held is None and self._upload_id is None and not self._is_beginning:
                self._held = number, bytes(data)
                return
            self._n_sending += 1
        try:
            upload_id = self._begun()
            self._send(upload_id, number, data)
        finally:
            with self._changed:
                self._n_sending -= 1
                self._changed.notify_all()

    def _begun(self) -> str:
        """Return the id of the multipart upload.

        The first caller starts it and sends the held part; others wait for the id.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._is_beginning)
            if self._upload_id is not None:
                return self._upload_id
            self._is_beginning = True
        upload_id = None
        try:
            asked = {**self._writing, "ChecksumAlgorithm": "CRC32C", "ChecksumType": "FULL_OBJECT"}
            upload_id = str(self._target.call("create_multipart_upload", self._key, **asked)["UploadId"])
        finally:
            with self._changed:
                self._upload_id, self._is_beginning = upload_id, False
                held, self._held = (self._held, None) if upload_id is not None else (None, self._held)
                self._changed.notify_all()
        if held is not None:
            self._send(upload_id, *held)
        return upload_id

    def _send(self, upload_id: str, number: int, data: Buffer) -> None:
        crc = crc32c(data)
        body = data if isinstance(data, bytes | bytearray) else bytes(data)
        said = self._target.call(
            "upload_part",
            self._key,
            UploadId=upload_id,
            PartNumber=number + 1,
            Body=body,
            ChecksumCRC32C=crc32c_to_text(crc),
        )
        is_confirmed = _confirms(said, crc, body)
        with self._changed:
            self._parts[number] = _Part(str(said["ETag"]), crc, len(body), is_confirmed)

    def complete(self, *, if_absent: bool = False) -> ObjectInfo | None:
        """Publish the object. One part takes one request."""
        if not self._stop():
            raise ValueError(f"{self._key}: the upload is already completed or aborted")
        condition = {"IfNoneMatch": "*"} if if_absent else {"IfMatch": self._if_match} if self._if_match else {}
        try:
            return self._published(condition)
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
            raise ObjectChanged(message, url=self._target.url_of(self._key), expected=self._if_match) from error

    def _published(self, condition: dict[str, str]) -> ObjectInfo:
        return self._put(condition) if self._upload_id is None else self._join(self._upload_id, condition)

    def _put(self, condition: dict[str, str]) -> ObjectInfo:
        number, data = self._held or (0, b"")
        if number:
            raise ValueError(f"{self._key}: part 0 is missing; parts are numbered 0, 1, 2, ... without gaps")
        self.crc32c = crc32c(data)
        asked = {**self._writing, **condition, "Body": data, "ChecksumCRC32C": crc32c_to_text(self.crc32c)}
        said = self._target.call("put_object", self._key, **asked)
        self.is_confirmed = _confirms(said, self.crc32c, data)
        return ObjectInfo(self._key, len(data), etag=said.get("ETag"), version=said.get("VersionId"))

    def _join(self, upload_id: str, condition: dict[str, str]) -> ObjectInfo:
        try:
            parts = parts_in_order(self._parts, self._key)
        except ValueError:
            self._drop()
            raise
        total, self.is_confirmed = 0, all(part.is_confirmed for part in parts)
        for part in parts:
            self.crc32c = combine(self.crc32c, part.crc32c, part.n_bytes)
            total += part.n_bytes
        named = [
            {"PartNumber": number, "ETag": part.etag, "ChecksumCRC32C": crc32c_to_text(part.crc32c)}
            for number, part in enumerate(parts, start=1)
        ]
        asked = {"ChecksumCRC32C": crc32c_to_text(self.crc32c), "ChecksumType": "FULL_OBJECT", "MpuObjectSize": total}
        try:
            said = self._target.call(
                "complete_multipart_upload",
                self._key,
                UploadId=upload_id,
                MultipartUpload={"Parts": named},
                **asked,
                **condition,
            )
        except NotFound:
            # A retry after a lost answer: S3 does not know the upload any more, and the object may exist.
            info = self._target.head(self._key)
            if "IfNoneMatch" in condition or info.n_bytes != total or info.crc32c != self.crc32c:
                raise
            return info
        return ObjectInfo(self._key, total, etag=said.get("ETag"), version=said.get("VersionId"))

    def abort(self) -> None:
        """Discard the parts sent."""
        if self._stop():
            self._drop()

    def _stop(self) -> bool:
        with self._changed:
            was_open, self._is_open = self._is_open, False
            self._changed.wait_for(lambda: not self._n_sending)
            return was_open

    def _drop(self) -> None:
        self._held = None
        if self._upload_id is not None:
            with suppress(StoreError):  # the parts then stay until a lifecycle rule of the bucket removes them
                self._target.call("abort_multipart_upload", self._key, UploadId=self._upload_id)


def _confirms(said: Mapping[str, Any], crc: int, data: bytes | bytearray) -> bool:
    """Return whether the server's answer contains a matching checksum of the bytes: CRC-32C, or MD5 as an ETag."""
    if (named := said.get("ChecksumCRC32C")) is not None:
        return crc32c_from_text(str(named)) == crc
    return str(said.get("ETag", "")).strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest()
